"""What schedulers set on each node; `docker/entrypoint` names the sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Variables = dict[str, str]


def _train_job(rank: int, addresses: Sequence[str]) -> Variables:
    return {
        "PET_NNODES": str(len(addresses)),
        "PET_NPROC_PER_NODE": "8",
        "PET_NODE_RANK": str(rank),
        "PET_MASTER_ADDR": addresses[0],
        "PET_MASTER_PORT": "29400",
        "JOB_COMPLETION_INDEX": str(rank),
    }


def _pytorch_job_with_processes(rank: int, addresses: Sequence[str]) -> Variables:
    return {
        "PET_NNODES": str(len(addresses)),
        "RANK": str(rank),
        "WORLD_SIZE": str(8 * len(addresses)),
        "MASTER_ADDR": addresses[0],
        "MASTER_PORT": "29400",
    }


def _pytorch_job(rank: int, addresses: Sequence[str]) -> Variables:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(addresses)),
        "MASTER_ADDR": addresses[0],
        "MASTER_PORT": "29400",
    }


def _skypilot(rank: int, addresses: Sequence[str]) -> Variables:
    return {
        "SKYPILOT_NUM_NODES": str(len(addresses)),
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NODE_IPS": "\n".join(addresses),
    }


def _dstack(rank: int, addresses: Sequence[str]) -> Variables:
    return {
        "DSTACK_NODES_NUM": str(len(addresses)),
        "DSTACK_NODE_RANK": str(rank),
        "DSTACK_MASTER_NODE_IP": addresses[0],
    }


def _open_mpi(rank: int, addresses: Sequence[str]) -> Variables:
    return {
        "OMPI_COMM_WORLD_SIZE": str(len(addresses)),
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "MASTER_ADDR": addresses[0],
    }


def _indexed_job(rank: int, addresses: Sequence[str]) -> Variables:
    return {"JOB_COMPLETION_INDEX": str(rank), "NUM_NODES": str(len(addresses)), "MASTER_ADDR": addresses[0]}


# Variables of a node by its rank and the addresses of all nodes, with one process per node.
SCHEDULERS: dict[str, Callable[[int, Sequence[str]], Variables]] = {
    "TrainJob": _train_job,
    "PyTorchJob with nprocPerNode": _pytorch_job_with_processes,
    "PyTorchJob": _pytorch_job,
    "SkyPilot": _skypilot,
    "dstack": _dstack,
    "Open MPI": _open_mpi,
    "Indexed Job": _indexed_job,
}

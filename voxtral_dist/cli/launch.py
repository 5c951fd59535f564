"""`voxtral-dist launch`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from voxtral_dist.cli.arguments import (
    Commands,
    add_run_config,
    count,
    examples,
    node_range,
    positive,
    positive_number,
)
from voxtral_dist.config import RunConfig, load_config
from voxtral_dist.config.builtin import recipe_or_file
from voxtral_dist.errors import UserError
from voxtral_dist.output.console import say
from voxtral_dist.output.counting import counted

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

_DOCUMENTED = "docs/deploy.md says what to expect of it."


def add_launch(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "launch",
        help="print what starts a run on many machines: Kubernetes manifests, a batch script, and their like",
        description="Print what starts a run on many machines. Nothing is started.",
        epilog=examples(
            "voxtral-dist launch local --config run.yaml --gpus 8 > run.sh",
            "voxtral-dist launch slurm --config run.yaml --nodes 4 --gpus 8 > run.sbatch",
        ),
    )
    targets = parser.add_subparsers(required=True, metavar="TARGET", dest="target")
    _add_kubernetes(targets)
    _add_claims(targets)
    _add_slurm(targets)
    _add_skypilot(targets)
    _add_hostfile(targets)
    _add_local(targets)


def _add_run(parser: argparse.ArgumentParser) -> None:
    add_run_config(parser, "run_dir=/runs/first")
    parser.add_argument("--name", default="voxtral", help="name of the job (default: %(default)s)")
    parser.add_argument(
        "--nodes",
        type=node_range,
        required=True,
        metavar="N",
        help="nodes of the run; MIN:MAX, such as 2:4, where it may have fewer (kubernetes --kind indexed-job, slurm)",
    )
    parser.add_argument("--gpus", type=positive, required=True, metavar="N", help="GPUs of a node, each with a rank")


def _add_save_seconds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--save-seconds",
        type=positive_number,
        metavar="SECONDS",
        help="time of a save, which decides how long a stopped run may take (default: as measured in the metrics.jsonl "
        "of the run, if it can be read here; else that of its checkpoint at 1 GB/s)",
    )


def _grace_seconds(parsed: argparse.Namespace, config: RunConfig) -> int:
    from voxtral_dist.launching.run_facts import grace_seconds, save_seconds

    seconds = parsed.save_seconds
    if seconds is None:
        seconds, source = save_seconds(config)
        say(f"A save takes {seconds:.0f} s ({source}).", to_errors=True)
    return grace_seconds(seconds, uploads=config.checkpoint.upload is not None)


def _given(parsed: argparse.Namespace, settings: type[BaseModel]) -> dict[str, Any]:
    """The options that were given, by the fields of their settings."""
    return {name: value for name in settings.model_fields if (value := getattr(parsed, name, None)) is not None}


def _nodes(parsed: argparse.Namespace) -> dict[str, int | None]:
    """The numbers of nodes, by the fields of settings."""
    least, most = parsed.nodes
    return {"nodes": most} | ({} if least == most else {"min_nodes": least})


def _sentence(error: ValidationError) -> str:
    """What is wrong with an option, in the words of a `UserError`."""
    parts = []
    for detail in error.errors():
        option = "--" + str(detail["loc"][0]).replace("_", "-") if detail["loc"] else ""
        message = detail["msg"].removeprefix("Value error, ")
        parts.append(f"`{option}` {message}, but is {detail['input']!r} instead" if option else message)
    return "; ".join(parts) + "."


def _add_kubernetes(targets: Commands[argparse.ArgumentParser]) -> None:
    from voxtral_dist.launching.kubernetes.settings import Kind, KubernetesSettings, Network

    parser = targets.add_parser(
        "kubernetes",
        help="manifests of a JobSet, TrainJob, PyTorchJob or Indexed Job",
        description=f"Print manifests for `kubectl apply --filename -`. {_DOCUMENTED}",
        epilog=examples("voxtral-dist launch kubernetes --config run.yaml --nodes 4 --gpus 8 --image IMAGE > job.yaml"),
    )
    _add_run(parser)
    _add_save_seconds(parser)
    parser.add_argument(
        "--image", required=True, help="image of docker/Dockerfile in a registry that the cluster reads"
    )
    parser.add_argument(
        "--kind", choices=get_args(Kind), default="jobset", help="what runs the pods (default: %(default)s)"
    )
    parser.add_argument(
        "--network",
        choices=get_args(Network),
        default="tcp",
        help="between nodes: rdma (InfiniBand, RoCE) and efa (AWS) ask for devices and IPC_LOCK (default: %(default)s)",
    )
    defaults = {name: field.default for name, field in KubernetesSettings.model_fields.items()}
    for option, metavar, meaning in (
        ("--namespace", "NAME", "namespace of all objects (default: that of kubectl)"),
        ("--rdma-resource", "NAME", "with --network rdma: resource of the cluster's device plugin"),
        ("--rdma-devices", "N", "RDMA or EFA devices of a pod (default: 1, or 32 with --network efa)"),
        ("--socket-interface", "NAME", "network interface over which ranks meet"),
        ("--cpus", "N", "CPU cores of a pod"),
        ("--memory", "SIZE", "memory of a pod, shared memory included"),
        ("--shared-memory", "SIZE", "size of /dev/shm"),
        ("--ephemeral-storage", "SIZE", "limit of what a pod writes to its node's disk (default: none)"),
        ("--hub-size", "SIZE", "size of the folder for downloaded weights"),
        ("--config-map", "NAME", "existing ConfigMap with the key config.yaml (default: one is made of --config)"),
        ("--data-claim", "NAME", "claim with the shards, mounted at /data, if they are no URLs (default: NAME-data)"),
        ("--runs-claim", "NAME", "claim of the runs, mounted at /runs (default: NAME-runs)"),
        ("--service-account", "NAME", "service account of the pods, for object storage by workload identity"),
        ("--secret", "NAME", "secret whose keys become variables, such as AWS_ACCESS_KEY_ID"),
        ("--node-cache", "PATH", "folder of the nodes' own disks for storage.cache_dir (default: lives with its pod)"),
        ("--priority-class", "NAME", "priority class of the pods"),
        ("--queue", "NAME", "local queue of Kueue, which admits all pods together"),
        ("--topology", "LABEL", "label of nodes that names their rack or block: all pods prefer the same one"),
        ("--ttl-seconds", "N", "delete the finished job after this time (default: never)"),
        ("--deadline-seconds", "N", "end the job after this time; of a JobSet, each attempt (default: none)"),
        ("--max-restarts", "N", "failures that are followed by a restart, not counting exit code 75"),
        ("--user", "N", "user and group of the container; 0 where the nodes limit locked memory of others"),
    ):
        default = defaults[option[2:].replace("-", "_")]
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(option, metavar=metavar, help=meaning + shown)
    parser.add_argument(
        "--topology-required", action="store_true", help="start only where all pods are in one domain of --topology"
    )
    parser.set_defaults(run=_kubernetes)


def _kubernetes(parsed: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from voxtral_dist.launching.kubernetes.manifests import manifests, text_of
    from voxtral_dist.launching.kubernetes.settings import KubernetesSettings
    from voxtral_dist.launching.run_facts import RunFacts, own_deepspeed_file

    config = load_config(parsed.config, parsed.set)
    given = _given(parsed, KubernetesSettings) | _nodes(parsed)
    # A mistake in an option is said before the model is sized.
    try:
        KubernetesSettings.model_validate(given | {"grace_seconds": 1})
        settings = KubernetesSettings.model_validate(given | {"grace_seconds": _grace_seconds(parsed, config)})
    except ValidationError as error:
        raise UserError(_sentence(error)) from error
    files = {"config.yaml": recipe_or_file(parsed.config).read_text(encoding="utf-8")}
    overrides = list(parsed.set)
    own = own_deepspeed_file(config)
    if own is not None and settings.config_map is None:
        files["deepspeed.json"] = _read(own)
        overrides.append("engine.deepspeed=/config/deepspeed.json")
    objects = manifests(settings, RunFacts.of(config), files, tuple(overrides))
    say(text_of(objects, _heading(parsed)), end="")
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"`engine.deepspeed`: {path} cannot be read: {error.strerror}.") from error


def _add_slurm(targets: Commands[argparse.ArgumentParser]) -> None:
    from voxtral_dist.launching.slurm import Container

    parser = targets.add_parser(
        "slurm",
        help="batch script for sbatch",
        description=f"Print a script for `sbatch`, to be started where all nodes have the same files. {_DOCUMENTED}",
        epilog=examples("voxtral-dist launch slurm --config run.yaml --nodes 4 --gpus 8 --venv .venv > run.sbatch"),
    )
    _add_run(parser)
    _add_save_seconds(parser)
    for option, metavar, meaning in (
        ("--partition", "NAME", "partition (default: the cluster's)"),
        ("--account", "NAME", "account that pays"),
        ("--qos", "NAME", "quality of service"),
        ("--time", "TIME", "limit of one attempt, such as 24:00:00: before it the run saves and queues itself again"),
        ("--cpus", "N", "CPU cores of a node (default: the cluster's)"),
        ("--socket-interface", "NAME", "network interface over which ranks meet (default: NCCL's choice)"),
        ("--folder", "PATH", "checkout of this repository, the working directory of the run (default: .)"),
        ("--venv", "PATH", "virtual environment that has the package (default: what the job's environment has)"),
        ("--image", "IMAGE", "with --container: image, or file of one, of docker/Dockerfile"),
        ("--max-restarts", "N", "failures that are followed by a restart, not counting exit code 75 (default: 20)"),
    ):
        parser.add_argument(option, metavar=metavar, help=meaning)
    parser.add_argument("--container", choices=get_args(Container), help="runtime of a container, instead of --venv")
    parser.add_argument(
        "--mounts",
        nargs="+",
        metavar="FOLDER[:FOLDER]",
        help="with --container: folders that it sees, as /lustre/runs:/runs",
    )
    parser.set_defaults(run=_slurm)


def _slurm(parsed: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from voxtral_dist.launching.slurm import SlurmSettings, batch_script

    config = load_config(parsed.config, parsed.set)
    given = _given(parsed, SlurmSettings) | _nodes(parsed)
    given |= {"config": str(parsed.config), "overrides": tuple(parsed.set)}
    if parsed.container is not None and parsed.config.exists():
        folder = parsed.config.resolve().parent
        given |= {"config": f"/config/{parsed.config.name}", "mounts": (*(parsed.mounts or ()), f"{folder}:/config")}
    try:
        SlurmSettings.model_validate(given | {"grace_seconds": 1})
        settings = SlurmSettings.model_validate(given | {"grace_seconds": _grace_seconds(parsed, config)})
    except ValidationError as error:
        raise UserError(_sentence(error)) from error
    say(batch_script(settings), end="")
    return 0


def _add_skypilot(targets: Commands[argparse.ArgumentParser]) -> None:
    parser = targets.add_parser(
        "skypilot",
        help="task for sky jobs launch",
        description=f"Print a task for `sky jobs launch`. {_DOCUMENTED}",
        epilog=examples("voxtral-dist launch skypilot --config run.yaml --nodes 2 --gpus 8 --gpu H100 > run.yaml"),
    )
    _add_run(parser)
    for option, metavar, meaning in (
        ("--gpu", "NAME", "GPU by SkyPilot's name, such as H100"),
        ("--infra", "NAME", "cloud, region or cluster, such as aws/us-east-1 (default: the cheapest)"),
        ("--disk-size", "GB", "disk of a node (default: 512)"),
        ("--volume", "NAME", "volume of SkyPilot that all nodes share, mounted at /runs"),
        ("--image", "IMAGE", "image of docker/Dockerfile (default: this checkout, installed by pip)"),
        ("--max-restarts", "N", "failures that are followed by a restart, not counting exit code 75 (default: 20)"),
    ):
        parser.add_argument(option, metavar=metavar, required=option == "--gpu", help=meaning)
    parser.add_argument("--spot", action="store_true", help="take spot instances")
    parser.set_defaults(run=_skypilot)


def _skypilot(parsed: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from voxtral_dist.launching.skypilot import SkySettings, sky_task

    load_config(parsed.config, parsed.set)
    least, most = parsed.nodes
    if least != most:
        raise UserError(f"`--nodes` must be one number with skypilot, which starts no fewer, but is {least}:{most}.")
    given = (
        _given(parsed, SkySettings) | {"nodes": most} | {"config": str(parsed.config), "overrides": tuple(parsed.set)}
    )
    given["is_file"] = parsed.config.exists()
    try:
        settings = SkySettings.model_validate(given)
    except ValidationError as error:
        raise UserError(_sentence(error)) from error
    say(sky_task(settings), end="")
    return 0


def _add_hostfile(targets: Commands[argparse.ArgumentParser]) -> None:
    parser = targets.add_parser(
        "hostfile",
        help="hosts of deepspeed --hostfile",
        description="Print a file of hosts for `deepspeed --hostfile`, with the command that starts the run from its "
        "first host by ssh.",
        epilog=examples("voxtral-dist launch hostfile --config run.yaml --hosts alpha beta --gpus 8 > hosts"),
    )
    add_run_config(parser, "run_dir=/shared/runs/first")
    parser.add_argument(
        "--hosts", nargs="+", required=True, metavar="HOST", help="names of the hosts, the first one's is rank 0"
    )
    parser.add_argument("--gpus", type=positive, required=True, metavar="N", help="GPUs of a host, each with a rank")
    parser.set_defaults(run=_hostfile)


def _hostfile(parsed: argparse.Namespace) -> int:
    from voxtral_dist.launching.hosts import hostfile

    load_config(parsed.config, parsed.set)
    say(hostfile(parsed.hosts, parsed.gpus, str(parsed.config), parsed.set), end="")
    return 0


def _add_local(targets: Commands[argparse.ArgumentParser]) -> None:
    parser = targets.add_parser(
        "local",
        help="script that runs on this machine and resumes",
        description="Print a script that runs on this machine, and starts the run again after exit codes on which it "
        "resumes.",
        epilog=examples("voxtral-dist launch local --config run.yaml --gpus 8 > run.sh"),
    )
    add_run_config(parser, "run_dir=runs/first")
    parser.add_argument("--gpus", type=positive, required=True, metavar="N", help="GPUs, each with a rank")
    parser.add_argument("--folder", default=".", metavar="PATH", help="checkout of this repository (default: .)")
    parser.add_argument(
        "--max-restarts",
        type=count,
        default=20,
        metavar="N",
        help="failures that are followed by a restart (default: 20)",
    )
    parser.set_defaults(run=_local)


def _local(parsed: argparse.Namespace) -> int:
    from voxtral_dist.launching.hosts import local_script

    load_config(parsed.config, parsed.set)
    say(local_script(parsed.gpus, parsed.folder, str(parsed.config), parsed.set, parsed.max_restarts), end="")
    return 0


def _add_claims(targets: Commands[argparse.ArgumentParser]) -> None:
    parser = targets.add_parser(
        "claims",
        help="claims of the volumes that `launch kubernetes` mounts",
        description="Print claims of volumes that all nodes mount at once, for `kubectl apply --filename -`. The "
        "storage class must offer ReadWriteMany: NFS, Lustre, CephFS or a cloud's file store; block volumes don't.",
        epilog=examples("voxtral-dist launch claims --runs-size 2Ti --storage-class shared > claims.yaml"),
    )
    for option, metavar, meaning in (
        ("--name", "NAME", "prefix of the claims' names (default: voxtral)"),
        ("--namespace", "NAME", "namespace of the claims (default: that of kubectl)"),
        ("--data-size", "SIZE", "size of NAME-data, for shards that are no URLs (default: no such claim)"),
        ("--runs-size", "SIZE", "size of NAME-runs: several checkpoints of each run (default: 1Ti)"),
        ("--storage-class", "NAME", "storage class (default: the cluster's)"),
    ):
        parser.add_argument(option, metavar=metavar, help=meaning)
    parser.set_defaults(run=_claims)


def _claims(parsed: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from voxtral_dist.launching.kubernetes.manifests import claims, text_of
    from voxtral_dist.launching.kubernetes.settings import ClaimSettings

    given = _given(parsed, ClaimSettings)
    try:
        settings = ClaimSettings.model_validate(given)
    except ValidationError as error:
        raise UserError(_sentence(error)) from error
    say(
        text_of(claims(settings), "Volumes that all nodes mount at once, written by `voxtral-dist launch claims`."),
        end="",
    )
    return 0


def _heading(parsed: argparse.Namespace) -> str:
    needs = {
        "jobset": "Needs JobSet 0.10 or newer (jobset.sigs.k8s.io) in the cluster.",
        "trainjob": "Needs Kubeflow Trainer 2.3 or newer in the cluster.",
        "pytorchjob": "Needs Kubeflow Training Operator 1.9 in the cluster.",
        "indexed-job": "Needs Kubernetes 1.31 or newer.",
    }[parsed.kind]
    least, most = parsed.nodes
    nodes = counted(most, "node") if least == most else f"{least} to {counted(most, 'node')}"
    return (
        f"A run on {nodes} of {counted(parsed.gpus, 'GPU')}, written by `voxtral-dist launch kubernetes`.\n"
        f"{needs} Rerun that command to change it."
    )

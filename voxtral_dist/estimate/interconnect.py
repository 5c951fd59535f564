"""Time of collectives of NCCL over the links of a node and the network between nodes.

A rank that sends b bytes of a collective, in c calls over n ranks on N nodes, takes (alpha-beta model; NVIDIA/nccl,
`src/graph/tuning.cc:ncclTopoTuneModel`, whose constants these are)

    c (base + (h - H) intra + H inter) + b / bandwidth

with h = n - 1 hops of a ring, H = N - 1 of them between nodes, and twice as many for an all-reduce; base is 8.4 µs, a
hop 3.4 µs by NVLink, 5.7 µs by PCIe and 9.6 µs by a network with RDMA. For TCP, which that table has not, 50 µs are
assumed. An all-reduce may go through a tree instead, whichever is faster: then hops are those of a node, n / N - 1, and
log2 N between nodes, twice, at 0.9 of the bandwidth.

Every ring enters and leaves each node once, so all rings of a node together are bounded by its network, and each of
them by the links of its GPUs: the bandwidth of a group is the smaller of a GPU's links and of the node's network times
the fraction of the node's ranks that the group has. It sustains 0.78 of data sheets within nodes, as NCCL assumes for
an A100 (235 of 300 GB/s), and between nodes 0.9 by RDMA, 0.8 by EFA, 0.6 by TCP, which are assumptions.

Data sheets of a node's network, in one direction: eight HDR InfiniBand cards of a DGX A100 (8 x 200 Gb/s), eight NDR
cards of a DGX H100, H200 or B200 (8 x 400 Gb/s), EFA of AWS p4d (400 Gb/s) and of p5 and p5e (3,200 Gb/s), and TCP.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from voxtral_dist.errors import UserError
from voxtral_dist.estimate.communication import Collective
from voxtral_dist.estimate.gpus import Gpu

_BASE_SECONDS = 8.4e-6
_NVLINK_HOP, _PCIE_HOP, _RDMA_HOP, _TCP_HOP = 3.4e-6, 5.7e-6, 9.6e-6, 50e-6
_LINK_FRACTION, _TREE_FRACTION = 0.78, 0.9
_BYTES_PER_GIGABIT = 1e9 / 8


@dataclass(frozen=True)
class Network:
    """The network of a node. bandwidth: of its data sheet, bytes a second in one direction, of all cards together."""

    name: str
    bandwidth: float
    sustained: float
    hop_seconds: float


NETWORKS = {
    network.name: network
    for network in (
        Network("ib-hdr", 1600 * _BYTES_PER_GIGABIT, 0.9, _RDMA_HOP),
        Network("ib-ndr", 3200 * _BYTES_PER_GIGABIT, 0.9, _RDMA_HOP),
        Network("efa-p4d", 400 * _BYTES_PER_GIGABIT, 0.8, _RDMA_HOP),
        Network("efa-p5", 3200 * _BYTES_PER_GIGABIT, 0.8, _RDMA_HOP),
        Network("tcp-100", 100 * _BYTES_PER_GIGABIT, 0.6, _TCP_HOP),
        Network("tcp-25", 25 * _BYTES_PER_GIGABIT, 0.6, _TCP_HOP),
    )
}


def named_network(text: str) -> Network:
    """A network of the table, or one with RDMA of so many gigabits a second of a node, such as `1600Gbps`.

    Raises:
        UserError: it is neither.
    """
    if text.lower() in NETWORKS:
        return NETWORKS[text.lower()]
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*gb(?:ps|/s|it/s)", text.strip().lower())
    if found is None or not float(found[1]):
        raise UserError(
            f"`--network` must be one of {', '.join(NETWORKS)}, or the bandwidth of a node such as 1600Gbps, but is "
            f"{text!r} instead."
        )
    return Network(text, float(found[1]) * _BYTES_PER_GIGABIT, 0.9, _RDMA_HOP)


@dataclass(frozen=True)
class Interconnect:
    """The links between all GPUs of a run. ranks_of_node: GPUs of a full node."""

    gpu: Gpu
    network: Network
    ranks_of_node: int

    def seconds(self, collective: Collective) -> float:
        """Time of all calls of a collective on ranks that begin together."""
        ring = self._seconds(collective, *self._ring_hops(collective), 1.0)
        if collective.kind != "all-reduce":
            return ring
        return min(ring, self._seconds(collective, *self._tree_hops(collective), _TREE_FRACTION))

    def bandwidth(self, collective: Collective) -> float:
        """Bytes a second that a rank sends."""
        links = self.gpu.link_bandwidth * _LINK_FRACTION
        here, nodes = self._ranks_here(collective)
        if nodes == 1:
            return links
        network = self.network.bandwidth * self.network.sustained
        return min(links, network * here / self.ranks_of_node)

    def _seconds(self, collective: Collective, intra: float, inter: float, fraction: float) -> float:
        hop = _NVLINK_HOP if self.gpu.has_nvlink else _PCIE_HOP
        latency = _BASE_SECONDS + intra * hop + inter * self.network.hop_seconds
        return collective.num_calls * latency + collective.sent_bytes() / (fraction * self.bandwidth(collective))

    def _ring_hops(self, collective: Collective) -> tuple[float, float]:
        _, nodes = self._ranks_here(collective)
        passes = 2 if collective.kind == "all-reduce" else 1
        return passes * (collective.num_ranks - nodes), passes * (nodes - 1)

    def _tree_hops(self, collective: Collective) -> tuple[float, float]:
        here, nodes = self._ranks_here(collective)
        return 2 * (here - 1), 2 * math.ceil(math.log2(nodes))

    def _ranks_here(self, collective: Collective) -> tuple[int, int]:
        """Ranks of a group in one node, and its nodes."""
        here = min(collective.num_ranks, max(1, self.ranks_of_node // collective.stride))
        return here, -(-collective.num_ranks // here)

"""Kernels of a micro-batch as numbers: what each computes, what it reads and writes, and how compilation fuses them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

# An output of so many times the bytes of all inputs repeats values.
_REPETITIONS = 8

Kind = Literal["product", "float8 product", "attention", "attention backward", "memory"]
Phase = Literal["forward", "recomputation", "backward"]


@dataclass(frozen=True)
class Kernel:
    """A kernel, or `count` of them in blocks of one kind.

    kind: `memory` is everything but products of matrices, convolutions (which are products too) and attention.
    phase: `recomputation` is the part of the backward pass that repeats the forward pass. block: index of the block
    that it belongs to, among those that were traced; None outside of blocks. flops: floating point operations. reads,
    writes: bytes by storage. fuses: whether a compiler can join it with its neighbours.
    """

    name: str
    kind: Kind
    phase: Phase
    block: int | None = None
    count: int = 1
    flops: float = 0.0
    reads: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)
    fuses: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes that are read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())


def compiled(kernels: Sequence[Kernel], num_chunks: int = 1) -> list[Kernel]:
    """The kernels after `torch.compile` of each block.

    Inside a block, element-wise kernels, copies and reductions of rows that depend on each other without a product or
    attention between them become one kernel. It reads what comes from elsewhere, and writes what is read elsewhere, or
    by nobody, as gradients are. A checkpoint of a compiled block recomputes all of it: torch stops a recomputation only
    between kernels that autograd sees, and a compiled block is one to it.

    What is only a small value repeated, such as the products of two vectors of scales, is computed where it is read.

    Args:
        kernels: of a micro-batch, in the order in which they run.
        num_chunks: chunks of the encoder.
    """
    kernels = _with_repetitions_where_read(kernels)
    sources = _sources(kernels)
    groups = _groups(kernels, sources)
    readers: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for number, read in enumerate(sources):
        for storage, source in read.items():
            if source is not None:
                readers[source, storage].add(groups[number])
    members: defaultdict[int, list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        members[group].append(number)
    fused = [_joined(kernels, sources, groups, readers, numbers) for numbers in members.values()]
    return [*fused, *_not_recomputed(kernels, num_chunks)]


def _with_repetitions_where_read(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The kernels without those that only repeat values for others of the block that fuse; these read the values."""
    sources = _sources(kernels)
    readers: defaultdict[int, set[int]] = defaultdict(set)
    for number, read in enumerate(sources):
        for source in read.values():
            if source is not None:
                readers[source].add(number)
    repeated: dict[int, dict[int, int]] = {}
    for number, kernel in enumerate(kernels):
        region = (kernel.block, kernel.phase)
        is_read_in_place = readers[number] and all(
            kernels[one].fuses and (kernels[one].block, kernels[one].phase) == region for one in readers[number]
        )
        repeats = sum(kernel.writes.values()) > _REPETITIONS * sum(kernel.reads.values())
        if kernel.fuses and kernel.block is not None and kernel.reads and repeats and is_read_in_place:
            repeated[number] = _reads(kernel.reads, sources[number], repeated)
    return [
        replace(kernel, reads=_reads(kernel.reads, sources[number], repeated))
        for number, kernel in enumerate(kernels)
        if number not in repeated
    ]


def _reads(
    reads: dict[int, int], sources: dict[int, int | None], repeated: dict[int, dict[int, int]]
) -> dict[int, int]:
    """What a kernel reads if it repeats values itself."""
    found: dict[int, int] = {}
    for storage, size in reads.items():
        source = sources[storage]
        found |= {storage: size} if source is None else repeated.get(source, {storage: size})
    return found


def _sources(kernels: Sequence[Kernel]) -> list[dict[int, int | None]]:
    """The kernel that wrote each storage that a kernel reads; None for inputs and weights."""
    writers: dict[int, int] = {}
    sources: list[dict[int, int | None]] = []
    for number, kernel in enumerate(kernels):
        sources.append({storage: writers.get(storage) for storage in kernel.reads})
        writers.update(dict.fromkeys(kernel.writes, number))
    return sources


def _groups(kernels: Sequence[Kernel], sources: Sequence[dict[int, int | None]]) -> list[int]:
    """The group of each kernel, named by its first member.

    A kernel's level is the largest number of kernels that do not fuse on the way to it. Neighbours of equal level can
    be joined: a path between them through such a kernel would make their levels differ.
    """
    parents = list(range(len(kernels)))
    levels: list[int] = []

    def first(number: int) -> int:
        while parents[number] != number:
            number = parents[number]
        return number

    for number, kernel in enumerate(kernels):
        region = (kernel.block, kernel.phase)
        own = {one for one in sources[number].values() if one is not None}
        near = [one for one in own if (kernels[one].block, kernels[one].phase) == region]
        level = max((levels[one] + (not kernels[one].fuses) for one in near), default=0)
        levels.append(level)
        if kernel.fuses and kernel.block is not None:
            joined = [first(one) for one in near if kernels[one].fuses and levels[one] == level]
            root = min([number, *joined])
            for one in [number, *joined]:
                parents[one] = root
    return [first(number) for number in range(len(kernels))]


def _joined(
    kernels: Sequence[Kernel],
    sources: Sequence[dict[int, int | None]],
    groups: Sequence[int],
    readers: dict[tuple[int, int], set[int]],
    numbers: Sequence[int],
) -> Kernel:
    """One kernel in place of all members of a group."""
    own = groups[numbers[0]]
    reads: dict[int, int] = {}
    writes: dict[int, int] = {}
    for number in numbers:
        for storage, size in kernels[number].reads.items():
            source = sources[number][storage]
            if source is None or groups[source] != own:
                reads[storage] = max(size, reads.get(storage, 0))
        for storage, size in kernels[number].writes.items():
            by = readers.get((number, storage), set())
            if not by or by != {own}:
                writes[storage] = max(size, writes.get(storage, 0))
    name = "+".join(dict.fromkeys(kernels[number].name for number in numbers))
    return replace(kernels[numbers[0]], name=name, reads=reads, writes=writes)


def _not_recomputed(kernels: Sequence[Kernel], num_chunks: int) -> list[Kernel]:
    """The last kernels of checkpointed blocks, which torch does not recompute unless the block is compiled.

    A block in several chunks is recomputed once for its chunk and, where it is checkpointed itself, once more.
    """
    forward: defaultdict[int, list[Kernel]] = defaultdict(list)
    repeated: Counter[int] = Counter()
    for kernel in kernels:
        if kernel.block is not None and kernel.phase == "forward":
            forward[kernel.block].append(kernel)
        elif kernel.block is not None and kernel.phase == "recomputation":
            repeated[kernel.block] += 1
    missing: list[Kernel] = []
    for block, num_repeated in repeated.items():
        own = forward[block]
        calls = num_chunks if len(own) % num_chunks == 0 and num_repeated % num_chunks == 0 else 1
        rest = -(num_repeated // calls) % (len(own) // calls)
        if rest:
            last = [replace(one, phase="recomputation") for one in own[-rest:]]
            missing += last * calls
    return missing

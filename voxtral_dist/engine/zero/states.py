"""Access to the float32 weights and moments that DeepSpeed keeps, in flat partitions or in files on a drive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from voxtral_dist.distributed.collectives import sum_tensor_on_rank, sum_tensor_over_ranks
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.ema import WeightAverages
from voxtral_dist.engine.engine import CopyTensor, ParameterState

_ADAM = ("exp_avg", "exp_avg_sq")
_MUON = ("momentum_buffer",)


@dataclass(frozen=True)
class Fragment:
    """This rank's partition of a parameter's weight or moment.

    inside: its positions in the flattened parameter. values: a one-dimensional view of DeepSpeed's own memory.
    """

    inside: slice
    values: Tensor


class MasterStates:
    """Reads and writes full float32 weights and moments of trained parameters from and to the ranks' partitions.

    All ranks must go through the parameters together. A full tensor is read by one rank, on its device; the others get
    None.
    """

    def __init__(
        self, engine: Any, optimizer: torch.optim.Optimizer, world: World, ema_decay: float | None = None
    ) -> None:
        self._engine = engine
        self._optimizer = optimizer
        self._world = world
        # None without `optimizer.ema_decay`.
        self.averages: WeightAverages | None = None
        if ema_decay is not None:
            self.averages = WeightAverages(ema_decay, lambda: [partition for partition, _ in self._partitions()])

    def weight(self, parameter: nn.Parameter, reader: int) -> Tensor | None:
        """The full weight on the rank `reader`; it may share memory with DeepSpeed's."""
        return self._full(parameter, self._weight_fragment(parameter), reader)

    def whole_weight(self, parameter: nn.Parameter) -> Tensor:
        """The full weight on the device of every rank."""
        full = self._filled(parameter, self._weight_fragment(parameter))
        sum_tensor_over_ranks(full, self._world)
        return full

    def state(self, name: str, parameter: nn.Parameter, reader: int, copy: CopyTensor) -> ParameterState | None:
        """Copies of the full weight and moments, on the rank `reader`; moments are zeros before the first update."""

        def copied(kind: str, fragment: Fragment | None) -> Tensor | None:
            full = self._full(parameter, fragment, reader)
            return None if full is None else copy((name, kind), full)

        weight, moments = copied("weight", self._weight_fragment(parameter)), {}
        for key in _moments_of(getattr(parameter, "use_muon", False)):
            moment = copied(key, self._moment_fragment(parameter, key))
            if moment is not None:
                moments[key] = moment
        average = copied("average", self._average_fragment(parameter)) if self.averages else None
        return None if weight is None else ParameterState(name, weight, moments, average)

    @torch.no_grad()
    def load(self, parameter: nn.Parameter, state: ParameterState) -> None:
        """Copy this rank's partition of a full weight, its moments and its average, after `create_moments`."""
        _write(self._weight_fragment(parameter), state.weight)
        for key, moment in state.moments.items():
            _write(self._moment_fragment(parameter, key), moment)
        if self.averages is not None:
            _write(self._average_fragment(parameter), state.weight if state.average is None else state.average)

    def create_moments(self, num_updates: int) -> None:
        """Create the optimizer states that DeepSpeed would create at the first step."""
        for partition, group in self._partitions():
            self._create_state(partition, group, num_updates)

    def set_num_updates(self, num_updates: int) -> None:
        """Set the number of updates in Adam's bias correction."""
        for partition, _ in self._partitions():
            self._optimizer.state[partition]["step"] = self._step_value(partition, num_updates)

    def _create_state(self, partition: Tensor, group: dict[str, Any], num_updates: int) -> None:
        state = self._optimizer.state[partition]
        state["step"] = self._step_value(partition, num_updates)
        for key in _moments_of(group.get("use_muon", False)):
            # DeepSpeed creates Muon's before the first step, in a precision of its choice.
            if key not in state:
                state[key] = torch.zeros_like(partition)

    def _step_value(self, partition: Tensor, num_updates: int) -> Any:
        if not isinstance(self._optimizer, torch.optim.AdamW):
            return num_updates
        # torch's fused AdamW keeps the count on the device of the weights, the plain one on the CPU.
        device = partition.device if self._optimizer.defaults["fused"] else "cpu"
        return torch.tensor(float(num_updates), device=device)

    def _full(self, parameter: nn.Parameter, fragment: Fragment | None, reader: int) -> Tensor | None:
        # A reduction, although gathering would send less: it takes the ring that training uses, whose buffers exist.
        # NCCL would allocate those of new pairs of ranks beside torch, which may hold all memory of the GPU.
        if self._world.size == 1 and fragment is not None:
            return fragment.values.detach().view(full_shape(parameter))
        full = self._filled(parameter, fragment)
        sum_tensor_on_rank(full, reader, self._world)
        return full if self._world.rank == reader else None

    def _filled(self, parameter: nn.Parameter, fragment: Fragment | None) -> Tensor:
        """The full tensor with this rank's values, and zeros for those of others."""
        full = torch.zeros(full_shape(parameter), device=self._world.device)
        if fragment is not None:
            full.view(-1)[fragment.inside].copy_(fragment.values.detach())
        return full

    def _averages_of(self, number: int) -> Tensor:
        """The averages of the partition with this number."""
        assert self.averages is not None, "only runs with averages ask for them"
        return self.averages.tensors[number]

    def _partitions(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """The tensors that the optimizer updates on this rank, each with its parameter group."""
        raise NotImplementedError

    def _weight_fragment(self, parameter: nn.Parameter) -> Fragment | None:
        raise NotImplementedError

    def _moment_fragment(self, parameter: nn.Parameter, key: str) -> Fragment | None:
        raise NotImplementedError

    def _average_fragment(self, parameter: nn.Parameter) -> Fragment | None:
        raise NotImplementedError


class ReplicatedStates(MasterStates):
    """Stage 0: every rank updates full parameters."""

    def _full(self, parameter: nn.Parameter, fragment: Fragment | None, reader: int) -> Tensor | None:
        if self._world.rank != reader:
            return None
        if fragment is None:
            return torch.zeros(full_shape(parameter), device=self._world.device)
        return fragment.values.detach().view(full_shape(parameter))

    def _partitions(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return ((parameter, group) for group in self._optimizer.param_groups for parameter in group["params"])

    def _weight_fragment(self, parameter: nn.Parameter) -> Fragment:
        return Fragment(slice(None), parameter.view(-1))

    def _moment_fragment(self, parameter: nn.Parameter, key: str) -> Fragment | None:
        moment = self._optimizer.state[parameter].get(key)
        return None if moment is None else Fragment(slice(None), moment.view(-1))

    def _average_fragment(self, parameter: nn.Parameter) -> Fragment:
        numbers = {id(partition): number for number, (partition, _) in enumerate(self._partitions())}
        return Fragment(slice(None), self._averages_of(numbers[id(parameter)]).view(-1))


class FlatStates(MasterStates):
    """Stages 1 and 2: the parameters of a group are concatenated, and each rank updates an equal partition."""

    def _partitions(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return ((group["params"][0], group) for group in self._optimizer.param_groups)

    def _weight_fragment(self, parameter: nn.Parameter) -> Fragment | None:
        return self._fragment(parameter, self._partition)

    def _moment_fragment(self, parameter: nn.Parameter, key: str) -> Fragment | None:
        # DeepSpeed maps moments to parameters too, but only when it loads or saves its own checkpoints.
        return self._fragment(parameter, lambda number: self._optimizer.state[self._partition(number)].get(key))

    def _average_fragment(self, parameter: nn.Parameter) -> Fragment | None:
        return self._fragment(parameter, self._averages_of)

    def _partition(self, number: int) -> Tensor:
        partition: Tensor = self._optimizer.param_groups[number]["params"][0]
        return partition

    def _fragment(self, parameter: nn.Parameter, flat_of: Callable[[int], Tensor | None]) -> Fragment | None:
        """This rank's part of a parameter in the flat tensor of its group, if it has one."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed adds it
        flat = None if mapping is None else flat_of(mapping.param_group_index)
        if flat is None:
            return None
        inside, in_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(slice(inside.start, inside.start + inside.numel), flat.narrow(0, in_flat.start, in_flat.numel))


class ShardedStates(MasterStates):
    """Stage 3: each rank has an equal slice of every flattened parameter, padded at the end.

    The slices of several parameters form a sub-group, the unit of updates and of swapping between memory and drive.
    """

    def _partitions(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        groups = self._engine.optimizer.sub_group_to_group_id
        for number, partition in enumerate(self._engine.optimizer.fp32_partitioned_groups_flat):
            yield partition, self._optimizer.param_groups[groups[number]]

    def create_moments(self, num_updates: int) -> None:
        """See `MasterStates`. On a drive, they are created per sub-group, as in DeepSpeed's first step."""
        for number, (partition, group) in enumerate(self._partitions()):
            if self._is_swapped(number):
                self._engine.optimizer.optimizer_swapper.swap_in_optimizer_state(partition)
                self._create_state(partition, group, num_updates)
                self._engine.optimizer.optimizer_swapper.swap_out_optimizer_state(partition)
            else:
                self._create_state(partition, group, num_updates)

    def _weight_fragment(self, parameter: nn.Parameter) -> Fragment:
        number, start, size = self._place(parameter)
        partition = self._engine.optimizer.fp32_partitioned_groups_flat[number]
        flat = self._mapped(number, partition) if self._is_swapped(number) else partition
        return self._slice(parameter, flat, start, size)

    def _moment_fragment(self, parameter: nn.Parameter, key: str) -> Fragment | None:
        number, start, size = self._place(parameter)
        partition = self._engine.optimizer.fp32_partitioned_groups_flat[number]
        state = self._optimizer.state.get(partition, {})
        if key not in state:
            return None
        flat = self._mapped(number, state[key]) if self._is_swapped(number) else state[key]
        return self._slice(parameter, flat, start, size)

    def _average_fragment(self, parameter: nn.Parameter) -> Fragment:
        number, start, size = self._place(parameter)
        return self._slice(parameter, self._averages_of(number), start, size)

    def _place(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        """The number of the parameter's sub-group, and the start and padded length of its slice in it."""
        number, start, size = self._engine.optimizer.grad_position[self._engine.optimizer.get_param_id(parameter)]
        return number, int(start), int(size)

    def _slice(self, parameter: nn.Parameter, flat: Tensor, start: int, size: int) -> Fragment:
        first = self._world.rank * size
        own = max(0, min(size, parameter.ds_numel - first))  # type: ignore[attr-defined]  # DeepSpeed adds it
        return Fragment(slice(first, first + own), flat.narrow(0, start, own))

    def _is_swapped(self, number: int) -> bool:
        return bool(self._engine.optimizer._swappable_optimizer_subgroup(number))

    def _mapped(self, number: int, tensor: Tensor) -> Tensor:
        """A sub-group's weights or one of its moments, mapped from DeepSpeed's file on the drive.

        Mapping reads and writes only the slice of a parameter; DeepSpeed's own access swaps all of the sub-group.
        """
        sub_group = self._engine.optimizer.fp32_partitioned_groups_flat[number]
        swapped = self._engine.optimizer.optimizer_swapper.swap_params_info[sub_group.ds_id]
        path = next(one.swap_path for one in swapped.tensors if one.compute_tensor is tensor)
        return torch.from_file(path, shared=True, size=swapped.numel(), dtype=torch.float32)


def master_states(
    engine: Any, optimizer: torch.optim.Optimizer, stage: int, world: World, ema_decay: float | None = None
) -> MasterStates:
    """The states of a DeepSpeed engine of this stage."""
    kind = {0: ReplicatedStates, 3: ShardedStates}.get(stage, FlatStates)
    return kind(engine, optimizer, world, ema_decay)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter; stage 3 empties sharded ones and keeps their shape in `ds_shape`."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _moments_of(is_muon: bool) -> tuple[str, ...]:
    return _MUON if is_muon else _ADAM


def _write(fragment: Fragment | None, full: Tensor) -> None:
    if fragment is not None:
        fragment.values.copy_(full.flatten()[fragment.inside])

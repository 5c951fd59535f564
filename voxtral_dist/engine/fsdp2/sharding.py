"""A model sharded by torch's FSDP2: the units that are gathered together, the rows of each rank, and full tensors.

Every parameter is a `DTensor`. Its rows (the first dimension) are split over the ranks of a replica in equal
partitions; the last partitions may be smaller or empty.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from voxtral_dist.config import Fsdp2Config
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import UserError
from voxtral_dist.model.blocks import blocks_of
from voxtral_dist.model.trainable import is_adapter
from voxtral_dist.model.voxtral import DTYPES, TrainedVoxtral, set_tensor
from voxtral_dist.model.weights import InitialWeights

# Names of the mesh's dimensions.
_REPLICATE, _SHARD = "replicate", "shard"


def refuse_partial_replicas(settings: Fsdp2Config, world_size: int) -> None:
    """Refuse replicas of the model that do not divide the ranks evenly.

    Raises:
        UserError: the number of ranks is not a multiple of `ranks_per_replica`.
    """
    per_replica = settings.ranks_per_replica
    if per_replica is not None and world_size % per_replica != 0:
        raise UserError(
            f"`engine.fsdp2.ranks_per_replica` must divide the number of ranks ({world_size}), but is {per_replica} "
            "instead."
        )


def build_mesh(world: World, ranks_per_replica: int | None) -> DeviceMesh:
    """The ranks in one row, or in one row per replica of the model; neighbouring ranks share a replica."""
    per_replica = ranks_per_replica or world.size
    if per_replica == world.size:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=(_SHARD,))
    shape = (world.size // per_replica, per_replica)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=(_REPLICATE, _SHARD))


def replica_group(mesh: DeviceMesh) -> torch.distributed.ProcessGroup:
    """The ranks of this rank's replica, which together hold each value once."""
    return mesh.get_group(_SHARD)


def store_in_bfloat16(model: TrainedVoxtral) -> None:
    """Give a meta model's trained parameters bfloat16 in place. Adapters are small, and stay as they are."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not is_adapter(name):
            parameter.data = parameter.data.to(torch.bfloat16)


def shard_model(model: TrainedVoxtral, mesh: DeviceMesh, settings: Fsdp2Config, precision: torch.dtype) -> None:
    """Shard a model on the meta device in place, still without storage.

    Trained parameters keep their dtype and are cast to `precision` when they are gathered. Frozen ones are stored in
    `precision`, or as bytes if they are quantized: FSDP2 requires a common dtype of a group's trained parameters only.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(precision)
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=DTYPES[settings.reduce_precision])
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if settings.cpu_offload else OffloadPolicy()

    def shard(module: nn.Module, reshard_after_forward: bool = settings.reshard_after_forward) -> FSDPModule:
        return fully_shard(
            module, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard_after_forward
        )

    for block in (block for blocks in blocks_of(model).values() for block in blocks):
        shard(block)
    shard(model.model.audio_tower)
    shard(model.model.multi_modal_projector)
    # The backward pass of an embedding needs its indices, not its weights: this saves a gather of a large matrix.
    shard(model.model.language_model.embed_tokens).set_unshard_in_backward(False)
    # The backward pass begins with this layer: resharding it would gather it twice in a row.
    shard(model.lm_head, reshard_after_forward=False)
    shard(model)


def fill_partitions(model: TrainedVoxtral, initial: InitialWeights, device: torch.device) -> None:
    """Give a sharded model on the meta device its initial weights; each rank reads only its own rows."""
    for name, parameter in list(model.named_parameters()):
        rows = rows_of(parameter)
        # A copy, because the tensor that was read may be a view of the file's pages.
        local = initial.rows(name, rows.start, rows.stop).to(device, parameter.dtype, copy=True)
        filled = nn.Parameter(with_local(parameter, local), requires_grad=parameter.requires_grad)
        set_tensor(model, name, filled)


def sharded(value: Tensor) -> DTensor:
    """A tensor, typed as the `DTensor` that every parameter, gradient and moment is here."""
    assert isinstance(value, DTensor), "every parameter belongs to a unit of sharding"
    return value


def rows_of(value: Tensor) -> slice:
    """This rank's rows of the full tensor; may be empty."""
    ranks, num_rows = sharded(value).device_mesh[_SHARD], value.shape[0]
    rows_per_rank = -(-num_rows // ranks.size())
    start = min(ranks.get_local_rank() * rows_per_rank, num_rows)
    return slice(start, min(start + rows_per_rank, num_rows))


def first_position(value: Tensor) -> int:
    """Position of this rank's first value in the flattened full tensor."""
    start: int = rows_of(value).start
    return start * (value.numel() // value.shape[0])


def with_local(like: Tensor, local: Tensor, shape: tuple[int, int] | None = None) -> DTensor:
    """A tensor whose rows are sharded like those of another one, from this rank's rows; without communication.

    shape: of the full tensor; None for that of the other one.
    """
    mesh, placements = sharded(like).device_mesh, sharded(like).placements
    size, stride = (like.shape, like.stride()) if shape is None else (torch.Size(shape), (shape[1], 1))
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=size, stride=stride)


def local_part(value: Tensor) -> Tensor:
    """This rank's rows, which share memory with the sharded tensor."""
    local: Tensor = sharded(value).to_local()
    return local


@torch.no_grad()
def gathered(value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A full copy of the tensor on every rank; all ranks call it together, with a device they communicate on.

    Quantized matrices are not cast.
    """
    cast = dtype if value.is_floating_point() else value.dtype
    # Cast before sending, so that no more bytes than needed are sent.
    full: Tensor = with_local(value, local_part(value).to(device, cast, copy=True)).full_tensor()
    return full

"""A model in the shards of torch's FSDP2: what is gathered together, which rows a rank holds, and whole tensors again.

Every parameter is a `DTensor` whose rows (the first dimension) are dealt to the ranks of a replica in equal chunks; the
last chunks may be shorter, or empty.
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
from voxtral_dist.model.voxtral import DTYPES, TrainedVoxtral, blocks_of, set_tensor
from voxtral_dist.model.weights import InitialWeights

_SHARD = "shard"


def refuse_partial_replicas(settings: Fsdp2Config, world_size: int) -> None:
    """Refuse replicas of the model that do not fill the world.

    Raises:
        UserError: the number of ranks is no multiple of theirs.
    """
    per_replica = settings.ranks_per_replica
    if per_replica is not None and world_size % per_replica != 0:
        raise UserError(
            f"`engine.fsdp2.ranks_per_replica` must divide the number of ranks ({world_size}), but is {per_replica} "
            "instead."
        )


def build_mesh(world: World, ranks_per_replica: int | None) -> DeviceMesh:
    """The ranks in one row, or one row for each replica of the model: neighbours share a replica."""
    per_replica = ranks_per_replica or world.size
    if per_replica == world.size:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=(_SHARD,))
    shape = (world.size // per_replica, per_replica)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replica", _SHARD))


def shard_group(mesh: DeviceMesh) -> torch.distributed.ProcessGroup:
    """The ranks that together hold each value once."""
    return mesh.get_group(_SHARD)


def shard_model(model: TrainedVoxtral, mesh: DeviceMesh, settings: Fsdp2Config, precision: torch.dtype) -> None:
    """Shard a meta_model on the meta device in place, still without storage.

    What is trained stays float32, and is cast to `precision` when it is gathered. What is frozen needs no more than
    `precision` to begin with: FSDP2 asks for one dtype of the *trained* parameters of a group only.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad:
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
    # The gradient of an embedding needs its indices, not its weights: one gather of a large matrix less.
    shard(model.model.language_model.embed_tokens).set_unshard_in_backward(False)
    # The backward pass begins with it, so giving it back would gather it twice in a row.
    shard(model.lm_head, reshard_after_forward=False)
    shard(model)


def fill_shards(model: TrainedVoxtral, initial: InitialWeights, device: torch.device) -> None:
    """Give a sharded meta_model its first values: each rank reads its own rows and nothing else."""
    for name, parameter in list(model.named_parameters()):
        rows = rows_of(parameter)
        # A copy, because what was read may be a view of the file's pages.
        local = initial.rows(name, rows.start, rows.stop).to(device, parameter.dtype, copy=True)
        filled = nn.Parameter(with_local(parameter, local), requires_grad=parameter.requires_grad)
        set_tensor(model, name, filled)


def sharded(value: Tensor) -> DTensor:
    """The same, known to be what every parameter is here, and its gradient and moments with it."""
    assert isinstance(value, DTensor), "it belongs to no unit of sharding"
    return value


def rows_of(value: Tensor) -> slice:
    """The rows of the whole tensor that lie on this rank; none where there are fewer rows than ranks."""
    ranks, num_rows = sharded(value).device_mesh[_SHARD], value.shape[0]
    chunk = -(-num_rows // ranks.size())
    start = min(ranks.get_local_rank() * chunk, num_rows)
    return slice(start, min(start + chunk, num_rows))


def with_local(like: Tensor, local: Tensor) -> DTensor:
    """A tensor that is sharded as another one, of this rank's rows; without communication."""
    mesh, placements = sharded(like).device_mesh, sharded(like).placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def local_part(value: Tensor) -> Tensor:
    """This rank's rows, sharing memory with the whole."""
    local: Tensor = sharded(value).to_local()
    return local


@torch.no_grad()
def gathered(value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy of the whole tensor on every rank, on a device that ranks communicate on; all of them call it together."""
    # Cast first: what is sent is as small as what is asked for.
    whole: Tensor = with_local(value, local_part(value).to(device, dtype, copy=True)).full_tensor()
    return whole

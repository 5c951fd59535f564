"""AdamW with 8-bit moments and bfloat16 weights: equal bits on any number of ranks, and no lost updates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from voxtral_dist.config import OptimizerConfig
from voxtral_dist.distributed.collectives import from_first_rank, gather_on_first
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.fsdp2 import low_memory_adamw
from voxtral_dist.engine.fsdp2.block_states import BLOCK_SIZE, decode, encode
from voxtral_dist.engine.fsdp2.rounding import add_rounded, random_bits, random_keys, to_bfloat16, wrapped

from ranks import run_ranks

# Rows of two blocks, rows of none, fewer rows than ranks, and a vector. The matrix is updated in several chunks.
SHAPES = {"blocks": (200, 2 * BLOCK_SIZE), "no_blocks": (7, 100), "one_row": (1, BLOCK_SIZE), "vector": (65,)}
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
# By name: precision of weights, and whether moments are quantized.
KINDS = {
    "adamw_8bit": (FLOAT32, True),
    "bfloat16 weights": (BFLOAT16, False),
    "both": (BFLOAT16, True),
    "neither": (FLOAT32, False),
}
SETTINGS: dict[str, Any] = {"betas": (0.9, 0.98), "weight_decay": 0.1, "eps": 1e-8}
RATE = 1e-3
NUM_STEPS = 5


def gradient_of(step: int, name: str) -> Tensor:
    """A gradient whose values differ by orders of magnitude within a row."""
    generator = torch.Generator().manual_seed(1 + step)
    shape = SHAPES[name]
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(1.5).exp()


def new_model(dtype: torch.dtype) -> nn.ParameterDict:
    generator = torch.Generator().manual_seed(0)
    return nn.ParameterDict({name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()})


def states_of_all_kinds(world: World) -> dict[str, dict[str, Tensor]]:
    """Full weights and moments after some steps on the same gradients, sharded over the ranks."""
    from torch.distributed.fsdp import fully_shard

    from voxtral_dist.engine.fsdp2.sharding import build_mesh, local_part, rows_of, with_local

    found = {}
    for kind, (dtype, is_quantized) in KINDS.items():
        model: Any = new_model(dtype)
        fully_shard(model, mesh=build_mesh(world, None))
        trained: dict[str, nn.Parameter] = dict(model.named_parameters())
        quantized = {"blocks", "one_row"} if is_quantized else set()
        config = OptimizerConfig(
            learning_rate=RATE, betas=SETTINGS["betas"], epsilon=SETTINGS["eps"], weight_decay=0.0, warmup_steps=0
        )
        groups = [{"params": list(trained.values()), "weight_decay": SETTINGS["weight_decay"]}]
        named = {one: name for name, one in trained.items()}
        optimizer = low_memory_adamw.LowMemoryAdamW(groups, named, quantized, config, seed=3)
        for step in range(NUM_STEPS):
            for name, parameter in trained.items():
                rows = gradient_of(step, name).to(dtype)[rows_of(parameter)]
                parameter.grad = with_local(parameter, rows.clone())
            optimizer.step()
        own = {name: local_part(one).detach() for name, one in trained.items()}
        for name, one in trained.items():
            state = optimizer.state[one]
            own |= {f"{name}//{key}": local_part(moment) for key, moment in state.items() if key != "step"}
        of_ranks = from_first_rank(gather_on_first(own, world), world)
        found[kind] = {key: torch.cat([of_rank[key] for of_rank in of_ranks]) for key in own}
    return found


@pytest.fixture(scope="module")
def on_one_rank() -> dict[str, dict[str, Tensor]]:
    return run_ranks(1, states_of_all_kinds)[0]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_equal_gradients_give_equal_bits_on_any_number_of_ranks(
    on_one_rank: dict[str, dict[str, Tensor]], num_ranks: int
) -> None:
    found = run_ranks(num_ranks, states_of_all_kinds)[0]
    for kind, expected in on_one_rank.items():
        assert found[kind].keys() == expected.keys()
        for key, tensor in expected.items():
            assert found[kind][key].dtype == tensor.dtype
            assert torch.equal(found[kind][key], tensor), f"{kind}: {key}"


def plain_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights after the same steps of torch's own AdamW."""
    model = new_model(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, **SETTINGS)
    for step in range(NUM_STEPS):
        for name, parameter in model.named_parameters():
            parameter.grad = gradient_of(step, name).to(dtype)
        optimizer.step()
    return {name: one.detach() for name, one in model.named_parameters()}


def test_float32_weights_and_moments_are_those_of_torch(on_one_rank: dict[str, dict[str, Tensor]]) -> None:
    for name, expected in plain_weights(FLOAT32).items():
        torch.testing.assert_close(on_one_rank["neither"][name], expected, rtol=1e-6, atol=1e-7)


def test_quantized_moments_change_an_update_by_some_percent(on_one_rank: dict[str, dict[str, Tensor]]) -> None:
    begin = new_model(FLOAT32)
    for name, expected in plain_weights(FLOAT32).items():
        found = on_one_rank["adamw_8bit"][name]
        if name in ("no_blocks", "vector"):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        else:
            error, change = (found - expected).norm(), (expected - begin[name]).norm()
            assert 0 < error < 0.05 * change, name


def test_bfloat16_weights_differ_by_rounding_only(on_one_rank: dict[str, dict[str, Tensor]]) -> None:
    for name, weight in on_one_rank["bfloat16 weights"].items():
        if name in SHAPES:
            assert weight.dtype == BFLOAT16
            difference = weight.float() - plain_weights(FLOAT32)[name]
            # One unit in the last place at the start, and one in each step, of the largest value on the way.
            largest = weight.float().abs() + NUM_STEPS * RATE
            assert (difference.abs() <= largest * 2**-7 * (1 + NUM_STEPS)).all(), name


def steps_down(weight: Tensor, num_steps: int, rate: float) -> Tensor:
    """The mean of bfloat16 weights after constant gradients of 1, each of which takes `rate` from a weight."""
    first, second = (torch.zeros_like(weight, dtype=FLOAT32) for _ in range(2))
    for step in range(1, num_steps + 1):
        scalars = torch.tensor([1.0, 0.0, rate / (1 - 0.9**step), (1 - 0.98**step) ** -0.5, 1e-8])
        (key,) = random_keys(0, step, ["weight"])
        place = torch.tensor([*key, 0], dtype=torch.int32)
        low_memory_adamw._update_values(weight, torch.ones_like(weight), first, second, scalars, place, 0.9, 0.98)
    return weight.float().mean()


def test_plain_bfloat16_weights_lose_small_updates_and_rounded_ones_keep_them() -> None:
    # Half a unit in the last place below 1 is 2^-9.
    num_steps, rate = 50, 2.0**-13
    plain = nn.Parameter(torch.ones(10_000, dtype=BFLOAT16))
    optimizer = torch.optim.AdamW([plain], lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(num_steps):
        plain.grad = torch.ones_like(plain)
        optimizer.step()
    assert (plain == 1.0).all()
    found = steps_down(torch.ones(10_000, dtype=BFLOAT16), num_steps, rate)
    # A step rounds to one of two values a unit apart: 4 standard deviations of the mean of all weights.
    assert float(found) == pytest.approx(1.0 - num_steps * rate, abs=4 * 0.5 * 2**-8 * (num_steps / 10_000) ** 0.5)


def test_bfloat16_sums_of_gradients_keep_small_ones() -> None:
    total, small = torch.ones(10_000, dtype=BFLOAT16), torch.full((10_000,), 2.0**-10, dtype=BFLOAT16)
    assert (total + small == total).all()
    for number in range(64):
        (key,) = random_keys(0, number, ["gradient"])
        add_rounded(total, small, torch.tensor([*key, 0], dtype=torch.int32))
    assert float(total.float().mean()) == pytest.approx(1 + 64 * 2**-10, abs=4 * 0.5 * 2**-7 * 64**0.5 / 100)


def test_rounding_takes_one_of_the_two_nearest_and_keeps_what_bfloat16_can_represent() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    bits = random_bits(torch.tensor([1, 2, 0], dtype=torch.int32), len(values))
    rounded = to_bfloat16(values, bits).float()
    assert ((rounded - values).abs() < values.abs() * 2**-7).all()
    assert torch.equal(to_bfloat16(rounded, bits).float(), rounded)
    assert abs(float((rounded - values).mean())) < 4 * 2**-8 / 100_000**0.5


def mixed(bits: int) -> int:
    """The mixing function in exact integers."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        bits = ((bits ^ (bits >> shift)) * factor) % 2**32
    return bits ^ (bits >> 15)


@pytest.mark.parametrize("start", [0, 2**31 - 5, 2**32 - 16])
def test_random_bits_are_a_function_of_key_and_position(start: int) -> None:
    (key,) = random_keys(1, 2, ["name"])
    found = random_bits(torch.tensor([*key, wrapped(start)], dtype=torch.int32), 16)
    first, second = (one % 2**32 for one in key)
    expected = [mixed((mixed((start + number) ^ first) + second) % 2**32) for number in range(16)]
    assert [int(one) % 2**32 for one in found] == expected


def test_keys_differ_by_seed_step_and_name() -> None:
    keys = [random_keys(seed, step, ["a", "b"]) for seed in (0, 1) for step in (0, 1)]
    assert len({key for of_step in keys for key in of_step}) == 8


def test_moments_are_read_back_within_the_stated_error() -> None:
    generator = torch.Generator().manual_seed(0)
    # Roots over five orders of magnitude in each block, and first moments of both signs.
    roots = torch.rand((100, BLOCK_SIZE), generator=generator).mul(-11).exp()
    first = roots * torch.randn((100, BLOCK_SIZE), generator=generator)
    codes = encode(first, roots.square())
    assert [one.dtype for one in codes] == [torch.int8, FLOAT32, torch.uint8, FLOAT32]
    found_first, found_second = decode(*codes)
    is_in_range = roots > 1.7e-5 * roots.amax(1, keepdim=True)
    assert ((found_second.sqrt() / roots - 1).abs()[is_in_range] < 0.032).all()
    # In units of r: half of 127 steps of the largest, and the error of r.
    largest = (first / roots).abs().amax(1, keepdim=True)
    assert ((found_first - first).abs() < roots * largest * (0.5 / 127 + 1e-3) * 1.04).all()
    assert all(
        torch.equal(one, two) for one, two in zip(codes[::2], encode(found_first, found_second)[::2], strict=True)
    )


def test_a_second_moment_is_zero_only_where_its_block_is() -> None:
    second = torch.zeros(2, BLOCK_SIZE)
    second[0, 0] = 1.0
    found = decode(*encode(torch.zeros_like(second), second))[1]
    assert (found[0] > 0).all()
    assert (found[1] == 0).all()
    assert not found.isnan().any()


def dynamic_map(is_signed: bool) -> Tensor:
    """The levels of bitsandbytes and torchao (Dettmers, arXiv 1511.04561)."""
    positive = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (exponent + (0 if is_signed else 1)) + 1)
        positive += (10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
    negative = [-one for one in positive if 0 < one < 1] if is_signed else []
    return torch.tensor(sorted(positive + negative))


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    scales = values.abs().amax(1, keepdim=True)
    return levels[torch.bucketize(values / scales, (levels[1:] + levels[:-1]) / 2)] * scales


def errors_of_updates(spread: float) -> tuple[float, float]:
    """Error of an update over its size, mean over steps: of our moments, and of those of the dynamic map."""
    generator = torch.Generator().manual_seed(0)
    sizes = 1e-4 * torch.randn((64, BLOCK_SIZE), generator=generator).mul(spread).exp()
    signed, unsigned = dynamic_map(is_signed=True), dynamic_map(is_signed=False)
    assert len(signed) == len(unsigned) == BLOCK_SIZE
    read_back = (
        lambda first, second: (first, second),
        lambda first, second: decode(*encode(first, second)),
        lambda first, second: (nearest(first, signed), nearest(second, unsigned)),
    )
    moments = [(torch.zeros_like(sizes), torch.zeros_like(sizes))] * 3
    errors = []
    for _ in range(60):
        gradient, updates = sizes * torch.randn(sizes.shape, generator=generator), []
        for number, (first, second) in enumerate(moments):
            first, second = 0.9 * first + 0.1 * gradient, 0.98 * second + 0.02 * gradient.square()
            updates.append(first / (second.sqrt() + 1e-8))
            moments[number] = read_back[number](first, second)
        errors.append([float((one - updates[0]).norm() / updates[0].norm()) for one in updates[1:]])
    ours, theirs = torch.tensor(errors).mean(0).tolist()
    return ours, theirs


def test_updates_are_right_however_much_the_gradients_of_a_block_differ() -> None:
    ours, theirs = errors_of_updates(spread=0.0)
    assert theirs < ours < 0.06
    ours, theirs = errors_of_updates(spread=1.5)
    assert ours < 0.06
    assert theirs > 1.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_update_is_the_plain_one(kind: str) -> None:
    dtype, is_quantized = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    roots = torch.rand((64, BLOCK_SIZE), generator=generator).mul(-5).exp()
    first = roots * torch.randn((64, BLOCK_SIZE), generator=generator)
    moments = encode(first, roots.square()) if is_quantized else (first.flatten(), roots.square().flatten())
    function = low_memory_adamw._update_blocks if is_quantized else low_memory_adamw._update_values
    weight, gradient = (torch.randn(roots.numel(), generator=generator).to(dtype) for _ in range(2))
    scalars, place = torch.tensor([0.5, 1e-5, 1e-3, 1.2, 1e-8]), torch.tensor([5, 6, 2**30], dtype=torch.int32)
    outcomes = []
    for one in (function, torch.compile(function, dynamic=True, fullgraph=True)):
        tensors = [tensor.clone() for tensor in (weight, gradient, *moments)]
        one(*tensors, scalars, place, 0.9, 0.98)
        outcomes.append(tensors)
    for plain, compiled in zip(*outcomes, strict=True):
        # A fused multiplication and addition may tip a rounding over.
        differs = ((plain.float() - compiled.float()).abs() > 1e-6 * plain.float().abs() + 1e-12).float().mean()
        assert differs < 1e-3

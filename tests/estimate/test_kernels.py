"""Kernels that compilation joins, and the time of kernels by the roofline."""

from __future__ import annotations

import pytest

from voxtral_dist.errors import UserError
from voxtral_dist.estimate.gpus import GPUS, Gpu, named_gpu
from voxtral_dist.estimate.kernels import Kernel, Phase, compiled
from voxtral_dist.estimate.roofline import Roofline

MB = 10**6


def memory(name: str, reads: list[int], writes: list[int], phase: Phase = "forward", block: int | None = 0) -> Kernel:
    return Kernel(name, "memory", phase, block, 1, 0.0, dict.fromkeys(reads, MB), dict.fromkeys(writes, MB), fuses=True)


def product(reads: list[int], writes: list[int], phase: Phase = "forward") -> Kernel:
    return Kernel("mm", "product", phase, 0, 1, 1e9, dict.fromkeys(reads, MB), dict.fromkeys(writes, MB))


def joined(kernels: list[Kernel]) -> dict[str, tuple[set[int], set[int]]]:
    return {one.name: (set(one.reads), set(one.writes)) for one in compiled(kernels)}


def test_a_chain_reads_its_inputs_and_writes_what_others_read():
    kernels = [memory("a", [0, 1], [2]), memory("b", [2], [3]), memory("c", [3, 1], [4]), product([4], [5])]
    assert joined(kernels) == {"a+b+c": ({0, 1}, {4}), "mm": ({4}, {5})}


def test_what_the_backward_pass_reads_is_written():
    kernels = [memory("a", [0], [1]), memory("b", [1], [2]), product([2], [3]), memory("c", [1, 3], [4], "backward")]
    assert joined(kernels)["a+b"] == ({0}, {1, 2})
    assert joined(kernels)["c"] == ({1, 3}, {4})


def test_nothing_is_joined_around_a_product():
    # `b` follows `a` both directly and through a product: a kernel of both would have to wait for itself.
    kernels = [memory("a", [0], [1]), product([1], [2]), memory("b", [1, 2], [3]), memory("c", [3], [4])]
    assert joined(kernels) == {"a": ({0}, {1}), "mm": ({1}, {2}), "b+c": ({1, 2}, {4})}


def test_what_is_written_in_place_is_read_once():
    kernels = [memory("a", [0, 1], [0]), memory("b", [0], [0]), memory("c", [0], [2])]
    [one] = compiled(kernels)
    # The second value of 0 is read inside alone, but it is 0's first value that comes from outside.
    assert (set(one.reads), set(one.writes)) == ({0, 1}, {2})


def test_what_repeats_values_is_computed_where_it_is_read():
    # The product of two vectors of scales is as large as the matrix that it scales after the product.
    outer = Kernel("outer", "memory", "forward", 0, 1, 0.0, {0: 10, 1: 10}, {2: MB}, fuses=True)
    kernels = [outer, product([3], [4]), memory("scaled", [4, 2], [5])]
    [first, second] = compiled(kernels)
    assert first.name == "mm"
    assert second.reads == {4: MB, 0: 10, 1: 10}
    assert second.writes == {5: MB}
    # A product cannot compute it.
    assert [one.name for one in compiled([outer, product([2], [4])])] == ["outer", "mm"]


def test_blocks_and_what_is_outside_of_them_stay_apart():
    kernels = [memory("a", [0], [1]), memory("b", [1], [2], block=1), memory("c", [2], [3], block=None)]
    kernels += [memory("d", [3], [4], block=None)]
    assert list(joined(kernels)) == ["a", "b", "c", "d"]


def test_a_kernel_takes_the_longest_of_three_times():
    gpu = Gpu("H200", 0, bandwidth=2e12, products=0.5, attention=0.4, attention_backward=0.2, sustained_bandwidth=0.5)
    roofline = Roofline(gpu, "bfloat16")
    rate = 989e12

    def kernel(kind: str, flops: float, size: int) -> Kernel:
        return Kernel("one", kind, "forward", flops=flops, reads={0: size}, count=2)  # type: ignore[arg-type]

    assert roofline.kernel(kernel("product", 1e12, 10)) == (pytest.approx(1e12 / (0.5 * rate)), "products")
    assert roofline.kernel(kernel("attention", 1e12, 10)) == (pytest.approx(1e12 / (0.4 * rate)), "attention")
    backward = kernel("attention backward", 1e12, 10)
    assert roofline.kernel(backward) == (pytest.approx(1e12 / (0.2 * rate)), "attention")
    assert roofline.kernel(kernel("product", 1e9, 10**9)) == (pytest.approx(1e-3), "memory traffic")
    assert roofline.kernel(kernel("memory", 0, 10)) == (2.5e-6, "launches")
    time = roofline.time([kernel("memory", 0, 10**9), kernel("memory", 0, 10)])
    assert time.num_kernels == 4
    assert time.seconds == pytest.approx(2e-3 + 5e-6)
    assert time.by_bound == {"memory traffic": pytest.approx(2e-3), "launches": 5e-6}
    assert time.bound == "memory traffic"


@pytest.mark.parametrize("name", GPUS)
def test_gpus_have_rates_below_their_data_sheets(name):
    gpu = named_gpu(name.lower().replace(" ", ""))
    assert gpu is GPUS[name]
    assert gpu.peak_flops("bfloat16") > gpu.peak_flops("float32") > 0
    assert 0 < gpu.attention_backward <= gpu.attention <= gpu.products <= 1
    assert 0 < gpu.sustained_bandwidth < 1


def test_an_unknown_gpu_is_a_sentence_with_the_known_names():
    with pytest.raises(UserError, match=r"`--gpu` must be one of A100, .*RTX 5090, but is 'H300'"):
        named_gpu("H300")

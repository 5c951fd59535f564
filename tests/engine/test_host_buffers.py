"""Copies of the state in host memory that is kept."""

from __future__ import annotations

import torch

from voxtral_dist.engine.host_buffers import HostBuffers


def test_a_copy_takes_the_memory_of_the_one_before_and_not_that_of_the_tensor() -> None:
    buffers, tensor = HostBuffers(), torch.arange(6.0).view(2, 3)
    first = buffers.copy("weight", tensor)
    tensor += 1
    assert torch.equal(first, tensor - 1)
    second = buffers.copy("weight", tensor)
    buffers.wait()
    assert torch.equal(second, tensor)
    assert second.data_ptr() == first.data_ptr() != tensor.data_ptr()
    assert buffers.num_bytes == tensor.nbytes


def test_another_key_shape_or_precision_has_memory_of_its_own() -> None:
    buffers = HostBuffers()
    first, other = buffers.copy("a", torch.ones(4)), buffers.copy("b", torch.zeros(4))
    assert torch.equal(first, torch.ones(4))
    longer, shorter = buffers.copy("a", torch.ones(8)), buffers.copy("b", torch.zeros(4, dtype=torch.bfloat16))
    assert (longer.shape, shorter.dtype) == ((8,), torch.bfloat16)
    assert buffers.num_bytes == longer.nbytes + shorter.nbytes
    assert torch.equal(other, torch.zeros(4))

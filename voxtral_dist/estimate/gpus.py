"""GPUs that the roofline knows by name: memory, bandwidth, and what training sustains of their data sheets' rates.

Peak rates of products are those of `voxtral_dist.distributed.devices`. The sustained fractions are assumptions, not yet
measured by this project, for products as large as Voxtral's (thousands of rows) in bfloat16:

    products     the best of all shapes reaches 0.86 of an A100's data sheet, 0.80 of an H100's and 1.08 of an RTX
                 4090's (github.com/mag-/gpu_benchmark); all shapes of a model, at steady power, reach less
                 In float8 the same fraction of a peak that is twice as high: with the casts of torchao's recipe, that
                 makes a Llama 3 8B with 8,192 positions on an H100 1.10 times as fast as bfloat16 by this roofline, and
                 torchtitan measured 1.10 (torchao's documentation)
    attention    FlashAttention 2, which torch's `sdpa` runs: at most 0.73 in the forward and 0.63 in the backward pass
                 of an A100 (Dao, arXiv 2307.08691), 0.35 to 0.4 of an H100 (Shah et al., arXiv 2407.08608); it has no
                 code for Blackwell, so a B200 is taken as fast as an H200
                 Of cards with little power, such as A10 and L4, less is expected
    bandwidth    large copies reach about 0.8 of HBM's data sheet, and 0.85 to 0.9 of GDDR6's

Links between the GPUs of a node, of data sheets too and in one direction: NVLink of the SXM boards of A100 (300 GB/s),
H100 and H200 (450) and B200 (900); 16 lanes of PCIe 4 (32 GB/s) or 5 (63) of the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from voxtral_dist.distributed.devices import known_peak_flops
from voxtral_dist.errors import UserError

# Bytes a second in one direction.
_PCIE_4, _PCIE_5 = 32e9, 63e9
_NVLINK_3, _NVLINK_4, _NVLINK_5 = 300e9, 450e9, 900e9


@dataclass(frozen=True)
class Gpu:
    """A GPU by the name of its data sheet.

    memory_bytes, bandwidth: of the data sheet; bytes, and bytes a second. products, attention, attention_backward:
    fractions of the dense peak that kernels of this kind sustain. sustained_bandwidth: fraction of `bandwidth`.
    launch_seconds: the least time of a kernel, however small. link_bandwidth: to other GPUs of its node, in one
    direction.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    products: float
    attention: float
    attention_backward: float
    sustained_bandwidth: float = 0.81
    launch_seconds: float = 2.5e-6
    link_bandwidth: float = _PCIE_4

    def peak_flops(self, precision: str) -> float:
        """Dense operations per second of the data sheet."""
        peak = known_peak_flops(self.name, precision)
        assert peak is not None, "every GPU of this table is in the table of devices"
        return peak

    @property
    def has_nvlink(self) -> bool:
        """Whether GPUs of a node are linked by NVLink."""
        return self.link_bandwidth > _PCIE_5

    @property
    def float8_peak_flops(self) -> float | None:
        """Dense operations per second of the data sheet in float8; None if the GPU has no such products."""
        return known_peak_flops(self.name, "float8")


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "A100", 80 * 10**9, 2.039e12, products=0.75, attention=0.6, attention_backward=0.5, link_bandwidth=_NVLINK_3
        ),
        Gpu(
            "A100 40GB",
            40 * 10**9,
            1.555e12,
            products=0.75,
            attention=0.6,
            attention_backward=0.5,
            link_bandwidth=_NVLINK_3,
        ),
        Gpu(
            "H100", 80 * 10**9, 3.35e12, products=0.66, attention=0.4, attention_backward=0.3, link_bandwidth=_NVLINK_4
        ),
        Gpu(
            "H200", 141 * 10**9, 4.8e12, products=0.66, attention=0.4, attention_backward=0.3, link_bandwidth=_NVLINK_4
        ),
        Gpu(
            "B200",
            180 * 10**9,
            8.0e12,
            products=0.66,
            attention=0.18,
            attention_backward=0.13,
            link_bandwidth=_NVLINK_5,
        ),
        Gpu("A10", 24 * 10**9, 0.6e12, 0.6, attention=0.5, attention_backward=0.4, sustained_bandwidth=0.87),
        Gpu("A40", 48 * 10**9, 0.696e12, 0.7, attention=0.55, attention_backward=0.45, sustained_bandwidth=0.87),
        Gpu("L4", 24 * 10**9, 0.3e12, 0.5, attention=0.4, attention_backward=0.35, sustained_bandwidth=0.87),
        Gpu("L40S", 48 * 10**9, 0.864e12, 0.65, attention=0.5, attention_backward=0.4, sustained_bandwidth=0.87),
        Gpu("RTX A6000", 48 * 10**9, 0.768e12, 0.7, attention=0.55, attention_backward=0.45, sustained_bandwidth=0.87),
        Gpu("RTX 6000 Ada", 48 * 10**9, 0.96e12, 0.65, attention=0.5, attention_backward=0.4, sustained_bandwidth=0.87),
        Gpu("RTX 3090", 24 * 10**9, 0.936e12, 0.9, attention=0.65, attention_backward=0.55, sustained_bandwidth=0.9),
        Gpu("RTX 4090", 24 * 10**9, 1.008e12, 0.9, attention=0.65, attention_backward=0.55, sustained_bandwidth=0.9),
        Gpu(
            "RTX 5090",
            32 * 10**9,
            1.792e12,
            0.9,
            attention=0.65,
            attention_backward=0.55,
            sustained_bandwidth=0.9,
            link_bandwidth=_PCIE_5,
        ),
    )
}


def named_gpu(name: str) -> Gpu:
    """The GPU of a name, in capital or small letters, with or without spaces.

    Raises:
        UserError: the name is not in the table.
    """
    found = {_plain(known): gpu for known, gpu in GPUS.items()}.get(_plain(name))
    if found is None:
        has_other_precision = known_peak_flops(name, "float16") and known_peak_flops(name, "bfloat16") is None
        reason = " It has no bfloat16, in which the recipes compute: see docs/gpus.md." if has_other_precision else ""
        raise UserError(
            f"`--gpu` must be one of {', '.join(GPUS)}, but is {name!r} instead.{reason} For another GPU, give "
            "--gpu-memory, and --mfu and --peak-tflops for an estimate of the time."
        )
    return found


def _plain(name: str) -> str:
    return "".join(name.upper().replace("-", " ").split())

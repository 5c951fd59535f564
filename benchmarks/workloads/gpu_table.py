"""Results of `gpu.py` as Markdown, ready for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from workloads.answers import OUT_OF_MEMORY
from workloads.gpu_contenders import CONTENDERS, Contender

NOT_MEASURED = "not yet measured"
_REASON_CHARACTERS = 60
_HEADER = (
    "contender, batch of 8",
    "clips per second",
    "seconds per step",
    "MFU",
    "device memory, reserved",
    "host memory",
    "predicted",
)


def markdown(result: Mapping[str, Any]) -> str:
    """The surroundings of a run, and its tables."""
    return "\n".join(
        [*_surroundings(result), "", *contender_table(result.get("contenders", {})), *_details(result), ""]
    )


def contender_table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for every contender, measured or not."""
    return _table(_HEADER, [_row(one, rows.get(name)) for name, one in CONTENDERS.items()])


def line(name: str, row: Mapping[str, Any]) -> str:
    """What is printed after a contender."""
    if "not_run" in row:
        return f"{name}: {row['not_run']} (after {row.get('process_seconds', 0.0):.0f} s)"
    return (
        f"{name}: {row['clips_per_second']:.1f} clips/s, {row['step_seconds']:.3f} s a step, MFU {row['mfu']:.2f}, "
        f"{_device_memory(row)} on the device, {row['added_host_bytes'] / 1e9:.1f} GB on the host, loss "
        f"{row['losses'][0]:.3f} to {row['losses'][-1]:.3f} ({row['process_seconds']:.0f} s of "
        f"{CONTENDERS[name].seconds:.0f} predicted)"
    )


def _surroundings(result: Mapping[str, Any]) -> Iterator[str]:
    device = result.get("device", {})
    versions = ", ".join(f"{name} {one}" for name, one in result.get("versions", {}).items() if one != "not installed")
    yield (
        f"{result.get('date')}; {device.get('name')}, {device.get('memory_bytes', 0) / 1e9:.0f} GB, driver "
        f"{device.get('driver')}, CUDA {device.get('cuda')}, cuDNN {device.get('cudnn')}; {versions}. Products of "
        f"{device.get('matmul_size')} x {device.get('matmul_size')} {device.get('matmul_precision')} matrices: "
        f"{device.get('matmul_flops_per_second', 0) / 1e12:.0f} TFLOP/s; copies: "
        f"{device.get('copied_bytes_per_second', 0) / 1e12:.1f} TB/s."
    )
    yield ""
    yield "```bash"
    yield str(result.get("command"))
    yield "```"


def _row(one: Contender, row: Mapping[str, Any] | None) -> list[str]:
    predicted = f"{one.clips_per_second} clips/s, {one.gigabytes} GB"
    if row is None:
        return [one.title, *[NOT_MEASURED] * 5, predicted]
    if "not_run" in row:
        host = f"{row['added_host_bytes'] / 1e9:.1f} GB" if row.get("added_host_bytes") else ""
        return [one.title, _reason(row["not_run"]), "", "", "", host, predicted]
    return [
        one.title,
        f"{row['clips_per_second']:.1f}",
        f"{row['step_seconds']:.3f}",
        f"{row['mfu']:.2f}" + (f" ({row['data_sheet_mfu']:.2f})" if row.get("data_sheet_mfu") else ""),
        _device_memory(row),
        f"{row['added_host_bytes'] / 1e9:.1f} GB",
        predicted,
    ]


def _device_memory(row: Mapping[str, Any]) -> str:
    peaks = row["whole_process"]
    if "peak_device_bytes" not in peaks:
        return "no device"
    return f"{peaks['peak_device_bytes'] / 1e9:.1f} GB, {peaks['peak_reserved_bytes'] / 1e9:.1f} GB"


def _reason(reason: str) -> str:
    if reason == OUT_OF_MEMORY:
        return reason
    last_line = reason.strip().splitlines()[-1] if reason.strip() else "no reason given"
    return last_line[:_REASON_CHARACTERS].replace("|", "/")


def _details(result: Mapping[str, Any]) -> Iterator[str]:
    attention = result.get("attention", {})
    if "gradients" in attention:
        yield ""
        yield from _table(
            ("attention", "kernel", "cuDNN allowed", "outputs finite", "gradients finite"),
            [_gradient_row(one) for one in attention["gradients"]],
        )
        yield ""
        yield from _table(
            ("two blocks, left padding", "cuDNN allowed", "gradients that are not finite"),
            [_model_row(one) for one in attention["language_model"]],
        )
        yield ""
        yield from _table(
            ("attention of a layer, both passes", "cuDNN allowed", "first of a length", "next"),
            [_new_shape_row(one) for one in attention["new_shapes"]],
        )
    kernels = result.get("contenders", {}).get("fsdp2_kernels", {}).get("kernels")
    if kernels:
        yield ""
        yield (
            f"One step of FSDP2: {kernels['step_seconds']:.3f} s, of which {kernels['kernel_seconds']:.3f} s in "
            f"{kernels['num_kernels']} kernels; the costliest:"
        )
        yield ""
        yield from _table(
            ("kernel", "calls", "ms"),
            [
                [f"`{one['name'][:80].replace('|', '/')}`", str(one["calls"]), f"{1e3 * one['seconds']:.1f}"]
                for one in kernels["costliest"]
            ],
        )


def _gradient_row(one: Mapping[str, Any]) -> list[str]:
    if "failed" in one:
        return [one["failed"][:200], "", "", "", ""]
    finite = all(one["gradients_are_finite"].values())
    return [
        f"T = {one['length']}, {'left padding' if one['left_padding'] else 'causal'}, scores near "
        f"{one['scores_near']:.0f}",
        one["backward"].removeprefix("ScaledDotProduct").removesuffix("Backward0"),
        _yes(one["cudnn"]),
        _yes(one["output_of_tokens_is_finite"]),
        _yes(finite) if finite else "no: " + ", ".join(k for k, v in one["gradients_are_finite"].items() if not v),
    ]


def _model_row(one: Mapping[str, Any]) -> list[str]:
    if "failed" in one:
        return [one["failed"][:200], "", ""]
    return [f"T = {one['length']}", _yes(one["cudnn"]), ", ".join(one["gradients_that_are_not_finite"]) or "none"]


def _new_shape_row(one: Mapping[str, Any]) -> list[str]:
    if "failed" in one:
        return [one["failed"][:200], "", "", ""]
    return [
        "left padding" if one["mask"] else "causal",
        _yes(one["cudnn"]),
        f"{1e3 * one['first_seconds']:.1f} ms",
        f"{1e3 * one['next_seconds']:.1f} ms",
    ]


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]

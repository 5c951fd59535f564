"""CUDA without a GPU: tensors that say `cuda:0` and compute on the CPU. A pytest plugin, loaded by `-p fake_cuda`.

torch decides by what a tensor says of its device. So values are right, mixtures of devices are refused as a GPU refuses
them, and each place where the host would wait for a GPU is recorded: values and shapes that depend on data, and copies
from memory that is not pinned.

torch asks for a device's guard once, so this module must be imported before torch: in a process of its own.

Not covered: kernels and their numerics, the choice of attention kernels, the device's memory, NCCL, streams (see
`fake_streams`), DTensor, `torch.compile`, and `parameter.data = ...`, which ZeRO needs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")


def load_device() -> Callable[[], None]:
    """Load the C++ part, which is built once for a version of torch; return what installs its guard again."""
    assert "torch" not in sys.modules, "torch has already looked for its devices"
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch_folder = Path(spec.origin).parent
    content = SOURCE.read_bytes() + (torch_folder / "version.py").read_bytes() + str(torch_folder).encode()
    name = f"fake-cuda-{os.getuid()}-{hashlib.sha256(content).hexdigest()[:16]}.so"
    library = Path(tempfile.gettempdir()) / name
    if not library.exists():
        _build(library, torch_folder)
    install_guard: Callable[[], None] = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL).install_guard
    install_guard()
    return install_guard


def _build(library: Path, torch_folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        paths = [f"-I{torch_folder}/include", f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib"]
        options = ["-O1", "-std=c++20", "-shared", "-fPIC", *paths]
        subprocess.run(["g++", *options, str(SOURCE), "-o", str(built), "-lc10", "-ltorch_cpu"], check=True)
        built.rename(library)


# Where it is installed, peft imports it, and its library for CPUs lacks what it looks up on a CUDA device.
sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
# transformers imports it, and it asks the driver what Triton can do.
sys.modules["torchao"] = None  # type: ignore[assignment]
install_guard = load_device()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten  # noqa: E402

CUDA = torch.device("cuda", 0)

# A build for CUDA has put its own in that place.
install_guard()
torch.cuda._lazy_init = lambda: None
torch.cuda.is_available = lambda: True
# It records no graphs, whatever torch was built for.
torch.version.cuda = None
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.is_bf16_supported = lambda including_emulation=True: True
# `torch.tensor(..., device="cuda")` makes a tensor on the CPU and moves it: the move has to be seen.
torch._C._set_only_lift_cpu_tensors(True)
# `module.to("cuda")` replaces parameters: data of another type cannot be assigned to them.
torch.__future__.set_overwrite_module_params_on_conversion(True)

aten = torch.ops.aten
# Operations whose result, or its shape, the host must read from the device.
_READ_BY_HOST = {
    aten._local_scalar_dense.default: "reads a value",
    aten.equal.default: "reads a value",
    aten.nonzero.default: "counts places",
    aten.masked_select.default: "counts places",
    aten._unique2.default: "counts places",
    aten.unique_consecutive.default: "counts places",
    aten.unique_dim.default: "counts places",
    aten.bincount.default: "counts places",
}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class DeviceLog:
    """What the host did with the device since the last `take`.

    waits: number of waits by place: the function of voxtral_dist that waits, and why it does.
    num_copies: copies between host and device that the host did not wait for.
    num_recorded: tensors whose memory was kept until another stream has used it.
    operations: number of operations on the device by name.
    """

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.num_copies = 0
        self.num_recorded = 0
        self.operations: Counter[str] = Counter()

    def add_wait(self, reason: str) -> None:
        """Record a wait of the function of voxtral_dist that runs."""
        self.waits[f"{_place()}: {reason}"] += 1

    def take(self) -> DeviceLog:
        """The record so far; a new one begins."""
        taken = DeviceLog()
        taken.__dict__.update(self.__dict__)
        self.__init__()  # type: ignore[misc]
        return taken


def _place() -> str:
    """The innermost function of voxtral_dist on the stack, such as `engine.loss.LossOfMicroBatch.__call__`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("voxtral_dist."):
            return f"{module.removeprefix('voxtral_dist.')}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "outside"


log = DeviceLog()


class CudaTensor(Tensor):
    """A tensor that says `cuda:0`; its values are in `real`, a tensor on the CPU."""

    real: Tensor
    __slots__ = ["real"]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[CudaTensor], real: Tensor) -> CudaTensor:
        made: CudaTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            layout=real.layout,
            device=CUDA,
            requires_grad=False,
        )
        made.real = real
        return made

    def tolist(self) -> Any:
        """The values, after a wait."""
        log.add_wait("reads values")
        return self.real.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CudaTensor({self.real!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _OnDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees operations without a tensor on the device, such as copies to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """Inside, tensors can be made on and copied to the device that this yields."""
    log.take()
    with _OnDevice():  # type: ignore[no-untyped-call]
        yield CUDA


def values(tensor: Tensor) -> Tensor:
    """The values of a tensor on any device, without a wait."""
    return tensor.real if isinstance(tensor, CudaTensor) else tensor


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, spec = tree_flatten((args, kwargs))
    on_device = [one for one in flat if isinstance(one, CudaTensor)]
    wanted = kwargs.get("device")
    target = None if wanted is None else torch.device(wanted).type
    if on_device or target == "cuda":
        log.operations[str(func)] += 1
    if func in (aten._to_copy.default, aten.copy_.default):
        _record_copy(func, args, kwargs, target)
    elif func is aten.record_stream.default:
        log.num_recorded += 1
        return None
    elif on_device:
        _refuse_mixture(func, flat)
        _record_wait(func, args, kwargs)
    plain_args, plain_kwargs = tree_unflatten([values(one) if isinstance(one, Tensor) else one for one in flat], spec)
    if target == "cuda":
        plain_kwargs["device"] = torch.device("cpu")
    made = func(*plain_args, **plain_kwargs)
    if target == "cpu" or not (on_device or target == "cuda"):
        return made
    # A tensor that is changed in place stays the object that it is.
    known = {id(one.real): one for one in on_device}
    return tree_map_only(Tensor, lambda one: known[id(one)] if id(one) in known else CudaTensor(one), made)


def _record_copy(func: Any, args: Any, kwargs: dict[str, Any], target: str | None) -> None:
    if func is aten._to_copy.default:
        source, is_async = args[0], bool(kwargs.get("non_blocking"))
        to_device = isinstance(source, CudaTensor) if target is None else target == "cuda"
        host_side = source
    else:
        to_device, source = isinstance(args[0], CudaTensor), args[1]
        is_async = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking"))
        host_side = source if to_device else args[0]
    if isinstance(source, CudaTensor) == to_device:
        return
    if not to_device and not (is_async and host_side.is_pinned()):
        # A tensor that is made for the copy is read next, and whoever reads it has to wait.
        log.add_wait("copies to the host")
    elif not is_async:
        log.add_wait("copies to the device and waits")
    elif not host_side.is_pinned():
        log.add_wait("copies from memory that is not pinned")
    else:
        log.num_copies += 1


def _refuse_mixture(func: Any, flat: list[Any]) -> None:
    """Raise as CUDA does; tensors of one value, and indices, may be on the CPU."""
    strangers = [one for one in flat if isinstance(one, Tensor) and not isinstance(one, CudaTensor) and one.dim()]
    if strangers and func not in _INDEXING:
        shapes = [tuple(one.shape) for one in strangers]
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but {shapes} are on the CPU")


def _record_wait(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if func in _READ_BY_HOST:
        log.add_wait(_READ_BY_HOST[func])
    elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        log.add_wait("counts places")
    elif func in _INDEXING:
        indices = [one for one in args[1] if one is not None]
        if any(one.dtype in (torch.bool, torch.uint8) for one in indices):
            log.add_wait("counts places")
        if not all(isinstance(one, CudaTensor) for one in indices):
            log.add_wait("copies indices to the device and waits")

"""Transforms of the waveform, built by class name from arguments that are checked before the run starts.

Classes are those of audiomentations, and our own. Folders of noises and room impulse responses are listed here, sorted
by name: audiomentations draws from the list, and lists them in the order of the file system, which differs between
machines.
"""

from __future__ import annotations

import difflib
import inspect
import random
import traceback
import typing
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import audiomentations
import soundfile
from audiomentations.core.transforms_interface import BaseWaveformTransform
from audiomentations.core.utils import SUPPORTED_EXTENSIONS, find_audio_files
from pydantic import ConfigDict, TypeAdapter, ValidationError

from voxtral_dist.config import Argument, AugmentationStep
from voxtral_dist.data.stored.audio import Waveform
from voxtral_dist.errors import UserError, first_line, lower_first

_FILE_ARGUMENTS = ("sounds_path", "ir_path")
# In larger folders, only about this many evenly spaced files are checked at the start.
_MAX_CHECKED_FILES = 10_000
_CHECKING_THREADS = 8
# At lower rates, the stretching library draws from a generator that cannot be seeded.
_MIN_REPRODUCIBLE_RATE = 0.5


class LengthAwareTimeStretch(audiomentations.TimeStretch):  # type: ignore[misc]  # it ships no types
    """Time stretching, slower (rate < 1) or faster at the same pitch, that adds no encoder window.

    The rate is uniform over the part of [min_rate, max_rate] that gives at most `max_samples` samples and
    `max_duration_seconds`; without such a rate, the audio stays as it is. `Augmentation` sets `max_samples` before each
    call; None sets no limit.

    Example:
        >>> import numpy as np
        >>> from voxtral_dist import LengthAwareTimeStretch
        >>> stretch = LengthAwareTimeStretch(min_rate=0.8, max_rate=1.25, p=1.0)
        >>> stretch.max_samples = 16_000
        >>> noise = np.random.default_rng(0).normal(0.0, 0.1, 16_000).astype(np.float32)
        >>> len(stretch(noise, sample_rate=16_000)) <= 16_000
        True
    """

    def __init__(
        self, min_rate: float = 0.8, max_rate: float = 1.25, p: float = 0.5, max_duration_seconds: float | None = None
    ) -> None:
        """A transform with a limit of its own beside that of the windows.

        Args:
            min_rate: slowest rate, from 0.5.
            max_rate: fastest rate, up to 10.
            p: probability that a clip is stretched.
            max_duration_seconds: longest audio that stretching makes, in seconds; longer clips are only played faster.
                None: windows are the only limit.

        Raises:
            ValueError: an argument is out of its range.
        """
        if min_rate < _MIN_REPRODUCIBLE_RATE:
            raise ValueError(f"min_rate must be >= {_MIN_REPRODUCIBLE_RATE}")
        if max_duration_seconds is not None and max_duration_seconds <= 0:
            raise ValueError("max_duration_seconds must be > 0")
        super().__init__(min_rate, max_rate, leave_length_unchanged=False, p=p)
        self.max_samples: int | None = None
        self.max_duration_seconds = max_duration_seconds

    def randomize_parameters(self, samples: Waveform, sample_rate: int) -> None:
        """Draw whether to stretch, and the rate."""
        super().randomize_parameters(samples, sample_rate)
        max_samples = self._max_samples(sample_rate)
        if max_samples is None or not self.parameters["should_apply"]:
            return
        min_rate = max(self.min_rate, len(samples) / max_samples)
        self.parameters["should_apply"] = min_rate <= self.max_rate
        self.parameters["rate"] = random.uniform(min_rate, self.max_rate)

    def _max_samples(self, sample_rate: int) -> int | None:
        if self.max_duration_seconds is None:
            return self.max_samples
        limit = max(1, int(self.max_duration_seconds * sample_rate))
        return limit if self.max_samples is None else min(limit, self.max_samples)


def build_transform(step: AugmentationStep) -> Any:
    """Build the transform of one step of the configuration.

    Raises:
        UserError: the class or an argument is unknown, a value is invalid, or audio files are missing or damaged.
    """
    transform_class = _known_class(step.name)
    arguments = _checked_arguments(transform_class, step)
    try:
        return transform_class(**arguments)
    except Exception as error:
        raise UserError(
            f"`train_data.augmentation`: `{step.name}` does not accept these arguments: {reason_of(error)}."
        ) from error


def reason_of(error: Exception) -> str:
    """The reason why a transform failed: its message, or else the assertion that failed."""
    text = first_line(error).removesuffix(".")
    if not text and isinstance(error, AssertionError):
        line = traceback.extract_tb(error.__traceback__)[-1].line or ""
        return f"`{line.removeprefix('assert ')}` must hold"
    return text or type(error).__name__


def _known_class(name: str) -> Any:
    known = {
        attribute: value
        for attribute, value in vars(audiomentations).items()
        # `Lambda` takes a function, which no configuration can give.
        if isinstance(value, type) and issubclass(value, BaseWaveformTransform) and attribute != "Lambda"
    }
    known[LengthAwareTimeStretch.__name__] = LengthAwareTimeStretch
    if name not in known:
        raise UserError(
            f"`train_data.augmentation`: there is no transform `{name}`{_hint(name, known)}; transforms are the "
            "classes of audiomentations, and `LengthAwareTimeStretch`."
        )
    return known[name]


def _hint(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f": did you mean `{nearest[0]}`?" if nearest else ""


def _checked_arguments(transform_class: Any, step: AugmentationStep) -> dict[str, Any]:
    """The arguments, converted to the types that the class declares, with folders expanded into files."""
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(transform_class.__init__).parameters.items()
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD
    }
    hints = typing.get_type_hints(transform_class.__init__)
    arguments: dict[str, Any] = {}
    for name, value in step.arguments.items():
        if name not in parameters:
            raise UserError(
                f"`train_data.augmentation`: `{step.name}` has no argument `{name}`{_hint(name, list(parameters))}; "
                f"its arguments are {', '.join(parameters)}."
            )
        default = parameters[name].default
        annotation = hints.get(name, type(default))
        arguments[name] = _typed(annotation, value, f"`train_data.augmentation`: `{name}` of `{step.name}`")
    for name in _FILE_ARGUMENTS:
        if name in arguments:
            arguments[name] = _audio_files(arguments[name], f"`train_data.augmentation`: `{name}` of `{step.name}`")
    _check_order(step.name, {name: parameter.default for name, parameter in parameters.items()} | arguments)
    return arguments


def _typed(annotation: Any, value: Argument | list[Argument], place: str) -> Any:
    if isinstance(value, bool) and annotation in (float, int):
        raise UserError(f"{place} must be a number, but is {value} instead.")
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        wanted = error.errors()[0]["msg"]
        raise UserError(f"{place}: {lower_first(wanted)}, but is {value!r} instead.") from error


def _check_order(name: str, arguments: dict[str, Any]) -> None:
    """Refuse a minimum above its maximum: some classes accept it and draw from the wrong range."""
    for low_name, low in arguments.items():
        high_name = low_name.replace("min_", "max_", 1)
        high = arguments.get(high_name)
        if low_name.startswith("min_") and _is_number(low) and _is_number(high) and low > high:
            raise UserError(
                f"`train_data.augmentation`: `{low_name}` of `{name}` must not be greater than its `{high_name}`, "
                f"but they are {low} and {high}."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _audio_files(places: Any, argument: str) -> list[str]:
    """The audio files in folders, sorted by name, and single files as given."""
    files: list[str] = []
    for place in places if isinstance(places, list | tuple) else [places]:
        path = Path(place).resolve()
        if path.is_dir():
            found = sorted(find_audio_files(path), key=_name_inside(path))
            if not found:
                raise UserError(
                    f"{argument}: the folder {place} contains no audio files ({', '.join(SUPPORTED_EXTENSIONS)})."
                )
            files += [str(file) for file in found]
        elif path.is_file() and path.name.lower().endswith(SUPPORTED_EXTENSIONS):
            files.append(str(path))
        else:
            raise UserError(f"{argument} must be a folder or an audio file, but {place} is neither.")
    _check_files(files, argument)
    return files


def _name_inside(folder: Path) -> Callable[[Path], str]:
    return lambda file: file.relative_to(folder).as_posix()


def _check_files(files: Sequence[str], argument: str) -> None:
    """Open files and read their last samples; at most `_MAX_CHECKED_FILES`, evenly spaced."""
    every = -(-len(files) // _MAX_CHECKED_FILES)
    with ThreadPoolExecutor(_CHECKING_THREADS) as pool:
        checked = files[::every]
        for file, trouble in zip(checked, pool.map(_trouble_of_file, checked), strict=True):
            if trouble is not None:
                raise UserError(f"{argument}: {file} {trouble}: remove it, or replace it by a valid WAV or FLAC file.")


def _trouble_of_file(path: str) -> str | None:
    try:
        with soundfile.SoundFile(path) as file:
            if file.frames <= 0:
                return "contains no audio"
            file.seek(file.frames - 1)
            return None if len(file.read(1)) == 1 else "is shorter than its header says"
    except (soundfile.SoundFileError, OSError) as error:
        reason = first_line(error).rpartition(": ")[2].removesuffix(".")
        return f"cannot be read ({reason or type(error).__name__})"

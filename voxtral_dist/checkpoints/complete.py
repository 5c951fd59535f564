"""`complete.json`: what a checkpoint holds, with the size and checksum of each of its files.

It is written last, so a folder without it is no checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import xxhash
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.errors import UserError, first_line
from voxtral_dist.output.counting import counted
from voxtral_dist.text.json_text import json_checksum

COMPLETE = "complete.json"
# DCP's own description of its files.
METADATA = ".metadata"
# 2: files have checksums. 1: they have sizes only.
FORMAT = 2
_READ_FORMATS = (1, 2)
_CHECKSUM = "checksum"
_BLOCK_BYTES = 8 * 2**20


class DamageError(UserError):
    """A checkpoint that cannot be loaded, because a file of it is missing or has other contents."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"The checkpoint {folder} is damaged: {reason}.")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _file_name(name: str) -> str:
    if Path(name).name != name or name == ".." or "\0" in name:
        raise ValueError("must be the name of a file in the checkpoint's folder")
    return name


FileName = Annotated[str, AfterValidator(_file_name)]


class StoredFile(_Part):
    """A file of a checkpoint.

    num_bytes: its size.
    xxh3: its checksum, XXH3 with 128 bits in hexadecimal; None in checkpoints of format 1.
    """

    num_bytes: int = Field(ge=0)
    xxh3: str | None = None

    @classmethod
    def of(cls, path: Path) -> StoredFile:
        """The size and checksum of a file. Directly after writing, it is read from the page cache."""
        return cls(num_bytes=path.stat().st_size, xxh3=_file_checksum(path))

    def damage(self, path: Path) -> str | None:
        """Why a file is not this one by its size; None if it is."""
        found = path.stat().st_size if path.is_file() else 0
        return (
            None if found == self.num_bytes else f"{path.name} has {counted(found, 'byte')} instead of {self.num_bytes}"
        )

    def damage_inside(self, path: Path) -> str | None:
        """Why a file is not this one by its contents, which are read; None if it is, or if no checksum is known."""
        if self.xxh3 is None or _file_checksum(path) == self.xxh3:
            return None
        return f"the contents of {path.name} are not those that were written (another checksum)"


def _with_sizes_only(value: Any) -> Any:
    """Files as format 2 has them; format 1 has their sizes."""
    if not isinstance(value, dict):
        return value
    return {name: {"num_bytes": one} if isinstance(one, int) else one for name, one in value.items()}


class CompleteCheckpoint(_Part):
    """The contents of `complete.json`.

    progress: totals of the run.
    data, model: see `identity`.
    shapes: full shape of each trained parameter.
    scalars: see `Engine.scalars`.
    files: every other file of the folder by name; in format 1 those of tensors only.
    layout: `whole` or `dcp`; see `files`.
    tensors: the file of each tensor, in the layout `whole`.
    test_sets: fingerprint of each test set of the run.
    """

    format: int = FORMAT
    progress: TrainProgress
    data: dict[str, Any]
    model: dict[str, Any]
    shapes: dict[str, tuple[Annotated[int, Field(ge=0)], ...]]
    scalars: dict[str, float]
    files: Annotated[dict[FileName, StoredFile], BeforeValidator(_with_sizes_only)]
    layout: Literal["whole", "dcp"]
    tensors: dict[str, str] = Field(default_factory=dict)
    test_sets: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _lists_all_files(self) -> Self:
        missing = {*self.tensors.values()} - self.files.keys()
        if self.layout == "dcp" and METADATA not in self.files:
            missing.add(METADATA)
        if missing:
            raise ValueError(f"the file {min(missing)} is not listed")
        if self.layout == "whole" and not self.tensors.keys() >= self.shapes.keys():
            raise ValueError(f"no file holds {min(self.shapes.keys() - self.tensors.keys())}")
        return self

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.num_bytes for file in self.files.values())

    def write(self, folder: Path) -> None:
        """Write `complete.json`, with a checksum of its own."""
        contents = self.model_dump(mode="json")
        text = json.dumps(contents | {_CHECKSUM: json_checksum(contents)}, indent=1)
        (folder / COMPLETE).write_text(text, encoding="utf-8")


def read_complete(folder: Path) -> CompleteCheckpoint:
    """Read and check `complete.json`.

    Raises:
        DamageError: it is not what was written.
        UserError: a newer version wrote it.
    """
    try:
        contents = json.loads((folder / COMPLETE).read_bytes())
        if not isinstance(contents, dict):
            raise ValueError("it is no object")
        found = contents.get("format")
        if isinstance(found, int) and found > FORMAT:
            raise UserError(
                f"The checkpoint {folder} has format {found}, but this version reads {FORMAT}: install the version of "
                "voxtral-dist that wrote it, or a newer one."
            )
        if found not in _READ_FORMATS:
            raise ValueError(f"it has the format {found!r}")
        checksum = contents.pop(_CHECKSUM, None)
        if found == FORMAT and checksum != json_checksum(contents):
            raise ValueError("it has another checksum")
        return CompleteCheckpoint.model_validate_json(json.dumps(contents), strict=True)
    except OSError as error:
        raise DamageError(folder, f"{COMPLETE} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamageError(folder, f"its {COMPLETE} cannot be read ({where}: {first['msg']})") from error
    except (ValueError, RecursionError) as error:
        raise DamageError(folder, f"its {COMPLETE} cannot be read ({first_line(error)})") from error


def _file_checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(block):
            digest.update(block[:num_bytes])
    return digest.hexdigest()

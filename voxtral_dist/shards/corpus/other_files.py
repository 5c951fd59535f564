"""Files of a corpus folder that are neither read nor known to be of no use: they may be audio of an unknown kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from voxtral_dist.shards.corpus.suffixes import AUDIO_FILE_SUFFIXES

# Texts that describe a corpus.
ABOUT = re.compile(r"(read.?me|licen[cs]e|copying|changelog|notice|version|requirements)", re.IGNORECASE)
# Files of these kinds lie in corpora, and hold no audio.
_KNOWN_SUFFIXES = frozenset(
    {
        *(".txt", ".lab", ".phn", ".wrd", ".textgrid", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml"),
        *(".md", ".rst", ".html", ".htm", ".pdf", ".jpg", ".jpeg", ".png", ".gif", ".svg", ".py", ".sh", ".log"),
        *(".cfg", ".ini", ".toml", ".md5", ".sha256", ".npy", ".npz", ".pt"),
    }
)
_NOT_OTHER = AUDIO_FILE_SUFFIXES | _KNOWN_SUFFIXES
_NUM_NAMED = 5


def is_other(name: str) -> bool:
    """Whether a file is neither audio nor text by its name, nor of a kind that corpora have beside them."""
    return Path(name).suffix.lower() not in _NOT_OTHER and not ABOUT.match(name)


def other_files(names: Mapping[Path, Mapping[str, str]]) -> list[Path]:
    """The other files, sorted. names: of all files of each folder, by their lower case."""
    return sorted(folder / name for folder, of_folder in names.items() for name in of_folder.values() if is_other(name))


def kinds_of(paths: Sequence[Path]) -> str:
    """The suffixes of files with their numbers, such as `3 .dss, 1 .xyz`."""
    counts = Counter(path.suffix.lower() or "without suffix" for path in paths).most_common()
    named = ", ".join(f"{count} {suffix}" for suffix, count in counts[:_NUM_NAMED])
    return f"{named} and {len(counts) - _NUM_NAMED} other kinds" if len(counts) > _NUM_NAMED else named


def by_stem(others: Iterable[Path]) -> dict[Path, str]:
    """Names of other files by their paths without suffix, in lower case; of several with one stem the first."""
    found: dict[Path, str] = {}
    for path in others:
        found.setdefault(stem_of(path), path.name)
    return found


def stem_of(path: Path) -> Path:
    """A path without its suffix, whose name is in lower case."""
    return path.with_name(path.stem.lower())


def conversion(name: str) -> str:
    """What to do with a file that may be audio."""
    return f"If that is audio, convert it by `ffmpeg -i {name} {Path(name).stem}.flac`."

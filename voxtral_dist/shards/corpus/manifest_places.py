"""Where the audio of a manifest is looked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.audio_places import places_below, places_of
from voxtral_dist.shards.corpus.options import CorpusOptions

# Folders of audio beside a table: Common Voice, its spontaneous speech, LJSpeech and its kin.
_AUDIO_FOLDERS = ("clips", "audios", "audio", "wavs", "wav")


def manifest_places(folder: Path, options: CorpusOptions, *, folders_first: bool) -> Callable[[str], tuple[str, ...]]:
    """The places of names in a manifest in `folder`: in it and its folders of audio, or in `audio_from` alone.

    Args:
        folder: that of the manifest.
        options: with `audio_from` and `names_only`.
        folders_first: whether the folders of audio come first, as the paths of Common Voice are names in `clips/`.

    Raises:
        UserError: `audio_from` is no folder.
    """
    if options.names_only:
        return lambda name: (name,)
    if options.audio_from is not None:
        audio_from = Path(options.audio_from).expanduser()
        if not audio_from.is_dir():
            raise UserError(f"The folder {audio_from} of `--audio-from` does not exist.")
        return partial(places_below, folder=audio_from)
    usual = tuple(folder / name for name in _AUDIO_FOLDERS if (folder / name).is_dir())
    return partial(places_of, bases=(*usual, folder) if folders_first else (folder, *usual))

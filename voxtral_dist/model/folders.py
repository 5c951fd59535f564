"""Whether a path can lead to a model, asked before anything is imported that takes seconds.

Only `refuse_unknown_name` uses the network.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from voxtral_dist.config import is_hub_name
from voxtral_dist.errors import UserError

_CONFIGS = ("config.json", "params.json")
_CHECKPOINT = "complete.json"
# Owners of repositories on the hub that folders here may be named after.
_OWNERS = ("mistralai",)
_MOST_NAMED = 3
_HUB_TIMEOUT_SECONDS = 10.0


def refuse_wrong_model(path: str, option: str = "model.path", *, takes_checkpoints: bool = False) -> None:
    """Refuse a path that is neither a model's folder nor a possible name on the hub, and name what was meant.

    Args:
        path: folder or hub name.
        option: what it was given as, for the message.
        takes_checkpoints: whether it may also be a checkpoint of a run.

    Raises:
        UserError: there is no such folder, or it is a run, its checkpoints, or adapters alone.
    """
    folder = Path(path)
    if not os.path.isdir(folder):  # noqa: PTH112  # `Path.is_dir` raises for a name that is too long
        if os.path.isfile(folder):  # noqa: PTH113
            raise UserError(f"`{option}`: {path} is a file: give the folder that holds the model.")
        _refuse_missing(path, option)
        return
    if any((folder / name).is_file() for name in _CONFIGS) or (takes_checkpoints and (folder / _CHECKPOINT).is_file()):
        return
    found = _instead(folder, takes_checkpoints)
    if found is not None:
        raise UserError(f"`{option}`: {path} {found}.")


def refuse_unknown_name(path: str, option: str = "model.path") -> None:
    """Refuse a name that is neither a folder here nor a model on the hub, which is asked once.

    The libraries that read models try each of their files for half a minute where the hub cannot be reached.

    Args:
        path: folder or hub name; only names that are not in the hub's cache are asked for.
        option: what it was given as, for the message.

    Raises:
        UserError: the hub has no such model that may be seen, or cannot be reached.
    """
    if os.path.isdir(path) or not is_hub_name(path):  # noqa: PTH112
        return
    import httpx2
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    found_none = f"`{option}`: there is no folder {path}, and the hub"
    try:
        # Offline, the libraries say so at once.
        if not constants.HF_HUB_OFFLINE and not _is_cached(path):
            HfApi().model_info(path, timeout=_HUB_TIMEOUT_SECONDS)
    except HFValidationError as error:
        raise UserError(f"{found_none} allows no such name.") from error
    except httpx2.TransportError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{found_none}, which may have a model of this name, cannot be reached: {reason}.") from error
    except GatedRepoError:
        return
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{found_none} has no model of this name that you may see: correct it, or log in by `hf auth login`."
        ) from error
    except HfHubHTTPError:
        # It may be well again when it is asked for files, which is tried several times.
        return


def _refuse_missing(path: str, option: str) -> None:
    parent = _nearest_parent(path)
    near = _near(path, parent)
    if not is_hub_name(path):
        instead = f"did you mean {near}?" if near else "give the folder of a model or its name on the hub (USER/NAME)."
        raise UserError(f"`{option}`: the folder {path} does not exist: {instead}")
    owner = Path(path).parent
    if owner.is_dir() and str(owner) not in _OWNERS and not _is_cached(path):
        raise UserError(
            f"`{option}`: the folder {path} does not exist; {owner} holds {_names(owner)}"
            f"{f': did you mean {near}?' if near else '.'} A repository of this name on the hub must be fetched first: "
            f"`hf download {path}`."
        )


def _instead(folder: Path, takes_checkpoints: bool) -> str | None:
    """What a folder without a model is, and what to give in its place; None if it is nothing known."""
    run = folder.parent if folder.name == "checkpoints" else folder
    if (folder / _CHECKPOINT).is_file():
        return "is a checkpoint, not a model: write its model by `voxtral-dist export`, or give the run's export/"
    if (run / "config.yaml").is_file() and (run / "metrics.jsonl").is_file():
        what = "is a run, not a model" if run == folder else "holds the checkpoints of a run"
        return f"{what}: {_models_of(run, takes_checkpoints)}"
    if (folder / "adapter_config.json").is_file():
        export = folder.parent / "export"
        whole = f"give {export}" if export.is_dir() else "give the full model that the run exported beside it"
        return f"holds adapters without their model: {whole}"
    return None


def _models_of(run: Path, takes_checkpoints: bool) -> str:
    if (run / "export").is_dir():
        return f"give {run / 'export'}"
    checkpoints = sorted(path for path in run.glob("checkpoints/step-*") if (path / _CHECKPOINT).is_file())
    if takes_checkpoints and checkpoints:
        return f"it has exported no model yet: give its newest checkpoint, {checkpoints[-1]}"
    if checkpoints:
        return f"it has exported no model yet: write one by `voxtral-dist export {run} FOLDER`"
    return "it has neither exported a model nor saved a checkpoint"


def _nearest_parent(path: str) -> Path:
    return next(parent for parent in [*Path(path).parents, Path("/")] if os.path.isdir(parent))  # noqa: PTH112


def _near(path: str, parent: Path) -> str | None:
    """A folder beside the missing one with nearly its name, and with the rest of its path."""
    first, *rest = Path(path).relative_to(parent).parts
    for name in difflib.get_close_matches(first, _folders(parent), n=_MOST_NAMED, cutoff=0.6):
        if os.path.isdir((parent / name).joinpath(*rest)):  # noqa: PTH112
            return str((parent / name).joinpath(*rest))
    return None


def _folders(parent: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(parent) if entry.is_dir())
    except OSError:
        return []


def _names(parent: Path) -> str:
    names = _folders(parent)
    more = ", ..." if len(names) > _MOST_NAMED else ""
    return f"{', '.join(names[:_MOST_NAMED])}{more}" if names else "no folders"


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(name, file), str) for file in _CONFIGS)

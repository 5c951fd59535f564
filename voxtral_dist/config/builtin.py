"""Recipes and DeepSpeed files that come with the package, found by their names."""

from __future__ import annotations

from pathlib import Path

from voxtral_dist.errors import UserError

_PACKAGE = Path(__file__).parent.parent
_CHECKOUT = _PACKAGE.parent


def recipes() -> dict[str, Path]:
    """The recipes by name, such as `voxtral_mini_lora`."""
    return _files("recipes", _CHECKOUT / "launch" / "recipes", ".yaml")


def deepspeed_files() -> dict[str, Path]:
    """The DeepSpeed files by name, such as `zero2`."""
    return _files("ds_configs", _CHECKOUT / "ds_configs", ".json")


def recipe_or_file(path: Path) -> Path:
    """A configuration by its path, or by the name of a recipe where there is no such file."""
    return path if path.exists() else recipes().get(str(path), path)


def deepspeed_file(path: Path) -> Path:
    """A DeepSpeed file by its path, or by its name: `zero2`, or `ds_configs/zero2.json` outside of a checkout."""
    if path.exists() or path.parent not in (Path(), Path("ds_configs")) or path.suffix not in ("", ".json"):
        return path
    return deepspeed_files().get(path.stem, path)


def refuse_missing_deepspeed_file(path: Path) -> None:
    """Refuse a DeepSpeed file that neither a path nor a name of the package leads to.

    Raises:
        UserError: there is none.
    """
    if not deepspeed_file(path).exists():
        raise UserError(f"`engine.deepspeed`: {path} does not exist; the package has {', '.join(deepspeed_files())}.")


def summary(recipe: Path) -> str:
    """What a recipe is for: the first sentence of the comment that it begins with."""
    words: list[str] = []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        # A command follows what it is for.
        if not line.startswith("# ") or line.startswith("#  "):
            break
        words += line.removeprefix("# ").split()
    sentence, _, _ = " ".join(words).partition(". ")
    return sentence.rstrip(":.")


def _files(packaged: str, in_checkout: Path, suffix: str) -> dict[str, Path]:
    """The files of a folder of the wheel; a checkout has them where its users read them."""
    folder = _PACKAGE / packaged
    return {path.stem: path for path in sorted((folder if folder.is_dir() else in_checkout).glob(f"*{suffix}"))}

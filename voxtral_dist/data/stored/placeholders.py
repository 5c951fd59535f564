"""Small files that stand for others: pointers of Git LFS, and notes of a Mac's Finder."""

from __future__ import annotations

# Enough of a file to know both.
HEAD_BYTES = 64
_LFS = b"version https://git-lfs.github.com/spec/"
_APPLE_DOUBLE = (b"\x00\x05\x16\x07", b"\x00\x05\x16\x00")


def placeholder_reason(head: bytes) -> str | None:
    """Why the first bytes of a file show that its contents are elsewhere, as a predicate; None for other files."""
    if head.startswith(_LFS):
        return "is a Git LFS pointer instead of the file: run `git lfs pull` in its repository"
    if head.startswith(_APPLE_DOUBLE):
        return "is a note of a Mac's Finder (AppleDouble) instead of the file"
    return None

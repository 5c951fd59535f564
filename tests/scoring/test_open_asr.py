"""The Open ASR Leaderboard's normalizer is run from a clone, and results name its commit."""

import hashlib
from pathlib import Path

import pytest

from voxtral_dist.errors import RankError, UserError
from voxtral_dist.scoring.normalizer import normalizer, normalizer_of_label

COMMIT = "0c261bfdc484c13bd2fabf8b4b5d96410ce40a87"
# As in the repository: the package imports more than scoring needs, and its modules import each other.
SOURCES = {
    "__init__.py": "import a_library_that_is_not_installed\n",
    "tables.py": "names = {'allan': 'allen'}\n",
    "normalizer.py": """from .tables import names


class EnglishTextNormalizer:
    def __call__(self, text):
        if "cannot" in text:
            raise ValueError("no")
        return " ".join(names.get(word, word) for word in text.lower().split())
""",
}


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "clone"
    (folder / "normalizer").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (folder / ".git" / "packed-refs").write_text(f"# pack-refs\n{COMMIT} refs/heads/main\n")
    for name, source in SOURCES.items():
        (folder / "normalizer" / name).write_text(source)
    monkeypatch.setenv("OPEN_ASR_LEADERBOARD", str(folder))
    return folder


def test_its_function_is_applied_and_its_label_tells_commit_and_contents(clone):
    used = normalizer(f"open_asr_en@{COMMIT[:8]}", ("no_punctuation",))
    digest = hashlib.sha256("".join(SOURCES[name] for name in sorted(SOURCES)).encode()).hexdigest()[:12]
    assert used.apply("Allan,  HELLO") == "allen hello"
    assert used.label == f"no_punctuation+open_asr_en-{COMMIT[:12]}-{digest}"
    assert normalizer_of_label(used.label).label == used.label
    with pytest.raises(RankError, match="failed on the text 'it cannot': ValueError: no"):
        used.apply("it cannot")


def test_a_change_of_its_files_is_another_version(clone):
    before = normalizer("open_asr_en")
    (clone / "normalizer" / "tables.py").write_text("names = {'hello': 'hi'}\n")
    after = normalizer("open_asr_en")
    assert (before.apply("Hello"), after.apply("Hello")) == ("hello", "hi")
    assert before.label != after.label


def test_a_detached_head_is_read_and_an_unpacked_branch(clone):
    (clone / ".git" / "HEAD").write_text(f"{'1' * 40}\n")
    assert normalizer("open_asr_en@1111111").version.startswith("111111111111-")
    (clone / ".git" / "HEAD").write_text("ref: refs/heads/other\n")
    (clone / ".git" / "refs" / "heads").mkdir(parents=True)
    (clone / ".git" / "refs" / "heads" / "other").write_text(f"{'2' * 40}\n")
    assert normalizer("open_asr_en").version.startswith("222222222222-")


def test_another_commit_and_a_missing_clone_are_refused_with_the_commands(clone, monkeypatch):
    with pytest.raises(UserError, match=f"is at commit {COMMIT[:12]}: run `git -C .* checkout abcdef0`"):
        normalizer("open_asr_en@abcdef0")
    (clone / "normalizer" / "tables.py").write_text("names = {\n")
    with pytest.raises(UserError, match=r"cannot be imported \(SyntaxError"):
        normalizer("open_asr_en")
    monkeypatch.setenv("OPEN_ASR_LEADERBOARD", str(clone / "nowhere"))
    with pytest.raises(UserError, match=r"holds no normalizer/normalizer\.py"):
        normalizer("open_asr_en")
    monkeypatch.delenv("OPEN_ASR_LEADERBOARD")
    with pytest.raises(UserError, match=r"it needs a clone.*git clone https://.*/open_asr_leaderboard"):
        normalizer("open_asr_en@abcdef0")

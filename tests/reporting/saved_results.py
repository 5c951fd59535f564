"""Runs and folders of results as evaluations leave them, without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from voxtral_dist.config import RunConfig, dump_config, load_config
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.data.stored.utterance import StoredUtterance
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.scoring.normalizer import normalizer
from voxtral_dist.scoring.result_files import write_results
from voxtral_dist.scoring.results import Measurements, score_test_set
from voxtral_dist.scoring.utterances import DecodedUtterance, ScoredUtterance, score_utterance

from runs import run_config

BASIC = normalizer("basic")
NUM_STEPS = 8
EVERY_STEPS = 4


def utterance(number: int, reference: str, hypothesis: str, **chosen: Any) -> ScoredUtterance:
    """An utterance scored by the default normalizer."""
    known = {"key": f"key-{number}", "language": "en", "duration_seconds": 1.5, "hit_limit": False} | chosen
    texts = {"reference": reference, "hypothesis": hypothesis}
    return score_utterance(DecodedUtterance(utterance_id=number, **texts, **known), BASIC)


def write_set(folder: Path, name: str, utterances: Sequence[ScoredUtterance], slices: tuple[str, ...] = ()) -> Path:
    """Write `NAME.json` and `NAME.jsonl`, and return the folder."""
    result = score_test_set(utterances, BASIC, grouping=Grouping(slices), measured=Measurements(2.0, 0.5))
    write_results(folder, name, utterances, result)
    return folder


def stored_utterances(shards: Path) -> list[StoredUtterance]:
    """All utterances of a set."""
    index, storage = read_index([str(shards)]), Storage()
    return [index.parse(number, storage.read(index.span(number))) for number in range(len(index))]


def misheard(shards: Path, num_words: int) -> list[ScoredUtterance]:
    """The utterances of a set with up to `num_words` wrong words at the start; every fifth has none."""
    return [
        utterance(
            number,
            stored.text,
            " ".join(["x"] * min(num_words, number % 5) + stored.text.split()[min(num_words, number % 5) :]),
            key=stored.key,
            language=stored.language,
            fields={"speaker": stored.fields["speaker"]},
        )
        for number, stored in enumerate(stored_utterances(shards))
    ]


def write_run(run_dir: Path, shards: Path, wrong_words: Sequence[int] = (3, 2, 1)) -> Path:
    """Write a run of `NUM_STEPS` steps that evaluated two sets at its start, in the middle and at its end."""
    evaluation = {"test_sets": {"speech": {"shards": str(shards)}, "again": {"shards": str(shards)}}}
    config = run_config(run_dir, Path("model"), shards, num_steps=NUM_STEPS, evaluation=evaluation)
    rows: list[dict[str, Any]] = [
        {
            "kind": "train",
            "step": step,
            "loss": 2.0 / step,
            "learning_rate": 1e-3,
            "grad_norm": None if step == 3 else 1.0,
        }
        for step in range(1, NUM_STEPS + 1)
    ]
    for place, num_words in enumerate(wrong_words):
        step = place * EVERY_STEPS
        for name in evaluation["test_sets"]:
            utterances = misheard(shards, num_words)
            folder = write_set(run_dir / "evaluations" / f"step-{step:07d}", name, utterances, ("speaker",))
            score = score_of(folder, name)
            rows.append({"kind": "evaluation", "step": step, "name": name, "wer": score["wer"], "cer": score["cer"]})
    (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return run_dir


def select_by_cer(run_dir: Path) -> None:
    """Let the configuration of a run select checkpoints by the CER of its first test set."""
    path = run_dir / "config.yaml"
    tree = load_config(path).model_dump()
    tree["evaluation"] |= {"every_steps": EVERY_STEPS, "selection": {"test_set": "speech", "metric": "cer"}}
    path.write_text(dump_config(RunConfig.model_validate(tree)), encoding="utf-8")


def score_of(folder: Path, name: str) -> dict[str, Any]:
    """The contents of `NAME.json`."""
    score: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return score


_VOID = frozenset({"meta", "link", "br", "path", "circle"})


@dataclass
class Element:
    """A tag with its contents."""

    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text inside."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()

    def all(self, tag: str | None = None, class_: str | None = None) -> list[Element]:
        """Elements inside with this tag and class, in order."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if tag in (None, child.tag) and (class_ is None or class_ in child.classes):
                    found.append(child)
                found += child.all(tag, class_)
        return found


class _Tree(HTMLParser):
    """Refuses tags that are not closed in the order in which they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("document", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(page: Path) -> Element:
    """The tree of a page; its tags must be balanced."""
    tree = _Tree()
    tree.feed(page.read_text(encoding="utf-8"))
    tree.close()
    assert len(tree.open) == 1, f"never closed: {[element.tag for element in tree.open[1:]]}"
    return tree.open[0]


def words_of(paragraph: Element) -> list[tuple[str, str | None, str | None]]:
    """The aligned words that a card shows."""
    found: list[tuple[str, str | None, str | None]] = []
    for child in paragraph.children:
        if not isinstance(child, Element):
            continue
        if "substitution" in child.classes:
            reference, hypothesis = child.all()
            found.append(("substitute", reference.text, hypothesis.text))
        else:
            found.append(
                {
                    "span": ("equal", child.text, child.text),
                    "del": ("delete", child.text, None),
                    "ins": ("insert", None, child.text),
                }[child.tag]
            )
    return found

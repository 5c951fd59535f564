"""Speak the demo's corpus: digits and short commands in English and German, with test voices never heard in training.

    python launch/demo/corpus.py OUT_DIR --seed 0

writes `OUT_DIR/{train,test}.jsonl`, one JSON object a line, and `OUT_DIR/{train,test}/*.flac` (16 kHz, mono).
The same seed gives the same bytes, whatever the number of processes.
"""

import argparse
import json
import multiprocessing
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from speech import Manner, speech_engine

SAMPLING_RATE = 16_000

DIGITS = {
    "en": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "de": ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"],
}
COMMANDS = {
    "en": [f"turn {state} the {thing}" for thing in ("lamp", "radio", "heater", "fan") for state in ("on", "off")],
    "de": [f"{thing} {state}" for thing in ("lampe", "radio", "heizung", "musik") for state in ("an", "aus")],
}
COMMAND_SHARE = 0.25
NUM_DIGITS_WEIGHTS = {1: 3, 2: 3, 3: 2, 4: 1}
WORDS_PER_MINUTE = (190, 260)
PITCH = (30, 70)

TEST_VARIANTS = ["Annie", "Lee", "Michael", "belinda", "f3", "grandpa", "john", "m4", "m7", "steph"]
TRAIN_VARIANTS = [
    "Alex",
    "Alicia",
    "Andrea",
    "Andy",
    "Denis",
    "Diogo",
    "Gene",
    "Henrique",
    "Hugo",
    "Jacky",
    "Mario",
    "Mike",
    "Nguyen",
    "RicishayMax",
    "Storm",
    "Tweaky",
    "adam",
    "anika",
    "announcer",
    "antonio",
    "aunty",
    "benjamin",
    "boris",
    "caleb",
    "david",
    "ed",
    "edward",
    "f1",
    "f2",
    "f4",
    "f5",
    "grandma",
    "gustave",
    "ian",
    "iven2",
    "iven3",
    "kaukovalta",
    "linda",
    "m1",
    "m2",
    "m3",
    "m5",
    "m6",
    "m8",
    "marcelo",
    "max",
    "michel",
    "miguel",
    "mike2",
    "norbert",
    "pablo",
    "paul",
    "pedro",
    "quincy",
    "rob",
    "robert",
    "sandro",
    "shelby",
    "steph2",
    "travis",
    "victor",
    "zac",
]


@dataclass(frozen=True)
class Utterance:
    """Text, voice and manner of one utterance; `audio_path` is relative to the corpus."""

    audio_path: str
    text: str
    language: str
    manner: Manner


def main() -> None:
    """Synthesize both splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-train", type=int, default=12_000, help="utterances to learn from")
    parser.add_argument("--num-test", type=int, default=240, help="utterances to be judged by")
    parser.add_argument("--num-processes", type=int, default=2)
    arguments = parser.parse_args()
    splits = (("train", arguments.num_train, TRAIN_VARIANTS), ("test", arguments.num_test, TEST_VARIANTS))
    for split, num_utterances, variants in splits:
        utterances = list(plan_split(split, num_utterances, variants, arguments.seed))
        write_split(arguments.out_dir, split, utterances, arguments.num_processes)


def plan_split(split: str, num_utterances: int, variants: list[str], seed: int) -> Iterator[Utterance]:
    """Plan half English, half German utterances, drawn independently: a larger split begins with the smaller one."""
    for index in range(num_utterances):
        draw = random.Random(f"{seed}/{split}/{index}")
        language = ("en", "de")[index % 2]
        manner = draw_manner(draw, language, variants)
        yield Utterance(f"{split}/{index:05d}.flac", draw_text(draw, language), language, manner)


def draw_manner(draw: random.Random, language: str, variants: list[str]) -> Manner:
    """Draw a voice, a rate and a pitch."""
    return Manner(f"{language}+{draw.choice(variants)}", draw.randint(*WORDS_PER_MINUTE), draw.randint(*PITCH))


def draw_text(draw: random.Random, language: str) -> str:
    """Draw a command, or one to four digits, as lower-case words."""
    if draw.random() < COMMAND_SHARE:
        return draw.choice(COMMANDS[language])
    (num_digits,) = draw.choices(list(NUM_DIGITS_WEIGHTS), weights=list(NUM_DIGITS_WEIGHTS.values()))
    return " ".join(draw.choices(DIGITS[language], k=num_digits))


def write_split(out_dir: Path, split: str, utterances: list[Utterance], num_processes: int) -> None:
    """Write audio files and a manifest in the order of `utterances`."""
    (out_dir / split).mkdir(parents=True, exist_ok=True)
    by_voice: dict[str, list[Utterance]] = defaultdict(list)
    for utterance in utterances:
        by_voice[utterance.manner.voice].append(utterance)
    jobs = [(out_dir, spoken_by_one) for spoken_by_one in by_voice.values()]
    # A fresh process for each voice: what eSpeak NG says depends on what the process said before.
    with multiprocessing.get_context("fork").Pool(num_processes, maxtasksperchild=1) as pool:
        durations = {path: seconds for part in pool.starmap(speak_all, jobs, chunksize=1) for path, seconds in part}
    with (out_dir / f"{split}.jsonl").open("w", encoding="utf-8") as manifest:
        for utterance in utterances:
            manifest.write(json.dumps(manifest_row(utterance, durations), ensure_ascii=False) + "\n")


def speak_all(out_dir: Path, utterances: list[Utterance]) -> list[tuple[str, float]]:
    """Write the audio and return each path with its seconds."""
    return [(utterance.audio_path, speak_one(out_dir, utterance)) for utterance in utterances]


def speak_one(out_dir: Path, utterance: Utterance) -> float:
    """Write one FLAC file of int16 at 16 kHz and return its seconds."""
    engine = speech_engine()
    samples = engine.say(utterance.text, utterance.manner)
    samples = soxr.resample(samples, engine.sampling_rate, SAMPLING_RATE)
    soundfile.write(out_dir / utterance.audio_path, samples.astype(np.int16), SAMPLING_RATE, subtype="PCM_16")
    return len(samples) / SAMPLING_RATE


def manifest_row(utterance: Utterance, durations: dict[str, float]) -> dict[str, str | float]:
    """Format one line of the manifest."""
    return {
        "audio_filepath": utterance.audio_path,
        "text": utterance.text,
        "lang": utterance.language,
        "speaker": utterance.manner.voice,
        "duration": round(durations[utterance.audio_path], 4),
    }


if __name__ == "__main__":
    main()

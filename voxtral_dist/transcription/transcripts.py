"""Transcripts of recordings, segment by segment, and subtitles made from them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from voxtral_dist.text.steps import collapse_spaces

TranscriptFormat = Literal["txt", "json", "srt"]
# A subtitle is shown for as long as its segment lasts, and nobody reads a minute of speech at once.
SUBTITLE_SECONDS = 10.0


@dataclass(frozen=True)
class Segment:
    """A part of a recording and its text, which is empty for silence.

    Attributes:
        start_seconds: from the beginning of the recording.
        end_seconds: from the beginning of the recording.
        text: the transcript, or the answer to an instruction.
        detected_language: ISO 639-1 code that the model named before the text; None where it named none.
        num_tokens: generated tokens.
        hit_limit: whether the limit of tokens ended the text, and not the model.

    Example:
        >>> from voxtral_dist import Segment
        >>> segment = Segment(0.0, 1.5, "Hello, world.", detected_language="en", num_tokens=5)
    """

    start_seconds: float
    end_seconds: float
    text: str
    detected_language: str | None = None
    num_tokens: int = 0
    hit_limit: bool = False


@dataclass(frozen=True)
class RecordingTranscript:
    """The transcript of a recording.

    Attributes:
        segments: the parts of the recording, in order, silence included.

    Example:
        >>> from voxtral_dist import RecordingTranscript, Segment
        >>> transcript = RecordingTranscript((Segment(0.0, 1.5, "Hello,", "en"), Segment(1.5, 2.25, "world.", "en")))
        >>> transcript.text, transcript.detected_language
        ('Hello, world.', 'en')
        >>> print(transcript.to_srt(), end="")
        1
        00:00:00,000 --> 00:00:01,500
        Hello,
        <BLANKLINE>
        2
        00:00:01,500 --> 00:00:02,250
        world.
        <BLANKLINE>
    """

    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """The text of the whole recording."""
        return " ".join(segment.text for segment in self.segments if segment.text)

    @property
    def detected_language(self) -> str | None:
        """The language that the model named for most segments; None where it named none."""
        named = Counter(segment.detected_language for segment in self.segments if segment.detected_language)
        return named.most_common(1)[0][0] if named else None

    def to_srt(self) -> str:
        """SubRip subtitles: a numbered cue for each segment with text."""
        spoken = [segment for segment in self.segments if segment.text]
        return "".join(f"{number}\n{_cue(segment)}\n\n" for number, segment in enumerate(spoken, 1))


def _cue(segment: Segment) -> str:
    times = f"{_timestamp(segment.start_seconds)} --> {_timestamp(segment.end_seconds)}"
    # A blank line inside the text would end the cue.
    return f"{times}\n{collapse_spaces(segment.text)}"


def _timestamp(seconds: float) -> str:
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{milliseconds // 1000:02d},{milliseconds % 1000:03d}"

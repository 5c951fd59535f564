"""What a model is asked about recordings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from voxtral_dist.data.examples.prompting import context_text
from voxtral_dist.errors import UserError
from voxtral_dist.text.languages import language_code, warn_of_shared_code
from voxtral_dist.text.word_list import WordList


@dataclass(frozen=True)
class Question:
    """A request to transcribe, or an instruction.

    Attributes:
        language: the speech's ISO 639-1 code, its locale or its English name, stored as the code; None lets the model
            detect it.
        context: text in the prompt: words that are likely, what was said before; see `context_text`.
        instruction: asked instead of a transcript, about each recording as a whole.

    Raises:
        UserError: the language is unknown, or an instruction comes with a language or a context.

    Example:
        >>> from voxtral_dist import Question
        >>> in_english = Question(language="en", context="Keywords: Siobhan, Xiaomi")
        >>> summary = Question(instruction="Summarize this call in one sentence.")
    """

    language: str | None = None
    context: str = ""
    instruction: str | None = None

    def __post_init__(self) -> None:
        warn_of_shared_code(self.language)
        try:
            object.__setattr__(self, "language", language_code(self.language))
        except ValueError as error:
            raise UserError(f"The question {error}. Without a language, the model detects it.") from error
        if self.instruction is not None and (self.language or self.context):
            raise UserError(
                "An instruction replaces the request to transcribe, which alone has a language and a context: put them "
                "into the instruction."
            )

    @classmethod
    def of(
        cls, language: str | None, words: Path | None, previous_text: str | None, instruction: str | None
    ) -> Question:
        """The question that the options of `voxtral-dist transcribe` ask, with every word of a file in its context.

        Raises:
            UserError: the file cannot be read, or the options exclude each other.
        """
        if instruction is not None and (language or words or previous_text):
            raise UserError(
                "`--instruction` replaces the request to transcribe: remove `--language`, `--words` and "
                "`--previous-text`, and put what they say into the instruction."
            )
        listed = WordList.read(words, "--words").entries if words else ()
        return cls(language, context_text(listed, previous_text or ""), instruction)

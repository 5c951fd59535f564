"""Which texts are written with spaces between words."""

import pytest

from voxtral_dist.text.scripts import has_spaces_between_words


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("Hello", "zh", False),
        ("你好", "en", True),
        ("你好，世界", None, False),
        ("こんにちは、せかい", None, False),
        ("スーパー", None, False),
        ("สวัสดีครับ", None, False),
        ("ສະບາຍດີ", None, False),
        ("សួស្តី", None, False),
        ("မင်္ဂလာပါ", None, False),
        ("안녕하세요 여러분", None, True),
        ("यह हिन्दी है", None, True),
        ("我用 Python", None, True),
        ("", None, True),
        ("... 12", None, True),
        ("𠀋𠂢", None, False),
    ],
)
def test_the_language_tells_or_else_the_script(text, language, expected):
    assert has_spaces_between_words(text, language) is expected

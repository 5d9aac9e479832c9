import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.data.prepare.document import Document, Dropped
from t5x_like.data.prepare.stages.text import MaskPersonalData, NormalizeText, normalize
from t5x_like.errors import UserError


def run(stage, text):
    result = stage.process(Document(text, "place", "source"))
    return result if isinstance(result, Dropped) else result.text


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("\r\n\t\v\0\u00a0\ufeff e\u0301"), max_size=50))
def test_normal_form(text):
    normal = normalize(text)
    assert normalize(normal) == normal
    assert unicodedata.is_normalized("NFC", normal)
    assert all(unicodedata.category(c) != "Cc" or c in "\n\t" for c in normal)
    assert "\n\n\n\n" not in normal
    assert all(line == line.rstrip(" \t") for line in normal.split("\n"))


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("a\r\nb\rc\u2028d\x0be", "a\nb\nc\nd\ne"),
        ("\ufeffe\u0301\u00a0x\u200b\u00ady", "\u00e9 xy"),
        ("def f():\n    return 1  \n\n\n\n\n\nx\n", "def f():\n    return 1\n\n\nx"),
        ("zero\u200dwidth \u200cjoiners stay", "zero\u200dwidth \u200cjoiners stay"),
    ],
)
def test_normal_form_by_example(text, normal):
    assert run(NormalizeText(), text) == normal


def test_bytes_that_are_no_text_are_dropped():
    assert run(NormalizeText(), "\0\1\2" * 50) == Dropped("not text")
    assert run(NormalizeText(), "\ufffd" * 3 + "x" * 100) == Dropped("not text")
    assert run(NormalizeText(), "\0" + "x" * 200) == "x" * 200
    assert run(NormalizeText(), " \n\t\u200b") == Dropped("empty")
    with pytest.raises(UserError, match=r"NormalizeText.max_replaced=2: must be"):
        NormalizeText(max_replaced=2)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to jane.doe+x@mail.example.co.uk, please.", "Write to email@example.com, please."),
        ("a@b is no address, nor is @handle or 5@6", "a@b is no address, nor is @handle or 5@6"),
        ("from 8.8.8.8 and 203.0.113.255.", "from 192.0.2.1 and 192.0.2.1."),
        (
            "at 127.0.0.1, 192.168.0.1 and 300.1.1.1 or 1.2.3.4.5",
            "at 127.0.0.1, 192.168.0.1 and 300.1.1.1 or 1.2.3.4.5",
        ),
        ("2a00:1450:4001:81b:0:0:0:200e is one", "2001:db8:0:0:0:0:0:1 is one"),
    ],
)
def test_personal_data_is_masked(text, masked):
    assert run(MaskPersonalData(), text) == masked


def test_masking_takes_linear_time():
    """Quadratic time would be hours."""
    run(MaskPersonalData(), "a." * 500_000 + "@" + "b." * 500_000)
    run(MaskPersonalData(), "1." * 1_000_000)

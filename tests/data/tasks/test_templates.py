import numpy as np
import pytest

from t5x_like.data.tasks.templates import check_template, fill, value_of
from t5x_like.errors import UserError

RECORD = {"question": "who?", "answers": {"text": ["a", "b"]}, "score": 3.14, "half": "\ud800!"}


def test_fields_are_filled():
    assert fill("q: {question} {answers[text][1]} {{x}}", RECORD) == "q: who? b {x}"
    assert fill("{score:.1f}", RECORD) == "3.1"
    assert value_of("answers[text]", RECORD) == ["a", "b"]


@pytest.mark.parametrize("score", [0.0, 1.1, 2.49, 3.14, 4.9, 5.0])
def test_numbers_are_rounded_as_t5_rounds_them(score):
    theirs = f"{np.round(score * 5) / 5:.1f}"
    assert fill("{score:by 0.2}", {"score": score}) == theirs


def test_text_can_be_written_as_utf8():
    assert fill("{half}", RECORD) == "?!"


@pytest.mark.parametrize("template", ["{question.__class__}", "{answers[text].append}", "{score.real}"])
def test_templates_reach_nothing_but_values(template):
    with pytest.raises(UserError, match="has a dot"):
        fill(template, RECORD)


@pytest.mark.parametrize("template", ["no field", "{}", "{a", "a}"])
def test_templates_are_checked_before_they_are_used(template):
    with pytest.raises(UserError, match=r"X.y="):
        check_template("X.y", template)

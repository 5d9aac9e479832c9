import json

import pytest

from t5x_like.data.prepare.document import Document, Dropped
from t5x_like.data.prepare.stages.decontaminate import DecontaminationFilter
from t5x_like.data.sources import TextSource
from t5x_like.errors import UserError

QUESTION = "What is the capital of the country in which the river Danube has its source?"
SHORT = "Who wrote the novel about the white whale?"


@pytest.fixture
def stage(tmp_path):
    texts = [QUESTION, SHORT, "too short to be compared"]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DecontaminationFilter(evaluation=TextSource(files=f"{tmp_path}/test.jsonl"))


def is_dropped(stage, text):
    return isinstance(stage.process(Document(text, "place", "source")), Dropped)


def test_documents_with_parts_of_evaluation_texts_are_dropped(stage):
    assert is_dropped(stage, f"A quiz. {QUESTION} Germany is.")
    assert is_dropped(stage, "so: what IS the capital - of the country, in which the river danube... HAS risen")
    assert not is_dropped(stage, "What is the capital of the country in which the river Rhine has its source?")
    # 8 words are compared as a whole, fewer not at all.
    assert is_dropped(stage, f"I ask you: {SHORT.upper()}")
    assert not is_dropped(stage, "Who wrote the novel about the blue whale?")
    assert not is_dropped(stage, "This is too short to be compared with anything.")
    assert not is_dropped(stage, "Two words")


def test_another_evaluation_set_is_another_stage(stage, tmp_path):
    key = stage.cache_key()
    (tmp_path / "test.jsonl").write_text('{"text": "something else"}\n')
    assert stage.cache_key() != key


def test_nothing_to_compare_drops_nothing(tmp_path):
    (tmp_path / "test.txt").write_text("short")
    assert not is_dropped(DecontaminationFilter(evaluation=TextSource(files=f"{tmp_path}/test.txt")), QUESTION)
    with pytest.raises(UserError, match=r"min_words=20: must be from 1 to num_words=13"):
        DecontaminationFilter(evaluation=TextSource(files="x"), min_words=20)

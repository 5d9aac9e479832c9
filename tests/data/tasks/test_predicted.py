"""Outputs that know the truth, read off as answers."""

import json

import numpy as np
import pytest

from t5x_like.data.build import build_data
from t5x_like.data.config import DataConfig
from t5x_like.data.objectives.examples import Classification, Regression
from t5x_like.data.objectives.preferences import Preferences
from t5x_like.data.objectives.tags import Tagging
from t5x_like.data.tasks.labels import ClassificationTask, RegressionTask
from t5x_like.data.tasks.preferences import PreferenceTask
from t5x_like.data.tasks.records import JsonRecords
from t5x_like.data.tasks.tags import TagTask
from t5x_like.data.tokenizers import ByteTokenizerConfig, SpecialTokens

RECORD = {"text": "one two", "label": 1, "score": 0.5, "words": ["one", "two"], "tags": [2, 0], "chosen": "yes"}


def one_hot(classes, count: int):
    return np.eye(count, dtype=np.float32)[classes]


CASES = {
    "class": (
        ClassificationTask,
        {"first": "{text}", "labels": ("a", "b", "c")},
        Classification(),
        lambda batch: one_hot(batch["labels"], 3),
        [1] * 3,
    ),
    "number": (
        RegressionTask,
        {"first": "{text}", "target": "score"},
        Regression(),
        lambda batch: batch["targets"],
        [0.5] * 3,
    ),
    "tags": (
        TagTask,
        {"labels": ("a", "b", "c")},
        Tagging(),
        lambda batch: one_hot(batch["encoder_target_classes"], 3),
        [2, 0] * 3,
    ),
    "preference": (
        PreferenceTask,
        {"prompt": "{text}", "rejected": "{text}"},
        Preferences(),
        lambda batch: batch["is_preferred"].astype(np.float32),
        [1] * 3,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_that_know_the_truth(tmp_path, name):
    task, fields, objective, outputs, expected = CASES[name]
    (tmp_path / "rows.json").write_text(json.dumps([RECORD] * 3))
    records = JsonRecords(train=str(tmp_path / "rows.json"), validation=str(tmp_path / "rows.json"))
    data = build_data(
        DataConfig(
            source=task(records=records, **fields),
            tokenizer=ByteTokenizerConfig(special_tokens=SpecialTokens(names=("[CLS]", "[SEP]"))),
            objective=objective,
            layout="documents",
            sequence_length=32,
            batch_size=6,
        ),
        None,
    )
    (task,), (layout,), (corpus,) = data.config.tasks, data.validation.layouts, data.corpora
    assert not task.writes
    predicted = task.predicted(outputs(data.validation.batch(0))[: layout.num_rows], layout, corpus.tokenizer)
    assert predicted == expected
    assert task.right(corpus.validation.read_references()) == expected

"""Records of files, of Hugging Face's datasets, and of TensorFlow Datasets."""

import gzip
import json
import sys

import numpy as np
import pytest

from t5x_like.data.tasks.records import HuggingFaceRecords, JsonRecords, TfdsRecords, plain
from t5x_like.data.tasks.spans import SpanTask
from t5x_like.data.tasks.texts import TextToTextTask
from t5x_like.data.tokenizers import ByteTokenizer
from t5x_like.errors import UserError

ROWS = [
    {
        "id": str(i),
        "question": f"which film is it, \u00fcber {i}?",
        "context": f"It is film {i}.",
        "answers": {"text": [f"film {i}", f"It is film {i}"], "answer_start": [6, 0]},
        "label": i % 2,
    }
    for i in range(12)
]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_json_in_all_its_forms(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n\n" for row in ROWS)
    for path in (lines, str(tmp_path / "b.json"), str(tmp_path / "c.jsonl.gz")):
        assert list(JsonRecords(train=path).read("train")) == ROWS
    both = JsonRecords(train=(lines, str(tmp_path / "b.json")))
    assert list(both.read("train")) == ROWS * 2
    key = both.cache_key()
    write_lines(tmp_path / "a.jsonl", ROWS[:5])
    assert both.cache_key() != key


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"x": 1}\n[2]\n', r"a\.jsonl:2 is list, not an object"),
        ("a.jsonl", b'{"x": 1}\n{"x":\n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"x": "\xff"}\n', r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not JSON"),
        ("a.json", b'{"x": 1}', r"holds no list of objects: name it \.jsonl"),
        ("a.jsonl.gz", gzip.compress(b'{"x": 1}\n' * 100, mtime=0)[:-20], "Cannot read"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(JsonRecords(train=str(tmp_path / name)).read("train"))


def test_files_that_are_missing_are_named(tmp_path):
    with pytest.raises(UserError, match=r"JsonRecords\.validation: no file matches"):
        list(JsonRecords(train="x", validation=str(tmp_path / "none")).read("validation"))


def test_a_directory_of_parquet_files_and_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = {"train": datasets.Dataset.from_list(ROWS), "validation": datasets.Dataset.from_list(ROWS[:3])}
    saved = datasets.DatasetDict(features)
    saved.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    for name, rows in saved.items():
        rows.to_parquet(str(tmp_path / "parquet" / f"{name}-00000-of-00001.parquet"))
    for directory in ("saved", "parquet"):
        records = HuggingFaceRecords(path=str(tmp_path / directory))
        assert list(records.read("train")) == ROWS
        assert len(list(records.read("validation"))) == 3
    with pytest.raises(UserError, match="cannot read train"):
        list(HuggingFaceRecords(path=str(tmp_path / "parquet"), train="none").read("train"))


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory):
    """A dataset that TFDS itself writes; no part of that needs TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class Films(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            answers = tfds.features.Sequence({"text": tfds.features.Text(), "answer_start": np.int32})
            texts = {name: tfds.features.Text() for name in ("id", "question", "context")}
            label = tfds.features.ClassLabel(names=["no", "yes"])
            features = tfds.features.FeaturesDict({**texts, "answers": answers, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples(ROWS), "validation": self._generate_examples(ROWS[:3])}

        def _generate_examples(self, rows):
            for row in rows:
                yield row["id"], row

    directory = tmp_path_factory.mktemp("tfds")
    Films(data_dir=str(directory), file_format="array_record").download_and_prepare()
    return directory


def test_tfds_by_name_without_tensorflow(tfds_directory):
    records = TfdsRecords(dataset="films", data_dir=str(tfds_directory))
    assert sorted(records.read("train"), key=lambda row: int(row["id"])) == ROWS
    assert len(list(records.read("validation"))) == 3
    assert (
        len(list(TfdsRecords(dataset="films:1.0.0", data_dir=str(tfds_directory), train="train[:50%]").read("train")))
        == 6
    )
    assert "tensorflow" not in sys.modules
    # The same templates fit records of every origin.
    [row, *_] = records.read("train")
    task = TextToTextTask(
        records=records, inputs="{question}", targets="{answers[text][0]}", references="answers[text]"
    )
    assert task.encode(row, ByteTokenizer()).reference == row["answers"]["text"]
    assert SpanTask(records=records).encode(row, ByteTokenizer()).numbers["span_starts"] == 5
    with pytest.raises(UserError, match="none"):
        list(TfdsRecords(dataset="films", data_dir=str(tfds_directory), train="none").read("train"))
    with pytest.raises(UserError, match=r"TfdsRecords\.dataset='films2'"):
        TfdsRecords(dataset="films2", data_dir=str(tfds_directory)).cache_key()


def test_values_become_plain():
    assert plain({"a": np.array([b"x", b"y"], object), "b": np.int64(3), "c": (np.float32(0.5),), "d": "s"}) == {
        "a": ["x", "y"],
        "b": 3,
        "c": [0.5],
        "d": "s",
    }

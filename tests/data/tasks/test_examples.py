"""From records to rows: what a model reads and learns of every kind of task."""

import json

import numpy as np
import pytest

from t5x_like.data.build import build_data
from t5x_like.data.config import DataConfig
from t5x_like.data.mixtures import Mixture
from t5x_like.data.objectives.answer_spans import SpanExtraction
from t5x_like.data.objectives.causal import CausalLM
from t5x_like.data.objectives.examples import AnswerLM, Classification, Regression, TextToText
from t5x_like.data.objectives.preferences import Preferences
from t5x_like.data.objectives.tags import Tagging
from t5x_like.data.tasks.labels import ClassificationTask, RegressionTask
from t5x_like.data.tasks.preferences import PreferenceTask
from t5x_like.data.tasks.records import JsonRecords
from t5x_like.data.tasks.spans import SpanTask
from t5x_like.data.tasks.tags import TagTask
from t5x_like.data.tasks.texts import TextToTextTask
from t5x_like.data.tokenizers import ByteTokenizerConfig, SpecialTokens
from t5x_like.errors import UserError

BYTES = ByteTokenizerConfig(special_tokens=SpecialTokens(names=("[CLS]", "[SEP]")))
CLS, SEP = 259, 260


def records(path, rows, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonRecords(train=str(path), validation=str(path), **options)


def data_of(task, objective, length=32, **options):
    options = {"layout": "documents", "batch_size": 4, **options}
    return build_data(
        DataConfig(source=task, tokenizer=BYTES, objective=objective, sequence_length=length, **options), None
    )


def text(data, tokens, weights=None):
    return data.tokenizer.decode(tokens if weights is None else tokens[weights > 0])


@pytest.fixture
def reviews(tmp_path):
    rows = [{"sentence": f"film {i} is {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(20)]
    return records(tmp_path / "reviews.jsonl", rows)


@pytest.fixture
def sentiment(reviews):
    return TextToTextTask(
        records=reviews, inputs="sst2 sentence: {sentence}", targets="{label}", labels=("negative", "positive")
    )


def test_text_to_text_for_an_encoder_decoder(sentiment):
    data = data_of(sentiment, TextToText(target_length=16), length=48)
    row = {name: values[3] for name, values in data.validation.batch(0).items()}
    used = row["encoder_segment_ids"] > 0
    assert text(data, row["encoder_input_tokens"]) == "sst2 sentence: film 3 is good"
    assert row["encoder_input_tokens"][used][-1] == data.tokenizer.eos_id
    weights = row["decoder_loss_weights"]
    assert text(data, row["decoder_target_tokens"], weights) == "positive"
    assert row["decoder_target_tokens"][weights > 0][-1] == data.tokenizer.eos_id
    # The decoder reads its targets one place later, from the padding token on.
    assert row["decoder_input_tokens"][0] == data.tokenizer.pad_id
    np.testing.assert_array_equal(row["decoder_input_tokens"][1:9], row["decoder_target_tokens"][:8])
    assert data.corpora[0].validation.read_references()[3] == ["positive"]


def test_text_to_text_for_a_decoder(sentiment):
    data = data_of(sentiment, AnswerLM(), length=48)
    row = {name: values[3] for name, values in data.validation.batch(0).items()}
    weights = row["decoder_loss_weights"]
    assert text(data, row["decoder_target_tokens"]) == "sst2 sentence: film 3 is goodpositive"
    assert text(data, row["decoder_target_tokens"], weights) == "positive"
    assert weights.sum() == len("positive") + 1
    assert row["decoder_input_tokens"][0] == data.tokenizer.eos_id


def test_what_is_too_long_keeps_room_for_the_answer(sentiment):
    data = data_of(sentiment, AnswerLM(), length=20)
    row = {name: values[3] for name, values in data.validation.batch(0).items()}
    assert text(data, row["decoder_target_tokens"]) == "m 3 is good" + "positive"
    assert row["decoder_loss_weights"].sum() == 9
    short = data_of(sentiment, TextToText(target_length=4), length=8).validation.batch(0)
    assert text(data, short["encoder_input_tokens"][3]) == "sst2 se"
    assert text(data, short["decoder_target_tokens"][3]) == "pos"
    assert (short["encoder_input_tokens"][3] == data.tokenizer.eos_id).sum() == 1


@pytest.mark.parametrize("objective", [TextToText(target_length=24), AnswerLM()])
def test_packed_examples_are_all_there_once_and_apart(sentiment, objective):
    data = data_of(sentiment, objective, length=128, layout="pack", batch_size=1)
    assert data.train.layout.num_rows < 20
    side = "encoder" if "encoder_input_tokens" in data.config.features else "decoder"
    inputs, answers = [], []
    for step in range(data.train.layout.num_rows):
        row = {name: values[0] for name, values in data.train.batch(step).items()}
        for piece in range(1, row["decoder_segment_ids"].max() + 1):
            mine = row["decoder_segment_ids"] == piece
            answers.append(text(data, row["decoder_target_tokens"][mine], row["decoder_loss_weights"][mine]))
            tokens = row["encoder_input_tokens"] if side == "encoder" else row["decoder_target_tokens"]
            inputs.append(text(data, tokens[row[f"{side}_segment_ids"] == piece]))
            np.testing.assert_array_equal(row["decoder_positions"][mine], np.arange(mine.sum()))
    assert sorted(answers) == ["negative"] * 10 + ["positive"] * 10
    assert len({one.removesuffix("positive").removesuffix("negative") for one in inputs}) == 20


def test_two_texts_and_a_class(tmp_path):
    rows = [{"a": "one two three", "b": "four", "label": "no"}, {"a": "x", "b": "", "label": "yes"}] * 3
    pairs = records(tmp_path / "pairs.jsonl", rows)
    task = ClassificationTask(records=pairs, first="{a}", second="{b}", labels=("yes", "no"))
    data = data_of(task, Classification(), length=24)
    batch = data.validation.batch(0)
    np.testing.assert_array_equal(batch["labels"], [1, 0, 1, 0])
    np.testing.assert_array_equal(batch["label_weights"], [1, 1, 1, 1])
    first = np.array([CLS, *data.tokenizer.encode("one two three"), SEP, *data.tokenizer.encode("four"), SEP])
    np.testing.assert_array_equal(batch["encoder_input_tokens"][0, : len(first)], first)
    np.testing.assert_array_equal(batch["encoder_token_types"][0], [0] * 15 + [1] * 5 + [0] * 4)
    np.testing.assert_array_equal(batch["encoder_input_tokens"][1, :4], [CLS, ord("x") + 3, SEP, 0])
    last = data.validation.batch(1)
    np.testing.assert_array_equal(last["label_weights"], [1, 1, 0, 0])


def test_the_longer_text_of_two_is_cut(tmp_path):
    rows = [{"a": "a" * m, "b": "b" * n, "score": 0.5} for m, n in ((30, 2), (2, 30), (30, 30), (5, 5), (30, 0))]
    task = RegressionTask(records=records(tmp_path / "r.jsonl", rows), first="{a}", second="{b}", target="score")
    data = data_of(task, Regression(), length=16, batch_size=5)
    batch = data.validation.batch(0)
    lengths = [(text(data, row).count("a"), text(data, row).count("b")) for row in batch["encoder_input_tokens"]]
    assert lengths == [(11, 2), (2, 11), (7, 6), (5, 5), (14, 0)]
    assert batch["targets"].dtype == np.float32
    assert data.train.layout.num_cut == 4


def test_answers_are_found_in_every_window_that_holds_them(tmp_path):
    words = [f"w{i}" for i in range(60)]
    context = " ".join(words)
    answer, none = "w31 w32", {"text": [], "answer_start": []}
    rows = [
        {
            "question": "where?",
            "context": context,
            "answers": {"text": [answer], "answer_start": [context.index(answer)]},
        },
        {"question": "why?", "context": "short text", "answers": none},
        {"question": "how long is a question that is cut?", "context": "it is cut", "answers": none},
    ]
    task = SpanTask(records=records(tmp_path / "squad.jsonl", rows))
    data = data_of(task, SpanExtraction(stride=16), length=64, batch_size=16)
    layout, batch = data.validation.layout, data.validation.batch(0)
    assert (layout.example == 0).sum() > 3
    found = 0
    for row in range(layout.num_rows):
        tokens, begin, end = (batch[name][row] for name in ("encoder_input_tokens", "span_starts", "span_ends"))
        assert tokens[0] == CLS
        assert (tokens == SEP).sum() == 2
        if begin:
            found += 1
            assert text(data, tokens[begin : end + 1]).strip() == answer
        else:
            assert end == 0
            assert layout.example[row] or answer not in text(data, tokens)
    assert found >= 2
    assert text(data, batch["encoder_input_tokens"][layout.num_rows - 1]) == "[CLS]how long is a qu[SEP]it is cut[SEP]"


def test_a_mixture_of_tasks_has_rows_of_all(sentiment, tmp_path):
    rows = [{"premise": f"it is {i}", "label": i % 2} for i in range(30)]
    other = TextToTextTask(
        records=records(tmp_path / "rte.jsonl", rows), inputs="rte: {premise}", targets="{label}", labels=("yes", "no")
    )
    mixture = Mixture(sources=(sentiment, other), rates=(1.0, 3.0))
    data = data_of(mixture, TextToText(), length=48, batch_size=64)
    batch = data.train.batch(0)
    starts = [text(data, row)[:4] for row in batch["encoder_input_tokens"]]
    assert {"sst2", "rte:"} == set(starts)
    assert "mixture: reviews.jsonl 25.00%, rte.jsonl 75.00%" in data.describe()
    assert [layout.num_rows for layout in data.validation.layouts] == [20, 30]


def test_records_without_a_validation_split_are_divided(tmp_path):
    rows = [{"q": f"question {i}", "a": f"answer {i}"} for i in range(200)]
    records(tmp_path / "all.jsonl", rows)
    task = TextToTextTask(records=JsonRecords(train=str(tmp_path / "all.jsonl")), inputs="{q}", targets="{a}")
    data = data_of(task, TextToText(), validation_fraction=0.2)
    train, validation = (getattr(data.corpora[0], name) for name in ("train", "validation"))
    assert train.num_documents + validation.num_documents == 200
    assert 20 <= validation.num_documents <= 60


def test_the_examples_are_kept(sentiment, tmp_path, monkeypatch):
    config = DataConfig(
        source=sentiment, tokenizer=BYTES, objective=AnswerLM(), layout="documents", sequence_length=48, batch_size=4
    )
    first = build_data(config, tmp_path / "data")
    monkeypatch.setattr(JsonRecords, "read", None)
    again = build_data(config, tmp_path / "data")
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(
        again.train.batch(7)["decoder_input_tokens"], first.train.batch(7)["decoder_input_tokens"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": CausalLM()}, "takes text, not the examples"),
        ({"objective": Classification()}, "needs first, labels, second"),
        ({"layout": "concatenate"}, "use 'documents' or 'pack'"),
        ({"objective": TextToText(), "source": None}, "takes the examples of a task"),
    ],
)
def test_what_does_not_belong_together_is_refused(sentiment, change, message):
    fields = {"source": sentiment, "tokenizer": BYTES, "objective": AnswerLM(), "layout": "documents", **change}
    fields = {name: value for name, value in fields.items() if value is not None}
    with pytest.raises(UserError, match=message):
        DataConfig(sequence_length=32, batch_size=4, **fields)


def test_records_that_do_not_fit_are_named(tmp_path):
    task = lambda **options: TextToTextTask(records=records(tmp_path / "x.jsonl", [{"a": "1", "label": 7}]), **options)
    with pytest.raises(UserError, match=r"x.jsonl, train record 1 does not fit TextToTextTask: no value 'b'. It has a"):
        data_of(task(inputs="{b}", targets="{a}"), TextToText())
    with pytest.raises(UserError, match="label is 7, not a class from 0 to 1, or one of no, yes"):
        data_of(task(inputs="{a}", targets="{label}", labels=("no", "yes")), TextToText())
    wrong = {"question": "?", "context": "abc", "answers": {"text": ["b"], "answer_start": [0]}}
    span = SpanTask(records=records(tmp_path / "y.jsonl", [wrong]))
    with pytest.raises(UserError, match="the answer 'b' does not stand at character 0"):
        data_of(span, SpanExtraction(), length=32)


@pytest.fixture
def names(tmp_path):
    rows = [{"words": ["Ann", "met", "Bob"], "tags": ["name", "other", 1]}, {"words": ["a" * 50, "b"], "tags": [0, 1]}]
    return TagTask(records=records(tmp_path / "names.jsonl", rows), labels=("other", "name"))


def test_the_first_token_of_a_word_has_its_class(names):
    data = data_of(names, Tagging(), length=16)
    row = {name: values[0] for name, values in data.validation.batch(0).items()}
    assert text(data, row["encoder_input_tokens"]) == "[CLS]Ann met Bob[SEP]"
    assert np.flatnonzero(row["encoder_loss_weights"]).tolist() == [1, 4, 8]
    assert row["encoder_target_classes"][[1, 4, 8]].tolist() == [1, 0, 1]


def test_classes_are_read_where_words_begin_and_what_has_no_room_is_wrong(names):
    data = data_of(names, Tagging(), length=16)
    outputs = np.zeros((2, 16, 2))
    outputs[0, [1, 8], 1] = 1
    predicted = names.predicted(outputs, data.validation.layout, data.tokenizer)
    assert predicted == [1, 0, 1, 0, -1]
    assert names.right(data.corpora[0].validation.read_references()) == [1, 0, 1, 0, 1]


def test_words_need_a_class_each(tmp_path):
    rows = [{"words": ["a", "b"], "tags": [0]}]
    task = TagTask(records=records(tmp_path / "bad.jsonl", rows), labels=("x", "y"))
    with pytest.raises(UserError, match="record 1 does not fit TagTask: 2 words have 1 tags"):
        data_of(task, Tagging())


@pytest.fixture
def preferences(tmp_path):
    rows = [{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(9)]
    return PreferenceTask(records=records(tmp_path / "preferences.jsonl", rows))


def test_an_answer_and_the_other_are_neighbours_in_every_batch(preferences):
    data = data_of(preferences, Preferences(), length=16)
    seen = []
    for step in range(9):
        batch = data.train.batch(step)
        read = [text(data, tokens) for tokens in batch["decoder_input_tokens"]]
        for chosen, rejected in zip(read[::2], read[1::2], strict=True):
            assert chosen.replace("yes", "no") == rejected != chosen
        assert batch["is_preferred"].tolist() == [1, 0, 1, 0]
        assert batch["label_weights"].tolist() == [1] * 4
        np.testing.assert_array_equal(
            data.train.batch(step, slice(1, 3))["decoder_input_tokens"][0], batch["decoder_input_tokens"][1]
        )
        seen += read[::2]
    # Two epochs of nine examples, in different orders.
    assert len(set(seen[:9])) == len(set(seen[9:])) == 9
    assert seen[:9] != seen[9:]


def test_the_last_rows_of_preferences_are_empty(preferences):
    data = data_of(preferences, Preferences(), length=16)
    assert data.validation.num_batches == 5
    assert data.validation.batch(4)["label_weights"].tolist() == [1, 1, 0, 0]


def test_a_long_answer_is_cut_and_ends_the_row(tmp_path):
    rows = [{"prompt": "p" * 40, "chosen": "c" * 40, "rejected": "r"}]
    task = PreferenceTask(records=records(tmp_path / "long.jsonl", rows))
    data = data_of(task, Preferences(), length=16, batch_size=2)
    read = [text(data, tokens) for tokens in data.validation.batch(0)["decoder_input_tokens"]]
    assert read == ["p" * 7 + "c" * 8, "p" * 13 + "r"]

"""What becomes of a model's scores: answers, and what they are worth."""

import json

import jax
import numpy as np
import pytest

from t5x_like.data.build import build_data
from t5x_like.data.config import DataConfig
from t5x_like.data.objectives.answer_spans import SpanExtraction
from t5x_like.data.objectives.examples import AnswerLM, TextToText
from t5x_like.data.tasks.records import JsonRecords
from t5x_like.data.tasks.spans import SpanTask, answer_text, words_of
from t5x_like.data.tasks.texts import TextToTextTask
from t5x_like.data.tokenizers import ByteTokenizerConfig, SpecialTokens
from t5x_like.evaluation import answers
from t5x_like.evaluation.answers import Answers, answer, prompt_of

BYTES = ByteTokenizerConfig(special_tokens=SpecialTokens(names=("[CLS]", "[SEP]")))


def questions(folder, count=12):
    rows = []
    for i in range(count):
        context = " ".join(f"The year {1900 + 7 * i + j}, it rained." for j in range(6))
        at = context.index(str(1900 + 8 * i % 6 + 7 * i)) if i % 4 else 0
        text = context[at : at + 4]
        gold = {"text": [text, f"the {text}"], "answer_start": [at, at]} if i % 4 else {"text": [], "answer_start": []}
        rows.append({"question": f"when {i}?", "context": context, "answers": gold})
    path = folder / "squad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows, SpanTask(records=JsonRecords(train=str(path), validation=str(path)))


def build(task, objective, length, batch_size=5):
    return build_data(
        DataConfig(
            source=task,
            tokenizer=BYTES,
            objective=objective,
            layout="documents",
            sequence_length=length,
            batch_size=batch_size,
        ),
        None,
    )


def test_scores_that_know_the_answer_are_perfect(tmp_path, monkeypatch):
    """The labels themselves, as scores, through windows, characters and words back to text."""
    rows, task = questions(tmp_path)
    data = build(task, SpanExtraction(stride=20), 64)
    assert data.validation.layouts[0].num_rows > 2 * len(rows)

    def oracle(graphdef, params, batch):
        scores = np.zeros((*batch["encoder_input_tokens"].shape, 2), np.float32)
        place = np.arange(len(scores))
        # A window without the answer says so, but less surely than one that has it.
        sure = np.where(batch["span_starts"] > 0, 5, 1)
        scores[place, batch["span_starts"], 0] = scores[place, batch["span_ends"], 1] = sure
        return scores

    monkeypatch.setattr(answers, "_predict", oracle)
    monkeypatch.setattr(jax, "jit", lambda function: function)
    monkeypatch.setattr(answers, "on_devices", lambda batch, target: batch)
    [result] = answer(None, None, data, None, None)
    assert result.right == [row["answers"]["text"] or [""] for row in rows]
    assert [bool(text) for text in result.predicted] == [bool(row["answers"]["text"]) for row in rows]
    assert result.scores() == {"exact_match": 1.0, "token_f1": 1.0}


def test_words_are_cut_at_punctuation_and_come_back_whole():
    tokenizer = BYTES.build(None)
    context = "Since 1976, (say) ten-year  olds:\nyes!"
    words = words_of(context, tokenizer)
    assert tokenizer.decode(words.tokens) == context
    assert [context[a:b] for a, b in zip([0, *words.ends], words.ends, strict=False)][:4] == [
        "Since",
        " 1976",
        ",",
        " (",
    ]
    for begin, end in ((6, 9), (7, 8)):
        assert answer_text(context, tokenizer, begin, end) == "1976"
    assert answer_text(context, tokenizer, 0, len(words.tokens) - 1) == context


@pytest.mark.parametrize(("objective", "expected"), [(TextToText(), "is 3 odd?\x01"), (AnswerLM(), "\x01is 3 odd?")])
def test_a_writer_gets_the_input_and_nothing_of_the_target(tmp_path, objective, expected):
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"q": f"is {i} odd?", "a": "yes" if i % 2 else "no"}) + "\n" for i in range(7)))
    records = JsonRecords(train=str(path), validation=str(path))
    task = TextToTextTask(records=records, inputs="{q}", targets="{a}", labels=(), metrics=("exact_match",))
    data = build(task, objective, 32)
    seen = []

    def write(prompts):
        seen.extend(prompts)
        return ["yes"] * len(prompts)

    [result] = answer(None, None, data, None, write)
    spelled = "".join("\x01" if token == 1 else data.tokenizer.decode([token]) for token in seen[3])
    assert spelled == expected
    assert len(seen) == 7
    assert result.scores() == {"exact_match": pytest.approx(3 / 7)}


def test_tasks_without_metrics_are_not_answered(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "a", "a": "b"}\n')
    records = JsonRecords(train=str(path), validation=str(path))
    task = TextToTextTask(records=records, inputs="{q}", targets="{a}", metrics=())
    assert list(answer(None, None, build(task, AnswerLM(), 32), None, None)) == []
    assert Answers(task, [], []).scores() == {}


def test_a_prompt_ends_where_the_first_answer_begins():
    row = {"decoder_input_tokens": np.arange(8), "decoder_loss_weights": np.array([0, 0, 1, 1, 0, 0, 1, 0])}
    assert prompt_of(row) == [0, 1, 2]

"""What a model answers to the examples of a task, and how good that is."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from t5x_like.data.build import Data
from t5x_like.data.objectives.objective import Rows
from t5x_like.data.tasks.task import Metric, Task
from t5x_like.errors import UserError
from t5x_like.evaluation.metrics import OF_CLASSES, OF_NUMBERS, OF_TEXTS
from t5x_like.models.parameters import GraphDef, Params, merge
from t5x_like.models.token_loss import Batch
from t5x_like.sharding.logical import on_devices

Write = Callable[[list[list[int]]], list[str]]
"""What a model writes for each of these inputs (of an encoder-decoder) or behind them (of a decoder)."""


class Answers(NamedTuple):
    """Of one task, example by example: what the model says, and what is right (see `Example.reference`)."""

    task: Task
    predicted: list[Any]
    right: list[Any]

    def scores(self) -> dict[str, float]:
        """The task's metrics by name."""
        scores = {}
        for metric in self.task.metrics:
            value = score(metric, self.predicted, self.right, self.task.labels)
            scores |= value if isinstance(value, dict) else {metric: value}
        return scores


def score(
    metric: Metric, predicted: Sequence[Any], right: Sequence[Any], labels: Sequence[str] = ()
) -> float | dict[str, float]:
    """One metric; texts are read as classes, by the names of these, or as numbers where it is about such."""
    if metric in OF_TEXTS:
        return OF_TEXTS[metric](predicted, right)
    if not right or isinstance(right[0], int | float):
        return (OF_CLASSES | OF_NUMBERS)[metric](predicted, right)
    if metric in OF_NUMBERS:
        return OF_NUMBERS[metric](_numbers(predicted), _numbers([one for one, *_ in right]))
    if not labels:
        matches = [text.strip() in accepted for text, accepted in zip(predicted, right, strict=True)]
        if metric != "accuracy":
            raise UserError(f"The metric {metric} is about classes: name them in TextToTextTask.labels.")
        return float(np.mean(matches))
    numbers = {label: number for number, label in enumerate(labels)}
    classes = lambda texts: [numbers.get(text.strip(), -1) for text in texts]
    return OF_CLASSES[metric](classes(predicted), classes(one for one, *_ in right))


def _numbers(texts: Sequence[str]) -> list[float]:
    """What is no number counts as -1, as T5's."""

    def number(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            return -1.0

    return [number(text) for text in texts]


def answer(graphdef: GraphDef, params: Params, data: Data, target: Batch, write: Write) -> Iterator[Answers]:
    """The answers to the whole validation split, task by task.

    Args:
      graphdef: Of the model.
      params: Its parameters.
      data: With the tasks.
      target: Shapes and shardings of a batch.
      write: The model as a writer; only used for tasks whose answers are texts.
    """
    step = jax.jit(lambda params, batch: _predict(graphdef, params, batch))
    batches = [data.validation.batch(number) for number in range(data.validation.num_batches)]
    start = 0
    for task, corpus, layout in zip(data.config.tasks, data.corpora, data.validation.layouts, strict=True):
        rows = _rows(batches, start, layout.num_rows)
        start += layout.num_rows
        if not task.writes:
            predict = lambda batch: np.asarray(step(params, on_devices(batch, target)))
            outputs = np.concatenate([predict(batch) for batch in _batches(rows, data.config.batch_size)])
            outputs = outputs[: layout.num_rows]
        elif task.metrics:
            prompts = list(map(prompt_of, _single(rows)))
            size = data.config.batch_size
            outputs = [text for at in range(0, len(prompts), size) for text in write(prompts[at : at + size])]
        else:
            continue
        predicted = task.predicted(outputs, layout, corpus.tokenizer)
        yield Answers(task, predicted, task.right(corpus.validation.read_references()))


def _predict(graphdef: GraphDef, params: Params, batch: Batch):
    model = merge(graphdef, params)
    output = model.run(batch)
    return model.head.predict(output.x, output.tokens.is_token)


def _rows(batches: Sequence[Rows], start: int, count: int) -> Rows:
    """So many rows of all batches, from one on."""
    return {name: np.concatenate([batch[name] for batch in batches])[start : start + count] for name in batches[0]}


def _batches(rows: Rows, size: int) -> Iterator[Rows]:
    """Batches of the rows; the last is filled with copies of its first."""
    count = len(next(iter(rows.values())))
    for start in range(0, count, size):
        index = np.arange(start, start + size)
        yield {name: values[np.where(index < count, index, start)] for name, values in rows.items()}


def _single(rows: Rows) -> Iterator[Rows]:
    for number in range(len(next(iter(rows.values())))):
        yield {name: values[number] for name, values in rows.items()}


def prompt_of(row: Rows) -> list[int]:
    """What a model reads of a row before it writes: the encoder's tokens, or the decoder's up to what it predicts."""
    if "encoder_input_tokens" in row:
        return row["encoder_input_tokens"][row["encoder_segment_ids"] > 0].tolist()
    return row["decoder_input_tokens"][: int(np.argmax(row["decoder_loss_weights"] > 0)) + 1].tolist()

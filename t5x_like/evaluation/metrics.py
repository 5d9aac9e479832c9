"""How answers are scored: functions of what was predicted and what is right, which need no model.

Classes are numbers from 0; -1 stands for an answer that is no class, and is always wrong. All scores are shares or
correlations, from 0 (or -1) to 1, but for BLEU and ROUGE, which are given as papers do, from 0 to 100.
"""

import collections
import re
import string
from collections.abc import Callable, Sequence

import numpy as np

from t5x_like.data.extras import require
from t5x_like.data.tasks.task import Metric

Classes = Sequence[int]
Numbers = Sequence[float]
Texts = Sequence[str]
References = Sequence[Sequence[str]]
"""All answers that are right, to each question."""


def accuracy(predicted: Classes, right: Classes) -> float:
    """The share that is right."""
    return float(np.mean(np.asarray(predicted) == np.asarray(right)))


def f1(predicted: Classes, right: Classes, positive: int = 1) -> float:
    """The harmonic mean of precision and recall of one class; 0 if it is never predicted, or never right."""
    found, wanted = np.asarray(predicted) == positive, np.asarray(right) == positive
    total = found.sum() + wanted.sum()
    return float(2 * (found & wanted).sum() / total) if total else 0.0


def macro_f1(predicted: Classes, right: Classes) -> float:
    """The mean of `f1` over the classes that are right somewhere, or predicted."""
    classes = sorted({*predicted, *right} - {-1})
    return float(np.mean([f1(predicted, right, positive) for positive in classes]))


def matthews(predicted: Classes, right: Classes) -> float:
    """The correlation of classes, of two or more (Gorodkin 2004); 0 where all are the same."""
    classes = np.unique([*predicted, *right])
    table = np.zeros((len(classes), len(classes)))
    np.add.at(table, (np.searchsorted(classes, right), np.searchsorted(classes, predicted)), 1)
    count, hits, of_right, of_predicted = table.sum(), np.trace(table), table.sum(axis=1), table.sum(axis=0)
    spread = (count**2 - of_predicted @ of_predicted) * (count**2 - of_right @ of_right)
    return float((hits * count - of_right @ of_predicted) / np.sqrt(spread)) if spread else 0.0


def pearson(predicted: Numbers, right: Numbers) -> float:
    """The linear correlation; 0 where all numbers are the same."""
    a, b = (np.asarray(values, np.float64) - np.mean(values) for values in (predicted, right))
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread else 0.0


def spearman(predicted: Numbers, right: Numbers) -> float:
    """The linear correlation of ranks; equal numbers share the mean of theirs."""
    return pearson(_ranks(predicted), _ranks(right))


def _ranks(values: Numbers) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def exact_match(predicted: Texts, references: References) -> float:
    """The share that is one of the right answers, both normalised."""
    matches = [any(normalized(text) == normalized(r) for r in right) for text, right in _pairs(predicted, references)]
    return float(np.mean(matches))


def token_f1(predicted: Texts, references: References) -> float:
    """The mean overlap with the nearest right answer, in words (SQuAD; Rajpurkar et al. 2016, section 6.1)."""
    best = [max(_overlap(text, r) for r in right) for text, right in _pairs(predicted, references)]
    return float(np.mean(best))


def normalized(text: str) -> str:
    """A text without case, punctuation, articles and spaces that are too many, as SQuAD compares answers."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _overlap(predicted: str, right: str) -> float:
    ours, theirs = normalized(predicted).split(), normalized(right).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def _pairs(predicted: Texts, references: References):
    return zip(predicted, references, strict=True)


def bleu(predicted: Texts, references: References) -> float:
    """BLEU of the corpus, from 0 to 100, as sacrebleu computes it (extra: tasks)."""
    sacrebleu = require("sacrebleu", "The metric bleu", "tasks")
    most = max(map(len, references))
    # A question with fewer references than others has None in their place.
    streams = [[right[i] if i < len(right) else None for right in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(predicted), streams).score)


def rouge(predicted: Texts, references: References) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-Lsum, F-measures from 0 to 100, the best over the references (extra: tasks).

    As rouge-score computes them with stemming; a line is a sentence.
    """
    rouge_score = require("rouge_score.rouge_scorer", "The metric rouge", "tasks")
    names = ("rouge1", "rouge2", "rougeLsum")
    scorer = rouge_score.RougeScorer(names, use_stemmer=True)
    scores = [scorer.score_multi(right, text) for text, right in _pairs(predicted, references)]
    return {name: 100 * float(np.mean([score[name].fmeasure for score in scores])) for name in names}


OF_CLASSES: dict[Metric, Callable[[Classes, Classes], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
}
OF_NUMBERS: dict[Metric, Callable[[Numbers, Numbers], float]] = {"pearson": pearson, "spearman": spearman}
OF_TEXTS: dict[Metric, Callable[[Texts, References], float | dict[str, float]]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "bleu": bleu,
    "rouge": rouge,
}

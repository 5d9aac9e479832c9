"""How answers are scored: functions of what was predicted and what is right, which need no model.

Classes are numbers from 0; -1 stands for an answer that is no class, and is always wrong. All scores are shares or
correlations, from 0 (or -1) to 1, but for BLEU and ROUGE, which are given as papers do, from 0 to 100. Those that
libraries define are theirs (extra: tasks).
"""

import collections
import re
import string
from collections.abc import Callable, Sequence
from typing import Literal

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
    return _mean_f1(predicted, right, [positive])


def macro_f1(predicted: Classes, right: Classes) -> float:
    """The mean of `f1` over the classes that are right somewhere, or predicted."""
    return _mean_f1(predicted, right, sorted({*predicted, *right} - {-1}))


def _mean_f1(predicted: Classes, right: Classes, classes: list[int]) -> float:
    score = require("sklearn.metrics", "The metric f1", "tasks").f1_score
    return float(score(right, predicted, labels=classes, average="macro", zero_division=0))


def matthews(predicted: Classes, right: Classes) -> float:
    """The correlation of classes, of two or more (Gorodkin 2004); 0 where all are the same."""
    return float(require("sklearn.metrics", "The metric matthews", "tasks").matthews_corrcoef(right, predicted))


def pearson(predicted: Numbers, right: Numbers) -> float:
    """The linear correlation; 0 where all numbers are the same."""
    return _correlation("pearson", predicted, right)


def spearman(predicted: Numbers, right: Numbers) -> float:
    """The linear correlation of ranks; equal numbers share the mean of theirs."""
    return _correlation("spearman", predicted, right)


def _correlation(kind: Literal["pearson", "spearman"], predicted: Numbers, right: Numbers) -> float:
    stats = require("scipy.stats", f"The metric {kind}", "tasks")
    if min(len(set(predicted)), len(set(right))) < 2:
        return 0.0
    return float((stats.pearsonr if kind == "pearson" else stats.spearmanr)(predicted, right).statistic)


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
    """BLEU of the corpus, from 0 to 100, as sacrebleu computes it."""
    sacrebleu = require("sacrebleu", "The metric bleu", "tasks")
    most = max(map(len, references))
    # A question with fewer references than others has None in their place.
    streams = [[right[i] if i < len(right) else None for right in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(predicted), streams).score)


def rouge(predicted: Texts, references: References) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-Lsum, F-measures from 0 to 100, the best over the references.

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

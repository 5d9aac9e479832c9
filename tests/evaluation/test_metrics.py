"""Metrics by their formulas, and against published scores."""

import sys
import typing

import numpy as np
import pytest

from t5x_like.data.tasks.spans import best_span
from t5x_like.data.tasks.task import Metric
from t5x_like.errors import UserError
from t5x_like.evaluation import metrics
from t5x_like.evaluation.answers import score

RNG = np.random.default_rng(0)
WORDS = np.array(
    ["the", "a", "cat", "dog", "sat", "on", "under", "mat", "house", "quickly,", "runs.", "walks!", "New-York", "1999"]
)


def texts(count, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 15))) for _ in range(count)]


def nearly(sentences, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(word for word in text.split() if rng.random() > 0.3) or "cat" for text in sentences]


def test_classes_by_hand():
    """Of class 1: 2 found, of 3 predicted and 4 right; of 0: 1, of 2 and 2; of 2: 0, of 1 and 1. One is no class."""
    right = [1, 1, 1, 1, 0, 0, 2]
    predicted = [1, 1, 0, -1, 0, 2, 1]
    assert metrics.accuracy(predicted, right) == pytest.approx(3 / 7)
    assert metrics.f1(predicted, right) == pytest.approx(2 * 2 / (3 + 4))
    assert metrics.macro_f1(predicted, right) == pytest.approx((4 / 7 + 2 / 4 + 0) / 3)


def test_matthews_is_the_correlation_of_two_classes():
    """Gorodkin's coefficient of many classes is Pearson's of two (Matthews 1975)."""
    right = RNG.integers(0, 2, 200)
    predicted = np.where(RNG.random(200) < 0.6, right, RNG.integers(0, 2, 200))
    expected = np.corrcoef(predicted, right)[0, 1]
    assert metrics.matthews(predicted.tolist(), right.tolist()) == pytest.approx(expected, abs=1e-12)
    # By hand, (c s - t.p) / sqrt((s^2 - p.p) (s^2 - t.t)): s = 4, c = 3, t = (2, 1, 1), p = (2, 2, 0).
    assert metrics.matthews([0, 0, 1, 1], [0, 0, 1, 2]) == pytest.approx((12 - 6) / np.sqrt((16 - 8) * (16 - 6)))


def test_correlations_by_their_formulas():
    right = RNG.integers(0, 11, 100) / 2
    predicted = right + RNG.normal(size=100)
    assert metrics.pearson(predicted, right) == pytest.approx(np.corrcoef(predicted, right)[0, 1], abs=1e-12)
    # Equal numbers share the mean of their ranks.
    assert metrics.spearman([1.0, 5.0, 5.0, 9.0], [2.0, 1.0, 3.0, 4.0]) == pytest.approx(
        np.corrcoef([1, 2.5, 2.5, 4], [2, 1, 3, 4])[0, 1]
    )


def test_a_metric_whose_library_is_missing_says_what_to_install(monkeypatch):
    for module, metric in (("sklearn.metrics", metrics.f1), ("scipy.stats", metrics.pearson)):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=r"The metric \w+ needs .* pip install 't5x_like\[tasks\]'"):
            metric([0, 1], [1, 1])


def test_what_never_changes_has_no_correlation():
    assert metrics.matthews([1, 1, 1], [0, 1, 0]) == 0
    assert metrics.pearson([2.0, 2.0], [1.0, 3.0]) == 0
    assert metrics.f1([0, 0], [0, 0]) == 0


def test_answers_by_squads_rules():
    predicted = ["The  Cat!", "a dog on the mat", "nothing", ""]
    right = [["cat"], ["dog", "the dog on mat"], ["everything"], [""]]
    assert metrics.exact_match(predicted, right) == 0.75
    # By hand: 1, 1 (without articles), 0, 1.
    assert metrics.token_f1(predicted, right) == 0.75
    # Two of the words agree, of three and of two.
    assert metrics.token_f1(["big cat sat"], [["cat sat"]]) == pytest.approx(2 * 2 / 5)


def test_bleu_against_published_scores():
    """The example of sacrebleu's own README, with two references."""
    pytest.importorskip("sacrebleu")
    predicted = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    assert metrics.bleu(predicted, references) == pytest.approx(48.53, abs=0.01)
    assert metrics.bleu(predicted, [[text] for text in predicted]) == pytest.approx(100)


def test_bleu_of_references_of_different_number():
    sacrebleu = pytest.importorskip("sacrebleu")
    right = texts(20, 1)
    predicted, more = nearly(right, 2), nearly(right, 3)
    references = [[a, b] if i % 2 else [a] for i, (a, b) in enumerate(zip(right, more, strict=True))]
    theirs = sacrebleu.corpus_bleu(predicted, [right, [b if i % 2 else None for i, b in enumerate(more)]]).score
    assert metrics.bleu(predicted, references) == pytest.approx(theirs)


def test_rouge_against_its_own_aggregation():
    scoring = pytest.importorskip("rouge_score.scoring")
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    right = texts(30, 4)
    predicted = nearly(right, 5)
    aggregator = scoring.BootstrapAggregator(n_samples=50)
    rouge = scorer.RougeScorer(["rouge1", "rouge2", "rougeLsum"], use_stemmer=True)
    for one, reference in zip(predicted, right, strict=True):
        aggregator.add_scores(rouge.score(reference, one))
    ours = metrics.rouge(predicted, [[text] for text in right])
    for name, value in aggregator.aggregate().items():
        assert 100 * value.low.fmeasure <= ours[name] <= 100 * value.high.fmeasure
    assert metrics.rouge(right, [[text] for text in right])["rougeLsum"] == pytest.approx(100)


def test_every_metric_has_a_function():
    tables = metrics.OF_CLASSES, metrics.OF_NUMBERS, metrics.OF_TEXTS
    assert {name for table in tables for name in table} == set(typing.get_args(Metric))


def test_texts_are_read_as_classes_and_numbers():
    labels = ("no", "yes")
    predicted, right = ["yes", "no ", "maybe", "yes"], [["yes"], ["no"], ["no"], ["no"]]
    assert score("accuracy", predicted, right, labels) == 0.5
    assert score("f1", predicted, right, labels) == pytest.approx(2 / 3)
    assert score("accuracy", predicted, right) == 0.5
    assert score("pearson", ["1.0", "2.0", "x"], [["1.0"], ["2.0"], ["-1.0"]]) == pytest.approx(1)
    with pytest.raises(UserError, match=r"name them in TextToTextTask\.labels"):
        score("matthews", predicted, right)


def test_the_best_span_is_neither_backward_nor_long():
    scores = np.full((50, 2), -5.0)
    scores[40, 0], scores[10, 0] = 5, 3
    scores[5, 1], scores[45, 1], scores[20, 1] = 9, 1, 2
    assert best_span(scores, 0, 49)[1:] == (40, 45)
    # Alone, the best start would be joined by an end that lies before it, or beyond the text.
    assert best_span(scores, 8, 30)[1:] == (10, 20)

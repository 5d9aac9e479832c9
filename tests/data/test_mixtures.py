import collections
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.data.build import build_data
from t5x_like.data.config import DataConfig
from t5x_like.data.loader import Loader
from t5x_like.data.mixtures import BLOCK, Mixture, MixtureStage, Schedule, round_rates
from t5x_like.data.prepared import PreparedSource, PreparedTokenizerConfig
from t5x_like.errors import UserError
from tests.data.corpora import make_corpus

RATES = st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda rates: sum(rates) > 1e-3)


@given(RATES)
def test_rates_are_rounded_to_parts_of_a_block(rates):
    counts = round_rates(rates)
    exact = np.array(rates) / np.sum(rates) * BLOCK
    assert counts.sum() == BLOCK
    assert ((counts > 0) == (exact > 0)).all()
    assert np.abs(counts - np.maximum(exact, exact > 0)).max() < 1 + len(rates)


@given(st.lists(st.tuples(st.integers(1, 9000), RATES), max_size=3), RATES, st.integers(0, 3))
def test_every_row_of_every_source_once_and_in_order(changes, first, seed):
    width = min([len(first), *(len(rates) for _, rates in changes)])
    stages, start = [(0, first[:width])], 0
    for length, rates in changes:
        start += length
        stages.append((start, rates[:width]))
    stages = [(at, rates) for at, rates in stages if sum(rates) > 0]
    if not stages or stages[0][0] != 0:
        return
    schedule = Schedule(stages, seed)
    numbers = np.arange(start + 9000)
    source, place = schedule.locate(numbers)
    for one in range(width):
        assert np.array_equal(place[source == one], np.arange(np.sum(source == one)))
    for number in (0, 1, start, start + 17, start + 9000):
        assert np.array_equal(schedule.used_before(number), np.bincount(source[:number], minlength=width))
    # Any rows by themselves are what they are among all.
    some = np.random.default_rng(0).permutation(numbers)[:50]
    assert np.array_equal(schedule.locate(some), (source[some], place[some]))


def test_shares_are_exact_in_every_block_and_random_within():
    schedule = Schedule([(0, (0.5, 0.3, 0.2))], seed=0)
    source, _ = schedule.locate(np.arange(10 * BLOCK))
    blocks = source.reshape(10, BLOCK)
    assert all(np.array_equal(np.bincount(block), round_rates((0.5, 0.3, 0.2))) for block in blocks)
    assert len({block.tobytes() for block in blocks}) == 10
    share = np.mean(blocks[:, :400] == 0)
    assert abs(share - 0.5) < 0.05


def test_a_change_of_rates_changes_nothing_before_it():
    plain, staged = Schedule([(0, (1, 1))], 0), Schedule([(0, (1, 1)), (5000, (1, 9))], 0)
    numbers = np.arange(10_000)
    before = numbers < 5000
    assert np.array_equal(np.array(plain.locate(numbers))[:, before], np.array(staged.locate(numbers))[:, before])
    assert 0.85 < np.mean(staged.locate(numbers[~before])[0]) < 0.95


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    first = make_corpus(folder / "web", 0, num_documents=100)
    tokenizer = PreparedTokenizerConfig(directory=first)
    return [
        first,
        *(
            make_corpus(folder / name, i, num_documents=n, tokenizer=tokenizer)
            for name, i, n in (("books", 1, 60), ("tiny", 2, 12))
        ),
    ]


def config(corpora, layout="pack", batch_size=8, **mixture):
    source = Mixture(sources=tuple(PreparedSource(directory=d) for d in corpora), **mixture)
    return DataConfig(
        source=source, tokenizer=None, layout=layout, sequence_length=64, batch_size=batch_size, validation_fraction=0.2
    )


def rows_of(batches, steps):
    return [tuple(row) for step in steps for row in batches.batch(step)["decoder_target_tokens"].tolist()]


@pytest.mark.parametrize("layout", ["pack", "concatenate", "documents"])
def test_each_source_in_whole_epochs_and_its_share(corpora, layout):
    data = build_data(config(corpora, layout, rates=(0.5, 0.3, 0.2)), None)
    alone = [build_data(config([d], layout), None) for d in corpora]
    steps = range(3 * sum(a.train.layout.num_rows for a in alone) // 8)
    seen = collections.Counter(rows_of(data.train, steps))
    epochs = data.train.epochs(len(steps))
    for one, number in zip(alone, epochs, strict=True):
        own = collections.Counter(rows_of(one.train, range(one.train.layout.num_rows)))
        # In 8 epochs; of documents that are cut, several may have the same short end.
        own = {row for row, count in own.items() if count == 8}
        assert {seen[row] for row in own} <= {int(number), int(number) + 1}
    assert epochs[2] > 2
    assert abs(epochs[2] * alone[2].train.layout.num_rows / (8 * len(steps)) - 0.2) < 0.05
    validation = collections.Counter(rows_of(data.validation, range(data.validation.num_batches)))
    expected = sum(
        (collections.Counter(rows_of(a.validation, range(a.validation.num_batches))) for a in alone),
        collections.Counter(),
    )
    empty = (0,) * 64
    del validation[empty], expected[empty]
    assert validation == expected
    assert "mixture: out 50.00%, out 30.00%, out 20.00%" in data.describe()


def test_rates_follow_sizes_temperature_and_limit(corpora):
    sizes = [build_data(config([d]), None).train.layout.num_tokens for d in corpora]
    rates = lambda **mixture: build_data(config(corpora, **mixture), None).train.schedule.rates
    # Raffel et al. 2020, section 3.5.2.
    assert np.allclose(rates(), np.array(sizes) / sum(sizes), atol=1e-3)
    limited = np.minimum(sizes, sizes[1])
    assert np.allclose(rates(max_tokens=sizes[1]), limited / limited.sum(), atol=1e-3)
    warm = np.array(sizes) ** 0.5
    assert np.allclose(rates(temperature=2.0), warm / warm.sum(), atol=1e-3)


@given(st.integers(0, 2000), st.slices(8))
def test_any_rows_of_any_batch_alone(corpora, step, rows):
    data = build_data(config(corpora, rates=(1, 1, 1)), None)
    whole, part = data.train.batch(step), data.train.batch(step, rows)
    for name, values in whole.items():
        assert np.array_equal(values[rows], part[name])


def test_a_source_shorter_than_a_batch_repeats(corpora):
    data = build_data(config([corpora[2]], batch_size=64, rates=(1,)), None)
    assert data.train.layout.num_rows < 64
    rows = collections.Counter(rows_of(data.train, [0]))
    assert max(rows.values()) - min(rows.values()) <= 1


def test_the_fingerprint_is_of_the_rates_too(corpora):
    prints = [
        build_data(config(corpora, **mixture), None).fingerprint
        for mixture in (
            {},
            {"rates": (1, 1, 1)},
            {"temperature": 2.0},
            {"max_tokens": 10},
            {"later": (MixtureStage(start_step=5, rates=(1, 0, 0)),)},
        )
    ]
    assert len(set(prints)) == len(prints)


TRACE = """
import hashlib, sys
from tests.data.test_mixtures import config, trace
from t5x_like.data.build import build_data
corpora, host, hosts, threads, start = eval(sys.argv[1])
print(trace(corpora, host, hosts, threads, start))
"""


def trace(corpora, host, hosts, threads, start):
    """Hashes of this host's rows of 40 batches, read by so many threads; a resumed run reads those from `start` on."""
    data = build_data(config(corpora, rates=(5, 3, 2), later=CHANGE), None)
    rows = slice(host * 8 // hosts, (host + 1) * 8 // hosts)
    digests = []
    read = lambda step: data.train.batch(step, rows)
    if threads:
        with Loader(read, start, 40 - start, num_threads=threads) as loader:
            batches = [batch for _, batch in loader]
    else:
        batches = map(read, range(start, 40))
    for batch in batches:
        digests.append(
            [
                hashlib.sha256(b"".join(v[r].tobytes() for _, v in sorted(batch.items()))).hexdigest()[:8]
                for r in range(8 // hosts)
            ]
        )
    return digests


CHANGE = (MixtureStage(start_step=20, rates=(1, 1, 8)),)


def test_the_trace_is_the_same_on_any_number_of_hosts_and_threads_and_after_a_resume(corpora):
    expected = trace(corpora, 0, 1, 0, 0)
    assert trace(corpora, 0, 1, 4, 0) == expected
    arguments = [
        (corpora, host, hosts, threads, start)
        for hosts, threads, start in ((2, 1, 0), (4, 4, 17))
        for host in range(hosts)
    ]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TRACE, repr(arg)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
        )
        for arg in arguments
    ]
    results = [eval(run.communicate()[0]) for run in runs]
    for hosts, start in ((2, 0), (4, 17)):
        mine = [result for result, arg in zip(results, arguments, strict=True) if arg[2] == hosts]
        together = [[row for host in mine for row in host[step]] for step in range(40 - start)]
        assert together == expected[start:]
    plain = build_data(config(corpora, rates=(5, 3, 2)), None)
    staged = build_data(config(corpora, rates=(5, 3, 2), later=CHANGE), None)
    same = [rows_of(plain.train, [step]) == rows_of(staged.train, [step]) for step in range(40)]
    assert all(same[:20])
    assert not any(same[20:])


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"rates": (0.0, 0.0, 0.0)}, r"Mixture.rates=\(0.0, 0.0, 0.0\): .*one at least must be positive"),
        ({"rates": (1.0, -1.0, 1.0)}, "must not be negative"),
        ({"rates": (1.0,)}, "there are 3 sources, give a rate for each"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"rates": (1.0, 1.0, 1.0), "temperature": 2.0}, "temperature and max_tokens have no effect"),
        ({"later": (MixtureStage(start_step=0, rates=(1.0, 1.0, 1.0)),)}, r"starts at the steps \[0\]"),
        ({"later": (MixtureStage(start_step=5, rates=()),)}, r"MixtureStage.rates=\(\)"),
    ],
)
def test_mistakes_are_named(corpora, mixture, message):
    with pytest.raises(UserError, match=message):
        config(corpora, **mixture)


def test_what_does_not_go_together(corpora, tmp_path):
    with pytest.raises(UserError, match="sources is empty"):
        Mixture(sources=())
    with pytest.raises(UserError, match=r"'random_windows' has no epochs to mix"):
        config(corpora, "random_windows")
    other = make_corpus(tmp_path / "other", 5)
    with pytest.raises(UserError, match=r"different tokenizers: .*web/out and .*other/out"):
        build_data(config([corpora[0], other]), None)

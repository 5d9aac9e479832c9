import collections
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.data.prepare.document import Document, Dropped
from t5x_like.data.prepare.stages.filters import (
    BlocklistFilter,
    C4Filter,
    FineWebFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    repeated_ngram_characters,
    top_ngram_characters,
)
from t5x_like.data.prepare.word_hashes import Words
from t5x_like.errors import UserError

PROSE = (
    "The house stood at the end of a long street, and nobody could remember who had built it.\n"
    "Every morning the old gardener came to look after the roses that grew along its walls.\n"
    "He used to say that flowers have more patience with people than people have with flowers.\n"
    "When the first snow fell he would cover each of them with straw, one after another.\n"
)


def verdict(stage, text, place="page"):
    result = stage.process(Document(text, place, "source"))
    return result.reason if isinstance(result, Dropped) else "kept"


@pytest.mark.parametrize("stage", [GopherQualityFilter(), GopherRepetitionFilter(), C4Filter(), FineWebFilter()])
def test_prose_passes(stage):
    assert verdict(stage, PROSE) == "kept"


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("fewer words", "The house of the gardener. " * 9),
        ("more words", PROSE * 2000),
        ("mean word length", "the of " + "a b c d " * 30),
        ("mean word length", "the of " + "incomprehensibilities " * 60),
        ("hash signs", PROSE + "#" * 10),
        ("ellipses", PROSE + "... " * 10),
        ("bullet lines", "- the house and the street\n" * 12),
        ("lines ending with an ellipsis", "The gardener came to look after all of the old roses again...\n" * 10),
        ("words without a letter", PROSE + "1234 " * 30),
        ("stop words", "Haus Garten Rose Wand Winter " * 20),
    ],
)
def test_gopher_quality_rules(reason, text):
    assert verdict(GopherQualityFilter(), text) == reason


WORDS = [f"w{number}" for number in range(200)]


def sentence(rng, length):
    return " ".join(rng.choice(WORDS) for _ in range(length))


def test_gopher_repetition_rules():
    rng = random.Random(0)
    line = sentence(rng, 12)
    unique = [sentence(rng, 12) for _ in range(20)]
    repetition = GopherRepetitionFilter()
    assert verdict(repetition, "\n".join(unique)) == "kept"
    assert verdict(repetition, "\n\n".join([line] * 4 + unique[:4])) == "repeated paragraphs"
    assert verdict(repetition, "\n".join([line] * 4 + unique[:4])) == "repeated lines"
    long = sentence(rng, 80)
    assert verdict(repetition, "\n".join([long] * 2 + unique[:5])) == "characters in repeated lines"
    assert verdict(repetition, "\n\n".join([long] * 2 + unique[:5])) == "characters in repeated paragraphs"
    assert verdict(repetition, " ".join(f"{WORDS[0]} {WORDS[1]} {word}" for word in WORDS)) == "most frequent 2-gram"
    assert verdict(repetition, f"{long} {long}") == "repeated 5-grams"
    loose = GopherRepetitionFilter(max_repeated_ngrams=(0.9, 0.9, 0.9, 0.9, 0.9, 0.1))
    assert verdict(loose, f"{long} {long}") == "repeated 10-grams"


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=30), st.integers(2, 6))
def test_ngram_measures_against_plain_python(parts, size):
    words = Words(" ".join(parts), normalized=False)
    ngrams = [tuple(parts[i : i + size]) for i in range(len(parts) - size + 1)]
    counts = collections.Counter(ngrams)
    top = max(counts.values(), default=0)
    expected = max((len(" ".join(g)) * n for g, n in counts.items() if n == top), default=0) if top > 1 else 0
    assert top_ngram_characters(words, size) == expected
    covered = {i + j for i, ngram in enumerate(ngrams) if ngram in ngrams[:i] for j in range(size)}
    assert repeated_ngram_characters(words, size) == sum(len(parts[i]) for i in covered)


def test_c4_keeps_sentences():
    page = (
        "Home | About | Contact\n" + PROSE + "Please enable Javascript to see all of this page.\n"
        "This site uses cookies to give you the best experience.\nIt was so.\nAnd then it went on and on...\n"
    )
    kept = C4Filter().process(Document(page, "page", "source"))
    assert kept.text == PROSE.strip()
    cited = C4Filter().process(Document(PROSE.replace("it.", "it.[12]"), "page", "source"))
    assert cited.text == PROSE.strip()
    assert verdict(C4Filter(), PROSE + "function() { return }") == "curly bracket"
    assert verdict(C4Filter(), PROSE + "Lorem ipsum dolor sit amet.") == "lorem ipsum"
    assert verdict(C4Filter(), "\n".join(PROSE.split("\n")[:2])) == "fewer sentences"
    assert verdict(C4Filter(), ("x" * 1001 + " stands in a line with others.\n") * 5) == "fewer sentences"
    any_ending = C4Filter(terminal_punctuation=("",)).process(Document(PROSE + "A line of five words", "p", "s"))
    assert any_ending.text.endswith("five words")


def test_fineweb_rules():
    words = "some words that stand without an end and are of a certain length"
    assert verdict(FineWebFilter(), "\n".join(f"{words} {i}" for i in range(10))) == "lines without punctuation"
    assert verdict(FineWebFilter(), "\n".join([f"Line {i}." for i in range(12)] + PROSE.split("\n"))) == "short lines"
    twice = PROSE + PROSE.split("\n")[0]
    assert verdict(FineWebFilter(), twice) == "characters in repeated lines"
    one_word_each = "\n".join(f"abcdefghijklmnop-{i}-qrstuvwxyz-abcd." for i in range(20))
    assert verdict(FineWebFilter(), one_word_each) == "lines per word"


def test_blocklists(tmp_path):
    (tmp_path / "words").write_text("Badger\nbad phrase\n\n")
    (tmp_path / "hosts").write_text("evil.example\n")
    stage = BlocklistFilter(words_file=f"{tmp_path}/words", hosts_file=f"{tmp_path}/hosts")
    assert verdict(stage, "The BADGER runs.") == "word on the list"
    assert verdict(stage, "a bad phrase, really") == "word on the list"
    assert verdict(stage, "badgers and a bad word") == "kept"
    assert verdict(stage, "fine", "https://www.evil.example/page") == "host on the list"
    assert verdict(stage, "fine", "https://notevil.example/evil.example") == "kept"
    key = stage.cache_key()
    (tmp_path / "words").write_text("badger\n")
    assert stage.cache_key() != key
    with pytest.raises(UserError, match=r"cannot read the list .*missing"):
        BlocklistFilter(words_file=f"{tmp_path}/missing")
    with pytest.raises(UserError, match="needs words_file or hosts_file"):
        BlocklistFilter()


@pytest.mark.datatrove
def test_decisions_agree_with_datatrove(monkeypatch):
    """The same synthetic pages with the limits set alike: the same pages are kept."""
    fineweb = pytest.importorskip("datatrove.pipeline.filters.fineweb_quality_filter", reason="extra: dev")
    from datatrove.data import Document as Page
    from datatrove.pipeline.filters import c4_filters, gopher_quality_filter, gopher_repetition_filter

    # Its tokenizer downloads models; what stands between spaces is a word here too.
    for module in (fineweb, gopher_quality_filter, gopher_repetition_filter):
        monkeypatch.setattr(module, "split_into_words", lambda text, language: text.split())
    monkeypatch.setattr(c4_filters, "split_into_sentences", lambda text, language: [s for s in text.split(".") if s])
    pairs = [
        (GopherQualityFilter(), gopher_quality_filter.GopherQualityFilter()),
        (GopherRepetitionFilter(), gopher_repetition_filter.GopherRepetitionFilter()),
        (FineWebFilter(), fineweb.FineWebQualityFilter(char_duplicates_ratio=0.1)),
        (C4Filter(), c4_filters.C4QualityFilter(min_num_sentences=3, min_words_per_line=5)),
    ]
    pages = [page(np.random.default_rng(seed)) for seed in range(400)]
    for ours, theirs in pairs:
        kept = [verdict(ours, text) == "kept" for text in pages]
        expected = [theirs.filter(Page(text=text, id="0")) is True for text in pages]
        assert 20 < sum(kept) < 380
        agreement = np.mean(np.array(kept) == np.array(expected))
        # Of repeated n-grams it skips some that overlap; every character in one counts here, as in the paper.
        assert agreement >= (0.95 if isinstance(ours, GopherRepetitionFilter) else 0.99), (ours, agreement)


def page(rng):
    """A page whose repetition, punctuation and lengths vary."""
    vocabulary = ["the", "of", "and", "to", *(f"word{'x' * (i % 6)}{i}" for i in range(int(rng.integers(20, 400))))]
    ending = rng.random()
    lines = []
    for _ in range(int(rng.integers(4, 40))):
        if lines and rng.random() < rng.choice([0.0, 0.05, 0.3]):
            lines.append(lines[int(rng.integers(len(lines)))])
            continue
        line = " ".join(rng.choice(vocabulary, int(rng.integers(2, 14))))
        lines.append(("- " if rng.random() < 0.05 else "") + line + ("." if rng.random() < ending else ""))
    return "\n".join(lines)

"""Rules about the quality of web pages, from the papers that found them useful.

A word is what stands between spaces. Limits are of the papers, and every one can be set; the reasons name the rule.
"""

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from t5x_like.configurable import configurable
from t5x_like.data.prepare.document import Document, Dropped, Stage
from t5x_like.data.prepare.word_hashes import Words, most_frequent, repeated, words
from t5x_like.errors import UserError
from t5x_like.files import fingerprint

ELLIPSES = ("...", "\u2026")
BULLETS = ("-", "*", "\u2022", "\u2023", "\u25e6", "\u25cf")
_LETTER = re.compile(r"[^\W\d_]")


@configurable
class GopherQualityFilter(Stage):
    """Documents that look like prose: Rae et al. 2021, https://arxiv.org/abs/2112.11446, appendix A.1.1.

    Attributes:
      min_words: Fewest words.
      max_words: Most words.
      min_word_length: Smallest mean length of a word, in characters.
      max_word_length: Largest mean length of a word.
      max_symbols: Most hash signs per word, and most ellipses per word.
      max_bullet_lines: Largest share of lines that begin with a bullet.
      max_ellipsis_lines: Largest share of lines that end with an ellipsis.
      min_alphabetic_words: Smallest share of words with a letter.
      stop_words: Words that prose has.
      min_stop_words: How many of them there have to be.
    """

    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3.0
    max_word_length: float = 10.0
    max_symbols: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    min_stop_words: int = 2

    def process(self, document: Document) -> Document | Dropped:
        text = document.text
        parts = text.split()
        if len(parts) < self.min_words:
            return Dropped("fewer words")
        if len(parts) > self.max_words:
            return Dropped("more words")
        mean = sum(map(len, parts)) / len(parts)
        if not self.min_word_length <= mean <= self.max_word_length:
            return Dropped("mean word length")
        if text.count("#") > self.max_symbols * len(parts):
            return Dropped("hash signs")
        if sum(map(text.count, ELLIPSES)) > self.max_symbols * len(parts):
            return Dropped("ellipses")
        lines = nonempty_lines(text)
        if share(line.lstrip().startswith(BULLETS) for line in lines) > self.max_bullet_lines:
            return Dropped("bullet lines")
        if share(line.rstrip().endswith(ELLIPSES) for line in lines) > self.max_ellipsis_lines:
            return Dropped("lines ending with an ellipsis")
        # Most words begin with a letter: looking there first is several times as fast.
        with_letter = sum(1 for part in parts if part[0].isalpha() or _LETTER.search(part))
        if with_letter < self.min_alphabetic_words * len(parts):
            return Dropped("words without a letter")
        if len(set(self.stop_words).intersection(map(str.lower, parts))) < self.min_stop_words:
            return Dropped("stop words")
        return document


@configurable
class GopherRepetitionFilter(Stage):
    """Documents that do not repeat themselves: Rae et al. 2021, https://arxiv.org/abs/2112.11446, table A1.

    Shares are of the document's characters unless said otherwise.

    Attributes:
      max_repeated_lines: Largest share of lines that stood in the document before.
      max_repeated_paragraphs: The same of paragraphs (between empty lines).
      max_repeated_line_characters: Largest share in such lines.
      max_repeated_paragraph_characters: Largest share in such paragraphs.
      max_top_ngram: Largest share in all occurrences of the most frequent run of 2, 3 and 4 words.
      max_repeated_ngrams: Largest share in runs of 5, 6, 7, 8, 9 and 10 words that occurred before.
    """

    max_repeated_lines: float = 0.30
    max_repeated_paragraphs: float = 0.30
    max_repeated_line_characters: float = 0.20
    max_repeated_paragraph_characters: float = 0.20
    max_top_ngram: tuple[float, float, float] = (0.20, 0.18, 0.16)
    max_repeated_ngrams: tuple[float, float, float, float, float, float] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)

    def process(self, document: Document) -> Document | Dropped:
        text = document.text
        paragraphs = [part for part in text.split("\n\n") if part.strip()]
        for unit, parts in (("paragraph", paragraphs), ("line", nonempty_lines(text))):
            count, characters = repetitions(parts)
            if count > getattr(self, f"max_repeated_{unit}s") * len(parts):
                return Dropped(f"repeated {unit}s")
            if characters > getattr(self, f"max_repeated_{unit}_characters") * len(text):
                return Dropped(f"characters in repeated {unit}s")
        found = words(text, normalized=False)
        for size, limit in enumerate(self.max_top_ngram, start=2):
            if top_ngram_characters(found, size, limit * len(text)) > limit * len(text):
                return Dropped(f"most frequent {size}-gram")
        for size, limit in enumerate(self.max_repeated_ngrams, start=5):
            characters = repeated_ngram_characters(found, size)
            if characters > limit * len(text):
                return Dropped(f"repeated {size}-grams")
            if characters <= min(self.max_repeated_ngrams) * len(text):
                break  # Longer runs repeat no more than shorter ones.
        return document


def nonempty_lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def share(verdicts: Iterable[bool]) -> float:
    """The share of true ones; 0 of none."""
    verdicts = list(verdicts)
    return sum(verdicts) / len(verdicts) if verdicts else 0.0


def repetitions(parts: list[str]) -> tuple[int, int]:
    """How many parts stood in the list before, and their characters."""
    seen, count, characters = set(), 0, 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        seen.add(part)
    return count, characters


def top_ngram_characters(found: Words, size: int, limit: float = 0.0) -> int:
    """Characters in all occurrences of the most frequent n-gram (of equally frequent ones the longest).

    0 if there is none that occurs twice, or if they are surely not more than `limit`.
    """
    ngrams = found.ngrams(size)
    count = most_frequent(ngrams)
    if count <= 1 or count * size * (found.lengths.max() + 1) <= limit:
        return 0
    _, first, counts = np.unique(ngrams, return_index=True, return_counts=True)
    top = first[counts == count]
    ends = np.cumsum(found.lengths)
    lengths = ends[top + size - 1] - ends[top] + found.lengths[top] + size - 1  # With the spaces between words.
    return int(lengths.max()) * count


def repeated_ngram_characters(found: Words, size: int) -> int:
    """Characters of the words in n-grams that occurred before, each word once."""
    again = repeated(found.ngrams(size))
    change = np.zeros(len(found.lengths) + 1, np.int64)
    change[: len(again)] += again
    change[size : size + len(again)] -= again
    return int(found.lengths[np.cumsum(change)[:-1] > 0].sum())


_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
_SENTENCE_END = re.compile(r"[.!?]+[\"'\u201d\u2019)\]]*(?=\s|$)")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@configurable
class C4Filter(Stage):
    """Keeps the lines that are sentences: Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 2.2.

    Drops pages with "lorem ipsum" or a curly bracket and, with fewer than `min_sentences`, what is left of a page;
    drops lines about Javascript, cookies and terms of use. The paper's list of words is `BlocklistFilter`'s.

    Attributes:
      terminal_punctuation: What a line has to end with; an empty string allows every ending.
      min_words_per_line: Fewest words in a line.
      max_word_length: Most characters in a word of a line.
      min_sentences: Fewest sentences in what is left.
    """

    terminal_punctuation: tuple[str, ...] = (".", "?", "!", '"')
    min_words_per_line: int = 5
    max_word_length: int = 1000
    min_sentences: int = 3

    def process(self, document: Document) -> Document | Dropped:
        lowered = document.text.lower()
        if "lorem ipsum" in lowered:
            return Dropped("lorem ipsum")
        if "{" in lowered:
            return Dropped("curly bracket")
        text = _CITATION.sub("", document.text) if "[" in lowered else document.text
        unwanted = [phrase for phrase in (*_POLICY, "javascript") if phrase in lowered]
        lines = [line for line in map(str.strip, text.split("\n")) if self._is_sentence(line, unwanted)]
        if sum(len(_SENTENCE_END.findall(line)) for line in lines) < self.min_sentences:
            return Dropped("fewer sentences")
        return document._replace(text="\n".join(lines))

    def _is_sentence(self, line: str, unwanted: list[str]) -> bool:
        if not line.endswith(self.terminal_punctuation) or line.endswith("..."):
            return False
        parts = line.split()
        if len(parts) < self.min_words_per_line or max(map(len, parts)) > self.max_word_length:
            return False
        return not (unwanted and any(phrase in line.lower() for phrase in unwanted))


@configurable
class FineWebFilter(Stage):
    """Pages that are not lists or menus: Penedo et al. 2024, https://arxiv.org/abs/2406.17557, section 3.6.

    Attributes:
      min_punctuated_lines: Smallest share of lines that end with `terminal_punctuation`.
      max_repeated_line_characters: Largest share of characters in lines that stood on the page before.
      max_short_lines: Largest share of short lines.
      short_line: Most characters of a short line.
      max_lines_per_word: Most line ends per word (a rule of the published pipeline, not of the paper).
      terminal_punctuation: Of western scripts, and of Chinese, Japanese and Hindi.
    """

    min_punctuated_lines: float = 0.12
    max_repeated_line_characters: float = 0.1
    max_short_lines: float = 0.67
    short_line: int = 30
    max_lines_per_word: float = 0.3
    terminal_punctuation: tuple[str, ...] = (".", "?", "!", "\u3002", "\uff1f", "\uff01", "\u0964", "\u061f")

    def process(self, document: Document) -> Document | Dropped:
        lines = nonempty_lines(document.text)
        if share(line.endswith(self.terminal_punctuation) for line in lines) < self.min_punctuated_lines:
            return Dropped("lines without punctuation")
        if share(len(line) <= self.short_line for line in lines) > self.max_short_lines:
            return Dropped("short lines")
        if repetitions(lines)[1] > self.max_repeated_line_characters * sum(map(len, lines)):
            return Dropped("characters in repeated lines")
        if document.text.count("\n") > self.max_lines_per_word * len(document.text.split()):
            return Dropped("lines per word")
        return document


@configurable
class BlocklistFilter(Stage):
    """Drops documents with a listed word or phrase, and pages of a listed host or of a part of it.

    Attributes:
      words_file: A word or phrase per line, in any case, compared with whole words; C4 used the list at
        https://github.com/LDNOOBW/List-of-Dirty-Naughty-Obscene-and-Otherwise-Bad-Words.
      hosts_file: A host per line, such as `example.com`, which takes `www.example.com` along.
    """

    words_file: str | None = None
    hosts_file: str | None = None

    def __post_init__(self):
        if self.words_file is None and self.hosts_file is None:
            raise UserError("BlocklistFilter needs words_file or hosts_file: set one, or leave the filter out.")
        self.cache_key()  # Reads the files: a missing one is told before any work.

    def cache_key(self) -> str:
        files = [path and fingerprint(_read(path)) for path in self._paths()]
        return repr((self, files))

    def _paths(self) -> tuple[str | None, str | None]:
        return self.words_file, self.hosts_file

    def process(self, document: Document) -> Document | Dropped:
        if self.hosts_file is not None:
            labels = (urlsplit(document.place).hostname or "").split(".")
            if not _entries(self.hosts_file).isdisjoint(".".join(labels[i:]) for i in range(len(labels))):
                return Dropped("host on the list")
        if self.words_file is not None and _pattern(self.words_file).search(document.text.lower()):
            return Dropped("word on the list")
        return document


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"BlocklistFilter: cannot read the list {path}: {error}.") from error


@functools.cache
def _entries(path: str) -> frozenset[str]:
    return frozenset(line.strip().lower() for line in _read(path).decode(errors="replace").splitlines()) - {""}


@functools.cache
def _pattern(path: str) -> re.Pattern:
    # The longest first, and one that never matches for an empty list.
    phrases = sorted(_entries(path), key=lambda phrase: (-len(phrase), phrase))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, phrases))})(?!\w)" if phrases else r"(?!)")

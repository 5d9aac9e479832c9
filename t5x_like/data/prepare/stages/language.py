"""Which language a document is in, by lingua, which brings its models along (extra: prepare)."""

import functools

from t5x_like.configurable import configurable
from t5x_like.data.extras import require
from t5x_like.data.prepare.document import Document, Dropped, Stage
from t5x_like.errors import UserError


@configurable
class LanguageFilter(Stage):
    """Keeps documents in the languages asked for.

    Attributes:
      languages: ISO 639-1 codes, such as `en`.
      among: Codes of the languages that are told apart; empty for all that lingua knows (75: slower, more memory).
      min_confidence: Smallest confidence that the document is in the likeliest of `languages`.
      num_characters: Of the beginning of a document, which decide.
    """

    languages: tuple[str, ...] = ("en",)
    among: tuple[str, ...] = ()
    min_confidence: float = 0.65
    num_characters: int = 1000

    def __post_init__(self):
        if not self.languages:
            raise UserError("LanguageFilter.languages is empty: name the languages to keep, such as ('en',).")
        missing = set(self.languages) - set(self.among)
        if self.among and missing:
            raise UserError(f"LanguageFilter.among={self.among} lacks {sorted(missing)}, which are to be kept.")
        _check_codes((*self.languages, *self.among))

    def process(self, document: Document) -> Document | Dropped:
        detector = _detector(self.among)
        best = next(iter(detector.compute_language_confidence_values(document.text[: self.num_characters])), None)
        if best is None:
            return Dropped("no language")
        code = best.language.iso_code_639_1.name.lower()
        if code not in self.languages:
            return Dropped(f"language {code}")
        return document if best.value >= self.min_confidence else Dropped("uncertain language")


def _lingua():
    return require("lingua", "LanguageFilter")


def _check_codes(codes: tuple[str, ...]):
    known = {language.iso_code_639_1.name.lower() for language in _lingua().Language.all()}
    if unknown := sorted(set(codes) - known):
        raise UserError(f"LanguageFilter: {unknown} are no ISO 639-1 codes that lingua knows: {sorted(known)}.")


@functools.cache
def _detector(among: tuple[str, ...]):
    lingua = _lingua()
    builder = lingua.LanguageDetectorBuilder
    if among:
        codes = [getattr(lingua.IsoCode639_1, code.upper()) for code in among]
        return builder.from_iso_codes_639_1(*codes).with_low_accuracy_mode().build()
    return builder.from_all_languages().with_low_accuracy_mode().build()

"""What trains and what validates: documents by a hash of their content, or text by its position."""

import abc
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Literal

SplitBy = Literal["document", "position"]


class Texts(abc.ABC):
    """Documents that can be read again and again."""

    @abc.abstractmethod
    def documents(self) -> Iterator[str]:
        """Yields the non-empty documents, in the same order at every call; all can be written as UTF-8."""

    @abc.abstractmethod
    def cache_key(self) -> str:
        """Names the present state of the texts: cheap, and different when the documents may have changed."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Divides documents into train and validation; the same text is always on the same side.

    Attributes:
      by: `document`: a hash of its content sends a document to one side, whatever its neighbours; `position`: the
        last characters of the whole text, in the order of the source, are the validation split (as nanoGPT).
      validation_fraction: Of the documents, or of the characters.
    """

    by: SplitBy
    validation_fraction: float


def content_hash(text: str) -> int:
    """64 bits that equal texts share, on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclasses.dataclass(frozen=True)
class SplitDocuments:
    """The documents of a source by split; every call reads the source again."""

    source: Texts
    split: Split

    def all(self) -> Iterator[str]:
        return self.source.documents()

    def train(self) -> Iterator[str]:
        return self._side(validation=False)

    def validation(self) -> Iterator[str]:
        return self._side(validation=True)

    def _side(self, validation: bool) -> Iterator[str]:
        if self.split.by == "document":
            threshold = int(self.split.validation_fraction * 2**64)
            for text in self.source.documents():
                if (content_hash(text) < threshold) == validation:
                    yield text
            return
        left = int(sum(map(len, self.source.documents())) * (1 - self.split.validation_fraction))
        for text in self.source.documents():
            here = text[left:] if validation else text[:left]
            left = max(left - len(text), 0)
            if here:
                yield here

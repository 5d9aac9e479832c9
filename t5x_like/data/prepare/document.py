"""A document on its way through the stages, and what a stage is."""

import abc
from typing import NamedTuple


class Document(NamedTuple):
    """A text, and where it was found.

    Attributes:
      text: Non-empty, and can be written as UTF-8.
      place: Path, with a line or record number, or the address of a page.
      source: The pattern among `PrepareConfig.files` that found it.
    """

    text: str
    place: str
    source: str


class Dropped(NamedTuple):
    """The verdict of a stage that a document does not go on, with the reason in a few words."""

    reason: str


class Stage(abc.ABC):
    """Something done to every document: it is changed, kept as it is, or dropped.

    Subclasses are configurables, so that a stage of the user's own (a trained classifier, say) is a class in a module
    named by `--plugin`. A stage is a pure function of the document; what it loads is loaded once per process.
    """

    @abc.abstractmethod
    def process(self, document: Document) -> Document | Dropped:
        """The document that goes on, or why none does."""

    def cache_key(self) -> str:
        """Differs between stages that may do different things: override it if files are read."""
        return repr(self)

"""Counts of what every stage kept and dropped, and why: sums, so that the order of the work changes nothing."""

import collections
import dataclasses
from typing import Any, Self

from t5x_like.data.prepare.document import Document
from t5x_like.data.splits import content_hash

DROPPED = "dropped: "
NUM_EXAMPLES = 5
EXCERPT = 400  # characters


@dataclasses.dataclass
class Tally:
    """Counts by (source, stage, outcome, unit).

    Attributes:
      counts: How many of a unit (`documents`, `characters`, ...) of a source had an outcome in a stage.
      examples: Of (stage, reason), the few documents with the smallest hashes: [hash, place, beginning].
      histograms: Of a name, how many values were in [2^(k-1), 2^k), by k.
    """

    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    examples: dict[tuple[str, str], list[list]] = dataclasses.field(default_factory=dict)
    histograms: dict[str, collections.Counter] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )

    def count(self, source: str, stage: str, outcome: str, **amounts: int):
        """Adds amounts, by unit, to an outcome of a stage."""
        for unit, amount in amounts.items():
            if amount:
                self.counts[source, stage, outcome, unit] += amount

    def keep(self, stage: str, document: Document):
        self.count(document.source, stage, "kept", documents=1, characters=len(document.text))

    def drop(self, stage: str, reason: str, document: Document):
        self.fail(stage, reason, document.source, document.place, document.text[:EXCERPT])
        self.count(document.source, stage, DROPPED + reason, characters=len(document.text))

    def fail(self, stage: str, reason: str, source: str, place: str, details: str = ""):
        """Counts what never became a document."""
        self.count(source, stage, DROPPED + reason, documents=1)
        self._add_examples((stage, reason), [[content_hash(place + details), place, details]])

    def observe(self, histogram: str, value: int):
        self.histograms[histogram][value.bit_length()] += 1

    def add(self, other: Self):
        """Adds the counts of another part of the work."""
        self.counts.update(other.counts)
        for key, examples in other.examples.items():
            self._add_examples(key, examples)
        for name, histogram in other.histograms.items():
            self.histograms[name].update(histogram)

    def _add_examples(self, key: tuple[str, str], examples: list[list]):
        self.examples[key] = sorted([*self.examples.get(key, ()), *examples])[:NUM_EXAMPLES]

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": [[*key, amount] for key, amount in sorted(self.counts.items())],
            "examples": [[*key, examples] for key, examples in sorted(self.examples.items())],
            "histograms": {name: sorted(values.items()) for name, values in sorted(self.histograms.items())},
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        tally = cls()
        for *key, amount in content["counts"]:
            tally.counts[tuple(key)] = amount
        for stage, reason, examples in content["examples"]:
            tally.examples[stage, reason] = examples
        for name, values in content["histograms"].items():
            tally.histograms[name].update(dict(values))
        return tally

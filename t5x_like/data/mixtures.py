"""Several sources in one stream of rows: which source a row comes from, and which of its rows, in closed form.

Rows are numbered since the run began. In every block of 4,096 of them each source has the same share, at places that a
random permutation of the block's own decides; so the rows of a source that precede a row can be counted at once,
whatever its number, and a change of the rates at a step changes nothing before it.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from t5x_like.configurable import configurable
from t5x_like.data.batches import ALL, TRAIN_NOISE, VALIDATION_NOISE, OrderedBatches, TrainBatches, row_numbers
from t5x_like.data.corpus import Corpus
from t5x_like.data.layouts import Layout
from t5x_like.data.objectives.objective import Index, Keys, Rows, Transform
from t5x_like.data.randomness import keys, permute
from t5x_like.data.sources import Source
from t5x_like.data.splits import Split
from t5x_like.data.tasks.examples import ExampleCorpus
from t5x_like.data.tasks.task import Task
from t5x_like.data.tokenizers import TokenizerConfig
from t5x_like.errors import UserError

BLOCK = 4096
# Streams of random keys: the permutations of each stage's blocks, the order of each source's rows.
_STAGES, _ORDERS = 2**16, 2**17


@configurable
class MixtureStage:
    """Rates that hold from a step on.

    Attributes:
      start_step: The first step with these rates.
      rates: Of the sources, in their order.
    """

    start_step: int
    rates: tuple[float, ...]


@configurable
class Mixture(Source):
    """Rows of several prepared corpora, which must have the same tokenizer, or of several tasks.

    Each is repeated as often as it takes.

    Without `rates` a source's is proportional to min(its tokens, `max_tokens`)^(1 / `temperature`): examples-
    proportional mixing with a limit, and temperature-scaled mixing, of Raffel et al. 2020, section 3.5.2, where size is
    counted in examples; rows are of nearly the same size here.

    Attributes:
      sources: The corpora, or the tasks, which are of one kind.
      rates: Shares of the rows; any scale. They are rounded to multiples of 1/4096, and none but 0 becomes 0.
      temperature: 1 for proportional rates; larger ones bring the rates closer together.
      max_tokens: Tokens of a source beyond which it counts as no larger; None: no limit.
      later: Rates that replace these from a step on, in the order of their steps.
    """

    sources: tuple[Source, ...]
    rates: tuple[float, ...] = ()
    temperature: float = 1.0
    max_tokens: int | None = None
    later: tuple[MixtureStage, ...] = ()

    needs_epochs = True

    def __post_init__(self):
        if not self.sources:
            raise UserError("Mixture.sources is empty: name at least one.")
        for source in self.sources:
            if isinstance(source, Mixture) or not (source.brings_tokenizer or source.tasks):
                raise UserError(
                    f"Mixture.sources: @{type(source).__name__}() is neither a prepared corpus nor a task: make a "
                    "corpus of it with t5x_like prepare."
                )
        if len({source.brings_tokenizer for source in self.sources}) > 1:
            raise UserError("Mixture.sources: prepared corpora and tasks do not mix, they have different objectives.")
        for name, rates in (("Mixture.rates", self.rates), *(("MixtureStage.rates", s.rates) for s in self.later)):
            self._check(name, rates)
        if self.temperature <= 0 or (self.max_tokens is not None and self.max_tokens < 1):
            raise UserError(
                f"Mixture.temperature={self.temperature} and max_tokens={self.max_tokens}: must be positive."
            )
        if self.rates and (self.temperature != 1.0 or self.max_tokens is not None):
            raise UserError("Mixture.rates are given: temperature and max_tokens have no effect, leave them out.")
        starts = [0, *(stage.start_step for stage in self.later)]
        if sorted(set(starts)) != starts:
            raise UserError(f"Mixture.later starts at the steps {starts[1:]}: they must be positive and ascend.")

    def _check(self, name: str, rates: tuple[float, ...]):
        if rates and len(rates) != len(self.sources):
            raise UserError(f"{name}={rates}: there are {len(self.sources)} sources, give a rate for each.")
        if (rates or name != "Mixture.rates") and not (min(rates, default=0) >= 0 and sum(rates) > 0):
            raise UserError(f"{name}={rates}: rates must not be negative, and one at least must be positive.")

    @property
    def brings_tokenizer(self) -> bool:
        return self.sources[0].brings_tokenizer

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(task for source in self.sources for task in source.tasks)

    @property
    def facts(self) -> tuple[Any, ...]:
        # Directories may be renamed; what is in them is in the corpora's own fingerprints.
        return self.rates, self.temperature, self.max_tokens, self.later

    def corpora(
        self, split: Split, tokenizer: TokenizerConfig | None, directory: Path | None
    ) -> tuple[Corpus | ExampleCorpus, ...]:
        corpora = tuple(corpus for source in self.sources for corpus in source.corpora(split, tokenizer, directory))
        places = {c.tokenizer.fingerprint(): source.place for c, source in zip(corpora, self.sources, strict=True)}
        if len(places) > 1 and self.brings_tokenizer:
            raise UserError(
                f"Mixture.sources have different tokenizers: {' and '.join(places.values())}. Prepare them with the "
                "same one (PrepareConfig.tokenizer = @PreparedTokenizerConfig()), and give them the same "
                "special_tokens."
            )
        if len(places) > 1:
            raise UserError(
                f"Mixture.sources: @{type(tokenizer).__name__}() is trained on each task and becomes another: use one "
                "that exists (a file, or that of a prepared corpus or of another run)."
            )
        return corpora

    def training(self, layouts: Sequence[Layout], transform: Transform, batch_size: int, seed: int) -> "MixedBatches":
        stages = self.stages([layout.num_tokens for layout in layouts])
        return MixedBatches(layouts, transform, batch_size, seed, stages, [source.name for source in self.sources])

    def validation(self, layouts: Sequence[Layout], transform: Transform, batch_size: int) -> "OrderedMixture":
        return OrderedMixture(layouts, transform, batch_size)

    def stages(self, num_tokens: Sequence[int]) -> list[tuple[int, Sequence[float]]]:
        """(first step, rates) of all stages, for sources of so many tokens."""
        first = self.rates or [min(size, self.max_tokens or size) ** (1 / self.temperature) for size in num_tokens]
        return [(0, first), *((stage.start_step, stage.rates) for stage in self.later)]


class Schedule:
    """Which source each row of a run comes from, and how many rows of that source precede it."""

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]], seed: int):
        """Counts ahead to the beginning of each stage.

        Args:
          stages: (first row, rates) of each; the first begins at row 0.
          seed: Of the permutations.
        """
        self._starts = np.array([start for start, _ in stages])
        self._counts = np.array([round_rates(rates) for _, rates in stages])
        self._seed = seed
        self._table = functools.lru_cache(maxsize=16)(self._make_table)
        self._before = np.zeros_like(self._counts)
        for number, (start, end) in enumerate(zip(self._starts[:-1], self._starts[1:], strict=True)):
            self._before[number + 1] = self._before[number] + self._used(number, end - start)

    @property
    def rates(self) -> Float64[np.ndarray, "sources"]:
        """Of the first stage."""
        return self._counts[0] / BLOCK

    def locate(self, numbers: Int64[np.ndarray, "rows"]) -> tuple[Int64[np.ndarray, "rows"], Int64[np.ndarray, "rows"]]:
        """The source of each row, and its place among the rows of that source since the run began."""
        source, place = np.empty_like(numbers), np.empty_like(numbers)
        stages = np.searchsorted(self._starts, numbers, side="right") - 1
        blocks, at = np.divmod(numbers - self._starts[stages], BLOCK)
        for stage, block in sorted(set(zip(stages.tolist(), blocks.tolist(), strict=True))):
            mine = (stages == stage) & (blocks == block)
            sources, ranks = self._table(stage, block)
            source[mine] = here = sources[at[mine]]
            place[mine] = self._before[stage, here] + block * self._counts[stage, here] + ranks[at[mine]]
        return source, place

    def used_before(self, number: int) -> Int64[np.ndarray, "sources"]:
        """Rows of each source among the first `number` rows."""
        stage = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._before[stage] + self._used(stage, number - self._starts[stage])

    def _used(self, stage: int, count: int) -> Int64[np.ndarray, "sources"]:
        """Rows of each source among the first `count` of a stage."""
        block, rest = divmod(int(count), BLOCK)
        sources, _ = self._table(stage, block)
        return block * self._counts[stage] + np.bincount(sources[:rest], minlength=self._counts.shape[1])

    def _make_table(self, stage: int, block: int) -> tuple[Int64[np.ndarray, "block"], Int64[np.ndarray, "block"]]:
        """For the rows of a block: the source, and the place among that source's rows in the block."""
        key = keys(self._seed, np.array([block]), _STAGES + stage)
        slots = permute(np.arange(BLOCK), key, BLOCK)
        sources = np.searchsorted(np.cumsum(self._counts[stage]), slots, side="right")
        order = np.argsort(sources, kind="stable")
        ranks = np.empty(BLOCK, np.int64)
        ranks[order] = np.concatenate([np.arange(count) for count in self._counts[stage]])
        return sources, ranks


def round_rates(rates: Sequence[float]) -> Int64[np.ndarray, "sources"]:
    """How many rows of a block each source has: the largest remainders are rounded up, and no rate but 0 gives 0."""
    exact = np.array(rates, np.float64) / np.sum(rates) * BLOCK
    counts = np.where(exact > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    while (missing := BLOCK - counts.sum()) > 0:
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    while counts.sum() > BLOCK:
        counts[np.argmax(counts - exact - BLOCK * (counts <= 1))] -= 1
    return counts


class Together:
    """Sizes of several layouts."""

    def __init__(self, layouts: Sequence[Layout], rates: Float64[np.ndarray, "sources"] | None = None):
        """Adds them up; `rates` are the shares of the rows, by default those of the layouts' rows."""
        self.num_rows = sum(layout.num_rows for layout in layouts)
        self.num_tokens = sum(layout.num_tokens for layout in layouts)
        weights = [layout.num_rows for layout in layouts] if rates is None else rates
        self.tokens_per_row = float(np.average([layout.tokens_per_row for layout in layouts], weights=weights))
        self.num_cut = sum(layout.num_cut for layout in layouts)


class MixedBatches(TrainBatches):
    """Batches of training from several layouts: of each, every row once per epoch, each epoch in another order."""

    def __init__(
        self,
        layouts: Sequence[Layout],
        transform: Transform,
        batch_size: int,
        seed: int,
        stages: Sequence[tuple[int, Sequence[float]]],
        names: Sequence[str],
    ):
        """Prepares the schedule; `stages` are (first step, rates), `names` those of the sources."""
        self._names = names
        self._layouts, self._transform, self.batch_size, self._seed = layouts, transform, batch_size, seed
        self.schedule = Schedule([(step * batch_size, rates) for step, rates in stages], seed)
        self.layout = Together(layouts, self.schedule.rates)

    def batch(self, step: int, rows: slice = ALL) -> Rows:
        numbers = row_numbers(step, self.batch_size, rows)
        source, place = self.schedule.locate(numbers)
        index = np.empty_like(place)
        for one in np.unique(source).tolist():
            mine, size = source == one, self._layouts[one].num_rows
            epoch, here = np.divmod(place[mine], size)
            index[mine] = permute(here, keys(self._seed, epoch, _ORDERS + one), size)
        noise = keys(self._seed, numbers, TRAIN_NOISE)
        return _read(self._layouts, self._transform, source, index, noise)

    def epochs(self, step: int) -> Float64[np.ndarray, "sources"]:
        """How often each source has been seen before this step."""
        return self.schedule.used_before(step * self.batch_size) / [layout.num_rows for layout in self._layouts]

    def describe(self) -> list[str]:
        rates = zip(self._names, self.schedule.rates, strict=True)
        return ["mixture: " + ", ".join(f"{name} {rate:.2%}" for name, rate in rates)]

    def describe_step(self, step: int) -> list[str]:
        epochs = zip(self._names, self.epochs(step), strict=True)
        return ["epochs before this step: " + ", ".join(f"{name} {number:.2f}" for name, number in epochs)]


class OrderedMixture(OrderedBatches):
    """All rows of all sources once, source by source, for evaluation; the last batch is filled with empty rows.

    Attributes:
      layouts: Of the sources.
    """

    def __init__(self, layouts: Sequence[Layout], transform: Transform, batch_size: int):
        self.layouts, self._transform, self.batch_size = tuple(layouts), transform, batch_size
        self.layout = Together(layouts)
        self._ends = np.cumsum([layout.num_rows for layout in layouts])
        self.num_batches = -(-self.layout.num_rows // batch_size)

    def batch(self, number: int, rows: slice = ALL) -> Rows:
        """The batch of a number from 0 to `num_batches` - 1, or those of its rows."""
        numbers = row_numbers(number, self.batch_size, rows)
        source = np.minimum(np.searchsorted(self._ends, numbers, side="right"), len(self.layouts) - 1)
        index = numbers - np.append(0, self._ends)[source]
        return _read(self.layouts, self._transform, source, index, keys(0, numbers, VALIDATION_NOISE))


def _read(
    layouts: Sequence[Layout], transform: Transform, source: Int64[np.ndarray, "rows"], index: Index, noise: Keys
) -> Rows:
    """Features of rows of several layouts, in the order of the rows."""
    batch: Rows = {}
    # An empty batch has the features, too.
    for one in np.unique(source).tolist() or [0]:
        mine = source == one
        for name, values in transform(layouts[one], index[mine], noise[mine]).items():
            batch.setdefault(name, np.empty((len(source), *values.shape[1:]), values.dtype))[mine] = values
    return batch

"""The whole of `prepare`: passes in their order, their results brought together."""

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from t5x_like.data.prepare import passes
from t5x_like.data.prepare.config import PrepareConfig
from t5x_like.data.prepare.duplicates import find_duplicates
from t5x_like.data.prepare.engine import Engine
from t5x_like.data.prepare.readers import DAMAGED
from t5x_like.data.prepare.report import REPORT_HTML, REPORT_JSON, make_report, render_html
from t5x_like.data.prepare.tally import DROPPED, Tally
from t5x_like.data.prepare.work import Plan, Unit, make_plan, write_json
from t5x_like.data.shards import PREPARED, TOKENIZER, Shard
from t5x_like.data.tokenizers import read_tokenizer
from t5x_like.data.tokens import token_dtype
from t5x_like.errors import UserError
from t5x_like.files import InUseError, locked, new_file

_WORK = ".work"
_KEY = "key"
_LOCK = "lock"
_SAMPLED_UNITS = 64


def prepare(config: PrepareConfig, engine: Engine) -> dict[str, Any]:
    """Makes the corpus, or finishes one that was begun; returns the report (`report.json`).

    Raises:
      UserError: if files are missing or too many are damaged, if nothing is left of them, if the directory holds
        something else, or if its disk is full (what is finished stays, and the same call goes on).
    """
    plan = make_plan(config)
    directory = Path(config.directory).expanduser()
    try:
        with _working(directory, plan.key) as work:
            if not (directory / PREPARED).exists():
                _run_passes(config, plan, engine, directory, work)
                shutil.rmtree(work)
            return json.loads((directory / REPORT_JSON).read_text())
    except OSError as error:
        raise UserError(
            f"Cannot write the corpus to {directory}: {error}. What is finished is kept; the same command goes on."
        ) from error


@contextlib.contextmanager
def _working(directory: Path, key: str) -> Iterator[Path]:
    """The work directory, for this process alone; UserError if the directory is of another corpus or process."""
    work, finished = directory / _WORK, directory / PREPARED
    known = work / _KEY
    if finished.exists():
        if json.loads(finished.read_text()).get("key") != key:
            raise UserError(
                f"{directory} holds a corpus of other files, or of another configuration: choose another directory, or "
                "remove that one."
            )
        yield work
        return
    if known.exists() and known.read_text() != key:
        raise UserError(
            f"{directory} holds an unfinished corpus of other files, or of another configuration: choose another "
            "directory, or remove that one."
        )
    if not known.exists() and directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty and holds no corpus: choose another directory.")
    work.mkdir(parents=True, exist_ok=True)
    known.write_text(key)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(work / _LOCK))
        except InUseError as holder:
            raise UserError(f"Another process prepares {directory} just now: let it finish, or stop it.") from holder
        yield work


def _run_passes(config: PrepareConfig, plan: Plan, engine: Engine, directory: Path, work: Path):
    units = plan.units
    engine.run(functools.partial(passes.clean, config=config, work=work), units, "Cleaning")
    tally = Tally()
    for unit in units:
        tally.add(Tally.from_json(json.loads((work / passes.name("clean", unit.number, ".json")).read_text())))
    _check_files(tally, config)
    find_duplicates(units, config.deduplication, work, engine)
    _make_tokenizer(config, units, work, directory / TOKENIZER)
    arguments = {"config": config, "work": work, "directory": directory, "num_units": len(units)}
    engine.run(functools.partial(passes.tokenize, **arguments), units, "Tokenizing")
    shards = []
    for unit in units:
        result = json.loads((work / passes.name("tokens", unit.number, ".json")).read_text())
        shards.append(Shard(**result["shard"]))
        tally.add(Tally.from_json(result["tally"]))
    _finish(config, plan.key, directory, [shard for shard in shards if shard.documents], tally)


def _check_files(tally: Tally, config: PrepareConfig):
    """UserError if too many files are damaged, or if they held nothing."""
    damaged = sum(n for (_, _, outcome, _), n in tally.counts.items() if outcome == DROPPED + DAMAGED)
    examples = tally.examples.get(("read", DAMAGED), [])
    listed = "; ".join(f"{place} ({details})" for _, place, details in examples)
    if damaged > config.reading.max_bad_files:
        raise UserError(
            f"{damaged} files are missing or damaged, more than Reading.max_bad_files="
            f"{config.reading.max_bad_files}: {listed}. Mend or leave them out, or allow {damaged}; then remove "
            f"{config.directory}."
        )
    last = type(config.stages[-1]).__name__ if config.stages else "extract"
    if not any(stage == last and outcome == "kept" for _, stage, outcome, _ in tally.counts):
        reasons = sorted({f"{stage}: {outcome}" for _, stage, outcome, _ in tally.counts if DROPPED in outcome})
        raise UserError(
            f"Nothing is left of PrepareConfig.files={config.files!r}: {'; '.join(reasons) or 'the files are empty'}. "
            f"{listed}".rstrip()
        )


class _CleanTexts:
    """The deduplicated texts, for tokenizers to learn from."""

    def __init__(self, config: PrepareConfig, units: Sequence[Unit], work: Path):
        self._config, self._units, self._work = config, units, work

    def train(self) -> Iterator[str]:
        """Yields the texts of at most 64 units from everywhere in the corpus: enough for a sample."""
        stride = -(-len(self._units) // _SAMPLED_UNITS)
        return self._texts(self._units[::stride])

    def all(self) -> Iterator[str]:
        return self._texts(self._units)

    def _texts(self, units: Sequence[Unit]) -> Iterator[str]:
        for unit in units:
            for document in passes.kept_documents(unit, self._config, self._work):
                yield document.text


def _make_tokenizer(config: PrepareConfig, units: Sequence[Unit], work: Path, place: Path):
    if place.exists():
        return
    tokenizer = config.tokenizer.build(_CleanTexts(config, units, work))
    aside = work / TOKENIZER
    aside.mkdir(exist_ok=True)
    tokenizer.save(aside)
    aside.rename(place)


def _finish(config: PrepareConfig, key: str, directory: Path, shards: Sequence[Shard], tally: Tally):
    """Writes the reports and, last, the file that says that the corpus is complete."""
    tokenizer = read_tokenizer(directory / TOKENIZER)
    report = make_report(config, tokenizer, shards, tally)
    write_json(directory / REPORT_JSON, report)
    with new_file(directory / REPORT_HTML) as aside:
        aside.write_text(render_html(report))
    record = {
        "format": 1,
        "key": key,
        "dtype": token_dtype(tokenizer.vocab_size),
        "tokenizer": tokenizer.fingerprint(),
        "shards": [shard._asdict() for shard in shards],
    }
    write_json(directory / PREPARED, record)

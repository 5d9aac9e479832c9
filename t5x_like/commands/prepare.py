"""`t5x_like prepare`: a corpus for training from files."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from t5x_like.commands import cli
from t5x_like.data.prepare.beam import BeamEngine
from t5x_like.data.prepare.config import PrepareConfig
from t5x_like.data.prepare.engine import LocalEngine
from t5x_like.data.prepare.report import REPORT_HTML
from t5x_like.data.prepare.run import prepare


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(command, argv, define_flags)


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string(
        "from", [], "File, directory or glob to read; may be given again (PrepareConfig.files).", flag_values=values
    )
    flags.DEFINE_string("to", None, "Directory of the corpus (PrepareConfig.directory).", flag_values=values)
    flags.DEFINE_integer(
        "workers",
        None,
        "Processes; all cores by default. The result does not depend on it.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "beam",
        [],
        "Run on Apache Beam; an option of the pipeline without its dashes, may be given again: --beam=runner=...",
        flag_values=values,
    )


def command(values: flags.FlagValues) -> None:
    """Reads, cleans, deduplicates and tokenises files, and writes a corpus to train from with a report about it.

    The same command finishes what was stopped. Without --gin_file the configuration is prepare/default.gin; for pages
    of the web there is prepare/web.gin.
    """
    values.gin_file = values.gin_file or ["prepare/default.gin"]
    if values["from"].value:
        values.gin_bindings = [*values.gin_bindings, f"PrepareConfig.files = {tuple(values['from'].value)!r}"]
    if values.to is not None:
        values.gin_bindings = [*values.gin_bindings, f"PrepareConfig.directory = {values.to!r}"]
    configured = cli.configured(values, PrepareConfig)
    if configured is None:
        return
    _, config = configured
    start = time.perf_counter()
    engine = BeamEngine([f"--{option}" for option in values.beam]) if values.beam else LocalEngine(values.workers)
    with engine:
        report = prepare(config, engine)
    print(summary(config, report, time.perf_counter() - start))


def summary(config: PrepareConfig, report: dict[str, Any], seconds: float) -> str:
    totals, tokenizer = report["totals"], report["tokenizer"]
    directory = Path(config.directory).expanduser()
    return "\n".join(
        [
            f"{totals['documents']:,} of {totals['documents_found']:,} documents, {totals['bytes']:,} bytes, "
            f"{totals['tokens']:,} tokens in {totals['shards']} shards ({seconds:.0f} s)",
            f"{tokenizer['kind']} with {tokenizer['vocab_size']:,} tokens: {tokenizer['bytes_per_token']:.2f} bytes "
            f"per token, {tokenizer['tokens_per_word']:.2f} tokens per word",
            f"What was dropped, and why: {directory / REPORT_HTML}",
            f"Train on it: t5x_like train --gin_file=runs/prepared.gin --gin.CORPUS={config.directory}",
        ]
    )

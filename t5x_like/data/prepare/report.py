"""What became of the input: `report.json` for programs, `report.html` for people."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from t5x_like.data.prepare.config import PrepareConfig
from t5x_like.data.prepare.tally import DROPPED, Tally
from t5x_like.data.shards import Shard
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.page import Markup, bar, element, facts, page, row, table

REPORT_JSON, REPORT_HTML = "report.json", "report.html"


def make_report(config: PrepareConfig, tokenizer: Tokenizer, shards: Sequence[Shard], tally: Tally) -> dict[str, Any]:
    """The report as JSON's types; nothing in it depends on when, where and with how many processes it was made."""
    stages = ["read", "extract", *(type(stage).__name__ for stage in config.stages), "deduplicate", "tokenize"]
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("directory", "stages")}
    settings["stages"] = [{"stage": type(stage).__name__, **dataclasses.asdict(stage)} for stage in config.stages]
    return {
        "totals": {
            "documents_found": _sum(tally, "read", "found", "documents"),
            "documents": sum(shard.documents for shard in shards),
            "bytes": sum(shard.bytes for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
            "shards": len(shards),
        },
        "stages": [_stage(tally, stage) for stage in dict.fromkeys(stages)],
        "sources": [_source(tally, source) for source in config.patterns],
        "tokenizer": {
            "kind": type(tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint(),
            **_fertility(tally, None),
        },
        "histograms": {
            name: [[2 ** (k - 1) if k else 0, values[k]] for k in range(min(values), max(values) + 1)]
            for name, values in sorted(tally.histograms.items())
        },
        "examples": [
            {"stage": stage, "reason": reason, "documents": [{"place": p, "beginning": b} for _, p, b in examples]}
            for (stage, reason), examples in sorted(tally.examples.items(), key=lambda item: stages.index(item[0][0]))
        ],
        "config": settings,
    }


def _sum(tally: Tally, stage: str, outcome: str, unit: str, source: str | None = None) -> int:
    return sum(
        amount
        for (s, t, o, u), amount in tally.counts.items()
        if (t, o, u) == (stage, outcome, unit) and source in (None, s)
    )


def _stage(tally: Tally, stage: str) -> dict[str, Any]:
    """Documents and characters of a stage by outcome, over all sources."""
    outcomes: dict[str, dict[str, int]] = {}
    for (_, name, outcome, unit), amount in sorted(tally.counts.items()):
        if name == stage:
            units = outcomes.setdefault(outcome, {})
            units[unit] = units.get(unit, 0) + amount
    return {"stage": stage, "outcomes": outcomes}


def _source(tally: Tally, source: str) -> dict[str, Any]:
    return {
        "source": source,
        "documents_found": _sum(tally, "read", "found", "documents", source),
        "bytes_found": _sum(tally, "read", "found", "bytes", source),
        **{unit: _sum(tally, "tokenize", "kept", unit, source) for unit in ("documents", "bytes", "tokens")},
        **_fertility(tally, source),
    }


def _fertility(tally: Tally, source: str | None) -> dict[str, float]:
    tokens, words, size, unknown = (
        _sum(tally, "tokenize", "kept", unit, source) for unit in ("tokens", "words", "bytes", "unknown")
    )
    return {
        "tokens_per_word": round(tokens / max(words, 1), 4),
        "bytes_per_token": round(size / max(tokens, 1), 4),
        "unknown_tokens": round(unknown / max(tokens, 1), 6),
    }


def render_html(report: dict[str, Any]) -> str:
    """A page that needs nothing but itself. All that comes from the input is escaped: it is text, never markup."""
    totals = report["totals"]
    shown = {
        "documents kept": totals["documents"],
        "of documents found": totals["documents_found"],
        "tokens": totals["tokens"],
        "bytes of text": totals["bytes"],
        "shards": totals["shards"],
    }
    parts = [
        element("h1", "Prepared corpus"),
        element("div", *(element("div", element("b", v), element("span", k, kind="dim")) for k, v in shown.items()),
                kind="totals"),
        element("h2", "Stages"),
        table(_stage_rows(report["stages"], totals["documents_found"]), ["stage", "documents", "characters", ""]),
        element("h2", "Sources"),
        _dict_table(report["sources"]),
        element("h2", "Tokenizer"),
        _dict_table([report["tokenizer"]]),
        *_histograms(report["histograms"]),
        element("h2", "Examples of what was dropped"),
        *(_example(example) for example in report["examples"]),
        element("h2", "Configuration"),
        facts(report["config"]),
    ]  # fmt: skip
    return page("Prepared corpus", parts)


def _stage_rows(stages: Sequence[dict[str, Any]], found: int) -> Iterator[Markup]:
    for stage in stages:
        kept = stage["outcomes"].get("kept", stage["outcomes"].get("found", {}))
        yield _stage_row(stage["stage"], kept, found)
        for outcome, units in stage["outcomes"].items():
            if outcome not in ("kept", "found"):
                yield _stage_row(outcome, units, found, "reason")


def _stage_row(label: str, units: dict[str, int], found: int, kind: str = "") -> Markup:
    documents = units.get("documents", 0)
    share = bar(documents, found, "bar drop" if label.startswith(DROPPED) else "bar")
    return row([label, documents, units.get("characters", 0), share], kind)


def _dict_table(rows: Sequence[dict[str, Any]]) -> Markup:
    return table([list(row.values()) for row in rows], [key.replace("_", " ") for key in rows[0]])


def _histograms(histograms: dict[str, list[list[int]]]) -> Iterator[Markup]:
    for name, bins in histograms.items():
        largest = max(count for _, count in bins)
        yield element("h2", name[0].upper() + name[1:])
        yield table(([low, count, bar(count, largest)] for low, count in bins), ["from", "documents", ""])


def _example(example: dict[str, Any]) -> Markup:
    documents = (
        part
        for document in example["documents"]
        for part in (
            element("div", document["place"], kind="dim place"),
            element("pre", document["beginning"]),
        )
    )
    return element("details", element("summary", f"{example['stage']}: {example['reason']}"), *documents)

"""What became of the input: `report.json` for programs, `report.html` for people."""

import dataclasses
import html
from collections.abc import Iterable, Sequence
from typing import Any

from t5x_like.data.prepare.config import PrepareConfig
from t5x_like.data.prepare.tally import DROPPED, Tally
from t5x_like.data.shards import Shard
from t5x_like.data.tokenizers import Tokenizer

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


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #4c8bf5; --drop: #d9534f; --dim: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { color: var(--dim); font-weight: 500; }
td:first-child, th:first-child { text-align: left; overflow-wrap: anywhere; }
.totals { display: flex; flex-wrap: wrap; gap: 2.5rem; margin: 1.2rem 0; }
.totals b { display: block; font-size: 1.5rem; }
.totals span { color: var(--dim); } .bar { background: var(--bar); height: .8rem; border-radius: 2px; min-width: 1px; }
.bar.drop { background: var(--drop); } td.wide { width: 45%; text-align: left; }
.reason td:first-child { padding-left: 2rem; }
details { border-bottom: 1px solid var(--line); padding: .4rem 0; } summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { background: #8881; padding: .6rem; border-radius: 4px; margin: .3rem 0 .8rem; }
.place { color: var(--dim); font-size: .85rem; overflow-wrap: anywhere; }
"""


def render_html(report: dict[str, Any]) -> str:
    """A page that needs nothing but itself. All that comes from the input is escaped: it is text, never markup."""
    totals = report["totals"]
    shown = {
        "documents kept": f"{totals['documents']:,}",
        "of documents found": f"{totals['documents_found']:,}",
        "tokens": f"{totals['tokens']:,}",
        "bytes of text": f"{totals['bytes']:,}",
        "shards": f"{totals['shards']:,}",
    }
    body = [
        "<h1>Prepared corpus</h1>",
        '<div class="totals">' + "".join(f"<div><b>{v}</b><span>{k}</span></div>" for k, v in shown.items()) + "</div>",
        "<h2>Stages</h2>",
        *_stage_table(report["stages"], totals["documents_found"]),
        "<h2>Sources</h2>",
        *_dict_table(report["sources"]),
        "<h2>Tokenizer</h2>",
        *_dict_table([report["tokenizer"]]),
        *_histograms(report["histograms"]),
        "<h2>Examples of what was dropped</h2>",
        *(_example(example) for example in report["examples"]),
        "<h2>Configuration</h2>",
        *_settings(report["config"]),
    ]
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Prepared corpus</title>'
    head = f"<head>{meta}<style>{_STYLE}</style></head>"
    return f"<!doctype html><html lang=en>{head}<body>{''.join(body)}</body></html>\n"


def _escaped(value: object) -> str:
    return html.escape(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))


def _row(cells: Iterable[str], tag: str = "td", kind: str = "") -> str:
    opening = f'<tr class="{kind}">' if kind else "<tr>"
    return opening + "".join(cell if cell.startswith("<td") else f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _bar(amount: int, whole: int, kind: str = "") -> str:
    return f'<td class="wide"><div class="bar {kind}" style="width:{100 * amount / max(whole, 1):.2f}%"></div></td>'


def _stage_table(stages: Sequence[dict[str, Any]], found: int) -> list[str]:
    lines = ["<table>", _row(["stage", "documents", "characters", ""], "th")]
    for stage in stages:
        kept = stage["outcomes"].get("kept", stage["outcomes"].get("found", {}))
        lines.append(_stage_row(stage["stage"], kept, found))
        for outcome, units in stage["outcomes"].items():
            if outcome not in ("kept", "found"):
                lines.append(_stage_row(outcome, units, found, "reason"))
    return [*lines, "</table>"]


def _stage_row(label: str, units: dict[str, int], found: int, kind: str = "") -> str:
    documents = units.get("documents", 0)
    cells = [_escaped(label), _escaped(documents), _escaped(units.get("characters", 0))]
    return _row([*cells, _bar(documents, found, "drop" if label.startswith(DROPPED) else "")], kind=kind)


def _dict_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = _row([_escaped(key.replace("_", " ")) for key in rows[0]], "th")
    return ["<table>", head, *(_row([_escaped(value) for value in row.values()]) for row in rows), "</table>"]


def _histograms(histograms: dict[str, list[list[int]]]) -> list[str]:
    lines = []
    for name, bins in histograms.items():
        largest = max(count for _, count in bins)
        lines += [f"<h2>{_escaped(name[0].upper() + name[1:])}</h2><table>", _row(["from", "documents", ""], "th")]
        lines += [_row([_escaped(low), _escaped(count), _bar(count, largest)]) for low, count in bins]
        lines.append("</table>")
    return lines


def _example(example: dict[str, Any]) -> str:
    documents = "".join(
        f'<div class="place">{_escaped(document["place"])}</div><pre>{_escaped(document["beginning"])}</pre>'
        for document in example["documents"]
    )
    summary = f"{_escaped(example['stage'])}: {_escaped(example['reason'])}"
    return f"<details><summary>{summary}</summary>{documents}</details>"


def _settings(config: dict[str, Any]) -> list[str]:
    rows = (_row([_escaped(name), f'<td class="wide">{_escaped(value)}</td>']) for name, value in config.items())
    return ["<table>", *rows, "</table>"]

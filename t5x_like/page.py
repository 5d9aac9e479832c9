"""One HTML page that needs neither network nor script; what comes from elsewhere is text in it, never markup."""

import html
from collections.abc import Iterable, Mapping, Sequence

STYLE = """
:root { color-scheme: light dark; --dim: #888; --line: #8884; --bar: #4269d0; --drop: #d9534f; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
body { overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; }
.dim, th { color: var(--dim); font-weight: 500; } .place { font-size: .85rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
td:first-child, th:first-child, td.wide { text-align: left; } td.wide { width: 45%; }
.reason td:first-child { padding-left: 2rem; }
.totals { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.2rem 0; }
.totals b { display: block; font-size: 1.5rem; }
.bar { background: var(--bar); height: .8rem; border-radius: 2px; min-width: 1px; } .drop { background: var(--drop); }
details { border-bottom: 1px solid var(--line); padding: .4rem 0; } summary { cursor: pointer; }
pre { white-space: pre-wrap; background: #8881; padding: .6rem; border-radius: 4px; margin: .3rem 0 .8rem; }
svg { width: 100%; height: auto; display: block; } text { font: 12px system-ui, sans-serif; fill: currentColor; }
.tokens { font: 14px/1.7 ui-monospace, monospace; white-space: pre-wrap; margin: 0; }
.tokens span { border-bottom: 2px solid; } .tokens .out { opacity: .45; border-color: transparent; }
.tokens b { background: #8883; border-radius: 3px; padding: 0 .2em; }
"""


class Markup(str):
    """HTML that is to stand as it is."""


def element(name: str, *content: object, **attributes: object) -> Markup:
    """`<name attributes>content</name>`: all of it escaped that is no `Markup`, and integers with commas.

    Attributes are named as in Python: `text_anchor` is `text-anchor`, and `kind` the class.
    """
    written = (f' {_attribute(key)}="{html.escape(str(value))}"' for key, value in attributes.items())
    return Markup(f"<{name}{''.join(written)}>{''.join(map(_escaped, content))}</{name}>")


def _attribute(name: str) -> str:
    return "class" if name == "kind" else name.replace("_", "-")


def _escaped(value: object) -> str:
    if isinstance(value, Markup):
        return value
    return html.escape(f"{value:,}" if type(value) is int else str(value), quote=False)


def row(cells: Iterable[object], kind: str = "", tag: str = "td") -> Markup:
    """A row of a table; a cell that is a `td` already stays as it is."""
    made = (cell if isinstance(cell, Markup) and cell.startswith("<td") else element(tag, cell) for cell in cells)
    return element("tr", *made, **({"kind": kind} if kind else {}))


def table(rows: Iterable[Markup | Sequence[object]], head: Sequence[object] = ()) -> Markup:
    """A table of such rows, or of their cells."""
    made = [cells if isinstance(cells, Markup) else row(cells) for cells in rows]
    return element("table", *([row(head, tag="th")] if head else []), *made)


def facts(values: Mapping[str, object]) -> Markup:
    """A table of names and what they say."""
    return table((name, element("td", value, kind="wide")) for name, value in values.items())


def bar(amount: float, whole: float, kind: str = "bar") -> Markup:
    """A wide cell with a bar as long as the amount is of the whole."""
    return element("td", element("div", kind=kind, style=f"width:{100 * amount / max(whole, 1):.2f}%"), kind="wide")


def page(title: str, parts: Iterable[object]) -> str:
    """The document; it fits a telephone without scrolling sideways."""
    metas = '<meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>'
    head = element("head", Markup(metas), element("title", title), element("style", Markup(STYLE)))
    return f"<!doctype html>{element('html', head, element('body', *parts), lang='en')}\n"

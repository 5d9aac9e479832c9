"""The text of records: bytes decoded, and the readable part of web pages without menus and scripts."""

import codecs
import collections
import html
import re
from typing import Literal, get_args

from t5x_like.configurable import configurable
from t5x_like.data.extras import require
from t5x_like.data.prepare.document import Dropped
from t5x_like.data.prepare.readers import Record
from t5x_like.errors import UserError

Extractor = Literal["builtin", "resiliparse", "trafilatura"]

_TAG = re.compile(rb"<(/?)([a-zA-Z][a-zA-Z0-9]*)")
_META_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w-]{1,40})""", re.IGNORECASE)
_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# Elements without an end tag, and those whose end tag is often left out.
_NEVER_CLOSED = frozenset(
    b"area base br col embed hr img input link meta param source track wbr p li dt dd td tr th option".split()
)


@configurable
class HtmlExtraction:
    """How the text of a web page is found.

    Attributes:
      extractors: Tried in this order until one finds text: `builtin` needs no package: text of the page's main part,
        or of all but menus, headers and footers; `resiliparse`: fast, keeps tables and code (Bevendorff et al. 2018);
        `trafilatura`: stricter about what belongs to an article (Barbaresi 2021). The latter two are in the extra
        `prepare`.
      min_characters: An extractor that finds fewer has found nothing.
      max_depth: Pages with elements nested deeper are dropped: they are attacks on parsers.
    """

    extractors: tuple[Extractor, ...] = ("builtin",)
    min_characters: int = 1
    max_depth: int = 512

    def __post_init__(self):
        if not self.extractors:
            raise UserError(f"HtmlExtraction.extractors is empty: choose from {get_args(Extractor)}.")
        modules = {"resiliparse": "resiliparse.extract.html2text", "trafilatura": "trafilatura"}
        for name in self.extractors:
            if name in modules:
                require(modules[name], f"HtmlExtraction.extractors={self.extractors!r}")

    def text(self, record: Record) -> tuple[str, int] | Dropped:
        """The text of a record and how many U+FFFD stand for bytes without meaning, or why there is none."""
        if not record.is_html:
            return decode(record.content, "utf-8")
        raw = record.content
        if nesting_depth(raw) > self.max_depth:
            return Dropped("nested too deeply")
        page, replaced = decode(raw, _charset(record))
        for name in self.extractors:
            text = _EXTRACTORS[name](page)
            if len(text) >= self.min_characters and text.strip():
                return text, replaced
        return Dropped("no text found on the page")


def decode(content: str | bytes, charset: str) -> tuple[str, int]:
    """Text that can be written as UTF-8, without a byte order mark, and how many U+FFFD it took."""
    if isinstance(content, str):
        try:
            content.encode()
        except UnicodeEncodeError:  # Half a surrogate pair, which JSON can spell.
            return decode(content.encode("utf-8", "surrogatepass"), "utf-8")
        return content.removeprefix("\ufeff"), 0
    text = content.decode(charset, "replace").removeprefix("\ufeff")
    return text, max(text.count("\ufffd") - content.count("\ufffd".encode()), 0)


def _charset(record: Record) -> str:
    """The encoding of a page: its byte order mark, what the server says, what it says itself, or UTF-8."""
    for mark, charset in _BOMS.items():
        if record.content.startswith(mark):
            return charset
    declared = _META_CHARSET.search(record.content[:2048])
    for name in (record.charset, declared and declared[1].decode("ascii", "replace")):
        try:
            if name and isinstance(b" ".decode(name), str):
                # As browsers do: pages that say Latin-1 mean Windows' extension of it.
                return "cp1252" if codecs.lookup(name).name in ("iso8859-1", "ascii") else name
        except (LookupError, UnicodeError, ValueError):
            continue
    return "utf-8"


def nesting_depth(page: bytes) -> int:
    """How deep elements are nested at most, counting those that have to be closed, and end tags of open ones."""
    depth = deepest = 0
    count = collections.Counter()
    for closing, name in _TAG.findall(page):
        name = name.lower()
        if name in _NEVER_CLOSED or (closing and not count[name]):
            continue
        change = -1 if closing else 1
        count[name] += change
        depth += change
        deepest = max(deepest, depth)
    return deepest


_SKIPPED = frozenset(
    {"script", "style", "noscript", "template", "title", "iframe", "object", "svg", "math", "canvas", "button"}
    | {"select", "textarea", "nav", "header", "footer", "aside", "menu", "dialog"}
)
_TRACKED = _SKIPPED | {"main", "article", "pre"}
_PARAGRAPHS = frozenset(
    {"article", "blockquote", "div", "dl", "main", "ol", "p", "pre", "section", "table", "ul"}
    | {"h1", "h2", "h3", "h4", "h5", "h6"}
)
_BLOCKS = _PARAGRAPHS | {
    *("address", "body", "br", "caption", "center", "dd", "details", "dt", "fieldset", "figcaption", "figure", "form"),
    *("hr", "html", "legend", "li", "summary", "tbody", "td", "tfoot", "th", "thead", "tr"),
}
_SPACES = re.compile(r"[ \t\r\n\f]+")
# A tag ends at the first angle bracket, so that no page, however malformed, is looked at twice.
_MARKUP = re.compile(r"<!--.*?(?:-->|\Z)|<[!?][^<>]*>|<(/?)([a-zA-Z][^\s<>/]*)[^<>]*>", re.DOTALL)
_END_OF_RAW = {name: re.compile(rf"</{name}\b", re.IGNORECASE) for name in ("script", "style")}


class _TextOfPage:
    """Collects the text of a page.

    Attributes:
      everything: What is not menu, header, footer, form control or the like.
      main: What of it stands in <main> or <article>.
    """

    def __init__(self, page: str):
        self.everything: list[str] = []
        self.main: list[str] = []
        self._open: list[str] = []
        self._count = collections.Counter()
        self._skipped = 0
        place = 0
        while tag := _MARKUP.search(page, place):
            self._text(page[place : tag.start()])
            place = tag.end()
            if name := (tag[2] or "").lower():
                self._end(name) if tag[1] else self._start(name)
            if name in _END_OF_RAW and not tag[1]:
                end = _END_OF_RAW[name].search(page, place)
                place = end.start() if end else len(page)
        self._text(page[place:])

    def _start(self, tag: str):
        self._break(tag)
        if tag in _TRACKED:
            self._open.append(tag)
            self._count[tag] += 1
            self._skipped += tag in _SKIPPED

    def _end(self, tag: str):
        # What was left open inside of it ends here too.
        while self._count[tag]:
            inner = self._open.pop()
            self._count[inner] -= 1
            self._skipped -= inner in _SKIPPED
            if inner == tag:
                break
        self._break(tag)

    def _text(self, text: str):
        text = html.unescape(text)
        if not self._count["pre"]:
            text = _SPACES.sub(" ", text)
            if self.everything and self.everything[-1][-1:].isspace():
                text = text.lstrip(" ")
        if text:
            self._write(text)

    def _break(self, tag: str):
        if tag in _BLOCKS:
            self._write("\n\n" if tag in _PARAGRAPHS else "\n")

    def _write(self, text: str):
        if not self._skipped:
            self.everything.append(text)
            if self._count["main"] or self._count["article"]:
                self.main.append(text)


def _builtin(page: str) -> str:
    found = _TextOfPage(page)
    main = "".join(found.main)
    text = main if main.strip() else "".join(found.everything)
    return re.sub(r"[ \t]*\n([ \t]*\n)+", "\n\n", text).strip()


def _resiliparse(page: str) -> str:
    html2text = require("resiliparse.extract.html2text", "HtmlExtraction")
    return html2text.extract_plain_text(page, main_content=True, alt_texts=False, links=False, form_fields=False)


def _trafilatura(page: str) -> str:
    return require("trafilatura", "HtmlExtraction").extract(page, include_comments=False, deduplicate=False) or ""


_EXTRACTORS = {"builtin": _builtin, "resiliparse": _resiliparse, "trafilatura": _trafilatura}

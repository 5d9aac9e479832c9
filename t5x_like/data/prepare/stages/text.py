"""Stages that change text: normal form, and personal data masked."""

import re
import unicodedata

from t5x_like.configurable import configurable
from t5x_like.data.prepare.document import Document, Dropped, Stage
from t5x_like.errors import UserError

# Spaces of any width become a space; what shows nothing (controls, zero width, byte order marks) goes.
_SPACES = dict.fromkeys([0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ")
_INVISIBLE = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160), 0xAD, 0x200B, 0x2060, 0xFEFF])
_LINE_ENDS = dict.fromkeys([*b"\r\v\f", 0x85, 0x2028, 0x2029], "\n")
_CHARACTERS = {chr(code): new or "" for code, new in {**_INVISIBLE, **_SPACES, **_LINE_ENDS}.items()}
# A search for what is rare takes a tenth of the time that a look at every character does.
_CHANGED = re.compile(f"[{re.escape(''.join(_CHARACTERS))}]")
_PLAIN = bytes([*b"\t\n", *range(32, 127)])
_TRAILING_SPACE = re.compile(r"[ \t]+(?=\n|\Z)")
_MANY_LINE_ENDS = re.compile(r"\n{4,}")


@configurable
class NormalizeText(Stage):
    """Unicode's composed form (NFC), plain spaces and line ends, no control or invisible characters.

    Spaces at the ends of lines go, and of several empty lines two stay; indentation stays.

    Attributes:
      max_replaced: Largest share of characters that are U+FFFD or NUL, which stand where bytes were not text; a
        document with more of them is dropped as binary.
    """

    max_replaced: float = 0.01

    def __post_init__(self):
        _check_fraction(self, "max_replaced")

    def process(self, document: Document) -> Document | Dropped:
        text = document.text
        if text.count("\ufffd") + text.count("\0") > self.max_replaced * len(text):
            return Dropped("not text")
        text = normalize(text)
        return document._replace(text=text) if text else Dropped("empty")


def normalize(text: str) -> str:
    """The normal form that `NormalizeText` describes; normalizing it again changes nothing."""
    # Most texts need none of this, which is found out ten times as fast as it is done.
    if not text.isascii() or text.encode().translate(None, _PLAIN):
        text = _CHANGED.sub(lambda match: _CHARACTERS[match[0]], text.replace("\r\n", "\n"))
        text = unicodedata.normalize("NFC", text)
    if " \n" in text or "\t\n" in text or text.endswith((" ", "\t")):
        text = _TRAILING_SPACE.sub("", text)
    if "\n\n\n\n" in text:
        text = _MANY_LINE_ENDS.sub("\n\n\n", text)
    return text.strip("\n")


# An address as it is written in text: RFC 5322 allows more, which nobody uses.
_EMAIL = re.compile(r"\b[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_BYTE = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_IPV4 = re.compile(rf"(?<![\d.]){_BYTE}(?:\.{_BYTE}){{3}}(?!\.?\d)")
_INNER_BYTES = re.compile(r"\.\d{1,3}\.\d{1,3}\.")  # Begins with a fixed character, so it is fast to look for.
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}(?![\w:])")


@configurable
class MaskPersonalData(Stage):
    """E-mail and IP addresses replaced by ones that belong to nobody, as FineWeb does.

    Penedo et al. 2024, https://arxiv.org/abs/2406.17557, section 3.7. Version numbers with four parts are masked too;
    addresses that routers do not forward (127.0.0.1, 192.168...) are left.

    Attributes:
      email: Stands for an e-mail address.
      ipv4: Stands for an IPv4 address.
      ipv6: Stands for an IPv6 address in its full form.
    """

    email: str = "email@example.com"
    ipv4: str = "192.0.2.1"
    ipv6: str = "2001:db8:0:0:0:0:0:1"

    def process(self, document: Document) -> Document:
        text = document.text
        if "@" in text:
            text = _EMAIL.sub(lambda found: self.email, text)
        if _INNER_BYTES.search(text):
            text = _IPV4.sub(lambda found: found[0] if _PRIVATE.match(found[0]) else self.ipv4, text)
        if text.count(":") >= 7:
            text = _IPV6.sub(lambda found: self.ipv6, text)
        return document._replace(text=text)


_PRIVATE = re.compile(r"0\.|10\.|127\.|169\.254\.|192\.168\.|172\.(1[6-9]|2\d|3[01])\.|255\.")


def _check_fraction(stage: Stage, *fields: str):
    for field in fields:
        if not 0 <= getattr(stage, field) <= 1:
            raise UserError(f"{type(stage).__name__}.{field}={getattr(stage, field)}: must be from 0 to 1.")

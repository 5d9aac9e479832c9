import sys
import time

import pytest

from t5x_like.data.prepare.document import Dropped
from t5x_like.data.prepare.extraction import HtmlExtraction, decode, nesting_depth
from t5x_like.data.prepare.readers import Record
from t5x_like.errors import UserError

PAGE = """<!DOCTYPE html><html><head><title>Title</title><style>p {{ color: red }}</style>
<script>if (a < b) document.write("<p>script</p>")</script></head>
<body><header>Site name</header><nav><ul><li><a href="/">Home</a><li>About</ul></nav>
<{element}><h1>Roses &amp; snow</h1><p>The first   paragraph
goes on <b>here</b>.<p>The second one.<br>A new line.
<pre>def f():
    return  1</pre>
<table><tr><td>1</td><td>2</td></tr></table></{element}>
<aside>Related pages</aside><footer>Imprint</footer></body></html>"""


def extract(page, extractor="builtin", charset=None, **fields):
    return HtmlExtraction(extractors=(extractor,), **fields).text(Record(page, True, "place", charset))


@pytest.mark.parametrize("element", ["main", "article", "div"])
def test_builtin_extraction(element):
    text, replaced = extract(PAGE.format(element=element).encode())
    assert text == (
        "Roses & snow\n\nThe first paragraph goes on here.\n\nThe second one.\nA new line.\n\n"
        "def f():\n    return  1\n\n1\n\n2"
    )
    assert replaced == 0


def test_only_the_main_part_counts_if_there_is_one():
    page = b"<body><p>Before it.<main><p>Inside of it.</main><p>Behind it.</body>"
    assert extract(page)[0] == "Inside of it."
    assert extract(page.replace(b"main", b"div"))[0] == "Before it.\n\nInside of it.\n\nBehind it."
    assert extract(b"<nav>menu</nav><script>x</script>") == Dropped("no text found on the page")


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
def test_other_extractors_find_the_text_and_no_menu(extractor):
    pytest.importorskip(extractor, reason="extra: prepare")
    paragraph = "The gardener came every morning to look after the roses that grew along the walls of the house. "
    page = (
        f"<html><body><nav><a href='/'>Home</a> <a href='/a'>About</a></nav><article><h1>Roses</h1><p>{paragraph * 3}"
    )
    page += f"</p><p>{paragraph * 2}</p></article><footer>Imprint</footer></body></html>"
    text, _ = extract(page.encode(), extractor)
    assert text.count("The gardener came") == 5
    assert "Imprint" not in text
    assert "About" not in text
    builtin, _ = extract(page.encode())
    assert builtin.split() == text.split()


def test_the_second_extractor_helps_where_the_first_finds_nothing(monkeypatch):
    from t5x_like.data.prepare import extraction

    monkeypatch.setitem(extraction._EXTRACTORS, "resiliparse", lambda page: "  \n")
    monkeypatch.setattr(extraction, "require", lambda module, user: None)
    found = HtmlExtraction(extractors=("resiliparse", "builtin")).text(Record(b"<p>Text.</p>", True, "place"))
    assert found == ("Text.", 0)


def test_missing_packages_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    with pytest.raises(UserError, match=r"HtmlExtraction.*trafilatura.*pip install 't5x_like\[prepare\]'"):
        HtmlExtraction(extractors=("trafilatura",))


@pytest.mark.parametrize(
    ("content", "charset", "text", "replaced"),
    [
        ("\ufeffcafé".encode(), "utf-8", "café", 0),
        (b"caf\xe9 \xff", "utf-8", "caf\ufffd \ufffd", 2),
        ("already \ufffd".encode(), "utf-8", "already \ufffd", 0),
        ("half a pair \ud83d", "utf-8", "half a pair \ufffd\ufffd\ufffd", 3),
    ],
)
def test_decoding(content, charset, text, replaced):
    assert decode(content, charset) == (text, replaced)


@pytest.mark.parametrize(
    ("page", "charset", "text"),
    [
        ("<p>café".encode("latin-1"), "iso-8859-1", "café"),
        (b"<meta charset=latin-1><p>\x80 5", None, "€ 5"),
        (
            '<meta http-equiv="Content-Type" content="text/html; charset=shift_jis"><p>日本'.encode("shift_jis"),
            None,
            "日本",
        ),
        ("<p>日本".encode("utf-16"), "latin-1", "日本"),
        ("<p>café".encode(), "no-such-charset", "café"),
        ("<p>café".encode(), "hex", "café"),
        ("<meta charset=zip><p>café".encode(), None, "café"),
    ],
)
def test_encodings_of_pages(page, charset, text):
    assert extract(page, charset=charset)[0] == text


@pytest.mark.parametrize("bomb", [b"<div>", b"<div></x>", b"<b><i>", b"<blockquote ", b"<nav>"])
def test_deep_nesting_is_refused_in_linear_time(bomb):
    page = bomb * (2**21 // len(bomb))
    start = time.process_time()
    assert extract(page) == Dropped("nested too deeply")
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "bomb", b"<p>x <nav></nav> </nav> <br/> &amp; <!-- <![CDATA[ <! </ < &# <script> <a' <a\"".split()
)
def test_strange_pages_take_linear_time(bomb):
    start = time.process_time()
    extract(bomb * (2**18 // len(bomb)), max_depth=2**30)
    assert time.process_time() - start < 10


def test_a_huge_attribute_is_no_text():
    page = b'<p title="' + b"x" * 2**20 + b'">Text.</p>'
    assert extract(page)[0] == "Text."


def test_depth_counts_what_has_to_be_closed():
    assert nesting_depth(b"<html><body><p>a<p>b<p>c<br><img></body></html>") == 2
    assert nesting_depth(b"<div><div></div></div><div></div>") == 2
    assert nesting_depth(b"</div>" * 10 + b"<div>") == 1

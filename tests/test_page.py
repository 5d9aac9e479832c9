import xml.etree.ElementTree as ElementTree

import pytest

from t5x_like.page import Markup, bar, element, page, row, table
from tests.browser import shown

EVIL = "<script>document.title = 'run'</script>"


def test_all_that_is_no_markup_is_escaped():
    made = element("p", EVIL, element("b", 1234567), True, Markup("&mdash;"), title=f'"{EVIL}"', kind="dim")
    assert made == (
        "<p title=\"&quot;&lt;script&gt;document.title = &#x27;run&#x27;&lt;/script&gt;&quot;\" class=\"dim\">"
        "&lt;script&gt;document.title = 'run'&lt;/script&gt;<b>1,234,567</b>True&mdash;</p>"
    )  # fmt: skip


def test_a_page_is_well_formed_and_asks_for_nothing():
    rows = [["a", 1, bar(1, 4)], row(["b", 2, EVIL], kind="reason")]
    text = page(EVIL, [element("h1", EVIL), table(rows, head=["name", "count", ""])])
    assert not any(word in text for word in ("http", "src=", "<link", "@import", "<script", "url("))
    document = ElementTree.fromstring(text.removeprefix("<!doctype html>"))
    assert document.find("head/title").text == EVIL
    cells = [[cell.text for cell in line] for line in document.iter("tr")]
    assert cells == [["name", "count", None], ["a", "1", None], ["b", "2", EVIL]]
    assert document.find(".//div").get("style") == "width:25.00%"


@pytest.mark.browser
def test_a_telephone_shows_it_without_scrolling_sideways(tmp_path):
    wide = "x" * 300
    parts = [element("pre", wide), table([[wide, *range(5), bar(1, 2)]], head=[wide] * 7), element("p", wide)]
    # In a frame, as the window of a browser has a least width.
    measure = "document.title = this.contentDocument.documentElement.scrollWidth"
    frame = element("iframe", srcdoc=page("page", parts), width=360, height=800, style="border:0", onload=measure)
    (tmp_path / "page.html").write_text(page("frame", [frame]))
    assert "<title>360</title>" in shown(tmp_path / "page.html", tmp_path / "picture.png")

import pytest

from t5x_like.data.prepare.document import Document, Dropped
from t5x_like.data.prepare.stages.language import LanguageFilter
from t5x_like.errors import UserError

ENGLISH = "The gardener came every morning to look after the roses that grew along the walls of the house."
GERMAN = "Der Gärtner kam jeden Morgen, um nach den Rosen zu sehen, die an den Mauern des Hauses wuchsen."


def test_languages_are_told_apart():
    pytest.importorskip("lingua", reason="extra: prepare")
    stage = LanguageFilter(among=("en", "de", "fr"))
    run = lambda text: stage.process(Document(text, "place", "source"))
    assert run(ENGLISH).text == ENGLISH
    assert run(GERMAN) == Dropped("language de")
    assert isinstance(run("12345 67890"), Dropped)
    both = LanguageFilter(languages=("de", "en"), among=("en", "de", "fr"))
    assert both.process(Document(GERMAN, "place", "source")).text == GERMAN
    strict = LanguageFilter(among=("en", "de", "fr"), min_confidence=1.0)
    assert strict.process(Document("house", "place", "source")) == Dropped("uncertain language")


def test_mistakes_are_named():
    pytest.importorskip("lingua", reason="extra: prepare")
    with pytest.raises(UserError, match=r"\['xx'\] are no ISO 639-1 codes"):
        LanguageFilter(languages=("xx",))
    with pytest.raises(UserError, match=r"among=.* lacks \['en'\]"):
        LanguageFilter(among=("de", "fr"))
    with pytest.raises(UserError, match="languages is empty"):
        LanguageFilter(languages=())

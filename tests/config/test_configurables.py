"""Every configurable class of the package is documented, and its fields have types that can be checked."""

import abc
import dataclasses
import importlib
import json
import pkgutil
import typing

import pytest

import t5x_like
from t5x_like.config import ConfigError, field_docs, parse_config
from t5x_like.config.types import MismatchError, coerce, describe
from t5x_like.configurable import REGISTRY, active, configurable, from_dict, inert, to_dict
from t5x_like.errors import UserError


class Shape(abc.ABC):
    @abc.abstractmethod
    def area(self) -> float: ...


@configurable
class Square(Shape):
    """A square.

    Attributes:
      side: its length.
    """

    side: float = 1.0

    def area(self) -> float:
        return self.side**2


@configurable
class Drawing:
    """A drawing.

    Attributes:
      shape: what is drawn.
    """

    shape: Shape = Square()


@pytest.fixture(scope="module")
def configurables():
    for module in pkgutil.walk_packages(t5x_like.__path__, "t5x_like."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    return [cls for cls in REGISTRY.values() if cls.__module__.startswith("t5x_like.")]


def test_every_field_is_documented(configurables):
    assert configurables
    for cls in configurables:
        assert list(field_docs(cls)) == [field.name for field in dataclasses.fields(cls)], cls.__name__


def test_every_annotation_can_be_checked(configurables):
    for cls in configurables:
        for name, annotation in typing.get_type_hints(cls).items():
            assert describe(annotation), f"{cls.__name__}.{name}"
            with pytest.raises(MismatchError):
                coerce(object(), annotation)


def test_every_default_fits_its_annotation(configurables):
    for cls in configurables:
        for field in dataclasses.fields(cls):
            if field.default is not dataclasses.MISSING:
                value = coerce(field.default, typing.get_type_hints(cls)[field.name])
                assert value == field.default, f"{cls.__name__}.{field.name}"
                assert type(value) is type(field.default), f"{cls.__name__}.{field.name}"


def test_a_field_of_a_role_takes_every_class_that_plays_it():
    @configurable
    class Circle(Shape):
        """A circle."""

        def area(self) -> float:
            return 3.0

    try:
        assert parse_config([], ["Drawing.shape=@Circle()"]).build(Drawing).shape == Circle()
        with pytest.raises(ConfigError, match=r"must be Shape \(Square or Circle\), got 3"):
            parse_config([], ["Drawing.shape=3"]).build(Drawing)
    finally:
        del REGISTRY["Circle"]


def test_what_a_role_says_of_an_attribute_is_no_default():
    class Sized(Shape):
        size: int | None = None
        name: str = "shape"

    try:

        @configurable
        class Dot(Sized):
            """A dot."""

            size: int

            def area(self) -> float:
                return 0.0

        with pytest.raises(ConfigError, match=r"Dot\.size: pass --gin\.Dot\.size"):
            parse_config([], ["Drawing.shape=@Dot()"]).build(Drawing)
        dot = parse_config([], ["Drawing.shape=@Dot()", "Dot.size=1"]).build(Drawing).shape
        assert (dot.size, dot.name) == (1, "shape")
    finally:
        REGISTRY.pop("Dot", None)


def test_a_class_that_lacks_a_method_of_its_role_is_refused():
    with pytest.raises(UserError, match=r"Line lacks area: define all methods of its role Shape \(area\)"):

        @configurable
        class Line(Shape):
            """A line."""

    assert "Line" not in REGISTRY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    size: int = 1
    speed: float = inert(1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    parts: tuple[Part, ...] = (Part(),)
    speed: Part = inert(Part())


def test_inert_fields_are_told_apart_at_any_depth():
    one = Whole(parts=(Part(size=3, speed=2.0), Part(speed=4.0)), speed=Part(size=9))
    assert active(one) == Whole(parts=(Part(size=3), Part()))


def test_a_saved_object_is_made_again(monkeypatch):
    for cls in (Part, Whole):
        monkeypatch.setitem(REGISTRY, cls.__name__, cls)
    one = Whole(parts=(Part(size=3), Part(speed=float("inf"))))
    saved = json.loads(json.dumps(to_dict(one)))
    assert from_dict(saved) == one
    del saved["speed"]["size"]
    with pytest.raises(UserError, match=r"saved Part has other fields than this version of it \(size\)"):
        from_dict(saved)
    with pytest.raises(UserError, match="has a Gone, which nothing registers"):
        from_dict({"class": "Gone"})

"""Every configurable class of the package is documented, and its fields have types that can be checked."""

import dataclasses
import importlib
import pkgutil
import typing

import pytest

import t5x_like
from t5x_like.config import field_docs
from t5x_like.config.types import MismatchError, coerce, describe
from t5x_like.configurable import REGISTRY


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

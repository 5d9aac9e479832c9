"""Safetensors files of a stranger: their tensors, or one clear error."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from t5x_like.errors import UserError
from t5x_like.huggingface.safetensors import INDEX, open_tensors

NUMBERS = st.integers(-5, 40) | st.sampled_from([2**31, 2**63, 2**70, True, 1.5, None, "4"])
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "", None, 3, ["F32"]]),
        "shape": st.lists(NUMBERS, max_size=4) | st.none() | st.text(max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3) | st.none(),
    },
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
HEADER = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRY | ANYTHING, max_size=3) | ANYTHING


def file_of(header: bytes, data: bytes = bytes(64), length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def read(directory):
    try:
        tensors = open_tensors(directory)
    except UserError as refused:
        tensors, error = {}, str(refused)
    else:
        error = str(directory)
    assert str(directory) in error
    for tensor in tensors.values():
        if 0 not in tensor.shape:
            assert tensor.read().shape == tensor.shape


@given(
    st.binary(max_size=100)
    | HEADER.map(lambda header: file_of(json.dumps(header).encode()))
    | st.tuples(st.binary(max_size=50), st.integers(0, 2**64 - 1)).map(lambda pair: file_of(pair[0], length=pair[1]))
)
@example(file_of(b"[" * 10**5))
@example(file_of(b'{"a": ' * 10**5))
@example(file_of(b'{"a": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}'))
@example(file_of(b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}'))
@example(file_of(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 16]}}'))
@settings(max_examples=300)
def test_any_file_is_read_or_refused(tmp_path_factory, content):
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / "model.safetensors").write_bytes(content)
    read(directory)


@given(ANYTHING | st.dictionaries(st.just("weight_map"), ANYTHING | st.dictionaries(st.text(max_size=3), ANYTHING)))
def test_any_index_is_read_or_refused(tmp_path_factory, content):
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / INDEX).write_text(json.dumps(content))
    read(directory)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_cannot_name_files_elsewhere(tmp_path, name):
    (tmp_path / "model").mkdir()
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "secret.safetensors").write_bytes(file_of(header, np.ones(4, np.float32).tobytes()))
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="no file of its own directory"):
        open_tensors(tmp_path / "model")

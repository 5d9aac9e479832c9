import json

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.huggingface.safetensors import INDEX, Tensor, open_tensors, write_tensors

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(5, dtype=np.float16),
    "c": np.arange(12).astype(jnp.bfloat16).reshape(3, 2, 2),
}


def write(directory, max_file_bytes=10**9):
    tensors = [Tensor(name, array.shape, array.dtype, lambda array=array: array) for name, array in ARRAYS.items()]
    return write_tensors(directory, tensors, max_file_bytes)


@pytest.mark.parametrize(("max_file_bytes", "count"), [(10**9, 1), (40, 2), (0, 3)])
def test_what_was_written_is_read(max_file_bytes, count, tmp_path):
    assert len(write(tmp_path, max_file_bytes)) == count
    tensors = open_tensors(tmp_path)
    assert list(tensors) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name].read(), array)
    if count > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == 24 + 10 + 24


@pytest.mark.hf
def test_the_library_reads_what_we_write_and_the_other_way_round(tmp_path):
    library = pytest.importorskip("safetensors.flax", reason="needs the extra: hf")
    write(tmp_path)
    loaded = library.load_file(tmp_path / "model.safetensors")
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)
    library.save_file({name: jnp.asarray(array) for name, array in ARRAYS.items()}, tmp_path / "model.safetensors")
    for name, tensor in open_tensors(tmp_path).items():
        np.testing.assert_array_equal(tensor.read(), ARRAYS[name])


def header(content) -> bytes:
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


DAMAGE = {
    "empty": (lambda data: b"", "truncated or is no safetensors file"),
    "half_a_header": (lambda data: data[:50], "truncated or is no safetensors file"),
    "half_the_data": (lambda data: data[:-30], "is truncated: . ends at byte"),
    "no_safetensors": (lambda data: b"PK\x03\x04" * 100, "truncated or is no safetensors file"),
    "no_json": (lambda data: data[:8] + b"[" + data[9:], "truncated or is no safetensors file"),
    "wrong_size": (
        lambda data: header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + b"....",
        "truncated or is no safetensors file",
    ),
    "quantised": (
        lambda data: header({"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}) + b"....",
        "a is I8: only weights of F32, F16, BF16",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_named(damage, message, tmp_path):
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        open_tensors(tmp_path)
    assert str(path) in str(error.value)


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.safetensors file"):
        open_tensors(tmp_path)
    first, second = write(tmp_path, 40)
    (tmp_path / second).unlink()
    with pytest.raises(UserError, match=f"{second} is missing"):
        open_tensors(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"z": first}}))
    with pytest.raises(UserError, match=f"names z in {first}, which does not hold it"):
        open_tensors(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        open_tensors(tmp_path)

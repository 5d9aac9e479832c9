import jax
import pytest

from t5x_like.errors import UserError
from t5x_like.sharding import layout
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.training.job import set_up
from tests import toy


def job(tmp_path, **sizes):
    config = MeshConfig(**sizes)
    return set_up(toy.experiment(tmp_path, mesh=config), build_mesh(config), toy.VOCAB)


def test_the_table_says_how_each_parameter_lies(tmp_path):
    made = job(tmp_path, data=2, fsdp=2, tensor=2)
    lines = layout.layout_table(made.state.params, made.spec.axes)
    embedding = next(line for line in lines if line.startswith("embedding "))
    assert embedding.split("  ")[0].strip() == "embedding"
    assert "64 x 32" in embedding
    assert "vocab, embed" in embedding
    assert "tensor, fsdp" in embedding
    assert len({len(line) for line in lines}) == 1


def test_large_parameters_that_nothing_splits_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "t5x_like.training.job.left_whole", lambda params, mesh: layout.left_whole(params, mesh, least_bytes=128)
    )
    lines = job(tmp_path, data=2, fsdp=2, tensor=2).describe().splitlines()
    [named] = [line for line in lines if line.startswith("whole on every device")]
    assert "final_norm/scale (32, 0 MiB)" in named
    assert "embedding" not in named
    # All data parallelism is to have whole parameters on every device.
    assert "whole on every device" not in job(tmp_path, data=8).describe()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 1, "tensor": 8}, r"num_heads \(4\) cannot be divided among MeshConfig.tensor \(8\): use tensor=4"),
        ({"data": 1, "sequence": 3, "fsdp": 2}, r"Rows of 16 tokens .* MeshConfig.sequence \(3\): use 15 or 18 tokens"),
    ],
)
def test_what_the_mesh_cannot_divide_is_refused(sizes, message, tmp_path):
    config = MeshConfig(**sizes)
    count = 6 if "sequence" in sizes else 8
    with pytest.raises(UserError, match=message):
        set_up(toy.experiment(tmp_path, mesh=config), build_mesh(config, jax.devices()[:count]), toy.VOCAB)

"""Attention on meshes that split rows and heads."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.kernels.attention import MaskSpec, RelativeBias, attention
from t5x_like.kernels.attention.call import AttentionCall, call_of
from t5x_like.kernels.target import compiling_for
from t5x_like.sharding import attention as sharded
from t5x_like.sharding.mesh import MESH_AXES, MeshConfig, build_mesh
from t5x_like.sharding.placement import ContextConfig, Placement
from tests.sharding.agreement import HEADS, arrays, check, packed

CAUSAL = MaskSpec(causal=True)
normal = lambda *shape: np.random.default_rng(3).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("sizes", "trained", "options"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, {}, {"mask": CAUSAL, "segment_ids": (packed(16, 4),) * 2}),
        ({"data": 2, "tensor": 4}, {"sinks": normal(HEADS)}, {"mask": CAUSAL, "soft_cap": 2.0}),
        (
            {"data": 1, "fsdp": 2, "tensor": 2},
            {"table": normal(HEADS, 8)},
            {"relative_bias": RelativeBias(8, 16), "alibi_slopes": np.abs(normal(HEADS))},
        ),
        ({"data": 2, "tensor": 2}, {"bias": normal(1, HEADS, 16, 1)}, {"positions": (3, jnp.int32(1)), "mask": CAUSAL}),
    ],
    ids=["packed", "too few key heads", "relative bias and alibi", "bias and offsets"],
)
def test_rows_and_heads_are_split(sizes, trained, options):
    check(sizes, {**arrays(16, batch=4), **trained}, options)


def test_nothing_is_sent_where_every_device_has_its_rows_and_heads():
    program = check({"data": 2, "fsdp": 2, "tensor": 2}, arrays(16, batch=4), {"mask": CAUSAL})
    assert not re.findall("all-|collective-permute|reduce-scatter", program)


def test_a_table_costs_one_reduction_of_its_gradient():
    trained = {**arrays(16, batch=4), "table": normal(HEADS, 8)}
    program = check({"data": 2, "tensor": 2}, trained, {"relative_bias": RelativeBias(8, 16)})
    assert len(re.findall(r" all-reduce\(", program)) == 1
    assert "all-gather" not in program


def test_heads_that_cannot_be_split_are_on_every_device(monkeypatch):
    said = []
    monkeypatch.setattr(sharded.logging, "info", said.append)
    sharded._log_once.cache_clear()
    check({"data": 2, "tensor": 4}, arrays(16, heads=6), {"mask": CAUSAL})
    assert said == ["attention: all 6 heads on every device, because tensor=4 does not divide them."]


def test_rows_that_cannot_be_split_are_on_every_device():
    check({"data": 8}, arrays(16, batch=3), {"mask": CAUSAL})


def test_a_cache_is_read_on_every_device():
    """One new token per row, at places that differ, over keys of which only some are written."""
    places = (np.array([[5], [7]], np.int32), np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12)))
    written = (np.ones((2, 1), np.int32), np.asarray(places[1] >= [[1], [3]], np.int32))
    options = {"mask": CAUSAL, "positions": places, "segment_ids": written}
    check({"data": 2, "sequence": 2, "tensor": 2}, arrays(1, kv_length=12), options, balance=False)


def test_dropout_drops_the_same_on_every_mesh():
    call = {**arrays(16), "mask": CAUSAL, "dropout_rate": 0.5, "dropout_key": jax.random.key(0)}
    expected = jax.jit(lambda: attention(**call))()
    with jax.set_mesh(build_mesh(MeshConfig(data=2, tensor=4))):
        ours = jax.jit(lambda: sharded.attend(call_of(**call))[0])()
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2}, {"data": 2, "sequence": 2}], ids=str)
def test_pallas_kernels_run_on_each_device(sizes, monkeypatch):
    from jax.experimental import pallas as pl

    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    trained = {**arrays(32), "table": normal(HEADS, 8)}
    trained |= {name: np.repeat(trained[name], 2, axis=-1) for name in "qkv"}  # the smallest head_dim of the kernel
    options = {"mask": CAUSAL, "relative_bias": RelativeBias(8, 16), "backend": "tpu"}
    with compiling_for("v5e"):
        check(sizes, trained, options, balance=False)


def in_stages(mesh, x, method):
    """The gradients of attention in a `shard_map` that is manual over the stages, each on its own part of x."""

    def stage(x):
        q = x[0]
        return sharded.attend(AttentionCall(q, q, q, mask=MaskSpec(causal=True, window=(4, None))))[0][None]

    spec = jax.sharding.PartitionSpec("stage")
    run = jax.shard_map(stage, in_specs=spec, out_specs=spec, axis_names={"stage"}, check_vma=False)
    with Placement(mesh, ContextConfig(method=method)).use():
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(run(x)))))(x)


def test_attention_may_be_in_a_stage_of_a_pipeline():
    kinds = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    mesh = jax.make_mesh((1, 1, 2, 1, 2, 2), MESH_AXES, kinds)
    x = normal(2, 2, 16, HEADS, 8)

    def plain(x):
        whole = lambda q: attention(q, q, q, mask=MaskSpec(causal=True, window=(4, None)))
        return jnp.sum(jnp.sin(jax.vmap(whole)(x)))

    np.testing.assert_allclose(in_stages(mesh, x, "all_gather"), jax.grad(plain)(x), atol=1e-5)
    with pytest.raises(UserError, match="'ring' cannot run in pipeline stages"):
        in_stages(mesh, x, "ring")


def test_kernels_are_compiled_for_each_device_of_a_tpu():
    """Up to Mosaic, which is where a kernel that the compiler would have to split is refused."""
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    q = jax.ShapeDtypeStruct((2, 256, 2, 128), jnp.bfloat16)
    with compiling_for("v5p"), jax.sharding.use_abstract_mesh(mesh):
        traced = jax.make_jaxpr(lambda q: sharded.attend(AttentionCall(q, q, q, mask=CAUSAL))[0])(q)
    assert "pallas_call" in str(traced)

"""Every backend against a plain loop over the groups, with all gradients; and what the door chooses and refuses."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

from t5x_like.errors import UserError
from t5x_like.kernels import backends
from t5x_like.kernels.grouped_matmul import grouped_matmul, tile_sizes
from t5x_like.kernels.grouped_matmul.tile_sizes import TileSizes, Tuning
from t5x_like.kernels.target import compiling_for
from tests.kernels.platforms import export_for, interpreted

PLATFORMS = {"reference": "cpu", "chunked": "cpu", "tpu": "tpu", "triton": "gpu"}


def by_loop(lhs, rhs, group_sizes, dout):
    """Product and both gradients."""
    out, dlhs, drhs = np.zeros_like(dout), np.zeros_like(lhs), np.zeros_like(rhs)
    ends = np.cumsum(group_sizes)
    for group, (first, end) in enumerate(zip(ends - group_sizes, ends, strict=True)):
        out[first:end] = lhs[first:end] @ rhs[group]
        dlhs[first:end] = dout[first:end] @ rhs[group].T
        drhs[group] = lhs[first:end].T @ dout[first:end]
    return out, dlhs, drhs


@functools.cache
def compiled(backend, **options):
    """Product and both gradients, compiled once for each shape."""

    def everything(lhs, rhs, group_sizes, dout):
        with interpreted(PLATFORMS[backend], **options):
            product = lambda lhs, rhs: grouped_matmul(lhs, rhs, group_sizes, backend=backend)
            out, pull = jax.vjp(product, lhs, rhs)
            return out, *pull(dout.astype(out.dtype))

    return jax.jit(everything)


def run(backend, *arrays, **options):
    return tuple(np.asarray(array, np.float32) for array in compiled(backend, **options)(*arrays))


def draw_arrays(m, k, n, group_sizes, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return normal(m, k), normal(len(group_sizes), k, n), np.asarray(group_sizes, np.int32), normal(m, n)


def assert_equal(ours, expected):
    for name, array, other in zip(("out", "dlhs", "drhs"), ours, expected, strict=True):
        np.testing.assert_allclose(array, other, atol=1e-5 * max(1, np.abs(other).max()), err_msg=name)


@st.composite
def products(draw):
    """Uneven and empty groups, rows of no group, dims that are no multiples of anything."""
    sizes = draw(st.lists(st.sampled_from([0, 1, 3, 127, 128, 129, 300]), min_size=4, max_size=4))
    ends = np.minimum(np.cumsum(sizes), 300)
    return draw_arrays(300, 40, 200, np.diff(ends, prepend=0), draw(st.integers(0, 100)))


@pytest.mark.parametrize("backend", PLATFORMS)
@settings(max_examples=6)
@example(draw_arrays(300, 40, 200, [0, 0, 0, 0]))
@example(draw_arrays(300, 40, 200, [0, 128, 172, 0]))
@given(products())
def test_equals_a_loop_with_all_gradients(backend, arrays):
    assert_equal(run(backend, *arrays), by_loop(*arrays))


@pytest.mark.parametrize("backend", ["tpu", "triton"])
def test_sums_over_several_tiles(monkeypatch, backend):
    small = Tuning(*[TileSizes(128, 128, 128)] * 3)
    monkeypatch.setitem(tile_sizes.TPU_TUNINGS, "v5e", small)
    arrays = draw_arrays(280, 300, 400, [100, 3, 0, 140])
    assert_equal(run(backend, *arrays), by_loop(*arrays))


@pytest.mark.parametrize("backend", PLATFORMS)
def test_what_rows_of_no_group_hold_moves_nothing(backend):
    lhs, rhs, group_sizes, dout = draw_arrays(300, 40, 200, [100, 0, 70, 0])
    expected = by_loop(lhs, rhs, group_sizes, dout)
    lhs[170:], dout[170:] = 1e6, -1e6
    ours = run(backend, lhs, rhs, group_sizes, dout)
    assert_equal(ours, expected)
    assert not ours[0][170:].any()
    assert not ours[1][170:].any()


@pytest.mark.parametrize("backend", ["chunked", "tpu", "triton"])
def test_bfloat16_is_as_exact_as_the_reference(backend):
    """Sums are in float32: what is left is the rounding of inputs and results."""
    arrays = draw_arrays(300, 40, 200, [100, 3, 0, 120])
    exact = by_loop(*arrays)
    lhs, rhs = (jnp.asarray(array, jnp.bfloat16) for array in arrays[:2])
    error = lambda backend: [
        np.linalg.norm(ours - array) for ours, array in zip(run(backend, lhs, rhs, *arrays[2:]), exact, strict=True)
    ]
    for name, ours, theirs in zip(("out", "dlhs", "drhs"), error(backend), error("reference"), strict=True):
        assert ours <= 1.1 * theirs, name


def test_two_cores_do_not_race():
    arrays = draw_arrays(300, 16, 1100, [100, 0, 150])
    ours = run("tpu", *arrays, detect_races=True, num_cores_or_threads=2)
    assert_equal(ours, by_loop(*arrays))
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_matrix_that_devices_share_gets_one_gradient(backend):
    lhs, rhs, group_sizes, _ = draw_arrays(80, 16, 24, [20, 3, 40])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.P("data"), jax.P()
    product = lambda lhs, rhs, sizes: jnp.sin(grouped_matmul(lhs, rhs, sizes, backend=backend))
    on_two = jax.shard_map(product, mesh=mesh, in_specs=(rows, whole, whole), out_specs=rows)
    one_by_one = lambda lhs, rhs, sizes: jnp.concatenate([product(half, rhs, sizes) for half in jnp.split(lhs, 2)])
    gradients = lambda function: jax.jit(jax.grad(lambda *arrays: function(*arrays, group_sizes).sum(), (0, 1)))
    arrays = np.concatenate([lhs, 2 * lhs]), rhs
    for ours, expected in zip(gradients(on_two)(*arrays), gradients(one_by_one)(*arrays), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chip", ["v5p", "gpu"])
def test_kernels_say_what_varies_inside_a_shard_map(chip):
    """So that the transformation may check it, and sums the gradient of what devices share."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.P("data"), jax.P()
    product = lambda *arrays: grouped_matmul(*arrays)
    on_two = jax.shard_map(product, mesh=mesh, in_specs=(rows, whole, whole), out_specs=rows, check_vma=True)
    loss = lambda *arrays: jnp.sum(on_two(*arrays) ** 2)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 128), (4, 128, 128))]
    with compiling_for(chip):
        program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*arrays, jax.ShapeDtypeStruct((4,), jnp.int32))
    assert str(program).count("pallas_call") == 3
    assert str(program).count("psum") == 1


SHAPES = {"whole tiles": (1024, 256, 512, 8), "ragged": (1000, 130, 70, 5), "few rows": (24, 256, 128, 16)}
CALLS = {"v4": ("tpu", "tpu_custom_call"), "v6e": ("tpu", "tpu_custom_call"), "gpu": ("cuda", "__gpu$xla.gpu.triton")}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("chip", CALLS)
def test_lowers(chip, shape, dtype):
    m, k, n, num_groups = shape
    arrays = [jax.ShapeDtypeStruct(dims, dtype) for dims in ((m, k), (num_groups, k, n))]
    loss = lambda lhs, rhs, sizes: jnp.sum(grouped_matmul(lhs, rhs, sizes).astype(jnp.float32) ** 2)
    platform, call = CALLS[chip]
    sizes = jax.ShapeDtypeStruct((num_groups,), jnp.int32)
    module = export_for(platform, chip, jax.value_and_grad(loss, (0, 1)), *arrays, sizes)
    assert module.count(call) == 3


LHS, RHS, SIZES = jnp.ones((6, 4)), jnp.ones((2, 4, 3)), jnp.array([2, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rhs": jnp.ones((2, 5, 3))}, "lhs (6, 4), rhs (2, 5, 3) and group_sizes (2,) do not fit"),
        ({"group_sizes": jnp.array([2])}, "group_sizes (1,) do not fit"),
        ({"lhs": jnp.ones((0, 4))}, "none of them empty"),
        ({"rhs": RHS.astype(jnp.bfloat16)}, "lhs is float32 and rhs is bfloat16: cast both"),
        ({"group_sizes": jnp.array([2.0, 3.0])}, "group_sizes is float32: give integers"),
        ({"backend": "megablox"}, "there is no backend 'megablox': choose from auto, tpu, triton, reference, chunked"),
        ({"backend": "tpu"}, "'tpu' cannot, because it runs on TPU, and this program is for cpu. Use reference"),
        ({"backend": "triton"}, "'triton' cannot, because it runs on GPU"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        grouped_matmul(**{"lhs": LHS, "rhs": RHS, "group_sizes": SIZES, **arguments})


@pytest.mark.parametrize(
    ("chip", "num_devices", "dtype", "backend"),
    [
        ("cpu", 1, jnp.float32, "chunked"),
        ("v5p", 1, jnp.bfloat16, "tpu"),
        ("v5p", 4, jnp.bfloat16, "reference"),
        ("v5p", 1, jnp.float16, "reference"),
        ("gpu", 1, jnp.float16, "triton"),
        ("h100", 1, jnp.bfloat16, "triton"),
        ("gpu", 4, jnp.float16, "chunked"),
    ],
)
def test_auto_takes_the_best_that_can_and_says_so(monkeypatch, chip, num_devices, dtype, backend):
    said = []
    monkeypatch.setattr(backends.logging, "info", said.append)
    backends.log_once.cache_clear()
    mesh = jax.sharding.AbstractMesh((num_devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = LHS.astype(dtype), RHS.astype(dtype), SIZES
    with compiling_for(chip), jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(lambda *arrays: grouped_matmul(*arrays), *arrays)
    assert said[0].startswith(f"grouped_matmul: {backend}, the first backend that can do it. Not: ")


def test_the_door_does_not_import_pallas():
    script = "import sys, t5x_like.kernels.grouped_matmul; sys.exit('jax.experimental.pallas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0

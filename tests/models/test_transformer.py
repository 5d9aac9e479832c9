import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from t5x_like.errors import UserError
from t5x_like.models.block import BlockConfig
from t5x_like.models.feedforward.mlp import ACTIVATIONS, MLPConfig
from t5x_like.models.heads.language_model import LanguageModelHeadConfig
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.norms import NormConfig
from t5x_like.models.parameters import InitializerConfig, logical_axes, merge, split
from t5x_like.models.positions import (
    LearnedPositionsConfig,
    LinearScaling,
    Llama3Scaling,
    RotaryConfig,
    SinusoidalPositionsConfig,
    YarnScaling,
    rotate,
)
from t5x_like.models.stack import StackConfig
from t5x_like.models.transformer import DecoderConfig, Transformer
from tests import toy

pytestmark = pytest.mark.typed

LENGTH, VOCAB = 12, 29


def small(*, attention=None, feedforward=None, block=None, stack=None, head=None, **decoder) -> DecoderConfig:
    attention = AttentionConfig(**{"num_heads": 4, "rotary": RotaryConfig(), **(attention or {})})
    block = BlockConfig(mixer=attention, feedforward=MLPConfig(**{"d_ff": 24, **(feedforward or {})}), **(block or {}))
    stack = StackConfig(**{"num_layers": 2, "block": block, **(stack or {})})
    head = LanguageModelHeadConfig(**(head or {}))
    fields = {"d_model": 16, "vocab_size": VOCAB, "dtype": "float32", "stack": stack, "head": head}
    return DecoderConfig(**{**fields, **decoder})


def build(config: DecoderConfig, seed: int = 0) -> Transformer:
    return jax.jit(config.build)(jax.random.key(seed))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, LENGTH), 0, VOCAB)


CONFIGS = {
    "llama": small(),
    "grouped_queries": small(attention={"num_kv_heads": 2, "head_dim": 6}),
    "multi_query": small(attention={"num_kv_heads": 1}),
    "biases": small(
        attention={"use_qkv_bias": True, "use_out_bias": True},
        feedforward={"use_bias": True},
        stack={"final_norm": NormConfig(use_bias=True)},
    ),
    "gpt2": small(
        attention={"rotary": None, "use_qkv_bias": True, "use_out_bias": True},
        feedforward={"activation": "gelu_tanh", "gated": False, "use_bias": True},
        block={"norm": NormConfig(kind="layernorm", use_bias=True)},
        positions=LearnedPositionsConfig(max_length=LENGTH),
    ),
    "sinusoidal": small(attention={"rotary": None}, positions=SinusoidalPositionsConfig()),
    "window": small(attention={"window": 3}),
    "qwen": small(attention={"qk_norm": NormConfig(), "use_qkv_bias": True, "num_kv_heads": 2}),
    "olmo2": small(
        attention={"qk_norm": NormConfig(), "qk_norm_dims": "all_heads", "num_kv_heads": 2},
        block={"norm_place": "post_branch"},
    ),
    "gemma": small(
        attention={"head_dim": 6, "num_kv_heads": 1},
        feedforward={"activation": "gelu_tanh"},
        block={"norm": NormConfig(zero_centered=True)},
        stack={"final_norm": NormConfig(zero_centered=True)},
        scale_embedding=True,
    ),
    "yarn": small(attention={"rotary": RotaryConfig(scaling=YarnScaling(factor=4.0, original_length=8))}),
    "no_positions": small(attention={"rotary": None}),
    "untied": small(head={"tie_embeddings": False}),
    "unrolled": small(stack={"scan_layers": False}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_later_token_changes_no_earlier_output(config, tokens):
    model = build(config)
    hidden = jax.jit(lambda tokens: model(toy.tokens(tokens))[0])
    changed = tokens.at[:, 7].set((tokens[:, 7] + 1) % VOCAB)
    before, after = hidden(tokens), hidden(changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).max() > 1e-3
    assert model.head.scores(before, model.embedding[...]).shape == (2, LENGTH, VOCAB)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_axes_name_every_dim_of_every_parameter(config):
    model = build(config)
    shapes = jax.tree.map(jnp.shape, split(model)[1], is_leaf=lambda a: hasattr(a, "shape"))
    axes = logical_axes(model)
    is_tuple = lambda a: isinstance(a, tuple)
    jax.tree.map(lambda shape, names: pytest.fail(f"{shape} {names}") if len(shape) != len(names) else None,
                 shapes, axes, is_leaf=is_tuple)  # fmt: skip
    scanned = config.stack.scan_layers
    stacked = jax.tree.leaves(axes["stack"]["scanned" if scanned else "unrolled"], is_leaf=is_tuple)
    assert all((names[0] == "layers") == scanned for names in stacked)


def test_scanned_layers_compute_what_unrolled_layers_do(tokens):
    scanned, unrolled = build(CONFIGS["llama"]), build(CONFIGS["unrolled"])
    np.testing.assert_allclose(scanned(toy.tokens(tokens))[0], unrolled(toy.tokens(tokens))[0], rtol=1e-5, atol=1e-6)
    layer = jax.tree.map(lambda a: a[1], split(scanned)[1]["stack"]["scanned"]["0"])
    jax.tree.map(np.testing.assert_array_equal, layer, split(unrolled)[1]["stack"]["unrolled"]["1"])


REMAT = {
    "full": {"remat": "full"},
    "dots": {"remat": "dots"},
    "names": {"remat": "names", "remat_names": ("attention", "mlp")},
    "offload": {"remat": "offload", "remat_names": ("attention",)},
}


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("policy", REMAT.values(), ids=REMAT)
def test_rematerialisation_changes_no_gradient(policy, scan_layers, tokens):
    def gradient(config):
        graphdef, params = split(build(config))
        loss = lambda params: jnp.sum(jnp.square(merge(graphdef, params)(toy.tokens(tokens))[0]))
        return jax.jit(jax.grad(loss))(params)

    plain = gradient(small(stack={"scan_layers": scan_layers}))
    recomputed = gradient(small(stack={"scan_layers": scan_layers, **policy}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, recomputed)


def test_remat_full_recomputes_and_none_does_not(tokens):
    def num_dots(remat):
        graphdef, params = split(build(small(stack={"scan_layers": False, "remat": remat})))
        loss = lambda params: jnp.sum(merge(graphdef, params)(toy.tokens(tokens))[0])
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    assert num_dots("none") < num_dots("dots") + 1 <= num_dots("full")


def test_in_a_loop_none_keeps_no_elementwise_results(tokens):
    config = small(stack={"scan_layers": True})
    graphdef, params = split(build(config))
    loss = lambda params: jnp.sum(merge(graphdef, params)(toy.tokens(tokens))[0])
    scans = [e for e in jax.make_jaxpr(jax.grad(loss))(params).eqns if e.primitive.name == "scan"]
    kept = [v.aval.shape for v in scans[0].outvars if v.aval.shape[-1:] == (config.stack.block.feedforward.d_ff,)]
    # Of the perceptron: what its two projections gave, but neither the gate's sigmoid nor their product.
    assert kept == [(config.stack.num_layers, *tokens.shape, config.stack.block.feedforward.d_ff)] * 2


def test_segments_do_not_see_each_other(tokens):
    model = build(CONFIGS["llama"])
    segment_ids = jnp.array([[1] * 5 + [2] * 4 + [0] * 3] * 2)
    positions = jnp.array([[*range(5), *range(4), 0, 0, 0]] * 2)
    packed = model(toy.tokens(tokens, segment_ids=segment_ids, positions=positions))[0]
    np.testing.assert_allclose(packed[:, 5:9], model(toy.tokens(tokens[:, 5:9]))[0], rtol=1e-5, atol=1e-6)
    changed = model(toy.tokens(tokens.at[:, 2].add(1) % VOCAB, segment_ids=segment_ids, positions=positions))[0]
    np.testing.assert_array_equal(packed[:, 5:], changed[:, 5:])


def test_a_window_hides_what_is_before_it(tokens):
    model = build(CONFIGS["window"])
    hidden = jax.jit(lambda tokens: model(toy.tokens(tokens))[0])
    before, after = hidden(tokens), hidden(tokens.at[:, 2].add(1) % VOCAB)
    seen = 2 + 2 * (3 - 1)  # two layers, each two tokens further
    np.testing.assert_array_equal(before[:, seen + 1 :], after[:, seen + 1 :])
    assert np.abs(before[:, seen] - after[:, seen]).max() > 1e-5
    wide = build(small(attention={"window": LENGTH}))
    np.testing.assert_array_equal(wide(toy.tokens(tokens))[0], build(CONFIGS["llama"])(toy.tokens(tokens))[0])


def test_normalised_queries_and_keys_have_no_scale(tokens):
    for name in ("qwen", "olmo2"):
        graphdef, params = split(build(CONFIGS[name]))
        query = params["stack"]["scanned"]["0"]["mixer"]["query"]
        kernel, outputs = query["kernel"], []
        for scale in (100, 5000):  # large enough that epsilon is nothing beside it
            query["kernel"] = kernel * scale
            outputs.append(merge(graphdef, params)(toy.tokens(tokens))[0])
        np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-3)


def test_zero_centered_norms_start_as_the_identity():
    x = jax.random.normal(jax.random.key(0), (3, 16))
    np.testing.assert_array_equal(NormConfig(zero_centered=True).build(16)(x), NormConfig().build(16)(x))


SCALINGS = {
    "linear": LinearScaling(factor=4.0),
    "llama3": Llama3Scaling(factor=4.0, original_length=64),
    "yarn": YarnScaling(factor=4.0, original_length=256),
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_scalings_slow_slow_rotations_by_the_factor_and_fast_ones_less(scaling):
    one = jnp.int32(1)
    slowdown = RotaryConfig().frequencies(32, one) / RotaryConfig(scaling=scaling).frequencies(32, one)
    np.testing.assert_allclose(slowdown[-1], 4.0, rtol=1e-5)
    np.testing.assert_allclose(slowdown[0], 4.0 if isinstance(scaling, LinearScaling) else 1.0, rtol=1e-5)
    assert np.all(np.diff(slowdown) > -1e-5)


def test_dropout_needs_a_key_and_depends_on_it(tokens):
    model = build(small(attention={"dropout_rate": 0.2}, block={"dropout_rate": 0.2}, dropout_rate=0.2))
    outputs = [
        model(toy.tokens(tokens), dropout_key=key)[0] for key in (None, None, jax.random.key(0), jax.random.key(1))
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-2
    assert np.abs(outputs[2] - outputs[3]).max() > 1e-2


def test_bfloat16_computes_close_to_float32_with_float32_parameters(tokens):
    exact, rounded = build(CONFIGS["llama"]), build(dataclasses.replace(CONFIGS["llama"], dtype="bfloat16"))
    assert {a.dtype for a in jax.tree.leaves(split(rounded)[1])} == {jnp.dtype("float32")}
    hidden = rounded(toy.tokens(tokens))[0]
    assert hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(hidden.astype("float32"), exact(toy.tokens(tokens))[0], atol=0.1)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norms_agree_with_flax(kind):
    x = jax.random.normal(jax.random.key(0), (3, 16)) * 3 + 1
    layer = {"rmsnorm": linen.RMSNorm, "layernorm": linen.LayerNorm}[kind](epsilon=1e-6)
    expected = layer.apply(layer.init(jax.random.key(0), x), x)
    ours = NormConfig(kind=kind, use_bias=kind == "layernorm").build(16)(x)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_rotary_turns_complex_numbers():
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, LENGTH, 2, 8)))
    positions = np.arange(LENGTH)[None]
    turned = np.asarray(rotate(jnp.asarray(x), jnp.asarray(positions), RotaryConfig(theta=100.0)))
    complex_x = x[..., :4] + 1j * x[..., 4:]
    angle = positions[:, :, None, None] * 100.0 ** (-np.arange(4) / 4)
    expected = complex_x * np.exp(1j * angle)
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), rtol=1e-5, atol=1e-5)


def test_sinusoids_start_at_zero_and_one_and_span_the_wavelengths():
    config, init = SinusoidalPositionsConfig(max_wavelength=100.0), InitializerConfig().build()
    table = config.build(8, init=init, key=jax.random.key(0))(jnp.arange(50)[None])[0]
    np.testing.assert_allclose(table[0], [0] * 4 + [1] * 4)
    np.testing.assert_allclose(table[:, 0], np.sin(np.arange(50)), atol=1e-5)
    np.testing.assert_allclose(table[:, 7], np.cos(np.arange(50) / 100), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [("gelu", 1.0, 0.8413447), ("gelu_tanh", 1.0, 0.841192), ("silu", 1.0, 0.7310586), ("relu", -2.0, 0.0),
     ("squared_relu", 3.0, 9.0)],
)  # fmt: skip
def test_activations_at_a_point(name, x, expected):
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.float32(x)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "deviation"),
    [("normal", 0.02), ("truncated_normal", 0.02 * 0.8796), ("xavier_normal", (2 / 500) ** 0.5),
     ("xavier_uniform", (2 / 500) ** 0.5), ("he_normal", (2 / 400) ** 0.5), ("he_uniform", (2 / 400) ** 0.5),
     ("lecun_normal", (1 / 400) ** 0.5)],
)  # fmt: skip
def test_initializers_have_their_standard_deviation(kind, deviation):
    weights = InitializerConfig(kind=kind).build()(jax.random.key(0), (400, 100), 400, 100)
    np.testing.assert_allclose(weights.std(), deviation, rtol=0.02)


def test_residual_projections_start_smaller_with_depth():
    layers = split(build(small(d_model=64, stack={"num_layers": 8})))[1]["stack"]["scanned"]["0"]
    scale = 1 / np.sqrt(2 * 8)
    for inside, out in ((layers["mixer"]["query"], layers["mixer"]["out"]),
                        (layers["feedforward"]["up"], layers["feedforward"]["down"])):  # fmt: skip
        np.testing.assert_allclose(out["kernel"].std() / inside["kernel"].std(), scale, rtol=0.05)


def num_parameters(config: DecoderConfig) -> int:
    params = jax.eval_shape(lambda: split(config.build(jax.random.key(0)))[1])
    return sum(a.size for a in jax.tree.leaves(params))


def gpt2(*, vocab_size, d_model, num_layers, num_heads, max_length, use_bias) -> DecoderConfig:
    return small(
        attention={"num_heads": num_heads, "rotary": None, "use_qkv_bias": use_bias, "use_out_bias": use_bias},
        feedforward={"d_ff": 4 * d_model, "activation": "gelu_tanh", "gated": False, "use_bias": use_bias},
        block={"norm": NormConfig(kind="layernorm", use_bias=use_bias)},
        stack={"num_layers": num_layers, "final_norm": NormConfig(kind="layernorm", use_bias=use_bias)},
        positions=LearnedPositionsConfig(max_length=max_length),
        vocab_size=vocab_size,
        d_model=d_model,
    )


def test_published_parameter_counts():
    gpt2_small = gpt2(vocab_size=50257, d_model=768, num_layers=12, num_heads=12, max_length=1024, use_bias=True)
    assert num_parameters(gpt2_small) == 124_439_808
    nanogpt = gpt2(vocab_size=65, d_model=384, num_layers=6, num_heads=6, max_length=256, use_bias=False)
    assert num_parameters(nanogpt) - 256 * 384 == 10_646_784  # nanoGPT prints 10.65M, without positions


BAD = {
    "heads": (
        lambda: small(attention={"num_heads": 3, "rotary": None}),
        "d_model .16. is not a multiple of .*num_heads .3.",
    ),
    "kv_heads": (lambda: small(attention={"num_kv_heads": 3}), "num_heads .4. is not a multiple of num_kv_heads .3."),
    "odd_rotary": (lambda: small(attention={"head_dim": 3}), "even number of dims"),
    "window": (lambda: small(attention={"window": 0}), "window is 0"),
    "qk_norm_dims": (lambda: small(attention={"qk_norm_dims": "all_heads"}), "without qk_norm"),
    "scaling_factor": (lambda: LinearScaling(factor=0.5), "factor is 0.5"),
    "scaling_length": (lambda: Llama3Scaling(factor=2.0, original_length=0), "original_length is 0"),
    "scaling_turns": (
        lambda: Llama3Scaling(factor=2.0, original_length=8, low_frequency_turns=4.0),
        "low_frequency_turns .4.0. must be less",
    ),
    "yarn_betas": (lambda: YarnScaling(factor=2.0, original_length=8, beta_slow=40.0), "beta_slow .40.0."),
    "yarn_theta": (lambda: RotaryConfig(theta=1.0, scaling=SCALINGS["yarn"]), "with YarnScaling it must be above 1"),
    "dropout": (lambda: small(block={"dropout_rate": 1.0}), "dropout_rate is 1.0"),
    "layers": (lambda: small(stack={"num_layers": 0}), "num_layers is 0"),
    "remat_names": (lambda: small(stack={"remat": "names"}), "need remat_names"),
    "unknown_name": (lambda: small(stack={"remat": "names", "remat_names": ("qery",)}), "qery: choose among query"),
    "odd_sinusoidal": (
        lambda: small(d_model=15, attention={"head_dim": 4}, positions=SinusoidalPositionsConfig()),
        "even",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_impossible_configurations_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()

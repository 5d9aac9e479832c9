"""What distinguishes the kinds of models: masks, cycles of blocks, cross-attention, biases of position."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.models.block import BlockConfig
from t5x_like.models.feedforward.mlp import MLPConfig
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.mixers.latent_attention import LatentAttentionConfig
from t5x_like.models.norms import NormConfig
from t5x_like.models.parameters import merge, split
from t5x_like.models.position_biases import AlibiConfig, RelativeBiasConfig
from t5x_like.models.positions import DynamicScaling, LearnedPositionsConfig, LongRopeScaling, RotaryConfig, rotate
from t5x_like.models.stack import StackConfig
from t5x_like.models.transformer import DecoderConfig, EncoderConfig, EncoderDecoderConfig
from tests import toy

BATCH, LENGTH, VOCAB, WIDTH = 2, 12, 29, 16
LAYER_NORM = NormConfig(kind="layernorm", use_bias=True)
T5_ATTENTION = AttentionConfig(num_heads=4, scale=1.0)


def attention(**fields) -> AttentionConfig:
    return AttentionConfig(**{"num_heads": 4, "rotary": RotaryConfig(), **fields})


def block(attention: AttentionConfig | LatentAttentionConfig | None, **fields) -> BlockConfig:
    return BlockConfig(**{"mixer": attention, "feedforward": MLPConfig(d_ff=24), **fields})


def stack(*cycle: BlockConfig, **fields) -> StackConfig:
    return StackConfig(**{"num_layers": 2, "block": cycle, **fields})


def decoder(stack: StackConfig, **fields) -> DecoderConfig:
    return DecoderConfig(**{"d_model": WIDTH, "vocab_size": VOCAB, "dtype": "float32", "stack": stack, **fields})


def encoder(stack: StackConfig, **fields) -> EncoderConfig:
    return EncoderConfig(**{"d_model": WIDTH, "vocab_size": VOCAB, "dtype": "float32", "stack": stack, **fields})


LATENT = LatentAttentionConfig(
    num_heads=4, kv_lora_rank=8, q_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
)
DECODERS = {
    "five_to_one": decoder(
        stack(*[block(attention(window=3))] * 2, block(attention(rotary=RotaryConfig(theta=1e6))), num_layers=7)
    ),
    "first": decoder(stack(block(attention()), first=(block(attention(num_heads=2)),), num_layers=3)),
    "no_positions_every_second": decoder(stack(block(attention()), block(attention(rotary=None)), num_layers=4)),
    "latent": decoder(stack(block(LATENT))),
    "latent_direct": decoder(stack(block(dataclasses.replace(LATENT, q_lora_rank=None, use_bias=True)))),
    "alibi": decoder(stack(block(attention(rotary=None)), position_bias=AlibiConfig())),
    "relative_bias": decoder(stack(block(T5_ATTENTION), position_bias=RelativeBiasConfig(num_buckets=8))),
    "sandwich": decoder(stack(block(attention(), norm_place="sandwich"))),
    "post": decoder(stack(block(attention(), norm_place="post", norm=LAYER_NORM), final_norm=None)),
    "no_norm": decoder(stack(block(attention(), norm=None), final_norm=None), residual_init="t_fixup"),
    "parallel": decoder(stack(block(attention(), parallel=True))),
    "soft_cap_and_scale": decoder(stack(block(attention(soft_cap=5.0, scale=0.3)))),
    "sinks": decoder(stack(block(attention(sinks=True, num_kv_heads=2)))),
    "partial_rotary": decoder(stack(block(attention(head_dim=8, rotary=RotaryConfig(fraction=0.5))))),
    "chunks": decoder(stack(block(attention(chunk=5)))),
    "one_part_a_block": decoder(
        stack(block(attention(), feedforward=None), block(None, norm_place="sandwich"), num_layers=4)
    ),
}


def build(config, seed=0):
    graphdef, params = split(jax.jit(config.build)(jax.random.key(seed)))
    # Larger than usual, and nothing at its start: every parameter must matter.
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [2 * a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return merge(graphdef, jax.tree.unflatten(structure, noisy))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, VOCAB)


@pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS)
def test_a_later_token_changes_no_earlier_output(config, tokens):
    model = build(config)
    hidden = jax.jit(lambda tokens: model(toy.tokens(tokens)).x)
    before, after = hidden(tokens), hidden(tokens.at[:, 7].set((tokens[:, 7] + 1) % VOCAB))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).max() > 1e-3


@pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS)
def test_every_parameter_has_a_gradient(config, tokens):
    graphdef, params = split(build(config))
    loss = lambda params: jnp.sum(jnp.sin(merge(graphdef, params)(toy.tokens(tokens)).x * jnp.arange(WIDTH)))
    for path, gradient in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.abs(gradient).max() > 0, path


@pytest.mark.parametrize("name", ["five_to_one", "first", "no_positions_every_second"])
def test_scanned_cycles_compute_what_unrolled_layers_do(name, tokens):
    config = DECODERS[name]
    plain = dataclasses.replace(config, stack=dataclasses.replace(config.stack, scan_layers=False))
    graphdef, params = split(build(config))
    layers = {}
    for i in range(config.stack.num_layers):
        (kind, place), index = config.stack.locate(i)
        layer = params["stack"][kind][place]
        layers[str(i)] = layer if index is None else jax.tree.map(lambda a, index=index: a[index], layer)
    others = {key: value for key, value in params["stack"].items() if key not in ("scanned", "unrolled")}
    unrolled = {**params, "stack": {**others, "unrolled": layers}}
    plain_graphdef, _ = split(plain.build(jax.random.key(0)))
    expected = merge(plain_graphdef, unrolled)(toy.tokens(tokens)).x
    np.testing.assert_allclose(merge(graphdef, params)(toy.tokens(tokens)).x, expected, rtol=1e-4, atol=1e-5)


def test_tokens_of_equal_order_see_each_other(tokens):
    """A prefix language model: the first five tokens see each other, the others what is before them."""
    model, prefix = build(decoder(stack(block(attention())))), 5
    order = jnp.maximum(jnp.arange(LENGTH) - prefix + 1, 0)[None].repeat(BATCH, 0)
    hidden = jax.jit(lambda tokens: model(toy.tokens(tokens, order=order)).x)
    change = lambda place: hidden(tokens.at[:, place].set((tokens[:, place] + 1) % VOCAB))
    before = hidden(tokens)
    assert np.abs(before[:, 0] - change(prefix - 1)[:, 0]).max() > 1e-4
    np.testing.assert_array_equal(before[:, :prefix], change(prefix)[:, :prefix])
    np.testing.assert_array_equal(before[:, :8], change(8)[:, :8])


def test_tokens_outside_the_key_mask_are_seen_by_none(tokens):
    model = build(decoder(stack(block(attention()))))
    key_mask = jnp.ones((BATCH, LENGTH), jnp.int32).at[:, 4].set(0)
    hidden = jax.jit(lambda tokens: model(toy.tokens(tokens, key_mask=key_mask)).x)
    before, after = hidden(tokens), hidden(tokens.at[:, 4].set((tokens[:, 4] + 1) % VOCAB))
    others = np.arange(LENGTH) != 4
    np.testing.assert_array_equal(before[:, others], after[:, others])


ENCODERS = {
    "bert": encoder(
        stack(block(AttentionConfig(num_heads=4), norm_place="post", norm=LAYER_NORM), final_norm=None),
        positions=LearnedPositionsConfig(max_length=LENGTH),
        num_token_types=2,
        embedding_norm=LAYER_NORM,
    ),
    "modern": encoder(
        stack(
            block(attention(window=4)),
            block(attention(rotary=RotaryConfig(theta=1e5))),
            first=(block(attention(), norm_mixer=False),),
            num_layers=4,
        )
    ),
    "relative_bias": encoder(stack(block(T5_ATTENTION), position_bias=RelativeBiasConfig(num_buckets=8))),
}


@pytest.mark.parametrize("config", ENCODERS.values(), ids=ENCODERS)
def test_an_encoder_sees_its_segment_and_nothing_else(config, tokens):
    model = build(config)
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3] * BATCH)
    positions = jnp.array([[*range(5), *range(4), 0, 0, 0]] * BATCH)
    hidden = jax.jit(lambda tokens: model(toy.tokens(tokens, segment_ids=segments, positions=positions)).x)
    before, after = hidden(tokens), hidden(tokens.at[:, 8].set((tokens[:, 8] + 1) % VOCAB))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(before[:, 5] - after[:, 5]).max() > 1e-4
    alone = model(toy.tokens(tokens[:, :5], segment_ids=segments[:, :5]))
    np.testing.assert_allclose(before[:, :5], alone.x, rtol=1e-4, atol=1e-5)


def test_a_window_of_an_encoder_reaches_half_of_it_to_either_side(tokens):
    model = build(encoder(stack(block(attention(window=4)), num_layers=1)))
    hidden = jax.jit(lambda tokens: model(toy.tokens(tokens)).x)
    before, after = hidden(tokens), hidden(tokens.at[:, 6].set((tokens[:, 6] + 1) % VOCAB))
    changed = np.abs(before - after).max(axis=(0, 2)) > 1e-6
    assert np.flatnonzero(changed).tolist() == [4, 5, 6, 7, 8]


def encoder_decoder(**fields) -> EncoderDecoderConfig:
    of_encoder = block(T5_ATTENTION)
    of_decoder = dataclasses.replace(of_encoder, cross_attention=T5_ATTENTION)
    bias = {"position_bias": RelativeBiasConfig(num_buckets=8)}
    stacks = {"encoder": stack(of_encoder, **bias), "decoder": stack(of_decoder, num_layers=3, **bias)}
    return EncoderDecoderConfig(**{"d_model": WIDTH, "vocab_size": VOCAB, "dtype": "float32", **stacks, **fields})


def test_packed_pairs_of_an_encoder_decoder_do_not_see_each_other(tokens):
    model = build(encoder_decoder())
    inputs = jax.random.randint(jax.random.key(2), (BATCH, 9), 0, VOCAB)
    batch = {
        "encoder_input_tokens": inputs,
        "encoder_segment_ids": jnp.array([[1] * 4 + [2] * 3 + [0] * 2] * BATCH),
        "encoder_positions": jnp.array([[*range(4), *range(3), 0, 0]] * BATCH),
        "decoder_input_tokens": tokens,
        "decoder_segment_ids": jnp.array([[1] * 5 + [2] * 6 + [0]] * BATCH),
        "decoder_positions": jnp.array([[*range(5), *range(6), 0]] * BATCH),
    }
    run = jax.jit(lambda batch: model.run(batch).x)
    before = run(batch)
    alone = {name: array[:, : 4 if name.startswith("encoder") else 5] for name, array in batch.items()}
    np.testing.assert_allclose(before[:, :5], run(alone)[:, :5], rtol=1e-4, atol=1e-5)
    other = run({**batch, "encoder_input_tokens": inputs.at[:, 5].set((inputs[:, 5] + 1) % VOCAB)})
    np.testing.assert_array_equal(before[:, :5], other[:, :5])
    assert np.abs(before[:, 5:11] - other[:, 5:11]).max() > 1e-4
    padding = run({**batch, "encoder_input_tokens": inputs.at[:, 8].set((inputs[:, 8] + 1) % VOCAB)})
    np.testing.assert_array_equal(before, padding)


def test_rotary_scalings_of_long_texts_begin_where_the_training_texts_end():
    x = jax.random.normal(jax.random.key(0), (1, 40, 2, 8))
    positions = jnp.arange(40)[None]
    plain = rotate(x, positions, RotaryConfig())
    dynamic = RotaryConfig(scaling=DynamicScaling(factor=2.0, original_length=16))
    np.testing.assert_allclose(rotate(x[:, :16], positions[:, :16], dynamic), plain[:, :16], atol=1e-6)
    assert np.abs(rotate(x, positions, dynamic) - plain).max() > 0.1
    factors = {"short_factors": (1.0,) * 4, "long_factors": (1.0, 2.0, 3.0, 4.0), "original_length": 16}
    longrope = RotaryConfig(scaling=LongRopeScaling(attention_factor=1.5, **factors))
    np.testing.assert_allclose(rotate(x[:, :16], positions[:, :16], longrope), 1.5 * plain[:, :16], atol=1e-5)
    long = rotate(x, positions, longrope) / 1.5
    np.testing.assert_allclose(long[..., 0], plain[..., 0], atol=1e-5)
    assert np.abs(long[..., 3] - plain[..., 3]).max() > 1e-3


def test_depth_does_not_grow_the_program():
    def size(num_layers):
        config = decoder(stack(block(attention()), num_layers=num_layers))
        graphdef, params = split(config.build(jax.random.key(0)))
        run = lambda params, tokens: merge(graphdef, params)(toy.tokens(tokens)).x
        return len(str(jax.make_jaxpr(run)(params, jnp.zeros((1, 8), jnp.int32))))

    assert size(64) < 1.05 * size(4)


BAD = {
    "bias_and_rotary": (
        lambda: stack(block(attention()), position_bias=AlibiConfig()),
        "AlibiConfig and its attention has rotary positions",
    ),
    "bias_and_heads": (
        lambda: stack(
            block(attention(rotary=None)), block(attention(rotary=None, num_heads=2)), position_bias=AlibiConfig()
        ),
        r"num_heads differ .2, 4.",
    ),
    "empty_cycle": (lambda: StackConfig(num_layers=1, block=()), "block is empty"),
    "cycle_too_long": (
        lambda: stack(*[block(attention())] * 3, num_layers=2),
        "num_layers is 2: .* one cycle of 3",
    ),
    "no_part": (lambda: block(None, feedforward=None), "mixer and BlockConfig.feedforward are both None"),
    "parallel_without_mixer": (lambda: block(None, parallel=True), "parallel needs a mixer and a feedforward"),
    "bias_for_none": (lambda: stack(block(None), position_bias=AlibiConfig()), "none of its mixers takes one"),
    "parallel_post": (lambda: block(attention(), parallel=True, norm_place="post"), "parallel needs norm_place"),
    "cross_rotary": (lambda: block(attention(), cross_attention=attention()), "cross_attention has rotary"),
    "cross_in_decoder": (
        lambda: decoder(stack(block(T5_ATTENTION, cross_attention=T5_ATTENTION))),
        "DecoderConfig.stack has BlockConfig.cross_attention",
    ),
    "no_cross": (
        lambda: encoder_decoder(decoder=stack(block(T5_ATTENTION))),
        "EncoderDecoderConfig.decoder has blocks without cross_attention",
    ),
    "odd_rotary_part": (
        lambda: decoder(stack(block(attention(head_dim=6, rotary=RotaryConfig(fraction=0.5))))),
        "= 3: rotary positions need an even number",
    ),
    "buckets": (lambda: RelativeBiasConfig(num_buckets=3), "num_buckets is 3"),
    "longrope": (
        lambda: LongRopeScaling(short_factors=(1.0,), long_factors=(1.0, 2.0), original_length=8),
        "1 short_factors and 2 long_factors",
    ),
    "latent": (lambda: dataclasses.replace(LATENT, qk_rope_head_dim=3), "qk_rope_head_dim is 3"),
    "soft_cap": (lambda: attention(soft_cap=0.0), "soft_cap is 0.0"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_impossible_models_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()

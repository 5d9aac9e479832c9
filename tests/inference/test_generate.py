import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.inference.cache import attend_cached, empty_states
from t5x_like.inference.generate import generate, generate_from_inputs
from t5x_like.inference.sampling import Sampling, restrict, sample
from t5x_like.models.block import BlockConfig
from t5x_like.models.feedforward.mlp import MLPConfig
from t5x_like.models.heads.language_model import LanguageModelHeadConfig
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.mixers.latent_attention import LatentAttentionConfig
from t5x_like.models.norms import NormConfig
from t5x_like.models.parameters import merge, split
from t5x_like.models.position_biases import RelativeBiasConfig
from t5x_like.models.positions import LearnedPositionsConfig, RotaryConfig, YarnScaling
from t5x_like.models.stack import StackConfig
from t5x_like.models.transformer import EncoderDecoderConfig
from tests import toy

GREEDY = Sampling(temperature=0)


@pytest.fixture(
    scope="module",
    params=[
        "scanned",
        "unrolled_learned_grouped",
        "window_qk_norm",
        "cycle",
        "latent",
        "relative_bias",
        "chunks",
        "one_part_a_block",
    ],
)
def decoder(request):
    config = toy.model(vocab_size=toy.VOCAB)
    if request.param == "window_qk_norm":
        rotary = RotaryConfig(scaling=YarnScaling(factor=2.0, original_length=8))
        attention = AttentionConfig(num_heads=4, window=4, qk_norm=NormConfig(), use_qkv_bias=True, rotary=rotary)
        block = dataclasses.replace(config.stack.block, mixer=attention, norm_place="post_branch")
        config = dataclasses.replace(config, stack=dataclasses.replace(config.stack, block=block), scale_embedding=True)
    elif request.param == "unrolled_learned_grouped":
        attention = AttentionConfig(num_heads=4, num_kv_heads=2)
        block = config.stack.block.__class__(mixer=attention, feedforward=config.stack.block.feedforward)
        stack = config.stack.__class__(num_layers=2, block=block, scan_layers=False)
        config = toy.model(vocab_size=toy.VOCAB, stack=stack, positions=LearnedPositionsConfig(max_length=32))
    elif request.param == "cycle":
        wide = config.stack.block
        narrow = dataclasses.replace(wide, mixer=AttentionConfig(num_heads=4, num_kv_heads=1, window=3, sinks=True))
        config = toy.model(vocab_size=toy.VOCAB, stack=StackConfig(num_layers=5, block=(narrow, wide), first=(wide,)))
    elif request.param == "latent":
        latent = LatentAttentionConfig(
            num_heads=4, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
        )
        config = with_block(config, mixer=latent)
    elif request.param == "relative_bias":
        config = with_block(config, mixer=AttentionConfig(num_heads=4, scale=1.0))
        stack = dataclasses.replace(config.stack, position_bias=RelativeBiasConfig(num_buckets=8))
        config = dataclasses.replace(config, stack=stack)
    elif request.param == "one_part_a_block":
        mixing = dataclasses.replace(config.stack.block, feedforward=None)
        feeding = dataclasses.replace(config.stack.block, mixer=None)
        config = toy.model(vocab_size=toy.VOCAB, stack=StackConfig(num_layers=5, block=(mixing, feeding)))
    elif request.param == "chunks":
        config = with_block(config, mixer=AttentionConfig(num_heads=4, chunk=5, soft_cap=3.0))
    # Larger weights than usual: untrained models are nearly indifferent between tokens.
    model = config.build(jax.random.key(0))
    graphdef, params = split(model)
    return graphdef, jax.tree.map(lambda a: a * 4 if a.ndim > 1 else a, params)


def with_block(config, **fields):
    block = dataclasses.replace(config.stack.block, **fields)
    return dataclasses.replace(config, stack=dataclasses.replace(config.stack, block=block))


def rebuild(decoder):
    return merge(*decoder)


def test_reading_in_parts_through_the_cache_is_reading_at_once(decoder):
    model = rebuild(decoder)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, toy.VOCAB)
    whole = model(toy.tokens(tokens))[0]
    states, parts = empty_states(model.config.stack, model.config.d_model, "float32", 2, 12), []
    for begin, end in ((0, 5), (5, 6), (6, 9)):
        positions = jnp.broadcast_to(jnp.arange(begin, end), (2, end - begin))
        attend = attend_cached(jnp.int32(begin), jnp.zeros(2, jnp.int32), 12)
        out = model(toy.tokens(tokens[:, begin:end], positions=positions), attend=attend, states=states)
        states = out.states
        parts.append(out.x)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-5)


def plain_greedy(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        hidden = model(toy.tokens(jnp.asarray(tokens)[None]))[0]
        tokens.append(int(jnp.argmax(model.head.scores(hidden[:, -1], model.embedding[...]))))
    return tokens[len(prompt) :]


def test_greedy_text_equals_the_plain_loop_for_every_prompt_of_a_batch(decoder):
    model, prompts = rebuild(decoder), [[3], [5, 9, 2, 40], [7, 7]]
    texts = generate(*decoder, prompts, max_new_tokens=8, context_length=32, sampling=GREEDY)
    for prompt, text in zip(prompts, texts, strict=True):
        assert text.tolist() == plain_greedy(model, prompt, 8)


def test_an_encoder_decoder_writes_what_the_plain_loop_writes():
    attention, bias = AttentionConfig(num_heads=4, scale=1.0), RelativeBiasConfig(num_buckets=8)
    block = BlockConfig(mixer=attention, feedforward=MLPConfig(d_ff=64))
    crossed = dataclasses.replace(block, cross_attention=attention)
    config = EncoderDecoderConfig(
        d_model=32,
        vocab_size=toy.VOCAB,
        dtype="float32",
        encoder=StackConfig(num_layers=2, block=block, position_bias=bias),
        decoder=StackConfig(num_layers=3, block=crossed, position_bias=bias),
        head=LanguageModelHeadConfig(tie_embeddings=False),
    )
    graphdef, params = split(config.build(jax.random.key(0)))
    params = jax.tree.map(lambda a: a * 4 if a.ndim > 1 else a, params)
    model, inputs = merge(graphdef, params), [[5, 9, 2, 40], [3], [7, 7, 8]]
    texts = generate_from_inputs(graphdef, params, inputs, start_id=0, max_new_tokens=8, sampling=GREEDY)
    for tokens, text in zip(inputs, texts, strict=True):
        written = [0]
        for _ in range(8):
            batch = {"encoder_input_tokens": jnp.array([tokens]), "decoder_input_tokens": jnp.array([written])}
            scores = model.head.scores(model.run(batch).x[:, -1], model.embedding[...])
            written.append(int(jnp.argmax(scores)))
        assert text.tolist() == written[1:]
    assert len({tuple(text) for text in texts}) == 3, "the encoder's input must matter"


def test_a_text_ends_before_its_end_token(decoder):
    prompt = [5, 9, 2, 40]
    plain = generate(*decoder, [prompt], max_new_tokens=8, context_length=32, sampling=GREEDY)[0].tolist()
    end = plain[3]
    texts = generate(*decoder, [prompt, [3]], max_new_tokens=8, context_length=32, sampling=GREEDY, eos_id=end)
    assert texts[0].tolist() == plain[: plain.index(end)]


def test_texts_may_outgrow_the_context(decoder):
    model = rebuild(decoder)
    text = generate(*decoder, [[5, 9, 2]], max_new_tokens=40, context_length=16, sampling=GREEDY)[0].tolist()
    assert len(text) == 40
    whole = [5, 9, 2, *text]
    assert text[:13] == plain_greedy(model, [5, 9, 2], 13)
    # Then the last half of the context is read again, and generation goes on from there.
    assert whole[16:24] == plain_greedy(model, whole[8:16], 8)
    long = generate(*decoder, [list(range(30))], max_new_tokens=3, context_length=16, sampling=GREEDY)[0].tolist()
    assert long == plain_greedy(model, list(range(22, 30)), 3)


def test_a_seed_decides_the_text(decoder):
    draw = lambda seed: generate(*decoder, [[3]], max_new_tokens=16, context_length=32, sampling=Sampling(), seed=seed)[
        0
    ].tolist()
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_an_empty_prompt_is_refused(decoder):
    with pytest.raises(UserError, match="prompt has no tokens"):
        generate(*decoder, [[]], max_new_tokens=2, context_length=8, sampling=GREEDY)


def allowed(logits, sampling):
    return [set(np.flatnonzero(np.isfinite(row))) for row in np.asarray(restrict(jnp.asarray(logits), sampling))]


def test_top_k_and_top_p_keep_the_most_likely_tokens():
    logits = np.log(np.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]], np.float32))
    assert allowed(logits, Sampling(top_k=2)) == [{0, 1}, {2, 3}]
    assert allowed(logits, Sampling(top_p=0.7)) == [{0, 1}, {2, 3}]
    assert allowed(logits, Sampling(top_p=0.76)) == [{0, 1, 2}, {1, 2, 3}]
    assert allowed(logits, Sampling(top_p=1e-6)) == [{0}, {3}]
    assert allowed(logits, Sampling(top_k=99)) == [{0, 1, 2, 3}] * 2
    # Top-p acts on what top-k left: two thirds and a third, and 0.43 and 0.57.
    assert allowed(logits, Sampling(top_k=2, top_p=0.6)) == [{0}, {2, 3}]


def test_draws_follow_the_probabilities():
    probabilities = np.array([0.5, 0.25, 0.2, 0.05])
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities)), (20_000, 4))
    keys = jax.random.split(jax.random.key(0), 20_000)
    counts = np.bincount(sample(logits, keys, Sampling()), minlength=4) / 20_000
    np.testing.assert_allclose(counts, probabilities, atol=0.012)
    sharper = np.bincount(sample(logits, keys, Sampling(temperature=0.5)), minlength=4) / 20_000
    np.testing.assert_allclose(sharper, probabilities**2 / np.sum(probabilities**2), atol=0.012)


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)

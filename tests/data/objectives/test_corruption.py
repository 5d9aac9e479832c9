import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.data.objectives.corruption import UL2, Denoiser, SpanCorruption
from t5x_like.data.tokenizers import ByteTokenizerConfig, CharacterTokenizer, SpecialTokens
from t5x_like.errors import UserError
from tests.data.objectives import toy

SENTINELS = [toy.TOKENIZER.sentinel(number) for number in range(100)]
MODES = [toy.TOKENIZER.special_id(mode) for mode in ("[R]", "[S]", "[X]")]
OBJECTIVES = st.sampled_from(
    [
        SpanCorruption(),
        SpanCorruption(noise_density=0.5, mean_noise_span_length=2.0),
        UL2(),
        UL2(denoisers=(Denoiser(noise_density=0.25, mean_noise_span_length=None),)),
    ]
)
LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=12)


def t5_lengths(inputs_length, noise_density, mean_noise_span_length):
    """Tokens and targets of T5's random_spans_helper."""

    def lengths(tokens):
        num_noise = round(tokens * noise_density)
        num_spans = round(num_noise / mean_noise_span_length)
        return tokens - num_noise + num_spans + 1, num_noise + num_spans + 1

    tokens = inputs_length - 1
    while lengths(tokens + 1)[0] <= inputs_length:
        tokens += 1
    targets = lengths(tokens)[1]
    return (tokens - 1, targets - 1) if noise_density == 0.5 and targets > inputs_length else (tokens, targets)


@pytest.mark.parametrize("length", [32, 100, 128, 512, 1024, 2048])
@pytest.mark.parametrize("density", [0.15, 0.25, 0.5])
@pytest.mark.parametrize("mean", [3.0, 5.0])
def test_lengths_are_t5s(length, density, mean):
    objective = SpanCorruption(noise_density=density, mean_noise_span_length=mean)
    tokens, targets = t5_lengths(length, density, mean)
    assert objective.text_length(length) == tokens
    assert objective.features(length, packed=False)["decoder_target_tokens"][0] == (targets,)


def test_lengths_of_the_paper():
    assert (SpanCorruption().text_length(512), SpanCorruption().target_length(512)) == (568, 114)


def fill(inputs, targets):
    """The text again: the noise of the targets in place of the sentinels of the inputs."""
    assert inputs[-1] == targets[-1] == toy.EOS
    spans, number = {}, -1
    for token in targets[:-1]:
        if token in SENTINELS:
            number += 1
            assert token == SENTINELS[number]
            spans[token] = []
        else:
            spans[SENTINELS[number]].append(token)
    assert all(spans.values())
    assert [token for token in inputs if token in SENTINELS] == list(spans)
    inputs = inputs[1:] if inputs[0] in MODES else inputs
    return [token for place in inputs[:-1] for token in spans.get(place, [place])]


@given(LENGTHS, OBJECTIVES, st.sampled_from(["concatenate", "pack", "documents"]), st.integers(0, 5))
def test_encoder_and_decoder_give_the_text_back(lengths, objective, layout, seed):
    text, rows = toy.rows_in_order(objective, toy.text(lengths), length=48, layout=layout, seed=seed)
    pieces = toy.pieces_of(text)
    targets = {(row, number): where for row, number, where in toy.segments(rows, "decoder")}
    seen = {}
    for row, number, where in toy.segments(rows, "encoder"):
        inputs, there = rows["encoder_input_tokens"][row][where], targets[row, number]
        spelled = rows["decoder_target_tokens"][row][there].tolist()
        seen[row, number] = fill(inputs.tolist(), spelled)
        assert rows["decoder_input_tokens"][row][there].tolist() == [0, *spelled[:-1]]
        assert rows["encoder_positions"][row][where].tolist() == list(range(where.sum()))
        assert rows["decoder_positions"][row][there].tolist() == list(range(there.sum()))
    assert seen == pieces
    assert len(targets) == len(pieces)
    assert np.array_equal(rows["decoder_loss_weights"], rows["decoder_segment_ids"] > 0)


@given(LENGTHS, OBJECTIVES, st.sampled_from(["concatenate", "pack", "documents"]), st.integers(0, 5))
def test_a_decoder_alone_gives_the_text_back(lengths, objective, layout, seed):
    objective = dataclasses.replace(objective, architecture="decoder")
    text, rows = toy.rows_in_order(objective, toy.text(lengths), length=64, layout=layout, seed=seed)
    seen = []
    for row in range(len(rows["decoder_order"])):
        order, weights = rows["decoder_order"][row], rows["decoder_loss_weights"][row]
        inputs, targets = rows["decoder_input_tokens"][row], rows["decoder_target_tokens"][row]
        end = -1
        while (weights[end + 1 :] == 1).any():
            begin = end + 1
            # The prefix ends where the first target is predicted; the piece where the order no longer rises.
            first = begin + int(np.argmax(weights[begin:] == 1))
            assert (order[begin : first + 1] == 0).all()
            end = first
            while end + 1 < len(order) and order[end + 1] == order[end] + 1:
                end += 1
            assert (weights[first : end + 1] == 1).all()
            assert (inputs[begin + 1 : end + 1] == targets[begin:end]).all()
            seen.append(fill(inputs[begin : first + 1].tolist(), targets[first : end + 1].tolist()))
    assert seen == list(toy.pieces_of(text).values())


@pytest.mark.parametrize("length", [64, 128, 200])
def test_rows_are_full(length):
    _, rows = toy.rows_in_order(SpanCorruption(), toy.text([20_000]), length=length)
    assert (rows["encoder_segment_ids"][:-1] == 1).all()
    assert (rows["decoder_segment_ids"][:-1] == 1).all()
    _, rows = toy.rows_in_order(SpanCorruption(architecture="decoder"), toy.text([20_000]), length=length)
    assert (rows["decoder_loss_weights"][:-1, -1] == 1).all()


def test_mixture_has_the_modes_and_rates_asked_for():
    objective = UL2(
        denoisers=(
            Denoiser(mode="[R]", noise_density=0.15, mean_noise_span_length=3.0, rate=6),
            Denoiser(mode="[S]", noise_density=0.25, mean_noise_span_length=None, rate=1),
            Denoiser(mode="[X]", noise_density=0.5, mean_noise_span_length=3.0, rate=3),
        )
    )
    _, rows = toy.rows_in_order(objective, toy.text([200_000]), length=64)
    first = rows["encoder_input_tokens"][:-1, 0]
    shares = [np.mean(first == mode) for mode in MODES]
    assert np.abs(np.array(shares) - (0.6, 0.1, 0.3)).max() < 5 * np.sqrt(0.25 / len(first))
    # The sequential denoiser leaves out the end of the text and nothing else.
    prefixes = rows["encoder_input_tokens"][:-1][first == MODES[1]]
    for prefix in prefixes.tolist():
        body = prefix[1 : prefix.index(SENTINELS[0])]
        assert not set(body) & set(SENTINELS)
        assert prefix[len(body) + 1 : len(body) + 3] == [SENTINELS[0], toy.EOS]
    noise = rows["decoder_loss_weights"][:-1][first == MODES[1]].sum(axis=1) - 2
    tokens = objective.text_length(64)
    assert noise.min() >= 0.125 * tokens - 0.5
    assert noise.max() <= 0.375 * tokens + 0.5
    assert abs(noise.mean() / tokens - 0.25) < 0.02


def test_default_mixture_is_table_1_of_the_paper():
    assert [(d.mode, d.mean_noise_span_length, d.noise_density) for d in UL2().denoisers] == [
        ("[R]", 3, 0.15),
        ("[R]", 8, 0.15),
        ("[S]", None, 0.25),
        ("[X]", 3, 0.5),
        ("[X]", 8, 0.5),
        ("[X]", 64, 0.15),
        ("[X]", 64, 0.5),
    ]


def test_missing_tokens_are_named():
    with pytest.raises(UserError, match=r"up to 28 spans .*=512.* 0 sentinels: set SpecialTokens.num_sentinels=100"):
        SpanCorruption().build(ByteTokenizerConfig().build(None), 512, packed=False)
    with pytest.raises(UserError, match=r"SpanCorruption ends sequences with the end of a document"):
        SpanCorruption().build(SpecialTokens(num_sentinels=50).extend(CharacterTokenizer("abc")), 128, packed=False)
    with pytest.raises(UserError, match=r"no token \[R\]: add it to SpecialTokens.names"):
        UL2().build(SpecialTokens(num_sentinels=100).extend(CharacterTokenizer("abc")), 128, packed=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpanCorruption(noise_density=1.0), r"SpanCorruption\.noise_density=1\.0"),
        (lambda: SpanCorruption(mean_noise_span_length=0.5), r"mean_noise_span_length=0\.5"),
        (lambda: Denoiser(noise_density=0.5, mean_noise_span_length=3.0, rate=0.0), r"Denoiser\.rate=0\.0"),
        (lambda: UL2(denoisers=()), r"UL2\.denoisers: give at least one"),
        (
            lambda: UL2(denoisers=(*UL2().denoisers, Denoiser(noise_density=0.5, mean_noise_span_length=3.0))),
            "either to each or to none",
        ),
        (lambda: SpanCorruption().text_length(1), r"sequence_length=1 has no room .* must be at least 2"),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()

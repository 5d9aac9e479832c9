"""FLOP counts against published MFU and against counting pairs of tokens."""

import types

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from t5x_like.models.block import BlockConfig
from t5x_like.models.feedforward.mlp import MLPConfig
from t5x_like.models.heads.language_model import LanguageModelHeadConfig
from t5x_like.models.mixers.attention import AttentionConfig, attended_keys
from t5x_like.models.parameters import split
from t5x_like.models.stack import StackConfig
from t5x_like.models.transformer import DecoderConfig, EncoderDecoderConfig
from t5x_like.training.flops import flops_per_row, model_flops_utilization, peak_flops_per_second


def device(kind):
    return types.SimpleNamespace(device_kind=kind)


def shapes(config):
    return jax.eval_shape(lambda: split(config.build(jax.random.key(0)))[1])


def llama_2_70b():
    attention = AttentionConfig(num_heads=64, num_kv_heads=8)
    block = BlockConfig(mixer=attention, feedforward=MLPConfig(d_ff=28672))
    head = LanguageModelHeadConfig(tie_embeddings=False)
    return DecoderConfig(d_model=8192, vocab_size=32000, stack=StackConfig(num_layers=80, block=block), head=head)


def test_mfu_of_llama_2_70b_is_what_was_published():
    """MaxText on v5p: 692 tokens per second and chip, published as 65.4 %, before causal attention counted half."""
    length, config = 4096, llama_2_70b()
    per_token = flops_per_row(config, shapes(config), {"decoder": length}) / length
    # 80 layers of 8192 x (8192 + 2 * 1024 + 8192) attention and 3 * 8192 * 28672 MLP kernels, and a 32000-token head.
    parameters = 80 * (8192 * (8192 + 2 * 1024 + 8192) + 3 * 8192 * 28672) + 8192 * 32000
    causal_part = 12 * 80 * 64 * 128 * length / 2
    assert per_token == 6 * parameters + causal_part
    peak = peak_flops_per_second(device("TPU v5p"))
    assert model_flops_utilization(692, per_token + causal_part, 1, peak) == pytest.approx(0.673, abs=0.005)
    assert model_flops_utilization(692, per_token, 1, peak) == pytest.approx(0.648, abs=0.005)


def test_an_encoder_decoder_counts_both_sides_and_what_crosses():
    attention, feedforward = AttentionConfig(num_heads=2), MLPConfig(d_ff=24, gated=False)
    encoder = BlockConfig(mixer=attention, feedforward=feedforward)
    decoder = BlockConfig(mixer=attention, cross_attention=attention, feedforward=feedforward)
    config = EncoderDecoderConfig(
        d_model=8,
        vocab_size=10,
        encoder=StackConfig(num_layers=3, block=encoder),
        decoder=StackConfig(num_layers=2, block=decoder, scan_layers=False),
    )
    of_attention, of_mlp = 8 * 8, 2 * 8 * 24
    products = (
        3 * 20 * (4 * of_attention + of_mlp)
        + 2 * 6 * (4 * of_attention + of_mlp + 2 * of_attention)  # and queries and outputs of cross-attention
        + 2 * 20 * 2 * of_attention  # its keys and values
        + 6 * 8 * 10
    )
    scores = 16 * (3 * 20 * 20 + 2 * 6 * 3 + 2 * 6 * 20)
    assert flops_per_row(config, shapes(config), {"encoder": 20, "decoder": 6}) == 6 * (products + scores)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 100, 512, 2000])
def test_attended_keys_are_those_of_the_mask(causal, window):
    length = 1024
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    limit = length if window is None else window
    mask = (query >= key) & (query - key < limit) if causal else np.broadcast_to(key < limit, (length, length))
    # The rule leaves out half a key per token.
    assert attended_keys(length, causal=causal, window=window) == pytest.approx(mask.sum() / length, abs=0.51)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA T4", None),
    ],
)
def test_peak_by_kind_of_device(kind, peak):
    assert peak_flops_per_second(device(kind)) == peak


@pytest.mark.parametrize(
    ("kind", "chip", "cores"), [("TPU v4", "TPU_V4", 2), ("TPU v5", "TPU_V5P", 2), ("TPU7x", "TPU_7X", 1)]
)
def test_tpu_peaks_agree_with_jax(kind, chip, cores):
    """jax counts per TensorCore; `cores` of them are one device."""
    info = pltpu.get_tpu_info_for_chip(getattr(pltpu.ChipVersion, chip), cores)
    assert peak_flops_per_second(device(kind)) == pytest.approx(cores * info.bf16_ops_per_second, rel=0.005)


def test_a_cpu_has_no_mfu():
    assert peak_flops_per_second(jax.devices()[0]) is None
    assert model_flops_utilization(1e3, 1e6, 8, None) is None

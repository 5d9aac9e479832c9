"""FLOP counts against published MFU and against counting pairs of tokens."""

import types

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from t5x_like.training.flops import model_flops_per_token, model_flops_utilization, peak_flops_per_second

LLAMA_2_70B = {"num_layers": 80, "num_heads": 64, "head_dim": 128, "sequence_length": 4096}


def device(kind):
    return types.SimpleNamespace(device_kind=kind)


def test_mfu_of_llama_2_70b_is_what_was_published():
    """MaxText on v5p: 692 tokens per second and chip, published as 65.4 %, before causal attention counted half."""
    # 80 layers of 8192 x (8192 + 2 * 1024 + 8192) attention and 3 * 8192 * 28672 MLP kernels, and a 32000-token head.
    parameters = 80 * (8192 * (8192 + 2 * 1024 + 8192) + 3 * 8192 * 28672) + 8192 * 32000
    peak = peak_flops_per_second(device("TPU v5p"))
    palm = model_flops_utilization(692, model_flops_per_token(parameters, causal=False, **LLAMA_2_70B), 1, peak)
    causal = model_flops_utilization(692, model_flops_per_token(parameters, **LLAMA_2_70B), 1, peak)
    assert palm == pytest.approx(0.673, abs=0.005)
    assert causal == pytest.approx(0.648, abs=0.005)
    assert causal < 0.654 < palm


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 100, 512, 2000])
def test_attention_counts_the_pairs_that_attend(causal, window):
    length = 1024
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    limit = length if window is None else window
    mask = (query >= key) & (query - key < limit) if causal else np.broadcast_to(key < limit, (length, length))
    flops = model_flops_per_token(
        0, num_layers=3, num_heads=2, head_dim=5, sequence_length=length, causal=causal, window=window
    )
    # Forward: 2 FLOPs for the score and 2 for the value, per pair and dim. The rule leaves out half a key per token.
    pairs = mask.sum() / length
    assert flops == pytest.approx(3 * 4 * 3 * 2 * 5 * pairs, abs=3 * 4 * 3 * 2 * 5 * 0.51)


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

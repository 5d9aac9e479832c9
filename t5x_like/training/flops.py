"""Model FLOPs and their share of the chips' peak (MFU)."""

import jax

COUNTING_RULE = (
    "MFU: 6 FLOPs per token and parameter of a matrix product (output head included, embedding tables not) plus "
    "12 x layers x heads x head_dim FLOPs per token and attended key (half of the sequence if causal, fewer in a "
    "window), as a share of the chips' dense bfloat16 peak; recomputation does not count."
)
"""What `mfu` means, to be shown where a run starts."""

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v5e": 197e12,
    "TPU v5 lite": 197e12,
    "TPU v6e": 918e12,
    "TPU v6 lite": 918e12,
    # A chip of 2307e12 shows as two devices.
    "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    # The SXM models; the PCIe and NVL ones are slower.
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
"""Dense bfloat16 FLOP/s of one JAX device by its `device_kind` (Google Cloud TPU documentation, NVIDIA data sheets)."""


def peak_flops_per_second(device: jax.Device) -> float | None:
    """Returns the dense bfloat16 peak of one device, or None where it is not known (CPUs among them)."""
    return PEAK_FLOPS.get(device.device_kind)


def model_flops_per_token(
    num_matmul_parameters: int,
    *,
    num_layers: int,
    num_heads: int,
    head_dim: int,
    sequence_length: int,
    causal: bool = True,
    window: int | None = None,
) -> float:
    """Returns the FLOPs that training needs per token: forward, and twice as many backward.

    Forward, a parameter of a matrix product takes 2 FLOPs, and an attended key 4 per dim of a head (score and weighted
    value). Keys that are masked out do not count. With `causal=False` and no window this is the count of PaLM
    (Chowdhery et al. 2022, appendix B), which many publish; for causal models it gives a higher utilization.

    Args:
      num_matmul_parameters: parameters in matrix products of a token: with the output head (also if it is tied to the
        embedding) and the experts that are used, without embedding and position tables.
      num_layers: attention layers.
      num_heads: query heads of a layer.
      head_dim: size of a head.
      sequence_length: tokens of a sequence.
      causal: whether tokens attend only to themselves and what is before them.
      window: largest number of keys that a token attends to; None for no limit.
    """
    keys = min(sequence_length, window or sequence_length)
    if causal:
        # On average over the sequence; the first `keys` tokens have fewer before them.
        keys -= keys**2 / (2 * sequence_length)
    return 6 * num_matmul_parameters + 12 * num_layers * num_heads * head_dim * keys


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: float, num_devices: int, peak: float | None
) -> float | None:
    """Returns the share of the devices' peak FLOP/s that goes into the model (0 to 1); None without a known peak."""
    return None if peak is None else tokens_per_second * flops_per_token / (num_devices * peak)

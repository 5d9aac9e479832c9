"""Model FLOPs and their share of the chips' peak (MFU)."""

from collections.abc import Iterator

import jax

from t5x_like.models.parameters import Params
from t5x_like.models.stack import StackConfig
from t5x_like.models.transformer import ModelConfig

COUNTING_RULE = (
    "MFU: 6 FLOPs per token and parameter of a matrix product (output head and used experts included, embedding tables "
    "not) plus 12 x layers x heads x head_dim FLOPs per token and attended key (half of the sequence if causal, fewer "
    "in a window), as a share of the chips' dense bfloat16 peak; recomputation does not count."
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


def flops_per_row(config: ModelConfig, params: Params, lengths: dict[str, int]) -> float:
    """Returns the FLOPs of training on one row of a batch: forward, and twice as many backward.

    Forward, a parameter of a matrix product takes 2 FLOPs per token, and an attended key 2 per dim of a key and of a
    value. Of the experts of a layer only those that a token uses count, and keys that are masked out do not. For a
    bidirectional model without windows this is the count of PaLM (Chowdhery et al. 2022, appendix B), which many
    publish; for causal ones it gives a higher utilization.

    Args:
      config: of the model.
      params: its parameters, or their shapes.
      lengths: tokens of a row, of `encoder` and `decoder` where the model has them.
    """
    head = params.get("head", {})
    in_head = (config.vocab_size * config.d_model if config.head.reads_embedding else 0) + sum(
        array.size for path, array in jax.tree.leaves_with_path(head) if path[-1].key in ("kernel", "projection")
    )
    products = in_head * lengths[config.features]
    others = 0.0
    for name, stack in config.stacks.items():
        length = lengths.get(name, lengths[config.features])
        causal = config.features == "decoder" and name != "encoder"
        products += _products(stack, params[name], length, lengths.get("encoder", 0))
        for block in stack.blocks:
            if block.mixer is not None:
                others += length * block.mixer.forward_flops(config.d_model, length, causal=causal)
            if block.cross_attention is not None:
                read = lengths["encoder"]
                others += length * block.cross_attention.forward_flops(config.d_model, read, causal=False)
    return 3 * (2 * products + others)


def active_parameters(config: ModelConfig, params: Params) -> int:
    """Returns the number of parameters that a token uses: of the experts of a layer, those it is sent to."""
    spared = sum(
        array.size * (1 - share)
        for name, stack in config.stacks.items()
        for _, array, share in _of_layers(stack, params[name])
    )
    return round(sum(array.size for array in jax.tree.leaves(params)) - spared)


def _products(stack: StackConfig, params: Params, length: int, encoder_length: int) -> float:
    """Uses of the parameters of matrix products, of all layers and tokens."""
    total = 0.0
    for names, array, share in _of_layers(stack, params):
        if names[-1] == "kernel":
            of_encoder = names[0] == "cross_attention" and names[1] in ("key", "value")
            total += array.size * share * (encoder_length if of_encoder else length)
    return total


def _of_layers(stack: StackConfig, params: Params) -> Iterator[tuple[list[str], jax.Array, float]]:
    """The parameters of a stack's layers: path in the layer, array, and which share of it a token uses."""
    for kind in ("scanned", "unrolled"):
        for i, layer in params.get(kind, {}).items():
            feedforward = (stack.cycle if kind == "scanned" else stack.blocks)[int(i)].feedforward
            for path, array in jax.tree.leaves_with_path(layer):
                names = [entry.key for entry in path]
                yield names, array, feedforward.share_used(names[1:]) if names[0] == "feedforward" else 1.0


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: float, num_devices: int, peak: float | None
) -> float | None:
    """Returns the share of the devices' peak FLOP/s that goes into the model (0 to 1); None without a known peak."""
    return None if peak is None else tokens_per_second * flops_per_token / (num_devices * peak)

"""Models whose layers differ: which attend within a window, and how their blocks repeat."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from t5x_like.huggingface.families.family import Fields
from t5x_like.models.block import BlockConfig
from t5x_like.models.positions import RotaryConfig

SLIDING, FULL = "sliding_attention", "full_attention"

Layers = Callable[[int, BlockConfig], BlockConfig]
"""(number of a layer, what all layers have in common) -> its block."""


def read_windows(fields: Fields, slides: Callable[[int], bool], *, window: int | None) -> list[int | None]:
    """The window of each layer.

    Args:
      fields: of config.json, which may have `layer_types`.
      slides: whether a layer has a window, where there is no such field.
      window: of the layers that have one.
    """
    num_layers = fields.need("num_hidden_layers")
    kinds = fields.take("layer_types", [SLIDING if slides(layer) else FULL for layer in range(num_layers)])
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {SLIDING, FULL}:
        raise fields.unsupported("layer_types", f"it must have {num_layers} times {SLIDING!r} or {FULL!r}")
    if SLIDING in kinds and window is None:
        raise fields.unsupported("sliding_window", "some layers slide, so there must be a number of tokens")
    return [window if kind == SLIDING else None for kind in kinds]


def with_windows(windows: Sequence[int | None], *, rotary: RotaryConfig | None = None) -> Layers:
    """Layers that differ in their windows.

    Args:
      windows: of each layer.
      rotary: positions of layers with a window; None: those of all.
    """

    def layers(layer: int, block: BlockConfig) -> BlockConfig:
        own = {"window": windows[layer]}
        if rotary is not None and windows[layer] is not None:
            own["rotary"] = rotary
        return dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, **own))

    return layers


def write_windows(blocks: Sequence[BlockConfig]) -> dict[str, Any]:
    """`layer_types`, and `sliding_window` where a layer has one."""
    windows = [block.mixer.window for block in blocks]
    first = next((window for window in windows if window is not None), None)
    own = {} if first is None else {"sliding_window": first}
    return own | {"layer_types": [FULL if window is None else SLIDING for window in windows]}


def repeated(blocks: Sequence[BlockConfig]) -> dict[str, Any]:
    """Blocks of all layers as fields of StackConfig: the shortest beginning and cycle that repeats to the end."""
    kinds = list(dict.fromkeys(blocks))
    numbers = [kinds.index(block) for block in blocks]
    for length in range(1, len(blocks) + 1):
        for begin in range(length):
            size = length - begin
            if numbers[begin + size :] == numbers[begin:-size]:
                cycle = tuple(blocks[begin:length])
                return {"first": tuple(blocks[:begin]), "block": cycle[0] if size == 1 else cycle}
    raise AssertionError("all blocks are a cycle that runs once")

"""A stack of blocks: the one place that decides scanning over layers and rematerialisation."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.models.attention import Attend
from t5x_like.models.block import Block, BlockConfig
from t5x_like.models.parameters import Initializer, Module, ModuleDict, merge, split, stack_modules

NAMED_TENSORS = ("query", "key", "value", "attention", "mlp", "gate")
"""What a block names with `checkpoint_name`, in the order it is computed."""


@configurable
class StackConfig:
    """Equal blocks one after the other.

    Attributes:
      num_layers: number of blocks.
      block: the block.
      scan_layers: runs the layers as one compiled loop over stacked parameters, so that compile time does not grow with
        depth; False unrolls them.
      remat: what the backward pass finds of the forward pass: `none` recomputes nothing; `full` keeps each block's
        input only; `dots` keeps the results of the projections; `names` keeps `remat_names`; `offload` keeps
        `remat_names` in host memory. The rest is recomputed.
      remat_names: tensors kept by `names` and `offload`, among query, key, value, attention, mlp, gate.
    """

    num_layers: int
    block: BlockConfig
    scan_layers: bool = True
    remat: Literal["none", "full", "dots", "names", "offload"] = "none"
    remat_names: tuple[str, ...] = ()

    def __post_init__(self):
        if self.num_layers < 1:
            raise UserError(f"StackConfig.num_layers is {self.num_layers}: it must be at least 1.")
        unknown = sorted(set(self.remat_names) - set(NAMED_TENSORS))
        if unknown:
            raise UserError(
                f"StackConfig.remat_names has {', '.join(unknown)}: choose among {', '.join(NAMED_TENSORS)}."
            )
        if bool(self.remat_names) != (self.remat in ("names", "offload")):
            raise UserError(
                f"StackConfig.remat is {self.remat!r} and remat_names is {self.remat_names}: "
                "`names` and `offload` need remat_names, the other policies take none."
            )

    def checkpointed(self, function: Callable) -> Callable:
        """`function` with this remat policy."""
        policies = jax.checkpoint_policies
        match self.remat:
            case "none":
                return function
            case "full":
                policy = None
            case "dots":
                policy = policies.dots_with_no_batch_dims_saveable
            case "names":
                policy = policies.save_only_these_names(*self.remat_names)
            case "offload":
                policy = policies.save_and_offload_only_these_names(
                    names_which_can_be_saved=[],
                    names_which_can_be_offloaded=list(self.remat_names),
                    offload_src="device",
                    offload_dst="pinned_host",
                )
        # Inside a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
        return jax.checkpoint(function, policy=policy, prevent_cse=not self.scan_layers)


class Stack(Module):
    def __init__(
        self,
        config: StackConfig,
        d_model: int,
        *,
        mask: MaskSpec,
        init: Initializer,
        out_init: Initializer,
        dtype: jnp.dtype,
        key: PRNGKeyArray,
    ):
        def build(key: PRNGKeyArray) -> Block:
            return Block(config.block, d_model, mask=mask, init=init, out_init=out_init, dtype=dtype, key=key)

        keys = jax.random.split(key, config.num_layers)
        if config.scan_layers:
            self.layers = stack_modules(build, keys)
        else:
            self.layers = ModuleDict({str(i): build(k) for i, k in enumerate(keys)})
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        *,
        positions: Int[Array, "batch length"],
        attend: Attend,
        states: Any = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch length embed"], Any]:
        """Runs all layers; `states`, one per layer stacked on the leading dim, go through `attend` and come back."""
        num_layers = self.config.num_layers
        dropout_keys = None if dropout_key is None else jax.random.split(dropout_key, num_layers)
        if self.config.scan_layers:
            graphdef, params = split(self.layers)

            def body(x, layer):
                params, state, dropout_key = layer
                block = merge(graphdef, params)
                return block(x, positions=positions, attend=attend, state=state, dropout_key=dropout_key)

            return lax.scan(self.config.checkpointed(body), x, (params, states, dropout_keys))

        new_states = []
        for i in range(num_layers):
            graphdef, params = split(self.layers[str(i)])

            def layer(x, params, state, dropout_key, graphdef=graphdef):
                block = merge(graphdef, params)
                return block(x, positions=positions, attend=attend, state=state, dropout_key=dropout_key)

            state, key = jax.tree.map(lambda a, i=i: a[i], (states, dropout_keys))
            x, state = self.config.checkpointed(layer)(x, params, state, key)
            new_states.append(state)
        return x, jax.tree.map(lambda *a: jnp.stack(a), *new_states)

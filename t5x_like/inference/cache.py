"""Keys and values of past tokens, and attention over them."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from t5x_like.kernels.attention.call import AttentionCall
from t5x_like.models.block import BlockConfig, BlockState
from t5x_like.models.context import Attend, TokenInfo
from t5x_like.models.mixers.cache import Cache
from t5x_like.models.stack import StackConfig, States
from t5x_like.sharding.attention import attend


def empty_states(stack: StackConfig, d_model: int, dtype: str, batch_size: int, max_length: int) -> States:
    """States of all layers of a stack that has not read anything yet."""

    def empty(block: BlockConfig) -> BlockState:
        return BlockState(block.mixer and block.mixer.empty_state(batch_size, max_length, dtype, d_model))

    cycles = stack.num_cycles
    stacked = lambda state: jax.tree.map(lambda a: jnp.broadcast_to(a, (cycles, *a.shape)), state)
    scanned = {str(i): stacked(empty(block)) for i, block in enumerate(stack.cycle)} if cycles else {}
    return {"scanned": scanned, "unrolled": {str(i): empty(stack.blocks[i]) for i in stack.unrolled}}


def attend_cached(index: Int[Array, ""], start: Int[Array, "batch"], max_length: int) -> Attend:
    """Writes the new keys and values at `index` and attends over the cache up to each new token.

    Args:
      index: where in the cache the first new token stands, the same for all rows.
      start: where each row's text begins; what stands before is padding on the left.
      max_length: of the cache.
    """
    kv_index = jnp.broadcast_to(jnp.arange(max_length, dtype=jnp.int32), (start.shape[0], max_length))

    def attend_to_cache(call: AttentionCall, state: Cache, tokens: TokenInfo):
        state = Cache(
            lax.dynamic_update_slice_in_dim(state.key, call.k.astype(state.key.dtype), index, axis=1),
            lax.dynamic_update_slice_in_dim(state.value, call.v.astype(state.value.dtype), index, axis=1),
        )
        q_index = jnp.broadcast_to(index + jnp.arange(call.q.shape[1], dtype=jnp.int32), call.q.shape[:2])
        positions = q_index - start[:, None], kv_index - start[:, None]
        segment_ids = tuple((side >= 0).astype(jnp.int32) for side in positions)
        call = call.replace(k=state.key, v=state.value, segment_ids=segment_ids, positions=positions)
        # The backend that the configuration names is for training; a step of decoding has a single query.
        return attend(call.replace(backend="auto"))[0], state

    return attend_to_cache

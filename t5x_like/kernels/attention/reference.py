"""Attention written plainly: what the other backends must agree with. Memory grows with q_length * kv_length."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from t5x_like.kernels.attention.biases import position_bias
from t5x_like.kernels.attention.call import AttentionCall
from t5x_like.kernels.attention.flash import NAME
from t5x_like.kernels.attention.logits import MASK_VALUE, attention_logits
from t5x_like.kernels.attention.masks import allowed
from t5x_like.kernels.randomness import keep


def reference_attention(
    call: AttentionCall,
) -> tuple[Float[Array, "batch q_length heads v_dim"], Float[Array, "batch q_length heads"] | None]:
    """Attention with a float32 softmax (Vaswani et al. 2017, section 3.2). See `attention` for the arguments.

    Heads come first, and the query heads that share a key head are folded into the query length. So keys and values
    are never repeated, and every array has four dimensions: with a fifth for the groups, or with einsums straight on
    [batch, length, heads, head_dim], XLA needs up to 2.5 times as long on CPU.
    """
    batch, num_heads, q_length, _ = call.scores
    num_kv_heads = call.k.shape[2]
    group = num_heads // num_kv_heads
    q, k, v = (array.swapaxes(1, 2) for array in (call.q, call.k, call.v))
    q = q.reshape(batch, num_kv_heads, group * q_length, -1)

    mask = allowed(call.mask, _fold(call.each_position, group), _fold(call.segment_ids, group))[:, None]
    products = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)
    logits = attention_logits(products, mask, _bias(call), scale=call.scale, soft_cap=call.soft_cap)
    if call.sinks is not None:  # one more key, with a logit of its own and no value
        sinks = jnp.repeat(call.sinks.astype(jnp.float32), q_length).reshape(1, num_kv_heads, -1, 1)
        logits = jnp.concatenate([logits, jnp.broadcast_to(sinks, (*logits.shape[:3], 1))], axis=-1)
    weights = _softmax(logits)[..., : k.shape[2]]
    if call.dropout_rate:
        kept = keep(call.dropout_key, call.dropout_rate, weights.shape)
        weights = jnp.where(kept, weights / (1 - call.dropout_rate), 0)

    out = jnp.einsum("bkts,bksh->bkth", weights.astype(v.dtype), v)
    out = checkpoint_name(out.reshape(batch, num_heads, q_length, -1).swapaxes(1, 2), NAME)
    if not call.return_lse:
        return out, None
    lse = jax.nn.logsumexp(logits, axis=-1)  # MASK_VALUE, to the last bit, in a row without allowed keys
    return out, lse.reshape(batch, num_heads, q_length).swapaxes(1, 2)


def _fold(pair: tuple[Array, Array] | None, group: int) -> tuple[Array, Array] | None:
    """Repeats what belongs to the queries for each query head of a group."""
    return pair if pair is None or group == 1 else (jnp.tile(pair[0], (1, group)), pair[1])


def _bias(call: AttentionCall) -> Float[Array, "#batch kv_heads group_q_length #kv_length"] | None:
    """All biases together, the query heads of a key head folded into the query length."""
    bias = position_bias(call.relative_bias, call.table, call.alibi_slopes, call.each_position)
    if call.bias is not None:
        general = call.bias.astype(jnp.float32)
        bias = general if bias is None else bias + general
    if bias is None:
        return None
    _, num_heads, q_length, _ = call.scores
    bias = jnp.broadcast_to(bias, (bias.shape[0], num_heads, q_length, bias.shape[3]))
    return bias.reshape(bias.shape[0], call.k.shape[2], -1, bias.shape[3])


@jax.custom_vjp
def _softmax(logits: Float[Array, "... kv_length"]) -> Float[Array, "... kv_length"]:
    """Softmax over the keys; all zero, with zero gradients, where no key is allowed.

    The maximum is held above MASK_VALUE: in a row without allowed keys every exponential is then exactly 0. The
    gradient needs the weights alone; derived automatically, it would keep and pass over several arrays of their size.
    """
    largest = jnp.maximum(logits.max(axis=-1, keepdims=True), MASK_VALUE / 2)
    exponentials = jnp.exp(logits - largest)
    total = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / jnp.where(total == 0, 1, total)


def _softmax_forward(logits):
    weights = _softmax(logits)
    return weights, weights


def _softmax_backward(weights, gradient):
    return (weights * (gradient - jnp.sum(weights * gradient, axis=-1, keepdims=True)),)


_softmax.defvjp(_softmax_forward, _softmax_backward)

"""Attention by NVIDIA's cuDNN, through `jax.nn.dot_product_attention`."""

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from t5x_like.kernels.attention.call import AttentionCall
from t5x_like.kernels.attention.flash import NAME


def cudnn_attention(call: AttentionCall) -> tuple[Float[Array, "batch q_length heads head_dim"], None]:
    """Attention by cuDNN; what it is not able to do, `capabilities.cudnn_refusal` has refused."""
    before, _ = call.mask.window  # keys after the query are hidden already
    o = jax.nn.dot_product_attention(
        call.q,
        call.k,
        call.v,
        bias=call.bias,
        scale=call.scale,
        is_causal=call.mask.causal,
        local_window_size=None if before is None else (before, 0),
        implementation="cudnn",
    )
    return checkpoint_name(o, NAME), None

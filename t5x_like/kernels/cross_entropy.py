"""Losses on the logits of a linear head, without storing the logits of all tokens.

With a vocabulary of 128k the float32 logits of one batch outweigh the rest of the model's activations. Here a scan
takes a chunk of tokens at a time: its logits, its loss, and at once its gradients with respect to `x` and `head`,
which are all that the backward pass needs. So no logits are kept and none are computed twice. Without
differentiation (evaluation) the same scan computes the loss alone.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from t5x_like.errors import UserError
from t5x_like.kernels.varying import vary_alike


class LossSums(NamedTuple):
    """Sums over tokens, each times its weight: float32 scalars. Divide by the global weight sum to get means.

    Attributes:
      objective: what to minimise, `loss + z_loss`. The only field that carries a gradient.
      loss: the loss itself, with label smoothing and without z-loss.
      z_loss: the penalty on the log-sum-exp of the logits, times its coefficient.
      weight: the weights.
      correct: tokens whose label has a greater logit than every other entry of the vocabulary.
    """

    objective: Float[Array, ""]
    loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]


class _TokenLosses(NamedTuple):
    """What a loss says of each token's logits."""

    loss: Float[Array, "tokens"]
    z_loss: Float[Array, "tokens"]
    gradient: Float[Array, "tokens vocab"]  # of loss + z_loss with respect to the logits


_LogitsLoss = Callable[[Float[Array, "tokens vocab"], Array], _TokenLosses]
"""Maps float32 logits and the booleans `is_label`, both [tokens, vocab], to the losses of the tokens."""


def cross_entropy(
    x: Float[Array, "tokens embed"],
    head: Float[Array, "vocab embed"],
    labels: Int[Array, "tokens"],
    weights: Float[Array, "tokens"],
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    soft_cap: float | None = None,
    chunk_size: int = 2048,
) -> LossSums:
    """Softmax cross-entropy of the logits `x @ head.T`, in nats.

    Products run in the dtype of `x` and accumulate in float32; so does the gradient of `head`, which may itself be
    float32 beside a bfloat16 `x`. Everything on logits is float32. Inside `jax.shard_map` the sums are those of the
    device's own tokens: reduce them with `lax.psum`.

    Args:
      x: final hidden states.
      head: output embedding.
      labels: entries of the vocabulary. Any integer will do where the weight is 0.
      weights: one per token; 0 leaves the token out. Neither weights nor labels receive a gradient.
      z_loss: coefficient of logsumexp(logits)^2 (PaLM, Chowdhery et al. 2022, section 5).
      label_smoothing: probability taken from the label and spread evenly over the whole vocabulary (Szegedy et al.
        2016, section 7). The loss of a perfect prediction is then the entropy of that target, not 0.
      soft_cap: the logits become `soft_cap * tanh(logits / soft_cap)` (Gemma 2, section 2).
      chunk_size: most tokens whose logits exist at a time; memory is chunk_size * vocab, whatever the tokens.
    """
    loss_of_logits = partial(_cross_entropy_of_logits, z_loss=z_loss, label_smoothing=label_smoothing)
    return _linear_loss(loss_of_logits, x, head, labels, weights, soft_cap=soft_cap, chunk_size=chunk_size)


def squared_error(
    x: Float[Array, "tokens embed"],
    head: Float[Array, "vocab embed"],
    labels: Int[Array, "tokens"],
    weights: Float[Array, "tokens"],
    *,
    label_weight: float = 1.0,
    label_value: float = 1.0,
    chunk_size: int = 2048,
) -> LossSums:
    """Square loss of the logits `x @ head.T` against one-hot labels, averaged over the vocabulary.

    Hui & Belkin, "Evaluation of neural architectures trained with square loss vs cross-entropy", ICLR 2021, section 3.

    Args:
      x: final hidden states.
      head: output embedding.
      labels: entries of the vocabulary.
      weights: one per token.
      label_weight: the paper's k, weight of the label's own term; above 1 for large vocabularies.
      label_value: the paper's M, the logit that the label should have; the others should have 0.
      chunk_size: most tokens whose logits exist at a time.
    """
    loss_of_logits = partial(_squared_error_of_logits, label_weight=label_weight, label_value=label_value)
    return _linear_loss(loss_of_logits, x, head, labels, weights, soft_cap=None, chunk_size=chunk_size)


def mean_squared_error(
    predictions: Float[Array, "tokens *features"],
    targets: Float[Array, "tokens *features"],
    weights: Float[Array, "tokens"],
) -> LossSums:
    """Squared error of a regression head, averaged over each token's features. Nothing counts as `correct`."""
    square = jnp.square(predictions.astype(jnp.float32) - targets.astype(jnp.float32))
    objective = jnp.sum(square.reshape(len(weights), -1).mean(axis=1) * lax.stop_gradient(weights))
    zero = jnp.zeros((), jnp.float32)
    return LossSums(objective, lax.stop_gradient(objective), zero, lax.stop_gradient(weights.sum()), zero)


def _cross_entropy_of_logits(logits, is_label, *, z_loss: float, label_smoothing: float) -> _TokenLosses:
    largest = logits.max(axis=1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    total = exponentials.sum(axis=1, keepdims=True)
    log_sum_exp = (jnp.log(total) + largest)[:, 0]

    expected_logit = jnp.sum(jnp.where(is_label, logits, 0), axis=1)
    target = is_label.astype(jnp.float32)
    if label_smoothing:
        expected_logit = (1 - label_smoothing) * expected_logit + label_smoothing * logits.mean(axis=1)
        target = (1 - label_smoothing) * target + label_smoothing / logits.shape[1]
    gradient = exponentials * ((1 + 2 * z_loss * log_sum_exp)[:, None] / total) - target
    return _TokenLosses(log_sum_exp - expected_logit, z_loss * jnp.square(log_sum_exp), gradient)


def _squared_error_of_logits(logits, is_label, *, label_weight: float, label_value: float) -> _TokenLosses:
    error = jnp.where(is_label, logits - label_value, logits)
    scale = jnp.where(is_label, label_weight, 1.0) / logits.shape[1]
    return _TokenLosses(jnp.sum(scale * jnp.square(error), axis=1), jnp.zeros(len(logits)), 2 * scale * error)


def _linear_loss(loss_of_logits: _LogitsLoss, x, head, labels, weights, *, soft_cap, chunk_size: int) -> LossSums:
    if chunk_size < 1:
        raise UserError(f"The loss cannot take {chunk_size} tokens at a time: set chunk_size to 1 or more.")
    # Tokens are spread as evenly as possible, so that a last chunk is never mostly padding.
    num_chunks = max(1, -(-len(x) // chunk_size))
    sums_and_gradients = partial(_scan_chunks, loss_of_logits, soft_cap, num_chunks)

    @jax.custom_vjp
    def sums(x, head, labels, weights):
        return sums_and_gradients(x, head, labels, weights, differentiate=False)[0]

    def forward(x, head, labels, weights):
        return sums_and_gradients(x, head, labels, weights, differentiate=True)

    def backward(gradients, cotangents):
        dx, dhead = (
            (cotangents.objective * gradient.astype(jnp.float32)).astype(gradient.dtype) for gradient in gradients
        )
        return dx, dhead, None, None

    sums.defvjp(forward, backward)
    return sums(*vary_alike(x, head, labels, weights.astype(jnp.float32)))


def _scan_chunks(loss_of_logits, soft_cap, num_chunks, x, head, labels, weights, *, differentiate):
    """The sums over all tokens, and (dx, dhead), or None without `differentiate`."""
    one_chunk = partial(_one_chunk, loss_of_logits, soft_cap, head.astype(x.dtype), differentiate=differentiate)
    if num_chunks == 1:
        sums, gradients = one_chunk(x, labels, weights)
        return sums, (gradients[0], gradients[1].astype(head.dtype)) if differentiate else None

    def step(carry, chunk):
        sums, dhead = carry
        chunk_sums, gradients = one_chunk(*chunk)
        sums = jax.tree.map(jnp.add, sums, chunk_sums)
        if not differentiate:
            return (sums, dhead), None
        return (sums, dhead + gradients[1]), gradients[0]

    size = -(-len(x) // num_chunks)
    chunks = [_split(array, num_chunks, size) for array in (x, labels, weights)]
    zeros = LossSums(*[jnp.zeros((), jnp.float32)] * len(LossSums._fields))
    dhead = jnp.zeros(head.shape, jnp.float32) if differentiate else None
    # In a shard_map the carry must vary over the same mesh axes as what is added to it.
    carry = jax.tree.map(lambda zero: vary_alike(zero, x)[0], (zeros, dhead))
    (sums, dhead), dx = lax.scan(step, carry, chunks)
    if not differentiate:
        return sums, None
    return sums, (dx.reshape(-1, x.shape[1])[: len(x)], dhead.astype(head.dtype))


def _one_chunk(loss_of_logits: _LogitsLoss, soft_cap, head, x, labels, weights, *, differentiate: bool):
    """The sums over one chunk of tokens, and (dx in the dtype of x, dhead in float32), or None."""
    logits = jnp.einsum("td,vd->tv", x, head, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    # A comparison, not a gather: it stays local where the vocabulary is sharded.
    is_label = labels[:, None] == lax.broadcasted_iota(labels.dtype, logits.shape, 1)
    token = loss_of_logits(logits, is_label)
    label_logit = jnp.sum(jnp.where(is_label, logits, 0), axis=1)
    correct = jnp.sum(logits >= label_logit[:, None], axis=1) == 1
    loss, z_loss = jnp.sum(token.loss * weights), jnp.sum(token.z_loss * weights)
    sums = LossSums(loss + z_loss, loss, z_loss, jnp.sum(weights), jnp.sum(correct * weights))
    if not differentiate:
        return sums, None

    dlogits = token.gradient * weights[:, None]
    if soft_cap is not None:
        dlogits *= 1 - jnp.square(logits / soft_cap)
    dlogits = dlogits.astype(x.dtype)
    dx = jnp.einsum("tv,vd->td", dlogits, head, preferred_element_type=jnp.float32).astype(x.dtype)
    dhead = jnp.einsum("tv,td->vd", dlogits, x, preferred_element_type=jnp.float32)
    return sums, (dx, dhead)


def _split(array: Array, num_chunks: int, size: int) -> Array:
    """Cuts the first dimension into chunks; the padding at the end is 0, so its weight is 0 too."""
    padding = [(0, num_chunks * size - len(array))] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, padding).reshape(num_chunks, size, *array.shape[1:])

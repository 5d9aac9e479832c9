"""Losses on the logits of a linear head, without storing the logits of all tokens.

With a vocabulary of 128k the float32 logits of one batch outweigh the rest of the model's activations. Here a scan
takes a chunk of tokens at a time: its logits, its loss, and at once its gradients with respect to `x` and `head`,
which are all that the backward pass needs. So no logits are kept and none are computed twice. Without
differentiation (evaluation) the same scan computes the loss alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from t5x_like.errors import UserError
from t5x_like.kernels.varying import axes_varied, vary_over, zeros_varying_like


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
    correct: Bool[Array, "tokens"]


@dataclass(frozen=True)
class _Vocabulary:
    """The entries that a device has the logits of: all, or an equal share each of the devices along a mesh axis."""

    axis: str | None

    def size(self, logits: Float[Array, "tokens vocab"]) -> int:
        return logits.shape[1] * (1 if self.axis is None else lax.axis_size(self.axis))

    def is_label(
        self, labels: Int[Array, "tokens"], logits: Float[Array, "tokens vocab"]
    ) -> Bool[Array, "tokens vocab"]:
        """A comparison, not a gather, so that each device looks among its own entries."""
        entries = lax.broadcasted_iota(labels.dtype, logits.shape, 1)
        if self.axis is not None:
            entries += (lax.axis_index(self.axis) * logits.shape[1]).astype(labels.dtype)
        return labels[:, None] == entries

    def largest(self, logits: Float[Array, "tokens vocab"]) -> Float[Array, "tokens 1"]:
        largest = logits.max(axis=1, keepdims=True)
        return largest if self.axis is None else lax.pmax(largest, self.axis)

    def sums(self, *terms: Float[Array, "tokens vocab"] | Bool[Array, "tokens vocab"]) -> list[Float[Array, "tokens"]]:
        """Each term summed over the vocabulary."""
        sums = [term.sum(axis=1, dtype=jnp.float32) for term in terms]
        return sums if self.axis is None else list(lax.psum(jnp.stack(sums), self.axis))


_LogitsLoss = Callable[[_Vocabulary, Float[Array, "tokens vocab"], Array], _TokenLosses]
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
    vocab_axis: str | None = None,
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
      vocab_axis: inside `jax.shard_map`, a mesh axis along which each device has an equal share of the vocabulary, in
        order, as its `head`, and all have the same tokens. Two numbers per token and sum pass between them, and the
        gradient of `x`.
    """
    loss_of_logits = partial(_cross_entropy_of_logits, z_loss=z_loss, label_smoothing=label_smoothing)
    return _linear_loss(
        loss_of_logits, x, head, labels, weights, soft_cap=soft_cap, chunk_size=chunk_size, vocab_axis=vocab_axis
    )


def squared_error(
    x: Float[Array, "tokens embed"],
    head: Float[Array, "vocab embed"],
    labels: Int[Array, "tokens"],
    weights: Float[Array, "tokens"],
    *,
    label_weight: float = 1.0,
    label_value: float = 1.0,
    chunk_size: int = 2048,
    vocab_axis: str | None = None,
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
      vocab_axis: as in `cross_entropy`.
    """
    loss_of_logits = partial(_squared_error_of_logits, label_weight=label_weight, label_value=label_value)
    return _linear_loss(
        loss_of_logits, x, head, labels, weights, soft_cap=None, chunk_size=chunk_size, vocab_axis=vocab_axis
    )


def _cross_entropy_of_logits(
    vocabulary: _Vocabulary, logits, is_label, *, z_loss: float, label_smoothing: float
) -> _TokenLosses:
    largest = vocabulary.largest(logits)
    exponentials = jnp.exp(logits - largest)
    label_logits = jnp.where(is_label, logits, 0)
    terms = (exponentials, label_logits, logits == largest) + ((logits,) if label_smoothing else ())
    total, label_logit, num_largest, *all_logits = vocabulary.sums(*terms)
    log_sum_exp = jnp.log(total) + largest[:, 0]

    expected_logit, target = label_logit, is_label.astype(jnp.float32)
    if label_smoothing:
        even = label_smoothing / vocabulary.size(logits)
        expected_logit = (1 - label_smoothing) * label_logit + even * all_logits[0]
        target = (1 - label_smoothing) * target + even
    gradient = exponentials * ((1 + 2 * z_loss * log_sum_exp) / total)[:, None] - target
    correct = (label_logit == largest[:, 0]) & (num_largest == 1)
    return _TokenLosses(log_sum_exp - expected_logit, z_loss * jnp.square(log_sum_exp), gradient, correct)


def _squared_error_of_logits(
    vocabulary: _Vocabulary, logits, is_label, *, label_weight: float, label_value: float
) -> _TokenLosses:
    largest = vocabulary.largest(logits)
    error = jnp.where(is_label, logits - label_value, logits)
    scale = jnp.where(is_label, label_weight, 1.0) / vocabulary.size(logits)
    label_logits = jnp.where(is_label, logits, 0)
    loss, label_logit, num_largest = vocabulary.sums(scale * jnp.square(error), label_logits, logits == largest)
    correct = (label_logit == largest[:, 0]) & (num_largest == 1)
    return _TokenLosses(loss, jnp.zeros_like(loss), 2 * scale * error, correct)


def _linear_loss(
    loss_of_logits: _LogitsLoss, x, head, labels, weights, *, soft_cap, chunk_size: int, vocab_axis: str | None
) -> LossSums:
    if chunk_size < 1:
        raise UserError(f"The loss cannot take {chunk_size} tokens at a time: set chunk_size to 1 or more.")
    # Tokens are spread as evenly as possible, so that a last chunk is never mostly padding.
    num_chunks = max(1, -(-len(x) // chunk_size))
    sums_and_gradients = partial(_scan_chunks, loss_of_logits, _Vocabulary(vocab_axis), soft_cap, num_chunks)

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
    weights = weights.astype(jnp.float32)
    # The devices of the vocabulary's axis have one loss together, and each a part of the gradient of x.
    axes = axes_varied((x, head, labels, weights)) - {vocab_axis}
    head_axes = axes | ({vocab_axis} if vocab_axis else set())
    labels, weights = vary_over(labels, axes), vary_over(weights, axes)
    return sums(vary_over(x, head_axes), vary_over(head, head_axes), labels, weights)


def _scan_chunks(loss_of_logits, vocabulary, soft_cap, num_chunks, x, head, labels, weights, *, differentiate):
    """The sums over all tokens, and (dx, dhead), or None without `differentiate`."""
    one_chunk = partial(
        _one_chunk, loss_of_logits, vocabulary, soft_cap, head.astype(x.dtype), differentiate=differentiate
    )
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
    # In a shard_map the carry must vary over the same mesh axes as what is added to it.
    zeros = jax.tree.map(lambda zero: vary_over(zero, axes_varied((weights,))), zeros)
    dhead = zeros_varying_like(head.shape, jnp.float32, (x, head)) if differentiate else None
    (sums, dhead), dx = lax.scan(step, (zeros, dhead), chunks)
    if not differentiate:
        return sums, None
    return sums, (dx.reshape(-1, x.shape[1])[: len(x)], dhead.astype(head.dtype))


def _one_chunk(
    loss_of_logits: _LogitsLoss, vocabulary: _Vocabulary, soft_cap, head, x, labels, weights, *, differentiate: bool
):
    """The sums over one chunk of tokens, and (dx in the dtype of x, dhead in float32), or None."""
    logits = jnp.einsum("td,vd->tv", x, head, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    token = loss_of_logits(vocabulary, logits, vocabulary.is_label(labels, logits))
    loss, z_loss = jnp.sum(token.loss * weights), jnp.sum(token.z_loss * weights)
    sums = LossSums(loss + z_loss, loss, z_loss, jnp.sum(weights), jnp.sum(token.correct * weights))
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

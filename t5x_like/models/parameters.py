"""Parameters: the few NNX calls, initializers, and the linear layer everything is made of."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.sharding.logical import length_is_split

Module = nnx.Module
ModuleDict = nnx.Dict
GraphDef = nnx.GraphDef
Params = dict[str, Any]
"""Nested dict of arrays: the parameters of a module, by attribute name."""
Axes = tuple[str, ...]
"""Logical name of every dim of an array, e.g. `("embed", "mlp")`."""
Initializer = Callable[[PRNGKeyArray, tuple[int, ...], int, int], Array]
"""(key, shape, fan_in, fan_out) -> float32 array."""


class Initializers(NamedTuple):
    """How the projections of a block start.

    Attributes:
      kernel: those that neither `inner` nor `out` is for.
      inner: the values of attention and the first layers of feed-forward networks.
      out: those that write into the residual stream.
    """

    kernel: Initializer
    inner: Initializer
    out: Initializer


def parameter(value: Array, axes: Axes) -> nnx.Param:
    """A trainable array together with the logical names of its dims."""
    return nnx.Param(value, axes=axes)


def split(module: Module) -> tuple[GraphDef, Params]:
    """Separates a module into its static structure and its parameters."""
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: GraphDef, params: Params) -> Module:
    """Inverse of `split`; cheap enough to stand inside a traced function."""
    return nnx.merge(graphdef, params)


def logical_axes(module: Module) -> Params:
    """The tree of `split(module)[1]` with each array replaced by its logical axes."""
    state = nnx.state(module)
    return nnx.to_pure_dict(jax.tree.map(lambda p: p.axes, state, is_leaf=lambda p: isinstance(p, nnx.Variable)))


def stack_modules(build: Callable[[PRNGKeyArray], Module], keys: Key[Array, "layers"]) -> Module:
    """One module whose parameters are those of `build(key)` for every key, stacked on a leading `layers` dim."""
    graphdef, state = nnx.split(jax.vmap(build)(keys))
    is_parameter = lambda p: isinstance(p, nnx.Variable)
    named = jax.tree.map(lambda p: parameter(p[...], ("layers", *p.axes)), state, is_leaf=is_parameter)
    return nnx.merge(graphdef, named)


@configurable
class InitializerConfig:
    """How weights start.

    Attributes:
      kind: distribution. `normal` and `truncated_normal` (cut at two standard deviations) use `stddev`; the others
        derive the scale from fan-in and fan-out: Xavier (Glorot & Bengio 2010), He (He et al. 2015), LeCun (1998).
      stddev: standard deviation of `normal` and `truncated_normal`.
    """

    kind: Literal[
        "normal", "truncated_normal", "xavier_normal", "xavier_uniform", "he_normal", "he_uniform", "lecun_normal"
    ] = "normal"
    stddev: float = 0.02

    def __post_init__(self):
        if self.stddev <= 0:
            raise UserError(f"InitializerConfig.stddev is {self.stddev}: it must be positive.")

    def build(self, *, scale: float = 1.0) -> Initializer:
        """The sampling function, its standard deviation multiplied by `scale`."""
        return lambda key, shape, fan_in, fan_out: scale * self._sample(key, shape, fan_in, fan_out)

    def _sample(self, key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Float[Array, "..."]:
        match self.kind:
            case "normal":
                return self.stddev * jax.random.normal(key, shape)
            case "truncated_normal":
                return self.stddev * jax.random.truncated_normal(key, -2, 2, shape)
            case "xavier_normal":
                return math.sqrt(2 / (fan_in + fan_out)) * jax.random.normal(key, shape)
            case "xavier_uniform":
                limit = math.sqrt(6 / (fan_in + fan_out))
                return jax.random.uniform(key, shape, minval=-limit, maxval=limit)
            case "he_normal":
                return math.sqrt(2 / fan_in) * jax.random.normal(key, shape)
            case "he_uniform":
                limit = math.sqrt(6 / fan_in)
                return jax.random.uniform(key, shape, minval=-limit, maxval=limit)
            case "lecun_normal":
                return math.sqrt(1 / fan_in) * jax.random.normal(key, shape)


class Linear(Module):
    """`y = x @ kernel + bias`, contracting the last `len(in_dims)` dims of x.

    kernel: `in_dims + out_dims`; bias: `out_dims`.
    """

    def __init__(
        self,
        in_dims: dict[str, int],
        out_dims: dict[str, int],
        *,
        init: Initializer,
        use_bias: bool,
        dtype: jnp.dtype,
        key: PRNGKeyArray,
    ):
        shape = (*in_dims.values(), *out_dims.values())
        fan_in, fan_out = math.prod(in_dims.values()), math.prod(out_dims.values())
        self.kernel = parameter(init(key, shape, fan_in, fan_out), (*in_dims, *out_dims))
        self.bias = parameter(jnp.zeros(tuple(out_dims.values())), tuple(out_dims)) if use_bias else None
        self.num_in_dims = len(in_dims)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "batch length *in"]) -> Float[Array, "batch length *out"]:
        kernel = self.kernel[...].astype(self.dtype)
        out_shape = kernel.shape[self.num_in_dims :]
        kernel = kernel.reshape(math.prod(kernel.shape[: self.num_in_dims]), -1)
        # One two-dimensional product: XLA:CPU runs the gradient of a [batch, length, embed] product half as fast. But a
        # dim that is split must stay itself, or it would be gathered.
        rows = x.shape[: x.ndim - self.num_in_dims] if length_is_split() else (-1,)
        y = x.astype(self.dtype).reshape(*rows, kernel.shape[0]) @ kernel
        y = y.reshape(*x.shape[: x.ndim - self.num_in_dims], *out_shape)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)

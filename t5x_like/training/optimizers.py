"""Optimizers: one choice of algorithm, one of schedule, and what is done to the gradient before them.

One update is, in this order:

    gradient  + gradients of the L1 and L2 penalties
              clipped to the global norm
              turned into a direction by the algorithm (Adam, Lion, Muon, ...)
              + weight_decay * parameter                    (decoupled: Loshchilov and Hutter 2019)
              * -learning_rate(number of updates made)

Its state is optax's: a plain pytree that counts its own updates, so a restored state continues exactly.
"""

import abc
import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.training import parameter_layouts
from t5x_like.training.schedules import Schedule


class Algorithm(abc.ABC):
    """What turns gradients into updates.

    Attributes:
      weight_decay: see `WeightDecay`; 0 for algorithms without.
    """

    weight_decay: float = 0.0

    @abc.abstractmethod
    def direction(self, layouts: Any) -> optax.GradientTransformation:
        """Returns the transformation of gradients into updates of learning rate -1, without weight decay.

        Args:
          layouts: tree like the parameters of `parameter_layouts.Layout`: where the matrices are.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightDecay(Algorithm):
    """An algorithm with decoupled weight decay.

    Attributes:
      weight_decay: share of a parameter, times the learning rate, that is taken away in every step;
        `OptimizerConfig.weight_decay_mask` says of which parameters.
    """

    weight_decay: float = 0.1


def _check(config, *, shares: tuple[str, ...] = (), not_negative: tuple[str, ...] = ()) -> None:
    """Refuses named fields out of [0, 1) (`shares`) or below 0; None passes."""
    for fields, limit, text in ((shares, 1.0, "in [0, 1)"), (not_negative, float("inf"), "0 or more")):
        for field in fields:
            value = getattr(config, field)
            if value is not None and not 0 <= value < limit:
                raise UserError(f"{type(config).__name__}.{field} must be {text}, not {value}.")


@configurable
class AdamWConfig(WeightDecay):
    """AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    Attributes:
      b1: decay of the average of gradients.
      b2: decay of the average of squared gradients.
      eps: added to the root of the average of squares.
      parameter_scale: multiply each update by its parameter's root mean square (at least 1e-3), as Adafactor does;
        learning rates are then relative (about 1e-2), and T5 trains stably (Nawrot 2023, nanoT5, section 3).
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    parameter_scale: bool = False

    def __post_init__(self):
        _check(self, shares=("b1", "b2"), not_negative=("eps", "weight_decay"))

    def direction(self, layouts: Any) -> optax.GradientTransformation:
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        return optax.chain(adam, parameter_layouts.scale_by_parameter(layouts)) if self.parameter_scale else adam


@configurable
class AdamConfig(Algorithm):
    """Adam (Kingma and Ba 2015).

    Attributes:
      b1: decay of the average of gradients.
      b2: decay of the average of squared gradients.
      eps: added to the root of the average of squares.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self):
        _check(self, shares=("b1", "b2"), not_negative=("eps",))

    def direction(self, layouts: Any) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@configurable
class AdafactorConfig(WeightDecay):
    """Adafactor (Shazeer and Stern 2018, algorithm 4), T5's optimizer: no first moment, a factored second one.

    Every matrix of a stack of layers or experts, and every projection to or from heads, counts as one matrix.

    Attributes:
      decay_rate: the second moment decays by `1 - t ** -decay_rate` at the t-th update.
      clip_rms: largest root mean square of a parameter's update before the learning rate; None for no limit.
      parameter_scale: multiply each update by the parameter's root mean square (at least 1e-3); learning rates are then
        relative (about 1e-2).
      min_dim_size_to_factor: matrices with fewer rows or columns keep their whole second moment.
    """

    decay_rate: float = 0.8
    clip_rms: float | None = 1.0
    parameter_scale: bool = True
    min_dim_size_to_factor: int = 128
    weight_decay: float = 0.0

    def __post_init__(self):
        _check(self, not_negative=("decay_rate", "weight_decay", "min_dim_size_to_factor"))
        if self.clip_rms is not None and not self.clip_rms > 0:
            raise UserError(f"AdafactorConfig.clip_rms must be positive or None, not {self.clip_rms}.")

    def direction(self, layouts: Any) -> optax.GradientTransformation:
        parts = [
            parameter_layouts.scale_by_factored_moment(
                layouts, decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_dim_size_to_factor
            )
        ]
        if self.clip_rms is not None:
            parts.append(parameter_layouts.clip_by_root_mean_square(layouts, self.clip_rms))
        if self.parameter_scale:
            parts.append(parameter_layouts.scale_by_parameter(layouts))
        return optax.chain(*parts)


@configurable
class SGDConfig(Algorithm):
    """Gradient descent. For weight decay use `OptimizerConfig.l2_penalty`.

    Attributes:
      momentum: decay of the sum of gradients that is followed; 0 follows the gradient itself.
      nesterov: look one step ahead; needs momentum.
    """

    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self):
        _check(self, shares=("momentum",))
        if self.nesterov and not self.momentum:
            raise UserError("SGDConfig.nesterov needs a momentum above 0: set SGDConfig.momentum, for example to 0.9.")

    def direction(self, layouts: Any) -> optax.GradientTransformation:
        return optax.trace(self.momentum, self.nesterov) if self.momentum else optax.identity()


@configurable
class RMSPropConfig(Algorithm):
    """RMSProp (Hinton 2012), as PyTorch has it.

    Attributes:
      decay: of the average of squared gradients.
      eps: added to the root of that average.
      momentum: decay of the sum of scaled gradients that is followed; 0 for none.
    """

    decay: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0

    def __post_init__(self):
        _check(self, shares=("decay", "momentum"), not_negative=("eps",))

    def direction(self, layouts: Any) -> optax.GradientTransformation:
        rms = optax.scale_by_rms(self.decay, self.eps, eps_in_sqrt=False)
        return optax.chain(rms, optax.trace(self.momentum)) if self.momentum else rms


@configurable
class LionConfig(WeightDecay):
    """Lion (Chen et al. 2023): the sign of a momentum. Learning rates are 3 to 10 times smaller than AdamW's.

    Attributes:
      b1: weight of the momentum against the gradient in the update.
      b2: decay of the momentum.
    """

    b1: float = 0.9
    b2: float = 0.99

    def __post_init__(self):
        _check(self, shares=("b1", "b2"), not_negative=("weight_decay",))

    def direction(self, layouts: Any) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2)


@configurable
class MuonConfig(WeightDecay):
    """Muon (Jordan 2024) for the matrices inside layers, Adam for embeddings, output head and vectors.

    Momenta of matrices are orthogonalized and scaled by `0.2 * sqrt(max(rows, columns))`, which gives them the root
    mean square of AdamW's updates, so that one learning rate, AdamW's, serves both (Liu et al. 2025, section 2.2).
    Every matrix of a stack of layers or experts, and every projection to or from heads, counts as one matrix.

    Attributes:
      momentum: decay of the average of gradients that is orthogonalized.
      nesterov: look one step ahead.
      num_iterations: Newton-Schulz iterations.
      b1: Adam's decay of the average of gradients.
      b2: Adam's decay of the average of squared gradients.
      eps: Adam's addition to the root of the average of squares.
    """

    momentum: float = 0.95
    nesterov: bool = True
    num_iterations: int = 5
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self):
        _check(self, shares=("momentum", "b1", "b2"), not_negative=("num_iterations", "eps", "weight_decay"))

    def direction(self, layouts: Any) -> optax.GradientTransformation:
        labels = jax.tree.map(lambda layout: "muon" if _is_hidden_matrix(layout) else "adam", layouts)
        dims = jax.tree.map(_muon_dims, layouts)
        muon = scale_by_muon(
            ns_steps=self.num_iterations, beta=self.momentum, nesterov=self.nesterov, weight_dimension_numbers=dims
        )
        scale = optax.stateless(lambda updates, params: jax.tree.map(_scale_like_adam, updates, dims))
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        return optax.partition({"muon": optax.chain(muon, scale), "adam": adam}, labels)


def _is_hidden_matrix(layout: parameter_layouts.Layout) -> bool:
    return layout.is_matrix and not {"vocab", "position"} & set(layout.axes)


def _muon_dims(layout: parameter_layouts.Layout) -> MuonDimensionNumbers | optax.MaskedNode:
    """Returns the dims of a matrix's rows and columns, or optax's mark for parameters that Muon leaves out."""
    if not _is_hidden_matrix(layout):
        return optax.MaskedNode()
    rows = layout.split - layout.stack
    return MuonDimensionNumbers(reduction_axis=layout.own_dims[:rows], output_axis=layout.own_dims[rows:])


def _scale_like_adam(update: Float[Array, "..."], dims: MuonDimensionNumbers) -> Float[Array, "..."]:
    """Returns an orthogonal matrix with the root mean square 0.2 that is usual for AdamW's updates."""
    rows, columns = (math.prod(update.shape[dim] for dim in side) for side in dims)
    return update * (0.2 * math.sqrt(max(rows, columns)))


@configurable
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
      algorithm: what turns gradients into updates.
      schedule: the learning rate over the run.
      weight_decay_mask: which parameters weight decay and the penalties act on: "matrices" leaves out biases, norm
        scales and other vectors; embeddings and position tables count as matrices.
      l1_penalty: adds `l1_penalty * sum(abs(parameter))` to what is minimized, by its gradient: the reported loss does
        not contain it.
      l2_penalty: adds `l2_penalty / 2 * sum(parameter ** 2)` in the same way (not the same as weight decay for
        algorithms that rescale gradients).
      clip_norm: largest norm of all gradients together, penalties included; larger ones are scaled down. None: any.
    """

    algorithm: Algorithm
    schedule: Schedule
    weight_decay_mask: Literal["matrices", "all"] = "matrices"
    l1_penalty: float = 0.0
    l2_penalty: float = 0.0
    clip_norm: float | None = 1.0

    def __post_init__(self):
        _check(self, not_negative=("l1_penalty", "l2_penalty"))
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"OptimizerConfig.clip_norm must be positive or None, not {self.clip_norm}.")
        if self.weight_decay_mask == "all" and not (self.algorithm.weight_decay or self.l1_penalty or self.l2_penalty):
            raise UserError(
                'OptimizerConfig.weight_decay_mask is "all", but nothing decays: set weight decay or a penalty, '
                "or remove the mask."
            )


def build_optimizer(config: OptimizerConfig, axes: Any, num_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of a run of `num_steps` updates.

    Args:
      config: the optimizer's configuration.
      axes: tree like the parameters, whose leaves are tuples of logical axis names, one for each dim.
      num_steps: length of the run, for the schedule.

    Raises:
      UserError: if the schedule does not fit the run.
    """
    layouts = parameter_layouts.layouts_of(axes)
    decays = jax.tree.map(lambda layout: layout.is_matrix or config.weight_decay_mask == "all", layouts)
    parts = []
    if config.l1_penalty or config.l2_penalty:
        parts.append(_add_penalty_gradients(config.l1_penalty, config.l2_penalty, decays))
    if config.clip_norm is not None:
        parts.append(_clip_by_global_norm(config.clip_norm))
    parts.append(config.algorithm.direction(layouts))
    if config.algorithm.weight_decay:
        parts.append(optax.add_decayed_weights(config.algorithm.weight_decay, decays))
    parts.append(optax.scale_by_learning_rate(schedule_of(config, num_steps)))
    return optax.chain(*parts)


def schedule_of(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates made."""
    return config.schedule.build(num_steps)


def _add_penalty_gradients(l1: float, l2: float, mask: Any) -> optax.GradientTransformation:
    def add(update, param, masked):
        return update + l1 * jnp.sign(param) + l2 * param if masked else update

    return optax.stateless(lambda updates, params: jax.tree.map(add, updates, params, mask))


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """As optax's, but with one product per element: AdamW as a whole takes a fifth less time on CPU."""

    def clip(updates, params):
        del params
        scale = jnp.minimum(1.0, max_norm / optax.tree.norm(updates))
        return jax.tree.map(lambda update: update * scale, updates)

    return optax.stateless(clip)


def state_axes(opt_state: Any, axes: Any) -> Any:
    """Returns the logical axis names of every array of an optimizer's state, as a tree like `opt_state`.

    Moments have their parameter's names. A factored moment has the names of its stack and of the first of the merged
    dims of its side. Dims of other arrays (constants; counters have none) are called "other".

    Args:
      opt_state: state of an optimizer of `build_optimizer`; abstract arrays will do.
      axes: tree like the parameters, whose leaves are tuples of logical axis names.
    """
    layouts = dict(jax.tree.leaves_with_path(parameter_layouts.layouts_of(axes)))

    def names(path, x):
        side = path[-1].name if isinstance(path[-1], jax.tree_util.GetAttrKey) else None
        own = path[:-1] if side in parameter_layouts.Factored._fields else path
        # Every state holds its moments in trees like the parameters: a parameter's path ends the path of its moments.
        layout = next((layouts[own[start:]] for start in range(len(own)) if own[start:] in layouts), None)
        if layout is None:
            return ("other",) * x.ndim
        if own is path:
            return layout.axes
        return (*layout.axes[: layout.stack], layout.axes[layout.stack if side == "row" else layout.split])

    return jax.tree.map_with_path(names, opt_state)

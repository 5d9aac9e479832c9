"""From an experiment to everything its training step needs, without making a single parameter."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from t5x_like.data.config import DataConfig
from t5x_like.errors import UserError
from t5x_like.models.model_spec import ModelSpec, model_spec
from t5x_like.models.parameters import Params
from t5x_like.models.token_loss import Batch
from t5x_like.models.transformer import ModelConfig
from t5x_like.runtime.compiler_options import compiler_options
from t5x_like.runtime.malloc import keep_freed_memory
from t5x_like.sharding.experts import check_experts
from t5x_like.sharding.layout import left_whole
from t5x_like.sharding.mesh import describe_mesh
from t5x_like.sharding.placement import RULES, Placement, Rules, is_axes
from t5x_like.training.experiment import Experiment
from t5x_like.training.flops import COUNTING_RULE, active_parameters, flops_per_row, peak_flops_per_second
from t5x_like.training.optimizers import build_optimizer, schedule_of
from t5x_like.training.pipeline_checks import check_stages, describe_stages
from t5x_like.training.state import TrainState, abstract_state, state_factory
from t5x_like.training.step import TrainStep, make_train_step


class Job(NamedTuple):
    """An experiment on a mesh.

    Attributes:
      model: the model's configuration, its vocabulary resolved.
      placement: its mesh, and how the devices share the work.
      spec: structure, shapes and logical axes of the parameters.
      create_state: makes the state of step 0.
      state: shapes and shardings of the state.
      batch: shapes and shardings of a batch.
      train_step: (state, batch) -> (state, metrics), not yet compiled.
      schedule: step -> learning rate.
      xla_profile: see MeshConfig.
      gradient_accumulation: see RunConfig.
    """

    model: ModelConfig
    placement: Placement
    spec: ModelSpec
    create_state: Callable[[], TrainState]
    state: TrainState
    batch: Batch
    train_step: TrainStep
    schedule: optax.Schedule
    xla_profile: str | None = None
    gradient_accumulation: int = 1

    @property
    def mesh(self) -> Mesh:
        """Devices by axis."""
        return self.placement.mesh

    @property
    def num_parameters(self) -> int:
        return sum(array.size for array in jax.tree.leaves(self.spec.params))

    @property
    def num_active_parameters(self) -> int:
        """Parameters that a token uses; fewer than all in a mixture of experts."""
        return active_parameters(self.model, self.spec.params)

    @property
    def row_lengths(self) -> dict[str, int]:
        """Tokens per row, of `encoder` and `decoder` where the model has them."""
        suffix = "_input_tokens"
        return {name.removesuffix(suffix): a.shape[1] for name, a in self.batch.items() if name.endswith(suffix)}

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of a batch, of encoder and decoder, padding included."""
        return next(iter(self.batch.values())).shape[0] * sum(self.row_lengths.values())

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of training on one token; see `training.flops`."""
        lengths = self.row_lengths
        return flops_per_row(self.model, self.spec.params, lengths) / sum(lengths.values())

    def describe(self) -> str:
        flops = f"{self.flops_per_token / 1e6:,.1f} million FLOPs per token"
        active = self.num_active_parameters
        of_which = "" if active == self.num_parameters else f" ({active:,} active)"
        lines = [f"{self.num_parameters:,} parameters{of_which}, {flops}; mesh: {describe_mesh(self.mesh)}"]
        rows = next(iter(self.batch.values())).shape[0]
        lines += describe_stages(self.model, self.mesh.shape, rows, self.row_lengths, self.gradient_accumulation)
        if whole := left_whole(self.state.params, self.mesh):
            lines.append(f"whole on every device, as no axis of the mesh divides them: {'; '.join(whole)}")
        known = peak_flops_per_second(self.mesh.devices.flat[0]) is not None
        return "\n".join([*lines, COUNTING_RULE] if known else lines)


def set_up(experiment: Experiment, mesh: Mesh, vocab_size: int) -> Job:
    """Checks that model, data and mesh fit together, and derives all shapes and shardings.

    Args:
      experiment: the run's configuration.
      mesh: see `sharding.mesh.build_mesh`.
      vocab_size: of the tokenizer.
    """
    check_mesh(experiment, mesh)
    run = experiment.run
    model = with_vocabulary(experiment.model, vocab_size)
    spec = model_spec(model)
    optimizer = build_optimizer(experiment.optimizer, spec.axes, run.steps)
    create = state_factory(model, optimizer, seed=run.seed, use_ema=run.ema_decay is not None)
    schedule = schedule_of(experiment.optimizer, run.steps)
    step = make_train_step(
        model,
        spec.graphdef,
        optimizer,
        schedule,
        run.loss,
        seed=run.seed,
        gradient_accumulation=run.gradient_accumulation,
        ema_decay=run.ema_decay,
        spike_sigmas=run.guard.spike_sigmas,
        norm_axes=spec.axes if run.logging.norms_every_steps else None,
    )
    placement = experiment.mesh.on(mesh)
    check_rules(placement.rules, spec.axes)
    state = abstract_state(create, spec.axes, placement)
    batch = batch_target(experiment.data, placement)
    profile = experiment.mesh.xla_profile
    return Job(model, placement, spec, create, state, batch, step, schedule, profile, run.gradient_accumulation)


def compile_step(job: Job) -> TrainStep:
    """The one compiled program of a run; its state argument is donated, and any other shape is an error."""
    if job.mesh.devices.flat[0].platform == "cpu":
        keep_freed_memory()
    out_shardings = (jax.tree.map(lambda a: a.sharding, job.state), None)
    step = jax.jit(job.train_step, donate_argnums=0, out_shardings=out_shardings)
    with job.placement.use():
        options = compiler_options(job.xla_profile, job.mesh.devices.flat[0])
        return step.lower(job.state, job.batch).compile(options)


def batch_target(data: DataConfig, placement: Placement) -> Batch:
    """Shapes and shardings of a batch."""

    def target(row: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        shape = (data.batch_size, *row)
        sharding = placement.sharding(("batch", "length")[: len(shape)], shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return {name: target(*feature) for name, feature in data.features.items()}


def with_vocabulary(model: ModelConfig, vocab_size: int) -> ModelConfig:
    """The model with the tokenizer's vocabulary, or its own larger one."""
    if model.vocab_size is None:
        return dataclasses.replace(model, vocab_size=vocab_size)
    if model.vocab_size < vocab_size:
        raise UserError(
            f"{type(model).__name__}.vocab_size is {model.vocab_size}, but the tokenizer has {vocab_size} tokens: "
            "raise it, or leave it None to follow the tokenizer."
        )
    return model


def check_rules(rules: Rules, axes: Params) -> None:
    """Refuses a rule for a name that no dim of a parameter has."""
    used = {name for names in jax.tree.leaves(axes, is_leaf=is_axes) for name in names}
    if unknown := sorted({name for name, _ in rules} - dict(RULES).keys() - used):
        raise UserError(
            f"MeshConfig.logical_axis_rules has a rule for {unknown[0]!r}, which no parameter of this model has: names "
            f"are {', '.join(sorted(used))}."
        )


def check_mesh(experiment: Experiment, mesh: Mesh) -> None:
    """Refuses a batch, heads or rows that the mesh cannot divide evenly."""
    axes = [axis for axis in dict(RULES)["batch"] if axis == "data" or mesh.shape[axis] > 1]
    shares = math.prod(mesh.shape[axis] for axis in axes)
    rows, parts = experiment.data.batch_size, experiment.run.gradient_accumulation
    unit = shares * parts
    if rows % unit:
        nearest = sorted({max(unit, rows // unit * unit), math.ceil(rows / unit) * unit})
        shared = f"{shares} shares" + (f" of {parts} microbatches" if parts > 1 else "")
        raise UserError(
            f"DataConfig.batch_size ({rows}) cannot be divided into {' x '.join(axes)} = {shared}: "
            f"use {' or '.join(map(str, nearest))}, or another mesh."
        )
    tensor = mesh.shape["tensor"]
    for stack in experiment.model.stacks.values():
        for mixer in stack.mixers:
            heads = mixer.num_heads
            if heads is not None and heads % tensor:
                raise UserError(
                    f"{type(mixer).__name__}.num_heads ({heads}) cannot be divided among MeshConfig.tensor ({tensor}): "
                    f"use tensor={math.gcd(heads, tensor)}, or another number of heads."
                )
    blocks = [block for stack in experiment.model.stacks.values() for block in stack.distinct]
    numbers = {block.num_experts for block in blocks} - {None}
    for num_experts in numbers or {None}:
        check_experts(num_experts, mesh)
    check_stages(experiment, mesh.shape)
    shares = mesh.shape["sequence"]
    for feature, (row, _) in experiment.data.features.items():
        if row and row[0] % shares:
            nearest = sorted({max(shares, row[0] // shares * shares), math.ceil(row[0] / shares) * shares})
            raise UserError(
                f"Rows of {row[0]} tokens ({feature}) cannot be divided among MeshConfig.sequence ({shares}): "
                f"use {' or '.join(map(str, nearest))} tokens, or another mesh."
            )

"""Pipeline stages and a run: what fits together, how long stages wait, what they send."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
from absl import logging

from t5x_like.errors import UserError
from t5x_like.models.stack import StackConfig
from t5x_like.models.transformer import ModelConfig
from t5x_like.sharding.logical import RULES
from t5x_like.sharding.pipeline.gpipe import bubble, num_ticks
from t5x_like.training.experiment import Experiment

MiB = 2**20


def check_stages(experiment: Experiment, mesh: Mapping[str, int]) -> None:
    """Refuses pipeline stages without layers or rows, and warns where most of the time they would wait.

    Args:
      experiment: the run.
      mesh: sizes of the mesh's axes.
    """
    if mesh["stage"] == 1:
        return
    _check_schedules(experiment.model)
    rows = experiment.data.batch_size // experiment.run.gradient_accumulation
    shares = _shares(mesh)
    for name, stack in experiment.model.stacks.items():
        _check_layers(name, stack, mesh["stage"])
        count = stack.pipeline.num_microbatches
        if rows % (shares * count):
            unit = shares * count
            nearest = sorted({max(unit, rows // unit * unit), math.ceil(rows / unit) * unit})
            raise UserError(
                f"A batch of {rows} rows cannot be divided into PipelineConfig.num_microbatches ({count}) of "
                f"data x fsdp x expert = {shares} shares: use {' or '.join(map(str, nearest))} rows, or another number."
            )
        if count == 1:
            waits = bubble(1, mesh["stage"], stack.pipeline.repeats)
            logging.warning("With one microbatch the stages of the %s wait %.0f%% of the time.", name, 100 * waits)


def _check_layers(name: str, stack: StackConfig, stages: int) -> None:
    count, repeats = stack.pipeline.num_microbatches, stack.pipeline.repeats
    if stack.num_cycles < stages * repeats:
        why, instead = f"it scans {stack.num_cycles} cycles", "more layers that are scanned"
        if not stack.scan_layers:
            why, instead = "StackConfig.scan_layers is False", "StackConfig.scan_layers = True, also to resume a run"
        raise UserError(
            f"MeshConfig.stage is {stages} with PipelineConfig.repeats = {repeats}, but the model's {name} cannot "
            f"be cut into {stages * repeats} pieces: {why}. Use fewer stages, or {instead}."
        )
    if repeats > 1 and count < stages:
        raise UserError(
            f"PipelineConfig.repeats is {repeats}, which needs at least as many microbatches as MeshConfig.stage "
            f"({stages}): raise PipelineConfig.num_microbatches, now {count}."
        )


def _check_schedules(model: ModelConfig) -> None:
    """Refuses 1F1B where the loss of a microbatch is not the sum of its rows' losses, and for an encoder alone."""
    schedules = {name: stack.pipeline.schedule for name, stack in model.stacks.items()}
    if "1f1b" not in schedules.values():
        return
    *before, (last, schedule) = schedules.items()
    if schedule != "1f1b":
        raise UserError(
            f"PipelineConfig.schedule is 1f1b for the {before[0][0]} and {schedule} for the {last}: the {last}'s, with "
            "which the loss ends, decides. Set 1f1b for both, or gpipe."
        )
    if model.head.compares_rows:
        raise UserError(
            "PipelineConfig.schedule is 1f1b, which would part the pairs of rows that "
            f"{type(model.head).__name__} compares: use gpipe."
        )


def describe_stages(
    model: ModelConfig, mesh: Mapping[str, int], rows: int, lengths: Mapping[str, int], parts: int = 1
) -> list[str]:
    """A line per stack: how long its stages wait, and what each sends in a step.

    Args:
      model: its configuration.
      mesh: sizes of the mesh's axes.
      rows: of a batch.
      lengths: of rows, of `encoder` and `decoder`.
      parts: of the batch, whose gradients are accumulated.
    """
    stages = mesh["stage"]
    if stages == 1:
        return []
    lines, last = [], list(model.stacks)[-1]
    by_1f1b = model.stacks[last].pipeline.schedule == "1f1b"
    for name, stack in model.stacks.items():
        pipeline, length = stack.pipeline, lengths.get(name, lengths.get(model.features))
        # An encoder goes forward again for its gradient where 1F1B of the decoder has come between.
        schedule, passes = (pipeline.schedule, 2) if name == last or not by_1f1b else ("gpipe", 3)
        # Vectors go forth and gradients back at every tick, whether a stage has worked or not.
        messages = passes * parts * num_ticks(pipeline.num_microbatches, stages, pipeline.repeats, schedule)
        tokens = rows * length / parts / pipeline.num_microbatches / _shares(mesh) / mesh["sequence"]
        sent = messages * tokens * model.d_model * jnp.dtype(model.dtype).itemsize
        waits = bubble(pipeline.num_microbatches, stages, pipeline.repeats)
        lines.append(
            f"{name}: {stages} stages, {schedule}, {pipeline.num_microbatches} microbatches; each waits "
            f"{waits:.0%} of the time and sends {sent / MiB:,.1f} MiB per step"
        )
    return lines


def _shares(mesh: Mapping[str, int]) -> int:
    return math.prod(mesh[axis] for axis in dict(RULES)["batch"])

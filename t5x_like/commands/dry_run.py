"""What `train --dry_run` prints: everything that shapes alone can tell."""

import math

import jax

from t5x_like.data.build import build_data
from t5x_like.sharding.mesh import build_mesh
from t5x_like.training.experiment import Experiment
from t5x_like.training.setup import Job, set_up


def dry_run(experiment: Experiment) -> str:
    """Parameters, memory per device, mesh and tokens per step of a run. Compiles nothing, trains nothing.

    Only where the size of the vocabulary depends on the text (characters) is the text read.
    """
    data = experiment.data
    vocab_size = experiment.model.vocab_size or getattr(data.tokenizer, "vocab_size", None)
    if vocab_size is None:
        vocab_size = build_data(data, None).tokenizer.vocab_size
    mesh = build_mesh(experiment.mesh)
    job = set_up(experiment, mesh, vocab_size)
    lines = [
        *parameter_table(job),
        "",
        job.describe(),
        f"tokens per step: {data.batch_size} x {' + '.join(map(str, job.row_lengths.values()))} = "
        f"{job.tokens_per_step:,}; in {experiment.run.steps:,} steps: {job.tokens_per_step * experiment.run.steps:,}",
        "memory per device, without activations:",
    ]
    parts = {
        "parameters": job.state.params,
        "gradients": job.state.params,
        "optimizer": job.state.opt_state,
        "average": job.state.ema,
        "batch": job.batch,
    }
    sizes = {name: bytes_per_device(part) for name, part in parts.items()}
    lines += [f"  {name:<12}{size / 2**20:>12,.1f} MiB" for name, size in sizes.items() if size]
    return "\n".join([*lines, f"  {'sum':<12}{sum(sizes.values()) / 2**20:>12,.1f} MiB"])


def parameter_table(job: Job) -> list[str]:
    """A line for every parameter: name, shape, logical axes, and how the mesh splits it."""
    params, _ = jax.tree_util.tree_flatten_with_path(job.state.params)
    axes = jax.tree.leaves(job.spec.axes, is_leaf=lambda node: isinstance(node, tuple))
    rows = [("parameter", "shape", "axes", "partition")]
    for (path, array), names in zip(params, axes, strict=True):
        name = "/".join(str(key.key) for key in path)
        spec = ", ".join("-" if entry is None else str(entry) for entry in array.sharding.spec)
        rows.append((name, " x ".join(map(str, array.shape)), ", ".join(names), spec))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    padded = ([f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)] for row in rows)
    return ["  ".join([*cells, row[3]]) for cells, row in zip(padded, rows, strict=True)]


def bytes_per_device(tree) -> int:
    """Bytes that the device with the largest share holds of a tree of shapes with shardings."""
    arrays = jax.tree.leaves(tree)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)

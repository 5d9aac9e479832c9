"""What `train --dry_run` prints: everything that shapes alone can tell."""

from t5x_like.data.build import build_data
from t5x_like.planning.memory import bytes_per_device
from t5x_like.sharding.layout import layout_table
from t5x_like.sharding.mesh import build_mesh
from t5x_like.training.experiment import Experiment
from t5x_like.training.job import set_up


def dry_run(experiment: Experiment) -> str:
    """Parameters, memory per device, mesh and tokens per step of a run. Compiles nothing, trains nothing.

    Only where the size of the vocabulary depends on the text (characters) is the text read.
    """
    data = experiment.data
    vocab_size = known_vocabulary(experiment) or build_data(data, None).tokenizer.vocab_size
    mesh = build_mesh(experiment.mesh)
    job = set_up(experiment, mesh, vocab_size)
    lines = [
        *layout_table(job.state.params, job.spec.axes),
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


def known_vocabulary(experiment: Experiment) -> int | None:
    """The size of the vocabulary without reading any text; None where it depends on that."""
    tokenizer = experiment.data.tokenizer
    return experiment.model.vocab_size or (tokenizer and tokenizer.known_size())

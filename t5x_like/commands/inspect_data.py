"""`t5x_like inspect-data`: what a model sees at a step."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.text import Text

from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.commands import cli
from t5x_like.data.build import Data, build_data
from t5x_like.data.inspection import BatchView, browser, terminal
from t5x_like.errors import UserError
from t5x_like.training.experiment import Experiment


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(command, argv, define_flags)


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("step", 0, "The step (of validation: the batch) to show.", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("rows", 4, "How many rows of the batch to show.", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("split", "train", ["train", "validation"], "Which split.", flag_values=values)
    flags.DEFINE_string("html", None, "Write a page to this file instead.", flag_values=values)


def command(values: flags.FlagValues) -> None:
    """Shows the exact batch of a step of a run: tokens by piece of text, what is predicted, how full the rows are."""
    configured = cli.configured(values, Experiment)
    if configured is None:
        return
    _, experiment = configured
    directory = RunDirectory(experiment.run.model_dir)
    directory.pull()
    data = build_data(experiment.data, directory.data)
    if values.split == "validation" and values.step >= data.validation.num_batches:
        raise UserError(f"--step={values.step}: validation has the batches 0 to {data.validation.num_batches - 1}.")
    view = BatchView(getattr(data, values.split).batch(values.step), data.tokenizer)
    rows = range(min(values.rows, view.num_rows))
    title = f"{values.split} batch of step {values.step}"
    if values.html is None:
        console = Console(highlight=False, soft_wrap=True)
        console.print(Text.assemble((title, "bold"), f"\n{describe(data, values.step)}"))
        for line in terminal(view, rows):
            console.print(line)
        return
    try:
        Path(values.html).write_text(browser(view, rows, title))
    except OSError as error:
        raise UserError(f"--html={values.html} cannot be written: {error}.") from error
    print(f"Wrote {values.html}: {title}, {len(rows)} of {view.num_rows} rows.")


def describe(data: Data, step: int) -> str:
    """The data in words, and of a mixture how often each source has been seen."""
    return "\n".join([data.describe(), *data.train.describe_step(step)])

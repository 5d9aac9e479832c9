"""The same passes on Apache Beam, for corpora that outgrow one machine (extra: beam).

A pass is a `Map` over its units, spread by a `Reshuffle`; workers read the input and write to the corpus's directory,
which has to be a file system that all of them share (NFS, Filestore, a bucket mounted by gcsfuse).
"""

from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

from absl import logging

from t5x_like.data.extras import require

T = TypeVar("T")


class BeamEngine:
    """Runs each pass as a pipeline; a context manager like `LocalEngine`."""

    def __init__(self, options: Sequence[str] = ()):
        """Checks the options.

        Args:
          options: Of the pipelines, as on Beam's command line: `--runner=DataflowRunner`, `--project=...`; without a
            runner, Beam's own on this machine.

        Raises:
          UserError: if Beam is not installed.
        """
        self._beam = require("apache_beam", "--beam", extra="beam")
        self._options = list(options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def run(self, function: Callable[[T], None], items: Sequence[T], label: str) -> None:
        beam = self._beam
        options = beam.options.pipeline_options.PipelineOptions(self._options)
        logging.info("%s: %d units on Beam.", label, len(items))
        with beam.Pipeline(options=options) as pipeline:
            units = pipeline | "Units" >> beam.Create(list(items)) | "Spread" >> beam.Reshuffle()
            # A unit is the result of its function for its files alone; a retried or doubled one writes the same.
            _ = units | label >> beam.Map(function)

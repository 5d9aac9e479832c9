"""The facts that a checkpoint keeps about the run that made it."""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from absl import logging

from t5x_like.configurable import to_dict
from t5x_like.data.build import Data
from t5x_like.errors import UserError
from t5x_like.runtime.versions import versions
from t5x_like.training.job import Job

Manifest = dict[str, Any]

MUST_MATCH = {"data": "data", "tokenizer": "data.tokenizer", "vocab_size": "model.vocab_size"}
"""Facts that decide whether a run can go on from a checkpoint, each with the part of the configuration behind it."""


def manifest_of(job: Job, data: Data, batch_number: int) -> Manifest:
    """Model, data, position in the data and versions of libraries, as JSON."""
    return {
        "data": data.fingerprint,
        "tokenizer": data.tokenizer.fingerprint(),
        "vocab_size": job.model.vocab_size,
        "batch_number": batch_number,
        "model": json.loads(json.dumps(to_dict(job.model))),
        "layers": {place: list(numbers) for place, numbers in job.model.layers.items()},
        "versions": versions(),
    }


def check_manifest(
    saved: Mapping[str, Any], current: Mapping[str, Any], checkpoint: PathLike[str], allow_changes: Sequence[str]
) -> None:
    """Compares a checkpoint's facts with those of the run that wants to go on from it.

    Args:
      saved: the checkpoint's manifest.
      current: that of the run.
      checkpoint: where it is.
      allow_changes: parts of the configuration that may have changed.

    Raises:
      UserError: if what must match does not.
    """
    changed = [
        f"{name} (allow with --allow_changes={part})"
        for name, part in MUST_MATCH.items()
        if saved.get(name) != current[name] and not is_allowed(part, allow_changes)
    ]
    if changed:
        raise UserError(
            f"The data has changed since checkpoint {checkpoint}: {', '.join(changed)}. Bring back the text, its "
            "tokenizer and the layout of batches as they were, or start a new run with another MODEL_DIR."
        )
    if (former := saved.get("versions")) != current["versions"]:
        logging.warning("Versions have changed (%s -> %s): losses may differ in their last bits.", former, versions())


def is_allowed(part: str, allow_changes: Sequence[str]) -> bool:
    """Whether a part of the configuration is among those that may change, or within or around one of them."""
    return any(f"{part}.".startswith(f"{path}.") or f"{path}.".startswith(f"{part}.") for path in allow_changes)

"""The whole configuration of every shipped run, as files: `python -m tests.config.rewrite_goldens` writes them anew."""

import json
from pathlib import Path

from t5x_like.config import parse_config
from t5x_like.config.parse import SHIPPED
from t5x_like.configurable import to_dict
from t5x_like.training.experiment import Experiment

GOLDENS = Path(__file__).parent / "goldens"
RUNS = sorted(path.stem for path in (SHIPPED / "runs").glob("*.gin"))


GIVEN = {
    **dict.fromkeys(("bert_base", "gpt2_124m", "llama3_70b", "llama3_8b"), ("TEXT_FILES",)),
    **dict.fromkeys(("nanogpt_char", "nanogpt_char_gpu"), ("TEXT_FILES",)),
    **dict.fromkeys(("deepseek_v3", "mixtral_8x7b", "prepared", "t5_1_1_base_c4", "t5_1_1_xxl"), ("CORPUS",)),
    **dict.fromkeys(("bert_tiny_tags", "bert_tiny_task", "reward_tiny", "t5_tiny_task"), ("TRAIN",)),
    "bert_base_task": ("FROM", "TOKENIZER_FILE"),
    "t5_base_task": ("FROM", "SPIECE_MODEL"),
}
"""The macros that a user of the run must give."""


def resolved(run: str) -> str:
    """The run's configuration with all defaults, a field a line; what the user must give is its own name."""
    given = [f"{name}={name.lower()}" for name in GIVEN.get(run, ())]
    experiment = parse_config([f"runs/{run}.gin"], given).build(Experiment)
    return json.dumps(to_dict(experiment), indent=1) + "\n"


def main() -> None:
    for path in GOLDENS.glob("*.json"):
        path.unlink()
    for run in RUNS:
        (GOLDENS / f"{run}.json").write_text(resolved(run))


if __name__ == "__main__":
    main()

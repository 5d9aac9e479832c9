"""`t5x_like generate`: continues prompts with a trained model."""

from collections.abc import Sequence

from absl import flags

from t5x_like.commands import cli, loading
from t5x_like.inference.load import GenerateConfig
from t5x_like.inference.sampling import Sampling


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(command, argv, define_flags)


def define_flags(values: flags.FlagValues) -> None:
    loading.define_flags(values)
    flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given again. Default: none.", flag_values=values)
    flags.DEFINE_integer("num_samples", 1, "Continuations of each prompt.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 200, "Longest continuation, in tokens.", lower_bound=1, flag_values=values)
    flags.DEFINE_float("temperature", 0.8, "Divides the logits; 0: greedy.", flag_values=values)
    flags.DEFINE_integer("top_k", None, "Draw among the k most likely tokens only.", flag_values=values)
    flags.DEFINE_float("top_p", None, "Draw among the likeliest tokens up to this probability.", flag_values=values)
    flags.DEFINE_bool("greedy", False, "Take the most likely token; the same as --temperature=0.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of the random draws.", flag_values=values)


def command(values: flags.FlagValues) -> None:
    """Continues prompts with a trained model and prints them with their continuations."""
    drawing = {
        "temperature": 0.0 if values.greedy else values.temperature,
        "top_k": values.top_k,
        "top_p": values.top_p,
    }
    Sampling(**drawing)  # Refuses what cannot be before anything is read.
    loaded = loading.load_model(values, GenerateConfig, lambda experiment: GenerateConfig(mesh=experiment.mesh))
    if loaded is None:
        return
    prompts = [prompt for prompt in values.prompt or [""] for _ in range(values.num_samples)]
    texts = loaded.model.generate(prompts, max_new_tokens=values.max_new_tokens, seed=values.seed, **drawing)
    separator = f"\n{'-' * 40}\n"
    print(separator.join(prompt + text for prompt, text in zip(prompts, texts, strict=True)))

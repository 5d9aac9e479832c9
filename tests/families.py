"""Toy models of transformers, random in every parameter."""

import os
from pathlib import Path

import numpy as np
import pytest

VOCAB, LENGTH = 29, 13

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
}

MODELS = {
    "gpt2": ("GPT2", {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "gpt2_untied": (
        "GPT2",
        {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 24,
         "activation_function": "relu", "tie_word_embeddings": False},
    ),
    "llama": ("Llama", SMALL),
    "llama_biases_tied": (
        "Llama",
        {**SMALL, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    ),
    "llama3_scaling": ("Llama", {**SMALL, "head_dim": 8, "rope_parameters": LLAMA3}),
    "llama_linear": (
        "Llama", {**SMALL, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}}
    ),
    "llama_yarn": ("Llama", {**SMALL, "head_dim": 16, "rope_parameters": YARN}),
    "mistral_window": ("Mistral", {**SMALL, "sliding_window": 4}),
    "qwen2": ("Qwen2", {**SMALL, "tie_word_embeddings": True}),
    "qwen2_window": ("Qwen2", {**SMALL, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 6}),
    "qwen3_biases": ("Qwen3", {**SMALL, "head_dim": 8, "attention_bias": True, "num_key_value_heads": 1}),
    "gemma": ("Gemma", {**SMALL, "head_dim": 8, "num_key_value_heads": 1}),
    "olmo2": ("Olmo2", SMALL),
}  # fmt: skip
"""By name: the prefix of the classes in transformers, and what their configuration is given."""


def build(name: str, **changes):
    """A random model of transformers in float32, on which no parameter has the value it starts with."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    torch = pytest.importorskip("torch", reason="needs the extra: hf")
    transformers = pytest.importorskip("transformers", reason="needs the extra: hf")
    prefix, fields = MODELS[name]
    torch.manual_seed(0)
    head = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
    fields = {"initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, **fields, **changes}
    model = getattr(transformers, prefix + head)(getattr(transformers, f"{prefix}Config")(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def save(model, directory: Path, **options) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def load(directory: Path):
    """The model of a directory, which must hold exactly its tensors."""
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    problems = {name: found for name, found in info.items() if found}
    assert not problems, problems
    return model.eval()


def logits(model, tokens: np.ndarray, **inputs: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        inputs = {name: torch.tensor(value) for name, value in inputs.items()}
        return model(torch.tensor(tokens), **inputs).logits.float().numpy()


def tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (2, LENGTH))

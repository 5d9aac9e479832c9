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

DEEPSEEK_YARN = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [1.0, 3.0, 5.0],
    "original_max_position_embeddings": 8,
}
SANDWICH = {**SMALL, "num_hidden_layers": 5, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 6}
MIXTURE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 4,
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
    "llama_dynamic": (
        "Llama",
        {**SMALL, "max_position_embeddings": 8,
         "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
    ),
    "qwen2_mixed": (
        "Qwen2",
        {**SMALL, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3_layer_types": (
        "Qwen3",
        {**SMALL, "num_hidden_layers": 5, "head_dim": 8, "use_sliding_window": True, "sliding_window": 4,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention",
                         "sliding_attention"]},
    ),
    "gemma2": ("Gemma2", SANDWICH),
    "gemma2_biases_untied": (
        "Gemma2",
        {**SANDWICH, "attention_bias": True, "tie_word_embeddings": False, "attn_logit_softcapping": None,
         "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "num_hidden_layers": 2},
    ),
    "gemma3": ("Gemma3", {**SANDWICH, "num_hidden_layers": 7, "sliding_window_pattern": 3}),
    "gemma3_linear": (
        "Gemma3",
        {**SANDWICH, "num_key_value_heads": 1,
         "rope_parameters": {
             "full_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
             "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
         },
         "layer_types": ["full_attention", *["sliding_attention"] * 3, "full_attention"]},
    ),
    "phi3": ("Phi3", {**SMALL, "resid_pdrop": 0.1, "pad_token_id": 0}),
    "phi3_longrope": (
        "Phi3",
        {**SMALL, "hidden_size": 32, "sliding_window": 5, "num_key_value_heads": 4, "pad_token_id": 0,
         "partial_rotary_factor": 0.75, "original_max_position_embeddings": 8, "rope_parameters": LONGROPE},
    ),
    "mixtral": ("Mixtral", {**SMALL, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral_window_tied": (
        "Mixtral",
        {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 4, "tie_word_embeddings": True},
    ),
    "qwen2_moe": ("Qwen2Moe", {**SMALL, **MIXTURE, "shared_expert_intermediate_size": 20}),
    "qwen2_moe_dense_layers": (
        "Qwen2Moe",
        {**SMALL, **MIXTURE, "shared_expert_intermediate_size": 20, "num_hidden_layers": 6, "decoder_sparse_step": 2,
         "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 5},
    ),
    "qwen3_moe": ("Qwen3Moe", {**SMALL, **MIXTURE, "head_dim": 6, "norm_topk_prob": True}),
    "qwen3_moe_dense_layer": (
        "Qwen3Moe",
        {**SMALL, **MIXTURE, "head_dim": 8, "mlp_only_layers": [1], "attention_bias": True,
         "use_sliding_window": True, "sliding_window": 4},
    ),
    "gpt_oss": (
        "GptOss",
        {**SMALL, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    ),
    "gpt_oss_no_biases": (
        "GptOss",
        {**SMALL, "num_hidden_layers": 4, "head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 3,
         "sliding_window": 5, "attention_bias": False, "rope_parameters": YARN, "tie_word_embeddings": True},
    ),
    "deepseek_v2": ("DeepseekV2", {**SMALL, **LATENT, "rope_parameters": DEEPSEEK_YARN}),
    "deepseek_v2_groups": (
        "DeepseekV2",
        {**SMALL, **LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
         "routed_scaling_factor": 1.7, "attention_bias": True},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {**SMALL, **LATENT, "n_group": 4, "topk_group": 2, "n_shared_experts": 2,
         "rope_parameters": {**DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek_v3_biases": (
        "DeepseekV3",
        {**SMALL, **LATENT, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "attention_bias": True,
         "norm_topk_prob": False},
    ),
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
    config = getattr(transformers, prefix + ("TextConfig" if prefix == "Gemma3" else "Config"))
    # The only one that computes soft-caps and sinks.
    model = getattr(transformers, prefix + head)(config(**fields, attn_implementation="eager"))
    with torch.no_grad():
        for parameter in (*model.parameters(), *(b for name, b in model.named_buffers() if name.endswith("_bias"))):
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def save(model, directory: Path, **options) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def load(directory: Path):
    """The model of a directory, which must hold exactly its tensors."""
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager"
    )
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

"""The families of decoders whose layers differ or mix experts: their files, without Hugging Face's packages."""

import json
import tracemalloc

import jax
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.huggingface.directory import CONFIG, choose_family, export_params, import_params, read_config
from t5x_like.huggingface.families.layers import repeated
from t5x_like.huggingface.safetensors import Tensor, open_tensors, write_tensors
from t5x_like.models.model_spec import model_spec
from t5x_like.models.parameters import split
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.sharding.placement import Placement

COMMON = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
LATENT = {
    "model_type": "deepseek_v3", "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 8, "n_shared_experts": 2, "kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8, "v_head_dim": 5, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 16, "mscale": 1.0,
                     "mscale_all_dim": 1.0},
}  # fmt: skip
GPT_OSS = {"model_type": "gpt_oss", "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3 = {"model_type": "qwen3_moe", "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [2],
         "moe_intermediate_size": 8}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3_text",
    "head_dim": 8,
    "num_hidden_layers": 7,
    "sliding_window": 4,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 7,
    "rope_scaling": {"rope_type": "linear", "factor": 8},
}
PHI3 = {"model_type": "phi3", "partial_rotary_factor": 0.5, "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [4]}}  # fmt: skip

FILES = {
    "mixtral": (MIXTRAL, {"model.layers.3.block_sparse_moe.experts.1.w3.weight": (24, 16)}),
    "qwen3_moe": (
        QWEN3,
        {"model.layers.2.mlp.up_proj.weight": (24, 16), "model.layers.3.mlp.experts.3.down_proj.weight": (16, 8)},
    ),
    "gpt_oss": (
        GPT_OSS,
        {"model.layers.0.mlp.experts.gate_up_proj": (4, 16, 48), "model.layers.1.self_attn.sinks": (4,)},
    ),
    "deepseek_v3": (
        LATENT,
        {"model.layers.0.mlp.up_proj.weight": (24, 16), "model.layers.1.mlp.gate.e_score_correction_bias": (8,),
         "model.layers.3.mlp.shared_experts.up_proj.weight": (16, 16),
         "model.layers.2.self_attn.kv_a_proj_with_mqa.weight": (20, 16)},
    ),
    "deepseek_v2": (
        {**LATENT, "model_type": "deepseek_v2", "q_lora_rank": None, "topk_method": "group_limited_greedy"},
        {"model.layers.2.self_attn.q_proj.weight": (56, 16)},
    ),
    "gemma3_text": (GEMMA3, {"model.layers.6.pre_feedforward_layernorm.weight": (16,)}),
    "gemma2": (
        {"model_type": "gemma2", "head_dim": 8, "sliding_window": 4},
        {"model.layers.3.post_feedforward_layernorm.weight": (16,)},
    ),
    "phi3": (
        PHI3, {"model.layers.1.self_attn.qkv_proj.weight": (32, 16), "model.layers.1.mlp.gate_up_proj.weight": (48, 16)}
    ),
    "qwen2_mixed": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        {"model.layers.3.self_attn.q_proj.bias": (16,)},
    ),
}  # fmt: skip
"""By name: fields beside COMMON, and some of the tensors."""

SHARDED = build_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))


def export(directory, fields):
    """Writes a random model of these fields; returns its family, configuration and parameters."""
    directory.mkdir(exist_ok=True)
    (directory / CONFIG).write_text(json.dumps({**COMMON, **fields}))
    family, config, _ = read_config(directory)
    params = jax.jit(lambda: split(config.build(jax.random.key(0)))[1])()
    leaves, tree = jax.tree.flatten(params)
    # No parameter keeps the value it starts with.
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(tree, [leaf + rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])
    export_params(directory, family, config, params, vocab_size=32, dtype="float32", max_file_bytes=10**9)
    return family, config, params


def load(directory, mesh=SHARDED):
    family, config, _ = read_config(directory)
    spec = model_spec(config)
    return import_params(directory, family, config, spec, vocab_size=32, placement=Placement(mesh))


@pytest.mark.parametrize(("fields", "tensors"), FILES.values(), ids=FILES)
def test_parameters_come_back_sharded(fields, tensors, tmp_path):
    family, config, params = export(tmp_path, fields)
    stored = open_tensors(tmp_path)
    assert tensors.items() <= {name: tensor.shape for name, tensor in stored.items()}.items()
    loaded, dtype = load(tmp_path)
    assert dtype == "float32"
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    chosen, written = choose_family(config, 64)
    assert chosen == family
    (tmp_path / CONFIG).write_text(json.dumps(written))
    # What was left to a default is written out; what is written reads back as the same model.
    assert choose_family(read_config(tmp_path).config, 64) == (family, written)


def test_experts_lie_on_their_devices(tmp_path):
    export(tmp_path, MIXTRAL)
    kernel = load(tmp_path)[0]["stack"]["scanned"]["0"]["feedforward"]["up"]["kernel"]
    assert kernel.shape == (4, 4, 16, 24)
    assert kernel.addressable_shards[0].data.shape == (4, 2, 8, 12)
    third = open_tensors(tmp_path)["model.layers.1.block_sparse_moe.experts.2.w3.weight"].read()
    np.testing.assert_array_equal(np.asarray(kernel)[1, 2], third.T)


def test_gates_and_ups_take_turns_in_gpt_oss(tmp_path):
    _, config, params = export(tmp_path, GPT_OSS)
    assert config.stack.cycle[0].mixer.window == 128
    assert config.stack.cycle[1].mixer.window is None
    both = open_tensors(tmp_path)["model.layers.3.mlp.experts.gate_up_proj"].read()
    feedforward = params["stack"]["scanned"]["1"]["feedforward"]
    np.testing.assert_array_equal(both[..., ::2], feedforward["gate"]["kernel"][1])
    np.testing.assert_array_equal(both[..., 1::2], feedforward["up"]["kernel"][1])


def test_dims_that_turn_together_are_neighbours_in_deepseek(tmp_path):
    _, config, params = export(tmp_path, LATENT)
    stored = open_tensors(tmp_path)
    theirs = stored["model.layers.1.self_attn.q_b_proj.weight"].read().reshape(4, 14, 10)
    ours = np.asarray(params["stack"]["scanned"]["0"]["mixer"]["query"]["kernel"][0]).transpose(1, 2, 0)
    np.testing.assert_array_equal(theirs[:, :6], ours[:, :6])
    np.testing.assert_array_equal(theirs[:, 6::2], ours[:, 6:10])
    np.testing.assert_array_equal(theirs[:, 7::2], ours[:, 10:])
    # mscale belongs to the products, not to the weights.
    assert config.stack.cycle[0].mixer.scale == pytest.approx(14**-0.5 * (0.1 * np.log(40) + 1) ** 2)
    assert config.stack.cycle[0].mixer.rotary.scaling.attention_factor == 1.0


def test_the_bias_of_the_balance_stays_float32(tmp_path):
    family, config, params = export(tmp_path, LATENT)
    export_params(tmp_path, family, config, params, vocab_size=32, dtype="bfloat16", max_file_bytes=10**9)
    dtypes = {name: tensor.dtype.name for name, tensor in open_tensors(tmp_path).items()}
    assert {name for name, dtype in dtypes.items() if dtype == "float32"} == {
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2, 3)
    }
    assert load(tmp_path)[1] == "bfloat16"


def test_layers_of_gemma3_differ_in_window_and_theta(tmp_path):
    _, config, _ = export(tmp_path, {**GEMMA3, "rope_theta": 500.0, "rope_local_base_freq": 20.0})
    attentions = [block.mixer for block in config.stack.blocks]
    assert [attention.window for attention in attentions] == [4, 4, None, 4, 4, None, 4]
    assert [attention.rotary.theta for attention in attentions] == [20, 20, 500, 20, 20, 500, 20]
    assert [attention.rotary.scaling is None for attention in attentions] == [
        True,
        True,
        False,
        True,
        True,
        False,
        True,
    ]
    assert len(config.stack.cycle) == 3


@pytest.mark.parametrize(
    ("layers", "first", "cycle"),
    [("aaaa", "", "a"), ("abab", "", "ab"), ("aaabaaabaa", "", "aaab"), ("abbb", "a", "b"), ("abcbcb", "a", "bc"),
     ("a", "", "a"), ("ab", "", "ab"), ("aaab", "", "aaab")],
)  # fmt: skip
def test_blocks_repeat_in_the_shortest_way(layers, first, cycle):
    fields = repeated(layers)
    block = fields["block"]
    assert ("".join(fields["first"]), "".join(block)) == (first, cycle)


def test_the_host_holds_one_tensor_at_a_time(tmp_path):
    fields = {**MIXTRAL, "vocab_size": 32, "hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 2}
    largest = 256 * 2048 * 4
    tracemalloc.start()
    try:
        family, config, params = export(tmp_path, fields)
        options = {"vocab_size": 32, "dtype": "float32", "max_file_bytes": 10**9}
        again = tmp_path / "again"
        again.mkdir()
        for work in (lambda: export_params(again, family, config, params, **options), lambda: load(tmp_path)):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            work()
            # Beside two tensors a shard: an eighth of the experts of both layers, which are one array of ours.
            assert tracemalloc.get_traced_memory()[1] - before < 2 * largest + largest
    finally:
        tracemalloc.stop()


def test_a_missing_expert_is_named(tmp_path):
    export(tmp_path, QWEN3)
    arrays = {name: np.array(tensor.read()) for name, tensor in open_tensors(tmp_path).items()}
    del arrays["model.layers.1.mlp.experts.3.gate_proj.weight"]
    write_tensors(tmp_path, [Tensor(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()], 10**9)
    with pytest.raises(UserError, match=r"missing: model.layers.1.mlp.experts.3.gate_proj.weight \[8, 16\]"):
        load(tmp_path)


MISTAKES = {
    "too_many_choices": ({**MIXTRAL, "num_experts_per_tok": 9}, "num_experts_per_tok is 9: num_local_experts is 4"),
    "groups": ({**LATENT, "n_group": 3}, "describes no possible model: .*num_groups .3. does not divide"),
    "interleaving": ({**LATENT, "rope_interleave": False}, "rope_interleave is false: only True"),
    "scores": ({**LATENT, "scoring_func": "softmax"}, 'scoring_func is "softmax": only .sigmoid.'),
    "method": ({**LATENT, "model_type": "deepseek_v2", "topk_method": "best"}, "topk_method is .*greedy"),
    "swiglu": ({**GPT_OSS, "swiglu_limit": 5.0}, "swiglu_limit is 5.0: only 7.0"),
    "bidirectional": ({**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
    "short_factor": (
        {**PHI3, "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 3}},
        "rope_scaling is .*must have 1 number",
    ),
}


@pytest.mark.parametrize(("fields", "message"), MISTAKES.values(), ids=MISTAKES)
def test_impossible_fields_are_named(fields, message, tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps({**COMMON, **fields}))
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)

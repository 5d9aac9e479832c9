"""Reading and writing Hugging Face directories, without Hugging Face's packages."""

import dataclasses
import json
import tracemalloc

import jax
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.huggingface.directory import CONFIG, choose_family, export_params, import_params, read_config
from t5x_like.huggingface.families import DECODERS
from t5x_like.huggingface.safetensors import INDEX, Tensor, open_tensors, write_tensors
from t5x_like.models.heads.language_model import LanguageModelHeadConfig
from t5x_like.models.model_spec import model_spec
from t5x_like.models.norms import NormConfig
from t5x_like.models.parameters import split
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.sharding.placement import Placement
from tests import toy

MESH = build_mesh(MeshConfig(data=1, fsdp=-1))


def export(directory, config=None, *, max_file_bytes=10**9, **fields):
    """Writes a toy Llama with random parameters, and returns these."""
    config = config or toy.model(vocab_size=toy.VOCAB)
    directory.mkdir(exist_ok=True)
    family, written = choose_family(config, 32)
    (directory / CONFIG).write_text(json.dumps({**written, **fields}))
    params = jax.jit(lambda: split(config.build(jax.random.key(0)))[1])()
    size = config.vocab_size
    export_params(directory, family, config, params, vocab_size=size, dtype="float32", max_file_bytes=max_file_bytes)
    return params


def load(directory):
    family, config, _ = read_config(directory)
    spec, size = model_spec(config), config.vocab_size
    return import_params(directory, family, config, spec, vocab_size=size, placement=Placement(MESH))[0]


@pytest.mark.parametrize("max_file_bytes", [10**9, 20_000, 1])
def test_parameters_come_back_sharded(max_file_bytes, tmp_path):
    params = export(tmp_path, max_file_bytes=max_file_bytes)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (max_file_bytes == 10**9)
    if len(files) > 1:
        assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
        largest = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
        assert largest < max(max_file_bytes, 4 * 64 * 32) + 4096  # one tensor may be larger; and the header
    loaded = load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert loaded["embedding"].addressable_shards[0].data.size == loaded["embedding"].size / 8


def test_without_their_index_files_are_read_as_well(tmp_path):
    params = export(tmp_path, max_file_bytes=20_000)
    (tmp_path / INDEX).unlink()
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), params)


def test_the_host_holds_one_tensor_at_a_time(tmp_path):
    config = toy.model(vocab_size=4096, d_model=256, head=LanguageModelHeadConfig(tie_embeddings=False))
    largest = 4096 * 256 * 4
    tracemalloc.start()
    try:
        for work in (lambda: export(tmp_path, config, max_file_bytes=largest), lambda: load(tmp_path)):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            work()
            assert tracemalloc.get_traced_memory()[1] - before < 2 * largest
    finally:
        tracemalloc.stop()


def rewrite(directory, change):
    """Changes the tensors of a directory: a dict of arrays by name."""
    arrays = {name: np.array(tensor.read()) for name, tensor in open_tensors(directory).items()}
    change(arrays)
    write_tensors(directory, [Tensor(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()], 10**9)


KEY = "model.layers.1.self_attn.k_proj.weight"

DAMAGE = {
    "missing": (lambda a: a.pop(KEY), r"missing: model.layers.1.self_attn.k_proj.weight \[32, 32\]"),
    "left_over": (lambda a: a.update(extra=a[KEY]), r"left over: extra \[32, 32\]"),
    "a_layer_too_many": (lambda a: a.update({KEY.replace("1", "2"): a[KEY]}), "left over: model.layers.2"),
    "misshaped": (lambda a: a.update({KEY: a[KEY][:16]}), r"k_proj.weight is \[16, 32\], needed is \[32, 32\]"),
    "untied": (lambda a: a.update({"lm_head.weight": a["model.embed_tokens.weight"] + 1}), "config.json ties them"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    export(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_copy_of_a_tied_embedding_is_dropped(tmp_path):
    params = export(tmp_path)
    rewrite(tmp_path, lambda a: a.update({"lm_head.weight": a["model.embed_tokens.weight"]}))
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), params)


FIELDS = {
    "model_type": ({"model_type": "mamba"}, "model_type is \"mamba\": known are gpt2, llama"),
    "quantization": ({"quantization_config": {"quant_method": "mxfp4"}}, "quantised weights cannot be converted"),
    "unknown_field": ({"use_magic": False}, "use_magic is false: llama models are not known"),
    "activation": ({"hidden_act": "gelu_fast"}, "hidden_act is \"gelu_fast\": choose among"),
    "rope_type": ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "rope_type must be default, linear, dynamic"),
    "rope_field": ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "beta is not supported"),
    "rope_factor": ({"rope_scaling": {"type": "linear"}}, "needs a factor"),
    "rope_per_layer": ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rotate alike"),
    "rope_lists": ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "longrope' needs a long_factor"),
    "rope_sizes": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "must have 4 numbers"
    ),
    "partial_rotary": ({"partial_rotary_factor": 0.5}, "llama models rotate whole heads"),
    "heads": ({"num_attention_heads": 3, "num_key_value_heads": 2}, "config.json describes no .*not a multiple"),
    "no_layers": ({"num_hidden_layers": None}, "no field 'num_hidden_layers'"),
    "layer_types": (
        {"model_type": "qwen2", "layer_types": ["full_attention"]},
        "layer_types is .*it must have 2 times 'sliding_attention' or 'full_attention'",
    ),
    "kind_of_layer": (
        {"model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"]}, "layer_types is .*must have 2"
    ),
    "no_window": (
        {"model_type": "gemma2", "head_dim": 8, "hidden_act": None, "sliding_window": None},
        "sliding_window is null: some layers slide",
    ),
    "gpt2": ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "only False is supported"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), FIELDS.values(), ids=FIELDS)
def test_unsupported_fields_are_named(fields, message, tmp_path):
    export(tmp_path, **fields)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


# Phi-3 without its own rotation is a Llama with other names.
DENSE = [family for family in DECODERS if not family.required and family.model_type != "phi3"]


@pytest.mark.parametrize("family", DENSE, ids=lambda family: family.model_type)
def test_every_family_writes_what_it_reads(family, tmp_path):
    fields = {"model_type": family.model_type, **family.write(toy.model(vocab_size=toy.VOCAB), 32)}
    if family.model_type == "mistral":
        fields["sliding_window"] = 7  # without, it would be a Llama
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    chosen, written = choose_family(read_config(tmp_path).config, 32)
    assert chosen == family
    assert written == {"architectures": [family.architecture], **fields}


def test_how_a_model_was_trained_decides_no_family():
    config = toy.model(vocab_size=toy.VOCAB, dropout_rate=0.1, residual_init="same", dtype="bfloat16")
    stack = dataclasses.replace(config.stack, scan_layers=False, remat="full")
    assert choose_family(dataclasses.replace(config, stack=stack), 32)[0].model_type == "llama"


def test_a_model_that_no_family_holds_is_refused():
    config = toy.model(vocab_size=toy.VOCAB)
    stack = dataclasses.replace(config.stack, final_norm=NormConfig(kind="layernorm"))
    config = dataclasses.replace(config, stack=stack)
    with pytest.raises(UserError, match=r"nearest, llama, .*\n  stack.final_norm.kind: 'rmsnorm' .here 'layer"):
        choose_family(config, 32)

"""Our models against those of transformers, with the same weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.huggingface.directory import CONFIG, choose_family, export_params, import_params, read_config
from t5x_like.huggingface.families.family import Fields
from t5x_like.huggingface.families.rotary import read_rotary
from t5x_like.learning.loss import LossConfig, batch_loss
from t5x_like.models.model_spec import model_spec
from t5x_like.models.parameters import merge
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.sharding.placement import Placement
from tests import families, toy

torch = pytest.importorskip("torch", reason="needs the extra: hf")
transformers = pytest.importorskip("transformers", reason="needs the extra: hf")

pytestmark = pytest.mark.hf

ONE_DEVICE = build_mesh(MeshConfig(), jax.devices()[:1])


def load_ours(directory, *, mesh=ONE_DEVICE, padded=None, scan_layers=True):
    """Source, configuration, structure and parameters of a Hugging Face directory."""
    family, config, _ = read_config(directory)
    vocab_size = config.vocab_size
    stack = dataclasses.replace(config.stack, scan_layers=scan_layers)
    config = dataclasses.replace(config, vocab_size=padded or vocab_size, stack=stack)
    spec = model_spec(config)
    params, dtype = import_params(directory, family, config, spec, vocab_size=vocab_size, placement=Placement(mesh))
    return config, spec.graphdef, params, dtype


def our_logits(graphdef, params, tokens, **inputs):
    @jax.jit
    def run(params):
        model = merge(graphdef, params)
        return model.head.scores(model(toy.tokens(jnp.asarray(tokens), **inputs)).x, model.embedding[...])

    return np.asarray(run(params))


@pytest.fixture(scope="module", params=families.MODELS)
def pair(request, tmp_path_factory):
    """The directory of a toy model, and the model."""
    model = families.build(request.param)
    return families.save(model, tmp_path_factory.mktemp(request.param)), model


def report(record_property, name, value):
    record_property(name, float(value))
    print(f"{name}: {value:.2e}")


def test_logits_agree_both_ways(pair, tmp_path, record_property):
    """Theirs -> ours -> theirs: the same logits, the same bytes, and a config.json that we wrote ourselves."""
    from safetensors.numpy import load_file

    directory, theirs = pair
    config, graphdef, params, dtype = load_ours(directory)
    tokens = families.tokens()
    expected = families.logits(theirs, tokens)
    assert expected.std() > 0.3
    difference = np.abs(our_logits(graphdef, params, tokens) - expected).max()
    report(record_property, f"{directory.name} logits", difference)
    assert difference < 1e-4

    family, fields = choose_family(config, 64)
    if directory.name.startswith("phi3") and family.model_type == "llama":
        # The same model but for the names of its tensors: it is for the user to ask for the others.
        family = read_config(directory).family
        fields = {"model_type": "phi3", "architectures": [family.architecture], **family.write(config, 64)}
    assert fields["model_type"] == theirs.config.model_type
    assert fields["architectures"] == [type(theirs).__name__]
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    size = config.vocab_size
    export_params(tmp_path, family, config, params, vocab_size=size, dtype=dtype, max_file_bytes=10**9)
    before, after = (load_file(path / "model.safetensors") for path in (directory, tmp_path))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.tobytes() == after[name].tobytes(), name
        assert value.shape == after[name].shape, name
    # Torch sums over experts in an order of its own each time.
    np.testing.assert_allclose(families.logits(families.load(tmp_path), tokens), expected, atol=1e-5)


PADDED = ["gpt2", "llama", "qwen3", "gemma3", "mixtral", "gpt_oss", "deepseek_v3", "phi3_longrope"]


@pytest.mark.parametrize("name", PADDED)
def test_padding_on_the_left_is_not_seen(name, tmp_path):
    theirs = families.build(name)
    _, graphdef, params, _ = load_ours(families.save(theirs, tmp_path))
    tokens, mask = families.tokens(), np.ones((2, families.LENGTH), np.int32)
    mask[1, :4] = 0
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
    expected = families.logits(theirs, tokens, attention_mask=mask, position_ids=positions)
    ours = our_logits(graphdef, params, tokens, segment_ids=mask, positions=positions)
    np.testing.assert_allclose(ours[mask == 1], expected[mask == 1], atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "qwen2_mixed", "gemma2", "mixtral", "gpt_oss", "deepseek_v2_groups"])
def test_packed_texts_do_not_see_each_other(name, tmp_path):
    theirs = families.build(name)
    _, graphdef, params, _ = load_ours(families.save(theirs, tmp_path))
    tokens, lengths = families.tokens(), (5, families.LENGTH - 5)
    expected = [families.logits(theirs, part) for part in np.split(tokens, [lengths[0]], axis=1)]
    packing = {
        "segment_ids": np.repeat([[1, 2]], lengths, axis=1),
        "positions": np.concatenate([np.arange(length) for length in lengths])[None],
    }
    packing = {key: np.broadcast_to(value, tokens.shape).astype(np.int32) for key, value in packing.items()}
    ours = our_logits(graphdef, params, tokens, **packing)
    np.testing.assert_allclose(ours, np.concatenate(expected, axis=1), atol=1e-4)


WITHOUT_EXTRAS = {
    "qwen3_biases": {},
    "gpt2": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    # transformers leaves the loss that balances experts out unless asked for the routers' logits.
    "qwen3_moe": {"router_aux_loss_coef": 0.0},
    "gpt_oss": {"router_aux_loss_coef": 0.0},
}


@pytest.mark.parametrize("name", WITHOUT_EXTRAS)
def test_gradients_agree(name, tmp_path, record_property):
    from safetensors.numpy import load_file

    theirs = families.build(name, **WITHOUT_EXTRAS[name])
    config, graphdef, params, _ = load_ours(families.save(theirs, tmp_path))
    tokens = families.tokens()
    theirs(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.backward()
    batch = {
        "decoder_input_tokens": jnp.asarray(tokens[:, :-1]),
        "decoder_target_tokens": jnp.asarray(tokens[:, 1:]),
        "decoder_loss_weights": jnp.ones((2, families.LENGTH - 1)),
    }
    loss = lambda params: batch_loss(LossConfig(), graphdef, params, batch)[0]
    gradient = jax.jit(jax.grad(loss))(params)

    # A gradient has the layout of its parameter, so it can be written like one, here and there.
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
    family, size = read_config(tmp_path).family, config.vocab_size
    export_params(tmp_path / "ours", family, config, gradient, vocab_size=size, dtype="float32", max_file_bytes=10**9)
    for parameter in theirs.parameters():
        parameter.data = parameter.grad
    families.save(theirs, tmp_path / "theirs")
    ours, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs"))
    assert ours.keys() == expected.keys()
    # Experts that no token chose, and keys' biases, which move all products of a query alike, have none but rounding.
    floor = 1e-4 * max(np.abs(value).max() for value in expected.values())
    errors = {
        name: np.abs(ours[name] - value).max() / max(np.abs(value).max(), floor) for name, value in expected.items()
    }
    report(record_property, f"{name} gradient", max(errors.values()))
    assert max(errors.values()) < 1e-3


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_sharded_and_unrolled_parameters_are_the_same(name, tmp_path):
    theirs = families.build(name)
    families.save(theirs, tmp_path)
    config, graphdef, params, _ = load_ours(tmp_path)
    _, _, sharded, _ = load_ours(tmp_path, mesh=build_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))
    jax.tree.map(np.testing.assert_array_equal, params, sharded)
    kernel = sharded["stack"]["scanned"]["0"]["mixer"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (config.stack.num_layers, 4, 2, 4)
    unrolled_config, unrolled_graphdef, unrolled, _ = load_ours(tmp_path, scan_layers=False)
    tokens = families.tokens()
    np.testing.assert_allclose(
        our_logits(unrolled_graphdef, unrolled, tokens), our_logits(graphdef, params, tokens), atol=1e-5
    )
    (tmp_path / "again").mkdir()
    family = read_config(tmp_path).family
    export_params(
        tmp_path / "again", family, unrolled_config, unrolled,
        vocab_size=families.VOCAB, dtype="float32", max_file_bytes=10**9,
    )  # fmt: skip
    (tmp_path / "again" / CONFIG).write_text((tmp_path / CONFIG).read_text())
    np.testing.assert_array_equal(
        families.logits(families.load(tmp_path / "again"), tokens), families.logits(theirs, tokens)
    )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_padded_vocabulary_hardly_changes_probabilities_and_is_not_exported(name, tmp_path):
    theirs = families.build(name)
    families.save(theirs, tmp_path)
    config, graphdef, params, _ = load_ours(tmp_path, padded=32)
    tokens, size = families.tokens(), families.VOCAB
    expected, ours = families.logits(theirs, tokens), our_logits(graphdef, params, tokens)
    assert ours.shape[-1] == 32
    np.testing.assert_allclose(ours[..., :size], expected, atol=1e-4)
    change = jax.nn.logsumexp(ours, -1) - jax.nn.logsumexp(expected, -1)
    assert np.all(change < np.log(32 / size) + 1e-4)
    (tmp_path / "again").mkdir()
    family, fields = choose_family(dataclasses.replace(config, vocab_size=size), 64)
    (tmp_path / "again" / CONFIG).write_text(json.dumps(fields))
    export_params(tmp_path / "again", family, config, params, vocab_size=size, dtype="float32", max_file_bytes=10**9)
    np.testing.assert_array_equal(families.logits(families.load(tmp_path / "again"), tokens), expected)


def test_bfloat16_files_come_back_bit_for_bit(tmp_path):
    from safetensors.torch import load_file

    families.save(families.build("llama").to(torch.bfloat16), tmp_path)
    config, _, params, dtype = load_ours(tmp_path)
    assert (config.dtype, dtype) == ("bfloat16", "bfloat16")
    (tmp_path / "again").mkdir()
    family = read_config(tmp_path).family
    export_params(
        tmp_path / "again", family, config, params, vocab_size=families.VOCAB, dtype=dtype, max_file_bytes=10**9
    )
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path, tmp_path / "again"))
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_files_of_a_bare_model_with_buffers_are_read(tmp_path):
    """As those of GPT-2: no prefix, and the causal mask beside the weights."""
    from safetensors.numpy import load_file, save_file

    theirs = families.build("gpt2")
    families.save(theirs, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file({**bare, "h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32)}, tmp_path / "model.safetensors")
    _, graphdef, params, _ = load_ours(tmp_path)
    tokens = families.tokens()
    np.testing.assert_allclose(our_logits(graphdef, params, tokens), families.logits(theirs, tokens), atol=1e-4)


ROTARY = {
    "new": {"rope_parameters": families.LLAMA3},
    "old": {
        "rope_theta": 5000.0,
        "rope_scaling": {name: value for name, value in families.LLAMA3.items() if name != "rope_theta"},
    },
    "yarn": {"rope_parameters": {**families.YARN, "truncate": False, "attention_factor": 1.5}},
    "yarn_defaults": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4}},
    "dynamic": {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2}},
    "yarn_mscale": {
        "rope_theta": 1e4,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "original_max_position_embeddings": 128,
        },
    },
    "longrope": {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + i for i in range(16)],
            "long_factor": [2.0 + i for i in range(16)],
        },
        "original_max_position_embeddings": 1024,
    },
    "linear": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}},
    "default": {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    "absent": {},
}


@pytest.mark.parametrize("fields", ROTARY.values(), ids=ROTARY)
def test_rotary_fields_mean_what_they_mean_to_transformers(fields, tmp_path):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = {**families.SMALL, "head_dim": 32, "max_position_embeddings": 4096, **fields}
    embedding = LlamaRotaryEmbedding(transformers.LlamaConfig(**json.loads(json.dumps(fields))))
    rotary = read_rotary(Fields(tmp_path, fields))
    np.testing.assert_allclose(rotary.frequencies(16, 1), embedding.inv_freq.numpy(), rtol=1e-5)
    magnitude = getattr(rotary.scaling, "magnitude", 1.0)
    np.testing.assert_allclose(magnitude, embedding.attention_scaling, rtol=1e-6)

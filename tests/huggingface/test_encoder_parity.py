"""Encoders and encoder-decoders against transformers: logits, gradients, and files there and back."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest

from t5x_like.huggingface.directory import CONFIG, choose_family, export_params, import_params, read_config
from t5x_like.learning.loss import LossConfig, batch_loss
from t5x_like.models.model_spec import model_spec
from t5x_like.models.parameters import merge
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.sharding.placement import Placement

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
torch = pytest.importorskip("torch", reason="needs the extra: hf")
transformers = pytest.importorskip("transformers", reason="needs the extra: hf")

pytestmark = pytest.mark.hf

VOCAB, LENGTH, TARGETS = 29, 13, 7
ONE_DEVICE = build_mesh(MeshConfig(), jax.devices()[:1])

BERT = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 40,
}  # fmt: skip
MODERN = {**BERT, "num_hidden_layers": 7, "local_attention": 6}
T5 = {
    "vocab_size": VOCAB, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0,
}  # fmt: skip

MODELS = {
    "bert": ("BertForPreTraining", BERT),
    "bert_masked_lm": ("BertForMaskedLM", {**BERT, "hidden_act": "gelu_new", "type_vocab_size": 3}),
    "roberta": ("RobertaForMaskedLM", {**BERT, "type_vocab_size": 1, "pad_token_id": 1}),
    "modernbert": ("ModernBertForMaskedLM", {**MODERN, "pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1}),
    "modernbert_biases": (
        "ModernBertForMaskedLM",
        {**MODERN, "norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True,
         "decoder_bias": False, "pad_token_id": 0},
    ),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5_1_1": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "ul2": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-silu", "tie_word_embeddings": False}),
    "mt5": ("MT5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}  # fmt: skip
SECOND_HALF = slice(8, None)


def build(name):
    cls, fields = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, cls.split("For")[0] + "Config")(**fields)
    model = getattr(transformers, cls)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    model, directory = build(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return request.param, directory, model


def load_ours(directory):
    family, config, _ = read_config(directory)
    spec = model_spec(config)
    params, dtype = import_params(directory, family, config, spec, vocab_size=VOCAB, placement=Placement(ONE_DEVICE))
    return family, config, spec.graphdef, params, dtype


def draw(seed, length):
    return np.random.default_rng(seed).integers(3, VOCAB, (2, length))


def inputs(name):
    """A batch of ours and the same for theirs; the second row is padded."""
    mask = np.ones((2, LENGTH), np.int32)
    mask[1, SECOND_HALF] = 0
    tokens = np.where(mask, draw(0, LENGTH), 1 if name == "roberta" else 0)
    ours = {"encoder_input_tokens": tokens, "encoder_segment_ids": mask}
    theirs = {"input_ids": tokens, "attention_mask": mask}
    if name.startswith("bert"):
        ours["encoder_token_types"] = theirs["token_type_ids"] = (np.arange(LENGTH) > 4).astype(int)[None].repeat(2, 0)
    if "t5" in name or name == "ul2":
        ours["decoder_input_tokens"] = theirs["decoder_input_ids"] = draw(1, TARGETS)
    return ours, {key: torch.tensor(value) for key, value in theirs.items()}


def our_scores(graphdef, params, batch):
    @jax.jit
    def run(params):
        model = merge(graphdef, params)
        output = model.run(batch)
        pairs = getattr(model.head, "pairs", None)
        scores = model.head.scores(output.x, model.embedding[...])
        return scores, None if pairs is None else pairs(output.x, output.tokens.is_token, None)

    return run(params)


def test_scores_agree_both_ways(pair, tmp_path):
    from safetensors.numpy import load_file

    name, directory, theirs = pair
    family, config, graphdef, params, dtype = load_ours(directory)
    batch, arguments = inputs(name)
    with torch.no_grad():
        expected = theirs(**arguments)
    scores, pairs = our_scores(graphdef, params, batch)
    logits = getattr(expected, "prediction_logits", None)
    logits = (expected.logits if logits is None else logits).numpy()
    real = np.ones(logits.shape[:2], bool) if "decoder_input_tokens" in batch else batch["encoder_segment_ids"] == 1
    difference = np.abs(np.asarray(scores) - logits)[real].max()
    print(f"{name} logits: {difference:.2e}")
    assert difference < 1e-4
    if pairs is not None:
        assert np.abs(np.asarray(pairs) - expected.seq_relationship_logits.numpy()).max() < 1e-4

    chosen, fields = choose_family(config, 40)
    assert chosen.model_type == family.model_type or name in ("mt5", "roberta")
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    options = {"vocab_size": VOCAB, "dtype": dtype, "max_file_bytes": 10**9}
    export_params(tmp_path, family, config, params, **options)
    before, after = (load_file(path / "model.safetensors") for path in (directory, tmp_path))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.tobytes() == after[key].tobytes(), key
    (tmp_path / CONFIG).write_text((directory / CONFIG).read_text())
    again, info = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        repeated = again.eval()(**arguments)
    np.testing.assert_array_equal(repeated[0].numpy(), expected[0].numpy())


@pytest.mark.parametrize("name", ["bert_masked_lm", "t5_1_1"])
def test_gradients_agree(name, tmp_path):
    from safetensors.numpy import load_file

    theirs = build(name)
    theirs.save_pretrained(tmp_path)
    family, config, graphdef, params, _ = load_ours(tmp_path)
    batch, arguments = inputs(name)
    if name == "t5_1_1":
        labels = draw(2, TARGETS)
        side = "decoder"
    else:
        labels = np.where(batch["encoder_segment_ids"] == 1, draw(2, LENGTH), -100)
        side = "encoder"
    theirs(**arguments, labels=torch.tensor(labels)).loss.backward()
    batch[f"{side}_target_tokens"] = np.maximum(labels, 0)
    batch[f"{side}_loss_weights"] = (labels >= 0).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda params: batch_loss(LossConfig(), graphdef, params, batch)[0]))(params)
    (tmp_path / "gradient").mkdir()
    export_params(
        tmp_path / "gradient", family, config, gradient, vocab_size=VOCAB, dtype="float32", max_file_bytes=10**9
    )
    ours = load_file(tmp_path / "gradient" / "model.safetensors")
    expected = {key: value.grad.numpy() for key, value in theirs.named_parameters()}
    # Some gradients are zero but for rounding: keys' biases shift all products of a query alike.
    floor = 1e-4 * max(np.abs(value).max() for value in expected.values())
    errors = {key: np.abs(ours[key] - expected[key]).max() / max(np.abs(expected[key]).max(), floor) for key in ours}
    print(f"{name} gradient: {max(errors.values()):.2e}")
    assert max(errors.values()) < 1e-3, errors


def test_a_model_of_our_own_finds_its_family(pair):
    name, directory, _ = pair
    family, config, _ = read_config(directory)
    fields = choose_family(dataclasses.replace(config, dtype="bfloat16"), 40)[1]
    assert fields["model_type"] == {"mt5": "t5", "roberta": "roberta"}.get(name, family.model_type)

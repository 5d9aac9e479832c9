"""Noise on inputs: how much of it, what it leaves alone, and that it depends on nothing but seed, step and row."""

import json

import numpy as np
import pytest

from t5x_like.data.augmentation import Augmentation, SubwordSampling, TokenNoise
from t5x_like.data.build import build_data
from t5x_like.data.config import DataConfig
from t5x_like.data.objectives.causal import CausalLM
from t5x_like.data.objectives.corruption import SpanCorruption
from t5x_like.data.objectives.examples import Classification, TextToText
from t5x_like.data.sources import TextSource
from t5x_like.data.subwords import SentencePieceConfig
from t5x_like.data.tasks.labels import ClassificationTask
from t5x_like.data.tasks.records import JsonRecords
from t5x_like.data.tasks.texts import TextToTextTask
from t5x_like.data.tokenizers import ByteTokenizerConfig, SpecialTokens
from t5x_like.errors import UserError

BYTES = ByteTokenizerConfig(special_tokens=SpecialTokens(names=("[MASK]", "[CLS]", "[SEP]"), num_sentinels=20))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    words = ["one", "sentence", "of", "several", "words", "that", "tokenizers", "cut"]
    rows = [{"text": " ".join(rng.choice(words, 12)), "label": int(i % 2)} for i in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def pairs(folder, *augmentations, **options):
    task = ClassificationTask(
        records=JsonRecords(train=f"{folder}/rows.jsonl"), first="{text}", second="{text}", labels=("no", "yes")
    )
    return build(task, Classification(), augmentations, **options)


def build(source, objective, augmentations, tokenizer=BYTES, length=192, layout="documents", **options):
    fields = {"sequence_length": length, "batch_size": 16, "layout": layout, "tokenizer": tokenizer, **options}
    return build_data(DataConfig(source=source, objective=objective, augmentations=augmentations, **fields), None)


def test_masks_and_replacements_have_their_rates(folder):
    clean = pairs(folder).train.batch(0)["encoder_input_tokens"]
    data = pairs(folder, TokenNoise(mask_rate=0.2, replace_rate=0.1))
    noisy = data.train.batch(0)["encoder_input_tokens"]
    is_text = (clean >= 3) & (clean < 259)
    np.testing.assert_array_equal(clean[~is_text], noisy[~is_text])
    masked = noisy == data.tokenizer.mask_id
    assert masked[is_text].mean() == pytest.approx(0.2, abs=0.03)
    assert ((noisy != clean) & ~masked)[is_text].mean() == pytest.approx(0.08, abs=0.03)


def test_tokens_are_dropped_and_rows_close_up(folder):
    clean, data = pairs(folder).train.batch(0), pairs(folder, TokenNoise(drop_rate=0.3))
    noisy = data.train.batch(0)
    for row in range(16):
        before = clean["encoder_input_tokens"][row][clean["encoder_segment_ids"][row] > 0]
        after = noisy["encoder_input_tokens"][row][noisy["encoder_segment_ids"][row] > 0]
        text = data.tokenizer.decode(after)
        assert text.startswith("[CLS]")
        assert text.count("[SEP]") == 2
        assert len(after) < len(before)
        # In the order in which they stood.
        remaining = iter(before.tolist())
        assert all(token in remaining for token in after.tolist())
        np.testing.assert_array_equal(noisy["encoder_positions"][row][: len(after)], np.arange(len(after)))
        types = noisy["encoder_token_types"][row][: len(after)]
        assert types.tolist() == sorted(types.tolist())
        assert types.sum() == len(text.split("[SEP]")[1]) + 1
    np.testing.assert_array_equal(clean["labels"], noisy["labels"])


def test_tokens_change_places_nearby_and_within_their_text(folder):
    clean, data = pairs(folder).train.batch(0), pairs(folder, TokenNoise(shuffle_distance=3))
    noisy = data.train.batch(0)["encoder_input_tokens"]
    clean = clean["encoder_input_tokens"]
    assert (noisy != clean).mean() > 0.2
    np.testing.assert_array_equal(np.sort(noisy, axis=1), np.sort(clean, axis=1))
    for special in (data.tokenizer.cls_id, data.tokenizer.sep_id):
        np.testing.assert_array_equal(noisy == special, clean == special)


def test_it_depends_on_seed_step_and_row_alone(folder):
    noise = TokenNoise(mask_rate=0.1, replace_rate=0.1, drop_rate=0.1, shuffle_distance=2)
    data = pairs(folder, noise)
    whole = data.train.batch(5)
    for name, values in pairs(folder, noise).train.batch(5, slice(4, 9)).items():
        np.testing.assert_array_equal(values, whole[name][4:9])
    epoch = data.train.layout.num_rows / 16
    assert data.fingerprint != pairs(folder).fingerprint
    other = pairs(folder, noise, seed=1).train.batch(5)
    assert (other["encoder_input_tokens"] != whole["encoder_input_tokens"]).any()
    assert epoch > 1
    clean, noisy = pairs(folder).validation.batch(0), data.validation.batch(0)
    np.testing.assert_array_equal(clean["encoder_input_tokens"], noisy["encoder_input_tokens"])


def test_packed_texts_keep_apart(folder):
    (folder / "text.txt").write_text("\n\n".join(f"text number {i} of many" for i in range(80)))
    source = TextSource(files=f"{folder}/text.txt", document_separator="\n\n")
    data = build(source, SpanCorruption(), (TokenNoise(drop_rate=0.3),), layout="pack", length=64)
    batch = data.train.batch(0)
    segments, positions = batch["encoder_segment_ids"], batch["encoder_positions"]
    assert segments.max() > 1
    for row in range(len(segments)):
        for segment in range(1, segments[row].max() + 1):
            here = positions[row][segments[row] == segment]
            np.testing.assert_array_equal(here, np.arange(len(here)))
            assert len(here)


def test_a_decoder_keeps_its_places(folder):
    (folder / "text.txt").write_text("some text to read " * 200)
    source, options = TextSource(files=f"{folder}/text.txt"), {"layout": "concatenate", "split": "position"}
    clean = build(source, CausalLM(), (), **options).train.batch(0)
    noisy = build(source, CausalLM(), (TokenNoise(mask_rate=0.5),), **options).train.batch(0)
    np.testing.assert_array_equal(clean["decoder_target_tokens"], noisy["decoder_target_tokens"])
    assert (clean["decoder_input_tokens"] != noisy["decoder_input_tokens"]).mean() == pytest.approx(0.5, abs=0.1)
    with pytest.raises(UserError, match="moves tokens, but decoder_target_tokens say where they stand"):
        build(source, CausalLM(), (TokenNoise(drop_rate=0.1),), **options)


def test_words_are_cut_in_other_ways_with_the_same_text(folder):
    task = TextToTextTask(records=JsonRecords(train=f"{folder}/rows.jsonl"), inputs="{text}", targets="{text}")
    tokenizer = SentencePieceConfig(vocab_size=290, model_type="unigram")
    options = {"tokenizer": tokenizer, "length": 128}
    clean = build(task, TextToText(), (), **options)
    data = build(task, TextToText(), (SubwordSampling(alpha=0.1),), **options)
    first, again, epoch = (data.train.batch(step)["encoder_input_tokens"] for step in (0, 0, 4))
    np.testing.assert_array_equal(first, again)
    plain = clean.train.batch(0)["encoder_input_tokens"]
    decode = data.tokenizer.decode
    assert [decode(row) for row in first] == [decode(row) for row in plain]
    assert np.mean((first != plain).any(axis=1)) > 0.8
    assert epoch.shape == first.shape
    with pytest.raises(UserError, match="BPE has one way"):
        build(task, TextToText(), (SubwordSampling(),), tokenizer=SentencePieceConfig(vocab_size=290))


class BackTranslation(Augmentation):
    """What a user would write: another wording of a row, from a table."""

    def build(self, tokenizer, features):
        table = {ord("o") + 3: ord("0") + 3}

        def augment(rows, keys):
            tokens = rows["encoder_input_tokens"]
            return rows | {"encoder_input_tokens": np.vectorize(lambda token: table.get(token, token))(tokens)}

        return augment


def test_ones_own(folder):
    data = pairs(folder, BackTranslation())
    assert "0ne" in data.tokenizer.decode(data.train.batch(0)["encoder_input_tokens"].ravel())


@pytest.mark.parametrize(
    "fields", [{}, {"mask_rate": 1.0}, {"drop_rate": -0.1}, {"shuffle_distance": -1}], ids=lambda fields: str(fields)
)
def test_mistakes(fields):
    with pytest.raises(UserError, match="TokenNoise"):
        TokenNoise(**fields)

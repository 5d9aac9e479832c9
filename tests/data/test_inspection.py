import io
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from t5x_like.data.build import build_data
from t5x_like.data.config import DataConfig
from t5x_like.data.inspection import BatchView, browser, terminal, token_names
from t5x_like.data.objectives.causal import CausalLM, PrefixLM
from t5x_like.data.objectives.corruption import SpanCorruption
from t5x_like.data.objectives.masked import MaskedLM
from t5x_like.data.sources import TextSource
from t5x_like.data.tokenizers import ByteTokenizer, ByteTokenizerConfig, SpecialTokens

SPECIAL = SpecialTokens(names=("[MASK]", "[CLS]", "[SEP]"), num_sentinels=20)


def build(tmp_path, objective, layout="pack", length=64):
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"Text <b>{number}</b> & more.\n" * (number % 4 + 1))
    config = DataConfig(
        source=TextSource(files=f"{tmp_path}/*.txt"),
        tokenizer=ByteTokenizerConfig(special_tokens=SPECIAL),
        objective=objective,
        layout=layout,
        sequence_length=length,
        batch_size=4,
        validation_fraction=0.2,
    )
    return build_data(config, None)


def shown(stream):
    return "".join(token.text for token in stream.tokens)


def test_the_text_of_a_packed_batch(tmp_path):
    data = build(tmp_path, CausalLM())
    batch = data.train.batch(0)
    view = BatchView(batch, data.tokenizer)
    for row in range(4):
        [stream] = view.row(row)
        targets = batch["decoder_target_tokens"][row]
        weights = batch["decoder_loss_weights"][row]
        assert shown(stream).replace("<eos>", "") == data.tokenizer.decode(targets[weights > 0])
        assert len(stream.tokens) + stream.num_padding == 64
        assert [token.segment for token in stream.tokens] == [s for s in batch["decoder_segment_ids"][row] if s]
        assert all(token.weight == 1 and not token.prediction for token in stream.tokens)
    facts = view.facts()
    filled = np.mean(batch["decoder_segment_ids"] > 0)
    assert facts["decoder tokens"].startswith(f"4 x 64, {filled:.1%} filled")
    assert facts["hash"] == BatchView(data.train.batch(0), data.tokenizer).facts()["hash"]
    assert facts["hash"] != BatchView(data.train.batch(1), data.tokenizer).facts()["hash"]


def test_masked_tokens_lead_to_what_is_predicted(tmp_path):
    data = build(tmp_path, MaskedLM(pairs="next"), "documents")
    batch = data.train.batch(0)
    view = BatchView(batch, data.tokenizer)
    [stream] = view.row(0)
    assert shown(stream).startswith("[CLS]")
    masked = [token for token in stream.tokens if token.text == "[MASK]"]
    assert masked
    assert all(len(token.prediction) >= 1 for token in masked)
    assert sum(token.weight > 0 for token in stream.tokens) == batch["encoder_loss_weights"][0].sum()
    assert view.labels(0) == {name: float(batch[name][0]) for name in ("pair_labels", "pair_weights")}


def test_both_sides_of_an_encoder_decoder(tmp_path):
    data = build(tmp_path, SpanCorruption(), "concatenate")
    encoder, decoder = BatchView(data.train.batch(0), data.tokenizer).row(0)
    assert "<extra_id_0>" in shown(encoder)
    assert shown(decoder).startswith("<extra_id_0>")
    assert not any(token.prediction for token in decoder.tokens)
    assert all(token.weight == 0 for token in encoder.tokens)


def test_a_prefix_is_not_predicted(tmp_path):
    data = build(tmp_path, PrefixLM(), "concatenate")
    [stream] = BatchView(data.train.batch(0), data.tokenizer).row(0)
    weights = [token.weight for token in stream.tokens]
    assert weights == sorted(weights)
    assert set(weights) == {0, 1}


class Parts(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.inside = set(), [], 0

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.inside += tag == "p"

    def handle_endtag(self, tag):
        self.inside -= tag == "p"

    def handle_data(self, data):
        if self.inside:
            self.text.append(data)


def test_pages_and_terminals_show_the_same_text(tmp_path):
    data = build(tmp_path, CausalLM())
    view = BatchView(data.train.batch(0), data.tokenizer)
    parts = Parts()
    parts.feed(browser(view, range(2), "title <script>"))
    assert "script" not in parts.tags
    expected = [shown(stream) + f" + {stream.num_padding} of padding" for row in range(2) for stream in view.row(row)]
    assert "".join(parts.text) == "".join(expected)
    assert "<b>" in expected[0]
    out = io.StringIO()
    console = Console(file=out, width=10_000, highlight=False, force_terminal=False)
    for line in terminal(view, range(2)):
        console.print(line)
    assert all(text in out.getvalue() for text in expected)


def test_names_of_tokens():
    names = token_names(SPECIAL.extend(ByteTokenizer()))
    assert names[:3] == ["<pad>", "<eos>", "<2>"]
    assert names[3 + ord("a")] == "a"
    assert names[3 + 0xC3] == "\\xc3"
    assert names[259:261] == ["[MASK]", "[CLS]"]
    assert names[-1] == "<extra_id_0>"


@pytest.mark.parametrize("layout", ["pack", "concatenate"])
def test_rows_without_text_are_padding(tmp_path, layout):
    data = build(tmp_path, CausalLM(), layout)
    last = data.validation.batch(data.validation.num_batches - 1)
    view = BatchView({name: np.zeros_like(values) for name, values in last.items()}, data.tokenizer)
    [stream] = view.row(0)
    assert (stream.tokens, stream.num_padding) == ([], 64)
    assert "0.0% filled" in view.facts()["decoder tokens"]

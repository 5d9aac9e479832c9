"""Conversations: what is learned of them is what the assistant says."""

import json

import pytest

from t5x_like.data.build import build_data
from t5x_like.data.config import DataConfig
from t5x_like.data.objectives.examples import AnswerLM
from t5x_like.data.tasks.chat import ChatTask
from t5x_like.data.tasks.records import JsonRecords
from t5x_like.data.tokenizers import ByteTokenizerConfig, SpecialTokens
from t5x_like.errors import UserError

pytest.importorskip("jinja2")

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye <|im_end|>"},
    {"role": "assistant", "content": "So long."},
]
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
BYTES = ByteTokenizerConfig(special_tokens=SpecialTokens(names=("<|im_start|>", "<|im_end|>")))


def data_of(folder, length=256, messages=MESSAGES, **options):
    path = folder / "chats.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    task = ChatTask(records=JsonRecords(train=str(path), validation=str(path)), **options)
    config = DataConfig(
        source=task, tokenizer=BYTES, objective=AnswerLM(), layout="pack", sequence_length=length, batch_size=1
    )
    return build_data(config, None)


def test_only_answers_are_learned(tmp_path):
    data = data_of(tmp_path)
    row = {name: values[0] for name, values in data.validation.batch(0).items()}
    decode = data.tokenizer.decode
    whole = decode(row["decoder_target_tokens"])
    assert whole.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n")
    learned = decode(row["decoder_target_tokens"][row["decoder_loss_weights"] > 0])
    assert learned == "Hello.<|im_end|>\nSo long.<|im_end|>\n"
    starts = row["decoder_target_tokens"] == data.tokenizer.special_id("<|im_start|>")
    assert starts.sum() == 5
    assert data.corpora[0].validation.read_references() == [["Hello."]]


def test_templates_of_other_families(tmp_path):
    path = tmp_path / "chat_template.jinja"
    path.write_text(GEMMA.replace("{% continue %}", ""))
    data = data_of(tmp_path, template=str(path))
    row = {name: values[0] for name, values in data.validation.batch(0).items()}
    learned = data.tokenizer.decode(row["decoder_target_tokens"][row["decoder_loss_weights"] > 0])
    assert learned == "Hello.<end_of_turn>\nSo long.<end_of_turn>\n"


def test_the_end_of_a_long_conversation_is_lost_not_its_answers(tmp_path):
    row = data_of(tmp_path, length=32).validation.batch(0)
    assert row["decoder_loss_weights"].sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{% for %}"}, "is not Jinja"),
        ({"template": "none.jinja"}, "is no template"),
        ({"template": "{{ messages.__class__.__mro__ }}"}, "cannot write it"),
        ({"template": "{{ raise_exception('no system') }}"}, "no system"),
        ({"template": "{{ messages | length }}"}, "otherwise when it goes on"),
        ({"messages": MESSAGES[:2]}, "no message has the role 'assistant'"),
    ],
)
def test_mistakes(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        data_of(tmp_path, **options)

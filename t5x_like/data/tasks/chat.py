"""Conversations: a chat template writes them, and the answers are what is learned."""

import functools
from typing import Any

import numpy as np

from t5x_like.configurable import configurable
from t5x_like.data.extras import require
from t5x_like.data.tasks.records import Record, Records
from t5x_like.data.tasks.task import Example, Metric, Task
from t5x_like.data.tokenizers import Tokenizer, encode_marked
from t5x_like.errors import UserError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@configurable
class ChatTask(Task):
    """Records with a list of messages, each with a role and a content; what the assistant says is learned.

    A template is Jinja as Hugging Face's `tokenizer.apply_chat_template` reads it, run in a sandbox. Special tokens
    that stand in it by name become such tokens: the tokenizer must have them (SpecialTokens.names = ('<|im_start|>',
    '<|im_end|>') for the default).

    Attributes:
      records: The records.
      messages: The value that is the list of messages.
      role: Whose messages are learned.
      template: The chat template, or the path of a file that holds it (`chat_template.jinja`).
      metrics: How what the model answers first is compared with the answer that it learns.
    """

    records: Records
    messages: str = "messages"
    role: str = "assistant"
    template: str = CHATML
    metrics: tuple[Metric, ...] = ()

    # Of `targets` those that are learned weigh 1: answers, and not what is said between them.
    field_names = ("inputs", "targets", "target_weights")

    def texts(self, record: Record) -> list[str]:
        return [message["content"] for message in record[self.messages]]

    def encode(self, record: Record, tokenizer: Tokenizer) -> Example:
        pieces, answer = self._pieces(record[self.messages])
        tokens = [encode_marked(tokenizer, text) for text in pieces]
        weights = [np.full(len(ids), number % 2, np.int32) for number, ids in enumerate(tokens)]
        join = lambda parts: np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)
        fields = {"inputs": join(tokens[:1]), "targets": join(tokens[1:]), "target_weights": join(weights[1:])}
        return Example(fields, {}, [answer])

    def _pieces(self, messages: list[dict[str, Any]]) -> tuple[list[str], str]:
        """What is read, what is learned, what is read, and so on; and the first answer."""
        render = _compiled(self.template)
        pieces, done, first = [], "", None
        for number, message in enumerate(messages):
            if message["role"] != self.role:
                continue
            before = render(messages=messages[:number], add_generation_prompt=True)
            behind = render(messages=messages[: number + 1], add_generation_prompt=False)
            if not before.startswith(done) or not behind.startswith(before):
                raise ValueError("its template writes a conversation otherwise when it goes on")
            pieces += [before[len(done) :], behind[len(before) :]]
            done, first = behind, message["content"] if first is None else first
        if first is None:
            raise ValueError(f"no message has the role {self.role!r}")
        return pieces, first


@functools.cache
def _compiled(template: str):
    """The template's function (messages, add_generation_prompt) -> text."""
    jinja2, sandbox = (require(name, "ChatTask", "tasks") for name in ("jinja2", "jinja2.sandbox"))
    if "{" not in template:
        try:
            with open(template, encoding="utf-8") as file:
                template = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"ChatTask.template is no template, and no file that holds one: {error}.") from error

    def raise_exception(message):
        raise ValueError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"ChatTask.template is not Jinja: {error}.") from error

    def render(**values) -> str:
        try:
            return compiled.render(bos_token="", eos_token="", **values).encode(errors="replace").decode()
        except jinja2.TemplateError as error:
            raise ValueError(f"its template cannot write it ({error})") from error

    return render

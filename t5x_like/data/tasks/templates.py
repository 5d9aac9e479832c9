"""Templates: text with fields of a record in braces. They are data: they name values, and reach nothing else."""

import string
from collections.abc import Mapping
from typing import Any

from t5x_like.errors import UserError


class _Formatter(string.Formatter):
    def get_field(self, field_name, args, kwargs):
        if "." in field_name:
            raise UserError(f"The template's field {{{field_name}}} has a dot: name a value, or one in it: {{a[b]}}.")
        return super().get_field(field_name, args, kwargs)

    def format_field(self, value, format_spec):
        if not format_spec.startswith("by "):
            return super().format_field(value, format_spec)
        step = format_spec.removeprefix("by ")
        return f"{round(float(value) / float(step)) * float(step):.{len(step.partition('.')[2])}f}"


_FORMATTER = _Formatter()


def fill(template: str, record: Mapping[str, Any]) -> str:
    """The template with the record's values: `{question}`, `{answers[text][0]}`, `{score:.1f}`, `{score:by 0.2}`.

    `by` rounds to a multiple. What cannot be written as UTF-8 becomes `?`.

    Raises:
      LookupError: for a value that the record has not got.
    """
    return _FORMATTER.vformat(template, (), record).encode(errors="replace").decode()


def value_of(field: str, record: Mapping[str, Any]) -> Any:
    """The value that `{field}` stands for; LookupError if there is none."""
    return _FORMATTER.get_field(field, (), record)[0]


def check_template(field: str, template: str) -> None:
    """UserError, which names the field, for braces that do not match, and for a template without any field."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"{field}={template!r}: {error}; double the braces {{{{ }}}} that are text.") from error
    if not names or not all(names):
        raise UserError(f"{field}={template!r}: name values of the records in braces, e.g. {{sentence}}.")

"""Packages that only some corpora need."""

import importlib
from types import ModuleType

from t5x_like.errors import UserError


def require(module: str, user: str, extra: str = "prepare") -> ModuleType:
    """Imports a module of an extra; UserError, with the line to type, where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{user} needs the package of {module}, which is not installed: pip install 't5x_like[{extra}]' ({error})."
        ) from error

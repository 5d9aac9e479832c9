"""The tokenizer of a Hugging Face directory."""

import json
from pathlib import Path
from typing import Any

from t5x_like.data.json_tokenizers import JSON_FILE, TokenizerFileConfig
from t5x_like.data.subwords import SentencePieceFileConfig
from t5x_like.data.tokenizers import SpecialTokens, TokenizerConfig
from t5x_like.errors import UserError

SETTINGS = "tokenizer_config.json"
MODEL_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def tokenizer_config(directory: Path) -> TokenizerConfig:
    """The configuration of a directory's own tokenizer: of its tokenizer.json, or of its SentencePiece model.

    Raises:
      UserError: if it has neither, or its settings cannot be read.
    """
    settings = _settings(directory / SETTINGS)
    if (directory / JSON_FILE).is_file():
        names = {f"{kind}_token": _token(settings.get(f"{kind}_token")) for kind in ("bos", "eos", "pad")}
        return TokenizerFileConfig(file=str(directory / JSON_FILE), **names)
    for name in MODEL_FILES:
        if (directory / name).is_file():
            # T5's sentinels are not in its SentencePiece model.
            sentinels = SpecialTokens(num_sentinels=settings.get("extra_ids") or 0)
            return SentencePieceFileConfig(model_file=str(directory / name), special_tokens=sentinels)
    raise UserError(
        f"{directory} has no tokenizer that can be read: neither {JSON_FILE} nor {', '.join(MODEL_FILES)}. "
        f"Transformers writes {JSON_FILE} from other files: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
    )


def _settings(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _token(value: Any) -> str | None:
    """A token is written as its text, or as an object that has it."""
    return value.get("content") if isinstance(value, dict) else value

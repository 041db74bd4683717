"""What the ledger needs of a model directory: that it can be trained, and its tokenizer with the chat template."""

import hashlib
from pathlib import Path
from typing import Any

import jinja2

from common.architectures import check_architecture, read_object
from common.errors import ModelError
from common.tokenizer import load_tokenizer
from learner.ledger.template import ChatTemplate, Messages

_SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class ModelDirectory:
    """A Hugging Face checkpoint, as far as prompts are concerned."""

    def __init__(self, path: Path) -> None:
        """Checks the architecture and loads the tokenizer.

        Raises:
            ModelError: The directory is missing, broken, or of an architecture that is not supported.
        """
        self.path = path
        check_architecture(path)
        self._tokenizer = load_tokenizer(path / "tokenizer.json")
        self._template = _template(path)

    def digest(self) -> str:
        """A hash of what decides how a prompt is tokenized."""
        digest = hashlib.sha256()
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            file = self.path / name
            digest.update(file.read_bytes() if file.exists() else b"\0")
        return digest.hexdigest()

    def encode(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]

    def render(self, messages: Messages, kwargs: dict[str, Any]) -> str:
        """The chat template applied to messages, with the beginning of the answer.

        Raises:
            ModelError: The model has no chat template.
            jinja2.TemplateError: The template refuses the messages.
        """
        if self._template is None:
            raise ModelError(f"{self.path}: found no chat template, expected one for prompts that are chat messages")
        return self._template.render(messages, kwargs)


def _template(path: Path) -> ChatTemplate | None:
    """The template in chat_template.jinja, or else in tokenizer_config.json; None where there is neither."""
    config = read_object(path / "tokenizer_config.json", "") if (path / "tokenizer_config.json").exists() else {}
    legacy = path / "special_tokens_map.json"
    special = {**(read_object(legacy, "") if legacy.exists() else {}), **config}
    text = _read_text(path / "chat_template.jinja") or config.get("chat_template")
    if isinstance(text, list):
        text = next((entry["template"] for entry in text if entry.get("name") == "default"), None)
    if text is None:
        return None
    try:
        return ChatTemplate(text, {k: _token(special[k]) for k in _SPECIAL if special.get(k) is not None})
    except jinja2.TemplateError as error:
        raise ModelError(f"{path}: broken chat template: {error}") from error


def _read_text(path: Path) -> str:
    """The text of a file; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


def _token(value: str | dict[str, Any]) -> str:
    return value if isinstance(value, str) else str(value["content"])

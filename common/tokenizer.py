"""A model's tokenizer, without transformers (which would load torch)."""

from pathlib import Path

from tokenizers import Tokenizer

from common.architectures import read_object
from common.errors import ModelError


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a model directory's tokenizer.json, without truncation and padding.

    Raises:
        ModelError: The file is missing, or holds no tokenizer.
    """
    read_object(path, "the model's fast tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{path}: no tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

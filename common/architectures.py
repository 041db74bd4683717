"""The architectures that can be trained, and what a model directory says of its own."""

import json
from pathlib import Path
from typing import Any

from common.errors import ModelError

QWEN2, QWEN3, QWEN3_MOE = "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
ARCHITECTURES = (QWEN2, QWEN3, QWEN3_MOE)


def check_architecture(model_dir: Path) -> None:
    """Checks that the model in a directory can be trained.

    Raises:
        ModelError: The directory or its config is missing or broken, or its architecture is not supported.
    """
    if not model_dir.is_dir():
        raise ModelError(
            f"model: {model_dir}: not found, expected the directory of a Hugging Face checkpoint; nothing is "
            "downloaded: hf download NAME --local-dir DIR"
        )
    path = model_dir / "config.json"
    names = read_object(path, "the model's configuration").get("architectures")
    found = names[0] if isinstance(names, list) and names else "none"
    if found not in ARCHITECTURES:
        raise ModelError(f"{path}: found architecture {found}, expected one of {', '.join(ARCHITECTURES)}")


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file of a model directory; `what` it is, for the message.

    Raises:
        ModelError: The file is missing, or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path}: not found, expected {what}") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: found {type(value).__name__}, expected an object")
    return value

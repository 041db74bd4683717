"""`python -m tests.generator.held REQUEST RUN NAME`: a generator that holds one request to SGLang.

It says so by RUN/held, and goes on when RUN/go is there.
"""

import sys
from pathlib import Path
from typing import Any

from common.errors import exit_on_error
from generator.__main__ import main
from generator.arguments import prepare_environment
from tests.clocks import comes_about


def hold(name: str, run_dir: Path) -> None:
    """Replaces a method of SGLang's manager by one that waits."""
    prepare_environment(run_dir)
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    real: Any = getattr(TokenizerManager, name)

    async def call(self: TokenizerManager, request: object) -> object:
        (run_dir / "held").touch()
        await comes_about((run_dir / "go").exists, "leave to go on")
        return await real(self, request)

    setattr(TokenizerManager, name, call)


if __name__ == "__main__":
    with exit_on_error():
        hold(sys.argv.pop(1), Path(sys.argv[1]))
        main()

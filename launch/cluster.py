"""`python launch/cluster.py --layout local [--dry-run] [key=value ...]` starts a run and watches it to its end."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

LAUNCH = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == LAUNCH:  # as a script: no module of launch/ is a top-level one
    sys.path[0] = str(LAUNCH.parent)

from common.config import Config  # noqa: E402
from common.errors import ConfigError, exit_on_error  # noqa: E402
from common.layout import load_config  # noqa: E402

LAYOUTS = LAUNCH / "layouts"


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are told as all other errors are."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def main() -> None:
    """Does what the command line says."""
    with exit_on_error():
        try:
            sys.exit(launch(_parse(sys.argv[1:])))
        except KeyboardInterrupt:
            sys.exit(130)


def launch(arguments: argparse.Namespace) -> int:
    """Runs the layout, or shows what it would run; returns the exit code.

    Raises:
        SluiceError: The input is wrong, or the run failed.
    """
    config = resolve(arguments.layout, arguments.overrides)
    if arguments.dry_run:
        sys.stdout.write(_dry_run(config))
        return 0
    from launch.session import run

    return run(config)


def resolve(layout: str, overrides: list[str]) -> Config:
    """The configuration of a layout, by its name or path, with overrides.

    Raises:
        ConfigError: A file, key or value is wrong.
    """
    from launch.checks import resolve_paths

    is_path = "/" in layout or layout.endswith(".toml")
    path = Path(layout) if is_path else LAYOUTS / f"{layout}.toml"
    return resolve_paths(load_config(path, overrides), Path.cwd())


def _dry_run(config: Config) -> str:
    """All checks, and nothing started or written; the tiny model stands where it would be built."""
    from launch.builtin import tiny_directory, with_tiny_task
    from launch.checks import check_plan
    from launch.resolved import describe
    from launch.resume import find_earlier, resume_lines
    from launch.run_directory import run_path

    path = run_path(config)
    earlier = find_earlier(config, path)
    shape = check_plan(config)
    if not config.model and not config.made_for:
        config = with_tiny_task(config, tiny_directory(config))
    resumed = "" if earlier is None else "".join(f"# {line}\n" for line in resume_lines(earlier, config, path))
    return resumed + describe(config, path, shape)


def _parse(arguments: list[str]) -> argparse.Namespace:
    layouts = ", ".join(sorted(path.stem for path in LAYOUTS.glob("*.toml")))
    parser = _Parser(prog="python launch/cluster.py", description=__doc__)
    parser.add_argument("--layout", required=True, help=f"one of {layouts}, or the path of a TOML file")
    parser.add_argument("--dry-run", action="store_true", help="show what would be run, and start nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.lr=3e-6")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    main()

"""One run from its checks to its report."""

import asyncio
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from rich.console import Console

from common.config import Config
from common.errors import RunDirectoryError, SluiceError
from common.layout import write_resolved
from common.log import logger, start_logging
from common.memory import remove_abandoned
from common.rendezvous import RENDEZVOUS, RunKeys
from launch.builtin import build_once, tiny_directory, with_tiny_task
from launch.checks import check_inputs
from launch.display import Display
from launch.notices import notices
from launch.plan import ProcessPlan, plan_processes, prepare_command
from launch.processes import ProcessError, Supervisor, run_foreground
from launch.progress import Progress
from launch.report import write_report
from launch.resume import find_earlier, is_complete, resume_lines
from launch.run_directory import RunDirectory, run_path


def run(config: Config) -> int:
    """Runs what is configured; returns the exit code.

    Raises:
        SluiceError: It could not start, or a process failed for good.
    """
    signal.signal(signal.SIGTERM, _leave)
    display = Display(Console(highlight=False))
    path = run_path(config)
    earlier = find_earlier(config, path)
    remove_abandoned(Path(config.weights.dir))
    shape = check_inputs(config)
    if not config.model:
        tiny = tiny_directory(config)
        build_once(tiny, config, display.notice)
        config = with_tiny_task(config, tiny)
        check_inputs(config)
    if earlier is not None:
        display.notice("\n".join(resume_lines(earlier, config, path)))
        if is_complete(earlier, config):
            return 0
    for line in notices(config, shape):
        display.notice(f"note: {line}")
    directory = RunDirectory.claim(path, has_run=earlier is not None)
    _prepare(config, directory, display)
    try:
        plans = plan_processes(config, directory.path)
        code = asyncio.run(supervise(plans, config, directory.path, display))
    except SluiceError:
        with suppress(RunDirectoryError):  # what ended the run is what people have to hear of
            _report(directory, display)
        raise
    else:
        _report(directory, display)
        return code
    finally:
        remove_abandoned(Path(config.weights.dir))  # what processes left that were killed
        directory.release()


def _report(directory: RunDirectory, display: Display) -> None:
    """Tells how the run went.

    Raises:
        RunDirectoryError: The disk is full.
    """
    if text := write_report(directory.path):
        display.notice(text)


def _prepare(config: Config, directory: RunDirectory, display: Display) -> None:
    """Fills the run directory, or leaves nothing new of it.

    Raises:
        ProcessError: A prompt, or what belongs to it, is wrong.
    """
    try:
        write_resolved(config, directory.path)
        RunKeys.load_or_create(directory.path)
        (directory.path / RENDEZVOUS).unlink(missing_ok=True)
        display.notice(f"run directory: {directory.path}")
        display.notice(run_foreground(prepare_command(directory.path)))
    except BaseException:
        directory.discard()
        raise


async def supervise(plans: list[ProcessPlan], config: Config, run_dir: Path, display: Display) -> int:
    """Watches the processes until the run is over; the first signal stops it in order, the second at once.

    Raises:
        ProcessError: A process failed for good.
    """
    start_logging("launcher", run_dir)
    supervisor = Supervisor(
        plans,
        run_dir,
        max_restarts=config.run.max_restarts,
        stop_timeout_s=config.run.stop_timeout_s,
        notice=display.notice,
    )
    stop = asyncio.Event()
    received: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        received.append(number)
        logger().info("signal", name=number.name)
        if len(received) > 1:
            supervisor.kill()
            return
        display.notice("stopping: the learner saves a checkpoint first; once more kills everything at once")
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    progress = Progress(run_dir, config.steps)
    progress.read()  # what a run that goes on has shown already
    following = asyncio.create_task(display.follow(progress))
    try:
        await supervisor.run(stop)
    except ProcessError:
        if not received:
            raise
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    return 128 + received[0] if received else 0


def _leave(number: int, _: FrameType | None) -> None:
    """SIGTERM before the processes are started: everything is undone on the way out."""
    sys.exit(128 + number)

"""The supervisor with real processes: small Python programs in the places of the roles."""

import asyncio
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import processes
from launch.output import last_words
from launch.plan import REPOSITORY, ProcessPlan
from launch.processes import ProcessError, Supervisor, child_command, run_foreground
from tests.clocks import PATIENCE_S, comes_about, settle, wait_until

FOREVER = "import time; time.sleep(600)"
NOTED = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
open({log!r} + ".ready", "a").write("x")
signal.sigwait([signal.SIGTERM])
open({log!r}, "a").write({name!r} + "\\n")
"""
DEAF = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
open({pid!r}, "w").write(str(os.getpid()))
signal.sigwait([signal.SIGTERM])
open({pid!r} + ".asked", "w").close()
signal.pause()
"""
GRANDCHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open({path!r}, "w").write(str(child.pid))
{then}
"""


def program(name: str, code: str) -> ProcessPlan:
    return ProcessPlan(name, name.partition("-")[0], (sys.executable, "-c", textwrap.dedent(code)))


def supervise(
    plans: list[ProcessPlan], run_dir: Path, *, stop_when: Callable[[], object] | None = None, **options: float
) -> list[str]:
    """Runs the programs to the end of the run, which is asked to stop when something has come about; the notices."""
    notices: list[str] = []

    async def body() -> None:
        stop = asyncio.Event()
        limits: dict[str, Any] = {"max_restarts": 2, "stop_timeout_s": PATIENCE_S, "back_off_s": 0.05, **options}
        running = asyncio.create_task(Supervisor(plans, run_dir, notice=notices.append, **limits).run(stop))
        if stop_when is not None:
            await comes_about(stop_when, "all to be ready")
            stop.set()
        await running

    asyncio.run(body())
    return notices


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def written(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_the_run_is_over_when_the_learner_ends_by_itself(tmp_path: Path) -> None:
    assert supervise([program("generator-0", FOREVER), program("learner", "print('done')")], tmp_path) == []
    assert (tmp_path / "logs" / "learner.out").read_text() == "done\n"


def test_a_process_that_crashes_is_started_again(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    generator = f"""
        import time
        file = open({str(lives)!r}, "a+")
        file.write("x")
        file.flush()
        if file.tell() < 3:
            raise ValueError(file.tell())
        time.sleep(600)
    """
    learner = f"""
        import os, time
        while not os.path.exists({str(lives)!r}) or os.path.getsize({str(lives)!r}) < 3:
            time.sleep(0.02)
    """
    notices = supervise([program("generator-0", generator), program("learner", learner)], tmp_path)
    assert notices == [
        "generator-0 ended with exit code 1: ValueError: 1; restart 1 of 2 in 0.05 s",
        "generator-0 ended with exit code 1: ValueError: 2; restart 2 of 2 in 0.1 s",
    ]


def test_a_process_that_always_crashes_stops_the_run_with_its_last_line(tmp_path: Path) -> None:
    plans = [program("verifier-0", "raise OSError('no disk')"), program("learner", FOREVER)]
    with pytest.raises(
        ProcessError, match=r"verifier-0: found exit code 1: OSError: no disk, expected .*max_restarts = 2"
    ) as e:
        supervise(plans, tmp_path)
    assert e.value.exit_code == 1


@pytest.mark.parametrize("code", [2, 3, 4])
def test_a_final_exit_code_stops_the_run_at_once(tmp_path: Path, code: int) -> None:
    lives = tmp_path / "lives"
    failing = f"""
        import sys
        open({str(lives)!r}, "a").write("x")
        print("sluice: bad port", file=sys.stderr)
        sys.exit({code})
    """
    with pytest.raises(ProcessError, match=r"^ledger: bad port$") as e:
        supervise([program("ledger", failing), program("learner", FOREVER)], tmp_path)
    assert e.value.exit_code == code
    assert lives.read_text() == "x"


def test_a_rank_s_exit_code_is_read_from_torchrun_s_report(tmp_path: Path) -> None:
    torchrun = """
        import sys
        sys.stderr.write("sluice: no generator for 300 s\\n")
        sys.stderr.write("torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\\n")
        sys.stderr.write("  exitcode  : 3 (pid: 12)\\n===\\n")
        sys.exit(1)
    """
    with pytest.raises(ProcessError, match=r"^learner: no generator for 300 s$") as e:
        supervise([program("learner", torchrun)], tmp_path)
    assert e.value.exit_code == 3


def test_a_killed_process_is_named_by_its_signal(tmp_path: Path) -> None:
    plans = [program("generator-0", "import os; os.kill(os.getpid(), 9)"), program("learner", FOREVER)]
    with pytest.raises(ProcessError, match="generator-0: found killed by SIGKILL"):
        supervise(plans, tmp_path, max_restarts=0)


def test_an_exit_code_that_is_no_signal_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match="learner: found exit code 255, expected"):
        supervise([program("learner", "raise SystemExit(255)")], tmp_path, max_restarts=0)


def test_roles_stop_in_order(tmp_path: Path) -> None:
    log = tmp_path / "order"
    names = ("ledger", "verifier-0", "generator-0", "generator-1", "learner")
    plans = [program(name, NOTED.format(log=str(log), name=name.partition("-")[0])) for name in names]
    supervise(plans, tmp_path, stop_when=lambda: written(tmp_path / "order.ready") == "xxxxx")
    assert log.read_text().split() == ["learner", "generator", "generator", "verifier", "ledger"]


def test_a_process_that_is_being_started_when_the_run_stops_is_asked_in_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher hears of each start only after it was asked to stop."""
    log = tmp_path / "order"
    start = asyncio.create_subprocess_exec
    plans = [program(name, NOTED.format(log=str(log), name=name)) for name in ("ledger", "learner")]

    async def scenario() -> None:
        stop = asyncio.Event()

        async def start_slowly(*command: str, **options: Any) -> asyncio.subprocess.Process:
            process = await start(*command, **options)
            await stop.wait()
            await settle()
            return process

        monkeypatch.setattr(asyncio, "create_subprocess_exec", start_slowly)
        supervisor = Supervisor(plans, tmp_path, max_restarts=0, stop_timeout_s=PATIENCE_S)
        running = asyncio.create_task(supervisor.run(stop))
        await comes_about(lambda: written(tmp_path / "order.ready") == "xx", "both to be ready")
        stop.set()
        await running

    asyncio.run(scenario())
    assert log.read_text().split() == ["learner", "ledger"]


def test_a_process_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_KILL_TIMEOUT_S", PATIENCE_S)
    pid = tmp_path / "pid"
    deaf = DEAF.format(pid=str(pid))
    notices = supervise([program("learner", deaf)], tmp_path, stop_when=lambda: written(pid), stop_timeout_s=0.3)
    assert notices == ["learner did not stop within 0.3 s and is killed"]
    assert not is_alive(int(pid.read_text()))


@pytest.mark.parametrize("then", ["time.sleep(0.1)", "raise SystemExit(0)", "import os; os.kill(os.getpid(), 9)"])
def test_grandchildren_end_with_the_process_that_started_them(tmp_path: Path, then: str) -> None:
    path = tmp_path / "pid"
    code = GRANDCHILD.format(path=str(path), then=then)
    subprocess.run(child_command((sys.executable, "-c", code)), timeout=PATIENCE_S, check=False)
    assert not is_alive(int(path.read_text()))


def test_a_killed_launcher_leaves_no_process(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    launcher = textwrap.dedent(f"""
        import asyncio, sys
        from pathlib import Path
        from launch.plan import ProcessPlan
        from launch.processes import Supervisor
        code = {GRANDCHILD.format(path=str(path), then="time.sleep(600)")!r}
        plans = [ProcessPlan("learner", "learner", (sys.executable, "-c", code))]
        asyncio.run(Supervisor(plans, Path({str(tmp_path)!r}), max_restarts=0, stop_timeout_s=5).run(asyncio.Event()))
    """)
    process = subprocess.Popen([sys.executable, "-c", launcher], cwd=REPOSITORY)
    wait_until(lambda: written(path), "the grandchild")
    grandchild = int(path.read_text())
    child = int(Path(f"/proc/{grandchild}/stat").read_text().rpartition(")")[2].split()[1])
    assert is_alive(grandchild)
    assert is_alive(child)
    process.kill()
    process.wait()
    wait_until(lambda: not is_alive(grandchild) and not is_alive(child), "both to end")


SESSION = """
import asyncio, sys
from pathlib import Path
from rich.console import Console
from common.config import Config
from launch.display import Display
from launch.plan import ProcessPlan
from launch.session import supervise
plans = [ProcessPlan(name, name.partition("-")[0], (sys.executable, "-c", code)) for name, code in {programs!r}]
sys.exit(asyncio.run(supervise(plans, Config(), Path({run_dir!r}), Display(Console()))))
"""


def start_session(run_dir: Path, programs: list[tuple[str, str]]) -> subprocess.Popen[str]:
    code = SESSION.format(programs=programs, run_dir=str(run_dir))
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_in_order(tmp_path: Path, number: signal.Signals, exit_code: int) -> None:
    log = tmp_path / "order"
    names = ("ledger", "verifier-0", "generator-0", "learner")
    session = start_session(tmp_path, [(n, NOTED.format(log=str(log), name=n.partition("-")[0])) for n in names])
    wait_until(lambda: written(tmp_path / "order.ready") == "xxxx", "all to be ready")
    session.send_signal(number)
    out, _ = session.communicate(timeout=PATIENCE_S)
    assert session.returncode == exit_code
    assert log.read_text().split() == ["learner", "generator", "verifier", "ledger"]
    assert "stopping" in out


def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    session = start_session(tmp_path, [("learner", DEAF.format(pid=str(pid)))])
    wait_until(lambda: written(pid), "the learner")
    session.send_signal(signal.SIGINT)
    assert session.stdout is not None
    while not (line := session.stdout.readline()).startswith("stopping: "):
        assert line, "it ended before it said that it stops"
    wait_until((tmp_path / "pid.asked").exists, "the learner to be asked to stop")
    assert is_alive(int(pid.read_text()))
    session.send_signal(signal.SIGINT)
    out, _ = session.communicate(timeout=PATIENCE_S)
    assert session.returncode == 130
    assert not is_alive(int(pid.read_text()))
    assert "did not stop within" not in out


def test_a_foreground_command_s_own_error_is_relayed() -> None:
    code = "import sys; print('noise\\nsluice: found a, expected b', file=sys.stderr); sys.exit(2)"
    with pytest.raises(ProcessError, match=r"^found a, expected b$") as e:
        run_foreground((sys.executable, "-c", code))
    assert e.value.exit_code == 2


def test_a_foreground_command_s_crash_is_told_with_its_last_line() -> None:
    with pytest.raises(ProcessError, match="found exit code 1, expected 0: KeyError: 'x'") as e:
        run_foreground((sys.executable, "-c", "{}['x']"))
    assert e.value.exit_code == 1


def test_children_have_one_thread_and_stay_offline() -> None:
    names = ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE")
    found = run_foreground(
        (sys.executable, "-c", f"import os; print(*(os.environ[n] for n in {names!r}), os.getcwd())")
    )
    assert found == f"1 false 1 {REPOSITORY}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        ("one\ntwo\n\n", "two"),
        ("Traceback:\nValueError: 3\nbye\n", "ValueError: 3"),
        ("ValueError: 3\nsluice: found a, expected b\nbye\n", "found a, expected b"),
        (
            "[rank0]: zmq.error.ZMQError: gone\ntorch.distributed.elastic.x.ChildFailedError:\n====\n",
            "zmq.error.ZMQError: gone",
        ),
    ],
)
def test_the_last_words_are_the_most_telling_line(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "out"
    path.write_text(text)
    assert last_words(path).line == line


def test_last_words_do_not_come_from_an_earlier_life(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("sluice: old\nnew\n")
    assert last_words(path, len("sluice: old\n")).line == "new"

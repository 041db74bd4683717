"""Wrong input ends before anything starts: exit code 2, one line that says what, expected what and where, no trace."""

import fcntl
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.run_directory import LOCK
from tests.launch.conftest import Cluster

Arguments = tuple[str, ...]
LAYOUT = ("--layout", "local")


@pytest.fixture
def valid(model: Path, prompts: Path, tmp_path: Path) -> Arguments:
    return (
        *LAYOUT,
        f"model={model}",
        f"data.train={prompts}",
        f"run.dir={tmp_path / 'run'}",
        "data.max_prompt_tokens=8",
    )


def assert_refused(cluster: Cluster, tmp_path: Path, arguments: Arguments, *fragments: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    ended = cluster(*arguments)
    lines = ended.stderr.splitlines()
    assert (ended.returncode, len(lines)) == (2, 1), ended.stderr
    assert lines[0].startswith("sluice: ")
    for fragment in fragments:
        assert fragment in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ((), ("--layout",)),
        (("--layout", "locla"), ("locla.toml: layout not found", "expected one of: ", "local")),
        ((*LAYOUT, "--fast"), ("unrecognized arguments: --fast",)),
        ((*LAYOUT, "lr=1e-6"), ("unknown key 'lr'", "nearest is 'optimizer.lr'", "override 'lr=1e-6'")),
        ((*LAYOUT, "optimizer.learning_rate=1"), ("unknown key 'optimizer.learning_rate'", "nearest is 'optimizer.")),
        ((*LAYOUT, 'data.train=[{path="x", rewrad="math"}]'), ("'data.train[].rewrad'", "'data.train[].reward'")),
        ((*LAYOUT, "loss.proximal=old"), ("found 'old', expected one of recompute, interpolate, generator",)),
        ((*LAYOUT, "optimizer.lr=-1"), ("optimizer.lr: found -1, expected float > 0.0",)),
        ((*LAYOUT, "steps"), ("override 'steps': found no '=', expected key=value",)),
        ((*LAYOUT, "updates_per_step=3"), ("updates_per_step: found 3, expected a divisor of groups_per_step = 16",)),
        ((*LAYOUT, "sampling.temperature=0"), ("sampling.temperature: found 0, expected more",)),
        ((*LAYOUT, "model=somewhere"), ("model and data.train", "expected both or neither")),
        ((*LAYOUT, "run.name=a/b"), ("run.name: found 'a/b', expected the name of a directory",)),
        ((*LAYOUT, "run.host=192.0.2.1"), ("run.host: found 192.0.2.1:0", "expected an address of this machine")),
    ],
)
def test_a_wrong_configuration_is_refused(
    cluster: Cluster, tmp_path: Path, arguments: Arguments, fragments: Arguments
) -> None:
    assert_refused(cluster, tmp_path, arguments, *fragments)


def test_a_layout_that_is_no_toml_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    layout = tmp_path / "mine.toml"
    layout.write_text("steps = \n")
    assert_refused(cluster, tmp_path, ("--layout", str(layout)), str(layout), "line 1")
    layout.write_text("[loss]\nproximal = 'old'\n")
    assert_refused(cluster, tmp_path, ("--layout", str(layout)), f"{layout}: loss.proximal: found 'old'")


def test_a_directory_is_no_layout(cluster: Cluster, tmp_path: Path) -> None:
    assert_refused(cluster, tmp_path, ("--layout", f"{tmp_path}/"), "cannot be read: Is a directory")


def test_a_model_directory_that_does_not_exist_is_refused(cluster: Cluster, tmp_path: Path, valid: Arguments) -> None:
    assert_refused(cluster, tmp_path, (*valid, "model=nowhere"), f"model: {tmp_path}/nowhere: not found, expected")


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("config.json", "config.json: not found, expected the model's configuration"),
        ("tokenizer.json", "tokenizer.json: not found, expected the model's fast tokenizer"),
        ("model.safetensors", "found no weights, expected model.safetensors"),
    ],
)
def test_an_incomplete_model_directory_is_refused(
    cluster: Cluster, tmp_path: Path, valid: Arguments, model: Path, name: str, fragment: str
) -> None:
    (model / name).unlink()
    assert_refused(cluster, tmp_path, valid, fragment)


def test_an_architecture_that_is_not_supported_is_refused(
    cluster: Cluster, tmp_path: Path, valid: Arguments, model: Path
) -> None:
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert_refused(cluster, tmp_path, valid, "found architecture LlamaForCausalLM, expected one of Qwen2ForCausalLM")


@pytest.mark.parametrize("key", ["sampling", "evaluation.sampling"])
def test_a_model_without_a_position_for_each_token_is_refused(
    cluster: Cluster, tmp_path: Path, valid: Arguments, model: Path, key: str
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    fragments = (
        "found max_position_embeddings = 40",
        f"expected at least data.max_prompt_tokens + {key}.max_tokens = 41",
    )
    assert_refused(cluster, tmp_path, (*valid, f"{key}.max_tokens=33"), *fragments)


def test_weights_that_are_cut_are_refused(cluster: Cluster, tmp_path: Path, valid: Arguments, model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert_refused(cluster, tmp_path, valid, "model.safetensors: found", "bytes, expected", "cut or damaged")
    weights.write_bytes(b"what is this")
    assert_refused(cluster, tmp_path, valid, "model.safetensors: found no head of weights, expected a safetensors file")


def test_an_index_that_names_a_missing_file_is_refused(
    cluster: Cluster, tmp_path: Path, valid: Arguments, model: Path
) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    assert_refused(cluster, tmp_path, valid, "model-1.safetensors: found no weights")


@pytest.mark.parametrize("key", ["train", "test"])
def test_a_data_file_that_does_not_exist_is_refused(
    cluster: Cluster, tmp_path: Path, valid: Arguments, key: str
) -> None:
    fragment = f"data.{key}: {tmp_path}/no.jsonl: not found, expected a file of prompts"
    assert_refused(cluster, tmp_path, (*valid, f"data.{key}=no.jsonl"), fragment)


def test_what_the_ledger_refuses_is_told_and_leaves_nothing(
    cluster: Cluster, tmp_path: Path, valid: Arguments, prompts: Path
) -> None:
    prompts.write_text('{"prompt": "1+1="}\n')
    assert_refused(cluster, tmp_path, valid, f"{prompts}:1: found columns prompt, expected prompt and answer")


def test_an_empty_run_directory_of_the_user_stays_when_the_run_cannot_start(
    cluster: Cluster, tmp_path: Path, valid: Arguments, prompts: Path
) -> None:
    (tmp_path / "run").mkdir()
    prompts.write_text("{\n")
    assert_refused(cluster, tmp_path, valid, f"{prompts}:1: broken JSON")


def test_missing_and_small_space_for_weights_is_refused(cluster: Cluster, tmp_path: Path, valid: Arguments) -> None:
    assert_refused(cluster, tmp_path, (*valid, "weights.dir=/nowhere"), "weights.dir: /nowhere: not found, expected")
    fragments = ("weights.dir: /dev/shm: found", "GiB free, expected", "room for the weights 1e+09 times")
    assert_refused(cluster, tmp_path, (*valid, "weights.retention=1000000000"), *fragments)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_that_is_taken_is_refused(cluster: Cluster, tmp_path: Path, valid: Arguments, taken_port: int) -> None:
    fragment = f"run.ledger_port: found 127.0.0.1:{taken_port} (Address already in use), expected a free port"
    assert_refused(cluster, tmp_path, (*valid, f"run.ledger_port={taken_port}"), fragment)


def test_a_run_directory_with_something_in_it_is_refused(cluster: Cluster, tmp_path: Path, valid: Arguments) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").touch()
    assert_refused(cluster, tmp_path, valid, f"run.dir: {run}: found other files, expected a new or empty directory")
    (run / LOCK).touch()
    assert_refused(cluster, tmp_path, valid, f"run.dir: {run}: found a run that has ended, expected a new or empty")
    with (run / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_refused(cluster, tmp_path, valid, f"run.dir: {run}: found a run at work there, expected none")


def test_a_run_directory_that_cannot_be_written_is_refused(cluster: Cluster, tmp_path: Path, valid: Arguments) -> None:
    (tmp_path / "file").touch()
    assert_refused(cluster, tmp_path, (*valid, "run.dir=file"), "found a file, expected a new or empty directory")
    assert_refused(cluster, tmp_path, (*valid, "run.dir=file/run"), "file cannot be written, expected a directory")
    assert_refused(cluster, tmp_path, (*valid, "run.dir=/proc/sluice"), "run.dir: /proc/sluice", "cannot be written")

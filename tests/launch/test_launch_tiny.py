import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from common.config import Config
from common.layout import load_config
from common.rendezvous import RunKeys
from common.sections import TinyConfig
from common.shape import read_shape
from launch.builtin import build_once, tiny_directory, with_tiny_task
from launch.checks import count_parameters
from launch.cluster import LAYOUTS
from launch.parameters import model_parameters
from launch.plan import REPOSITORY, tiny_command
from launch.processes import ProcessError
from launch.tiny import EOS, PAD, Pair, _new_model, save_tokenizer, slipped_sum, split_pairs
from launch.tiny_sizes import tiny_shape
from tests.clocks import PATIENCE_S


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_held_out_is_trained_on_not_even_swapped(seed: int) -> None:
    split = split_pairs(seed)
    trained = {frozenset(pair) for pair in split.train}
    assert (len(split.test), len(split.validation)) == (500, 300)
    assert len(set(split.train)) == len(split.train) > 8_000
    for held_out in (split.test, split.validation):
        assert len({frozenset(pair) for pair in held_out}) == len(held_out)
        assert trained.isdisjoint(frozenset(pair) for pair in held_out)
    assert {frozenset(p) for p in split.test}.isdisjoint(frozenset(p) for p in split.validation)


def test_the_split_follows_the_seed() -> None:
    assert split_pairs(3) == split_pairs(3)
    assert split_pairs(3) != split_pairs(4)


def test_prompts_have_one_length_and_answers_no_padding() -> None:
    assert (Pair(7, 45).prompt, Pair(7, 45).answer) == ("07+45=", "52")
    assert (Pair(0, 0).prompt, Pair(0, 0).answer) == ("00+00=", "0")


def test_demonstrations_drop_carries_and_nothing_else() -> None:
    rng = random.Random(0)

    def demonstrated(pair: Pair) -> dict[int, float]:
        sums = [slipped_sum(pair, rng) for _ in range(4000)]
        return {total: sums.count(total) / len(sums) for total in sorted(set(sums))}

    assert demonstrated(Pair(12, 34)) == {46: 1.0}
    assert demonstrated(Pair(7, 45)) == pytest.approx({42: 0.85, 52: 0.15}, abs=0.03)
    assert demonstrated(Pair(60, 50)) == pytest.approx({10: 0.85, 110: 0.15}, abs=0.03)
    assert demonstrated(Pair(99, 99)) == pytest.approx({88: 0.7225, 98: 0.1275, 188: 0.1275, 198: 0.0225}, abs=0.03)
    assert demonstrated(Pair(55, 47)) == pytest.approx({92: 0.85, 2: 0.1275, 102: 0.0225}, abs=0.03)


def test_the_tokenizer_knows_characters(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("07+45=52").ids
    assert len(ids) == 8
    assert not {PAD, EOS} & set(ids)
    assert tokenizer.decode(ids) == "07+45=52"
    assert tokenizer.decode([*ids, EOS], skip_special_tokens=False) == "07+45=52<eos>"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<eos>"


def test_the_cache_is_named_by_source_seed_and_experts(tmp_path: Path) -> None:
    assert tiny_directory(Config(), tmp_path) == tiny_directory(Config(steps=7), tmp_path)
    others = [Config(), Config(seed=1), Config(tiny=TinyConfig(num_experts=8)), Config(tiny=TinyConfig(num_experts=4))]
    assert len({tiny_directory(config, tmp_path) for config in others}) == len(others)


def test_a_task_that_is_in_the_cache_is_not_built_again(tmp_path: Path) -> None:
    notices: list[str] = []
    build_once(tmp_path, Config(), notices.append)
    assert notices == []


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ProcessError):
        build_once(tmp_path / "cache" / "tiny", Config(seed=-(2**70)), lambda _: None)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_tiny_task_fills_the_empty_keys(tmp_path: Path) -> None:
    config = with_tiny_task(Config(tiny=TinyConfig(num_experts=8)), tmp_path)
    config.check()
    assert config.model == str(tmp_path / "model")
    assert [(f.path, f.name, f.reward) for f in config.data.train_files] == [
        (str(tmp_path / "train.jsonl"), "addition", "exact")
    ]
    assert config.data.test_files[0].path == str(tmp_path / "test.jsonl")


@pytest.mark.parametrize("num_experts", [0, 8])
def test_the_sizes_are_known_before_it_is_built(num_experts: int, tmp_path: Path) -> None:
    _new_model(num_experts).save_pretrained(tmp_path)
    found, expected = read_shape(tmp_path), tiny_shape(num_experts)
    differing = {f for f in expected.__struct_fields__ if getattr(found, f) != getattr(expected, f)}
    assert differing <= {"num_experts", "num_local_experts", "rope_theta"}  # of which each has two names
    assert (found.total_experts, found.rotary_base) == (expected.total_experts, expected.rotary_base)


@pytest.mark.full
@pytest.mark.learning
@pytest.mark.parametrize(("num_experts", "num_parameters"), [(0, 410_000), (8, 900_000)])
def test_the_tiny_model_is_built_and_the_ledger_takes_it(num_experts: int, num_parameters: int, tmp_path: Path) -> None:
    from common.layout import write_resolved

    subprocess.run(tiny_command(tmp_path / "tiny", 1, num_experts), cwd=REPOSITORY, check=True, timeout=PATIENCE_S)
    config = with_tiny_task(load_config(LAYOUTS / "local.toml", []), tmp_path / "tiny")
    assert read_shape(Path(config.model)).total_experts == num_experts
    assert count_parameters(Path(config.model)) == model_parameters(tiny_shape(num_experts))
    assert count_parameters(Path(config.model)) == pytest.approx(num_parameters, rel=0.05)
    write_resolved(config, tmp_path)
    RunKeys.create(tmp_path)
    prepared = subprocess.run(
        [sys.executable, "-m", "learner.ledger", "--prepare", str(tmp_path)],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert prepared.stdout.endswith("500 held out, 0 outside the limits\n")

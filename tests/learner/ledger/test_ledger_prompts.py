"""Files of prompts: what is read, and what is said of a broken one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from common import wire
from common.config import Config
from common.errors import DataError, ModelError, SluiceError
from common.sections import DataConfig, DataFile
from learner.ledger.prompts import Prepared, prepare
from learner.ledger.store import Store
from tests.clocks import PATIENCE_S

WriteRows = Callable[[str, list[dict[str, Any]]], Path]


def run_prepare(tmp_path: Path, model_dir: Path, **data: Any) -> tuple[Store, Prepared]:
    store = Store(tmp_path)
    return store, prepare(store, Config(model=str(model_dir), data=DataConfig(**data)))


def prompts_of(store: Store) -> list[wire.Prompt]:
    return [store.prompt(row) for (row,) in store.rows("SELECT id FROM prompts ORDER BY id")]


def text_of(model_dir: Path, prompt: wire.Prompt) -> str:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    return "".join(tokenizer.id_to_token(int(i)) or "?" for i in wire.ints(prompt.token_ids))


def test_a_string_is_tokenized_as_it_is_and_messages_by_the_template(
    tmp_path: Path, model_dir: Path, write_rows: WriteRows
) -> None:
    messages = [{"role": "user", "content": "1+1="}]
    path = write_rows("a.jsonl", [{"prompt": "2+2=", "answer": 4}, {"prompt": messages, "answer": "2"}])
    store, prepared = run_prepare(tmp_path, model_dir, train=str(path))
    assert prepared == (2, 0, 0)
    plain, chat = prompts_of(store)
    assert text_of(model_dir, plain) == "2+2="
    assert text_of(model_dir, chat) == "<|user|>1+1=\n<|assistant|>"
    assert (plain.id, plain.answer, plain.reward, chat.answer) == ("train/a/1", "4", "math", "2")


def test_the_system_prompt_goes_before_messages_that_have_none(
    tmp_path: Path, model_dir: Path, write_rows: WriteRows
) -> None:
    user, system = {"role": "user", "content": "x"}, {"role": "system", "content": "own"}
    rows = [{"prompt": [user], "answer": 1}, {"prompt": [system, user], "answer": 1}]
    store, _ = run_prepare(tmp_path, model_dir, train=str(write_rows("a.jsonl", rows)), system_prompt="set")
    texts = [text_of(model_dir, prompt) for prompt in prompts_of(store)]
    assert texts == ["<|system|>set\n<|user|>x\n<|assistant|>", "<|system|>own\n<|user|>x\n<|assistant|>"]


def test_files_prepared_for_verl_load_unchanged(tmp_path: Path, model_dir: Path) -> None:
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"content": f"what is {i}?", "role": "user"}],
            "ability": "math",
            "reward_model": {"ground_truth": str(i), "style": "rule"},
            "extra_info": {"index": i, "split": "train"},
        }
        for i in range(3)
    ]
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    store, prepared = run_prepare(tmp_path, model_dir, train=str(path))
    assert prepared.num_train == 3
    assert [(p.answer, p.reward) for p in prompts_of(store)] == [("0", "math"), ("1", "math"), ("2", "math")]
    assert text_of(model_dir, prompts_of(store)[2]) == "<|user|>what is 2?\n<|assistant|>"


def test_a_files_reward_is_the_configured_one(tmp_path: Path, model_dir: Path, write_rows: WriteRows) -> None:
    path = write_rows("a.jsonl", [{"prompt": "a", "answer": 1}])
    store, _ = run_prepare(tmp_path, model_dir, train=(DataFile(path=str(path), name="set", reward="exact"),))
    (prompt,) = prompts_of(store)
    assert (prompt.id, prompt.reward, prompt.source) == ("train/set/1", "exact", "set")


def test_an_over_long_prompt_is_dropped_and_counted_or_an_error(
    tmp_path: Path, model_dir: Path, write_rows: WriteRows
) -> None:
    path = write_rows("a.jsonl", [{"prompt": "12345", "answer": 1}, {"prompt": "1", "answer": 1}])
    _, prepared = run_prepare(tmp_path, model_dir, train=str(path), max_prompt_tokens=4)
    assert prepared == (1, 0, 1)
    with pytest.raises(
        DataError, match=r"a.jsonl:1: prompt: found 5 tokens, expected at most data.max_prompt_tokens = 4"
    ):
        run_prepare(tmp_path, model_dir, train=str(path), max_prompt_tokens=4, over_long="error")


def test_preparing_again_changes_nothing_and_other_content_is_refused_once_the_run_began(
    tmp_path: Path, model_dir: Path, write_rows: WriteRows
) -> None:
    path = write_rows("a.jsonl", [{"prompt": "a", "answer": 1}])
    store, first = run_prepare(tmp_path, model_dir, train=str(path))
    assert run_prepare(tmp_path, model_dir, train=str(path))[1] == first
    write_rows("a.jsonl", [{"prompt": "b", "answer": 1}, {"prompt": "c", "answer": 1}])
    store, second = run_prepare(tmp_path, model_dir, train=str(path))
    assert second.num_train == 2
    ledger = store.ledger(Config(), 0.0)
    ledger.begin(None)
    ledger.grant("g", ledger.track.current, 1, 0.0)  # type: ignore[arg-type]
    store.save(ledger.drain(), store.evaluations(Config(), 0.0).drain())
    write_rows("a.jsonl", [{"prompt": "d", "answer": 1}])
    with pytest.raises(DataError, match="other content than when the run began"):
        run_prepare(tmp_path, model_dir, train=str(path))


BROKEN: list[tuple[str, str, str]] = [
    ('{"prompt": "a", "answer": 1}\n{"prompt": ', ":2: ", "broken JSON"),
    ('["a"]', ":1: ", "found a list, expected an object"),
    ('{"question": "a", "answer": 1}', ":1: ", "found columns question, answer, expected prompt and answer"),
    ('{"prompt": "a", "solution": 1}', ":1: ", "found columns prompt, solution"),
    ('{"prompt": 3, "answer": 1}', ":1: prompt: ", "found a number, expected text or chat messages"),
    ('{"prompt": [], "answer": 1}', ":1: prompt: ", "found an empty list"),
    ('{"prompt": [{"role": "user"}], "answer": 1}', ":1: prompt: ", "expected a role and a content"),
    ('{"prompt": "a", "answer": null}', ":1: answer: ", "found nothing, expected text or a number"),
    ('{"prompt": "a", "answer": [1]}', ":1: answer: ", "found a list"),
    ('{"prompt": "a", "answer": true}', ":1: answer: ", "found a boolean"),
    ('{"prompt": "a", "answer": " "}', ":1: answer: ", "found an empty string, expected text or a number"),
    ('{"prompt": "a", "answer": "\\ud800"}', ":1: ", "broken JSON"),
    ('{"prompt": "a", "reward_model": {}}', ":1: reward_model: ", "found an empty object, expected an object with a"),
    ('{"prompt": " ", "answer": 1}', ":1: prompt: ", "found an empty string"),
    ("\n\n", ": ", "found no row"),
]


@pytest.mark.parametrize(("content", "where", "what"), BROKEN)
def test_a_broken_file_is_one_line_that_says_where_and_what(
    tmp_path: Path, model_dir: Path, content: str, where: str, what: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        run_prepare(tmp_path, model_dir, train=str(path))
    assert f"a.jsonl{where}" in str(error.value)
    assert what in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("missing.jsonl", None, "not found"),
        ("a.csv", b"prompt,answer", "found a file of type '.csv', expected .jsonl or .parquet"),
        ("a.parquet", b"no parquet", "cannot be read as Parquet"),
        ("a.jsonl", b"\xff\xfe\xfa", "broken JSON"),
        ("a.jsonl", b'{"prompt": "caf\xe9", "answer": 1}', "a.jsonl:1: broken JSON"),
        ("a.jsonl", b"", "a.jsonl: found no row"),
    ],
)
def test_a_file_that_is_no_file_of_prompts(
    tmp_path: Path, model_dir: Path, name: str, content: bytes | None, what: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=what.replace(".", r"\.")):
        run_prepare(tmp_path, model_dir, train=str(tmp_path / name))


def test_a_parquet_file_without_the_columns_names_those_it_has(tmp_path: Path, model_dir: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": ["a"], "answer": ["b"]}), path)
    with pytest.raises(DataError, match="found columns question, answer, expected prompt and answer"):
        run_prepare(tmp_path, model_dir, train=str(path))


def test_what_contradicts_itself_is_refused(tmp_path: Path, model_dir: Path, write_rows: WriteRows) -> None:
    one = str(write_rows("a.jsonl", [{"prompt": "a", "answer": 1}, {"prompt": "bbb", "answer": 1}]))
    other = str(write_rows("b.jsonl", [{"prompt": "bbb", "answer": 2}]))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"train": one, "test": other}, r"a.jsonl:2: found the prompt of .*b.jsonl:1, expected no held-out prompt"),
        ({"train": other, "max_prompt_tokens": 2}, r"b.jsonl: found 1 prompts, all too long"),
        ({"train": one, "system_prompt": "x"}, r"a.jsonl:1: found a string with data.system_prompt set"),
        ({"train": (DataFile(path=one), DataFile(path=one))}, "two sets named 'a'"),
        ({"train": (DataFile(path=one, reward="bleu"),)}, "found reward 'bleu', expected one of exact, math"),
        ({}, "data.train: found nothing"),
    ]
    for data, message in cases:
        with pytest.raises(DataError, match=message):
            run_prepare(tmp_path, model_dir, **data)


def test_a_failed_preparation_leaves_nothing_behind(tmp_path: Path, model_dir: Path, write_rows: WriteRows) -> None:
    path = write_rows("a.jsonl", [{"prompt": "a", "answer": 1}, {"prompt": "b"}])
    with pytest.raises(DataError):
        run_prepare(tmp_path, model_dir, train=str(path))
    assert Store(tmp_path).rows("SELECT * FROM prompts") == []
    with pytest.raises(DataError, match="--prepare"):
        Store(tmp_path).ledger(Config(), 0.0)


def test_a_model_that_cannot_be_trained_is_refused(tmp_path: Path, model_dir: Path, write_rows: WriteRows) -> None:
    train = str(write_rows("a.jsonl", [{"prompt": [{"role": "user", "content": "a"}], "answer": 1}]))
    breaks: list[tuple[Callable[[], object], str]] = [
        ((model_dir / "tokenizer_config.json").unlink, "no chat template"),
        (lambda: (model_dir / "chat_template.jinja").write_bytes(b"\xff"), "chat_template.jinja: cannot be read"),
        (lambda: (model_dir / "chat_template.jinja").write_text("{% if %}"), "broken chat template"),
        (lambda: (model_dir / "tokenizer.json").write_text("{}"), "no tokenizer"),
        ((model_dir / "tokenizer.json").unlink, "tokenizer.json: not found"),
        (
            lambda: (model_dir / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]})),
            "found architecture LlamaForCausalLM, expected one of Qwen2ForCausalLM",
        ),
        (lambda: (model_dir / "config.json").write_text("{"), "config.json: cannot be read"),
        ((model_dir / "config.json").unlink, "config.json: not found"),
        (lambda: model_dir.rename(tmp_path / "elsewhere"), "model: not found"),
    ]
    for break_it, message in breaks:
        break_it()
        with pytest.raises(ModelError, match=message) as error:
            run_prepare(tmp_path, model_dir, train=train)
        assert isinstance(error.value, SluiceError)
        assert error.value.exit_code == 2


def test_neither_the_ledger_nor_its_preparation_loads_torch() -> None:
    heavy = "{'torch', 'transformers', 'sglang', 'megatron'}"
    code = f"import sys, learner.ledger.__main__, learner.ledger.prompts; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=PATIENCE_S).returncode == 0


def test_a_name_or_an_answer_that_no_message_can_carry_is_one_line(
    tmp_path: Path, model_dir: Path, write_rows: WriteRows
) -> None:
    path = write_rows("a.jsonl", [{"prompt": "1+1=", "answer": 2}, {"prompt": "2+2=", "answer": "4" * (1 << 21)}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: found a prompt whose name or answer no message can carry"):
        run_prepare(tmp_path, model_dir, train=str(path))
    short = write_rows("b.jsonl", [{"prompt": "1+1=", "answer": 2}])
    with pytest.raises(DataError, match=r"b\.jsonl:1: found a prompt whose name or answer no message can carry"):
        run_prepare(tmp_path, model_dir, train=(DataFile(path=str(short), name="a\nb"),))

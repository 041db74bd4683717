"""The sections of a configuration: one frozen struct each, whose docstrings say what the keys mean."""

from typing import Annotated, Literal, dataclass_transform

import msgspec
from msgspec import Meta

from common.wire import Sampling

Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0, le=604_800)]
Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16"]


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the sections."""


class RunConfig(Section):
    """Where the run lives.

    Attributes:
        name: Pattern of the run's name, in strftime's form; the directory is `runs/NAME`.
        dir: The run directory, in place of `runs/NAME` where not empty.
        resume: With `auto` a run that is in the directory goes on, with other keys where they may change (see below).
        stall_timeout_s: How long the run may stand still before it stops with a non-zero exit code.
        stop_timeout_s: How long each role may take to stop before it is killed.
        max_restarts: How often one process may be restarted before the run stops; one that lived for ten minutes is
            counted anew.
        host: The address that sockets bind; loopback for one machine.
        ledger_port: The ledger's port; 0 takes a free one.
    """

    name: str = "run-%Y%m%d-%H%M%S"
    dir: str = ""
    resume: Literal["never", "auto"] = "never"
    stall_timeout_s: Seconds = 300.0
    stop_timeout_s: Seconds = 60.0
    max_restarts: Natural = 5
    host: str = "127.0.0.1"
    ledger_port: Annotated[int, Meta(ge=0, le=65_535)] = 0


class TinyConfig(Section):
    """The built-in model, for a run that names none.

    Attributes:
        num_experts: Of each layer, two of them for each token; 0 is a dense model.
    """

    num_experts: Annotated[int, Meta(ge=0, le=256)] = 0


class DataFile(Section):
    """One file of prompts.

    Attributes:
        path: JSONL or Parquet, with columns `prompt` and `answer`, or verl's.
        name: Of the set, in metrics; the file's stem where empty.
        weight: Share of the visits, relative to the other files'.
        reward: Name of the reward; the row's `data_source` decides where empty.
    """

    path: str
    name: str = ""
    weight: Positive = 1.0
    reward: str = ""


class DataConfig(Section):
    """The prompts.

    Attributes:
        train: One file, or several that are mixed by weight.
        test: Held-out sets, none of whose prompts is trained on.
        max_prompt_tokens: Longest prompt, with the chat template applied.
        over_long: What becomes of longer ones: dropped and counted, cut to their last `max_prompt_tokens`
            (`truncate_left`), or an error.
        system_prompt: Put before chat messages that have none.
        chat_template_kwargs: Passed to the model's chat template.
        shuffle: Whether each epoch has an order of its own, drawn with the run's seed.
    """

    train: str | tuple[DataFile, ...] = ""
    test: str | tuple[DataFile, ...] = ""
    max_prompt_tokens: Count = 1024
    over_long: Literal["drop", "truncate_left", "error"] = "drop"
    system_prompt: str = ""
    chat_template_kwargs: dict[str, str | int | float | bool] = {}
    shuffle: bool = True

    @property
    def train_files(self) -> tuple[DataFile, ...]:
        """`train` as files."""
        return _files(self.train)

    @property
    def test_files(self) -> tuple[DataFile, ...]:
        """`test` as files."""
        return _files(self.test)


class SamplingConfig(Section):
    """How completions are sampled.

    Attributes:
        temperature: 0 is greedy.
        top_p: Nucleus.
        top_k: 0 considers all tokens.
        max_tokens: Longest response.
        stop: Strings that end a response.
        stop_token_ids: Tokens that end a response, beside the model's own.
    """

    temperature: NonNegative = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Natural = 0
    max_tokens: Count = 1024
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[Natural, ...] = ()

    def on_wire(self) -> Sampling:
        """As a lease carries it."""
        return Sampling(**msgspec.structs.asdict(self))


class EvaluationConfig(Section):
    """Held-out evaluation while training goes on.

    Attributes:
        every: Steps between evaluations; there is one before the first step and one after the last.
        num_samples: Completions a prompt: k of avg@k and pass@k.
        sampling: How they are sampled.
    """

    every: Count = 10
    num_samples: Count = 1
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)


class EngineParallelConfig(Section):
    """How the GPUs of one engine share the model: `tensor` times `data` of them.

    Attributes:
        tensor: GPUs that share each matrix of attention.
        data: Copies of attention in one engine, each with requests of its own; several only with experts.
        expert: GPUs that share the experts of a layer; a divisor of `tensor` times `data`.
    """

    tensor: Count = 1
    data: Count = 1
    expert: Count = 1

    @property
    def num_gpus(self) -> int:
        """Of one engine."""
        return self.tensor * self.data


class GeneratorConfig(Section):
    """The generators; each has one SGLang engine.

    Attributes:
        count: Processes that the launcher starts.
        dtype: Of the engine's weights and activations.
        max_running_requests: Completions that one engine works on at once.
        max_total_tokens: Tokens that one engine's KV cache holds.
        memory_share: Share of a GPU's memory, on a CPU of the machine's, that weights and KV cache may take together.
        prefill_chunk_tokens: Prompt tokens that one engine takes in at once; more come in chunks.
        max_groups: Groups that one generator holds at once.
        gate_max: float32: largest difference between an engine's and the learner's logprob of a probe token.
        gate_mean: bfloat16: largest mean difference.
        gate_p99: bfloat16: largest 99th percentile of the difference.
        parallel: How the GPUs of an engine share the model.
    """

    count: Count = 1
    dtype: Dtype = "float32"
    max_running_requests: Count = 256
    max_total_tokens: Count = 65_536
    memory_share: Annotated[float, Meta(gt=0, lt=1)] = 0.3
    prefill_chunk_tokens: Count = 8192
    max_groups: Count = 32
    gate_max: Positive = 1e-4
    gate_mean: Positive = 0.1
    gate_p99: Positive = 0.6
    parallel: EngineParallelConfig = EngineParallelConfig()


class VerifierConfig(Section):
    """The verifiers.

    Attributes:
        count: Processes that the launcher starts.
        num_workers: Grading processes of each.
        max_groups: Groups that one verifier holds at once.
        deadline_s: Wall-clock of one grade; then its worker is killed and the outcome is `timeout`.
        memory_bytes: Address space of a grading process.
        max_items: Grades before a grading process is replaced.
    """

    count: Count = 1
    num_workers: Count = 1
    max_groups: Count = 64
    deadline_s: Seconds = 5.0
    memory_bytes: Annotated[int, Meta(ge=1 << 26)] = 2 << 30
    max_items: Count = 100_000


class LeaseConfig(Section):
    """The ledger's leases.

    Attributes:
        heartbeat_timeout_s: Silence after which a generator's leases are granted to others.
        completion_timeout_s: How long each completion may take from when a generator gets the lease; then it is late.
        late: What becomes of a group with late completions: its lease is given back and its prompt sampled anew
            (`give_back`), or it is trained without them where at least two are there (`train_rest`).
        max_attempts: Attempts after which a visit is quarantined.
    """

    heartbeat_timeout_s: Seconds = 15.0
    completion_timeout_s: Seconds = 600.0
    late: Literal["give_back", "train_rest"] = "give_back"
    max_attempts: Count = 8


class WeightsConfig(Section):
    """How weights reach the engines.

    Attributes:
        dir: Memory-backed directory of each node, for what learner ranks publish and generators have pulled.
        anchor_every: Versions from one that can be pulled whole to the next; those between are pulled as what changed.
        retention: How much whole versions and changes a learner rank keeps for those who pull, in multiples of its part
            of the weights; beside it, the rank has the newest version and the one in the making.
    """

    dir: str = "/dev/shm"  # noqa: S108
    anchor_every: Count = 16
    retention: Annotated[float, Meta(ge=2, le=1e12)] = 2.5


def _files(files: str | tuple[DataFile, ...]) -> tuple[DataFile, ...]:
    if isinstance(files, str):
        return (DataFile(path=files),) if files else ()
    return files

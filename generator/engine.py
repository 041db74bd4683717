"""The SGLang engine, in this process's event loop."""

import asyncio
import atexit
import base64
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil
from numpy.typing import NDArray

from common import wire
from common.config import Config
from common.errors import DeadlineError, EngineError, ModelError, WireError
from common.log import logger
from common.routes import RouteShape, encode_routes, route_shape
from common.shape import read_shape
from common.versions import Version
from common.wire import Completion, FinishReason, VersionSpan
from generator.arguments import eos_token_ids, make_rendezvous, prepare_environment, server_arguments
from generator.underway import Underway, cancel

LOAD_SHARE = 1 / 2  # of run.stall_timeout_s: so that another engine can be there before it is over
FINISH_SHARE, CANCEL_SHARE, KILL_SHARE = 1 / 3, 1 / 20, 1 / 5  # of run.stop_timeout_s


class Load(NamedTuple):
    """What the requests in an engine take, as its scheduler says.

    Attributes:
        num_running: Requests that it works on.
        num_waiting: Requests that wait for their turn.
        num_cached_tokens: Tokens of the KV cache that requests hold; what only the prefix cache keeps is not in it.
    """

    num_running: int
    num_waiting: int
    num_cached_tokens: int


class Engine:
    """An engine that samples by token ids and takes new weights while it samples.

    Attributes:
        version: Of the weights that it holds; None until the first are loaded.
        eos_token_ids: Tokens that end a response by the model's own configuration.
    """

    def __init__(self, config: Config, memory: Path) -> None:
        """Starts the engine's processes and waits until they are ready; needs the running event loop's main thread.

        It has weights of no meaning: of the model's directory it reads what is no weight. SGLang puts a handler of its
        own in the place of the loop's for SIGTERM: set yours again. `memory` is a memory-backed directory.

        Raises:
            ModelError: SGLang cannot read the model's config.
        """
        self.version: Version | None = None
        self._num_tokens = 0
        self._underway, self._swapping = Underway(), asyncio.Lock()
        self._patience_s, self._stop_s = LOAD_SHARE * config.run.stall_timeout_s, config.run.stop_timeout_s
        needs_text = bool(config.sampling.stop or config.evaluation.sampling.stop)
        self.eos_token_ids = eos_token_ids(Path(config.model))
        self._routes = route_shape(read_shape(Path(config.model))) if config.learner.routing_replay else None
        on_cpu = prepare_environment(memory)
        self._rendezvous = make_rendezvous(on_cpu)
        import sglang

        try:
            self._engine: Any = sglang.Engine(**server_arguments(config, on_cpu, needs_text=needs_text))
        except (ValueError, RuntimeError, OSError) as error:
            raise ModelError(f"{config.model}: SGLang cannot load it: {error}") from error
        self._manager = self._engine.tokenizer_manager
        self._manager.auto_create_handle_loop()
        logger().info("engine_started")

    async def generate(
        self,
        token_ids: NDArray[np.int32],
        sampling: wire.Sampling,
        *,
        seed: int,
        request_id: str,
        routed_experts: bool = False,
    ) -> Completion:
        """One completion of a prompt, sampled with `seed` under whatever versions the engine holds meanwhile.

        With `routed_experts`, which needs `learner.routing_replay`, it carries them; those of a prefix that was in the
        cache are the ones that it was cached with.

        Raises:
            EngineError: The engine refuses the request.
        """
        from sglang.srt.managers.io_struct import GenerateReqInput

        assert self.version is not None
        asked_at = self.version
        request = GenerateReqInput(
            rid=request_id,
            input_ids=token_ids.tolist(),
            sampling_params=self._sampling_params(sampling, seed),
            return_logprob=True,
            logprob_start_len=-1,
            extra_key=str(asked_at),  # the prefix cache of other weights is not ours
            return_routed_experts=routed_experts,
        )
        answer = await self._ask(request)
        completion = _completion(answer, asked_at, seed)
        if routed_experts and completion.finish_reason is not FinishReason.ABORT:
            assert self._routes is not None
            routes = _routes_of(answer, len(token_ids) + completion.num_tokens, self._routes)
            completion = msgspec.structs.replace(completion, routed_experts=routes)
        self._num_tokens += completion.num_tokens
        return completion

    async def logprobs(self, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """The logprob of each token after the first, at temperature 1; past the prefix cache.

        Raises:
            EngineError: The engine refuses the request.
            DeadlineError: It does not answer in time.
        """
        from sglang.srt.managers.io_struct import GenerateReqInput

        request = GenerateReqInput(
            rid=f"probe-{os.urandom(6).hex()}",
            input_ids=token_ids.tolist(),
            sampling_params={"max_new_tokens": 1, "temperature": 0.0, "skip_special_tokens": False},
            return_logprob=True,
            logprob_start_len=0,
            extra_key=f"probe-{os.urandom(6).hex()}",
        )
        try:
            async with asyncio.timeout(self._patience_s):
                answer = await self._ask(request)
        except TimeoutError as error:
            waited = f"waited {self._patience_s:g} s for SGLang to say the logprobs of {len(token_ids)} tokens"
            raise DeadlineError(waited) from error
        return np.array([logprob for logprob, *_ in answer["meta_info"]["input_token_logprobs"][1:]], dtype=np.float32)

    def num_tokens(self) -> int:
        """Tokens sampled so far, those of requests in flight too; SGLang tells of these every few dozen tokens."""
        return self._num_tokens + sum(len(state.output_ids) for state in self._manager.rid_to_state.values())

    def load_now(self) -> Load:
        """What the engine is busy with; its scheduler tells it at each prefill, every few decodes, and when idle."""
        loads = self._manager.load_snapshot_reader.read_all()
        return Load(
            num_running=sum(load.num_running_reqs for load in loads),
            num_waiting=sum(load.num_waiting_reqs for load in loads),
            num_cached_tokens=sum(load.num_used_tokens for load in loads),
        )

    def abort(self, request_id: str) -> None:
        """Stops a request; its `generate` returns what there is, with finish reason `abort`.

        SGLang stops each request whose id begins with this one: no id may be the beginning of another's.
        """
        self._manager.abort_request(rid=request_id)

    async def load(self, directory: Path, version: Version) -> float:
        """Swaps the weights in place: requests in flight pause, and go on under the new version.

        `directory` has the weights of `version`, in Hugging Face format. Once begun, it goes on to its end where the
        task that asks for it is cancelled. Returns the seconds of the pause.

        Raises:
            EngineError: The engine could not load them; what it holds now is unknown.
            DeadlineError: It has not loaded them in half of `run.stall_timeout_s`.
        """
        what = f"SGLang to load version {version} from {directory}"
        return await self._underway.to_its_end(self._swap(directory, version), what, deadline_s=self._patience_s)

    async def close(self) -> None:
        """Ends the engine: what is under way first, then its processes, and what SGLang left in this process.

        It takes less than `run.stop_timeout_s`, whatever hangs.
        """
        try:
            await self._underway.finish(deadline_s=FINISH_SHARE * self._stop_s)
            await cancel(self._manager.asyncio_tasks, deadline_s=CANCEL_SHARE * self._stop_s)
        finally:
            try:
                await self._end_processes()
            finally:
                await self._underway.break_off(deadline_s=CANCEL_SHARE * self._stop_s)

    async def _end_processes(self) -> None:
        """In place of SGLang's own shutdown, which kills every child of this process, whoever started it."""
        atexit.unregister(self._engine.shutdown)
        self._manager._subprocess_watchdog.stop()  # it takes the death of a process for a crash, and ends this one
        contexts = [self._manager.send_to_scheduler.context, self._engine.send_to_rpc.context]
        try:
            await asyncio.to_thread(_kill, self._engine.get_all_child_pids(), KILL_SHARE * self._stop_s)
        finally:
            for context in contexts:
                context.destroy(linger=0)
            self._rendezvous.cleanup()

    async def _swap(self, directory: Path, version: Version) -> float:
        from sglang.srt.managers.io_struct import (
            ContinueGenerationReqInput,
            PauseGenerationReqInput,
            UpdateWeightFromDiskReqInput,
        )

        async with self._swapping:  # SGLang has one place for the answer; whoever was cancelled may still hold it
            began = time.monotonic()
            await self._manager.pause_generation(PauseGenerationReqInput(mode="in_place"))
            try:
                request = UpdateWeightFromDiskReqInput(
                    model_path=str(directory), load_format="auto", weight_version=str(version), flush_cache=False
                )
                success, message, _ = await self._manager.update_weights_from_disk(request)
            finally:
                await self._manager.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))
            if not success:
                raise EngineError(f"{directory}: SGLang could not load version {version}: {message}")
            self.version = version
            return time.monotonic() - began

    async def _ask(self, request: Any) -> dict[str, Any]:
        return await self._underway.while_asked(self._answer(request))

    async def _answer(self, request: Any) -> dict[str, Any]:
        last: dict[str, Any] | None = None
        try:
            async for answer in self._manager.generate_request(request):
                last = answer  # there is one; what is not exhausted is closed by the loop, some time later
        except ValueError as error:
            raise EngineError(f"SGLang refused {request.rid}: {error}") from error
        if last is None:
            raise EngineError(f"SGLang gave no answer to {request.rid}")
        return last

    def _sampling_params(self, sampling: wire.Sampling, seed: int) -> dict[str, Any]:
        params: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "max_new_tokens": sampling.max_tokens,
            "stop_token_ids": [*self.eos_token_ids, *sampling.stop_token_ids],
            "sampling_seed": seed,
            "skip_special_tokens": False,
        }
        return params | ({"stop": list(sampling.stop)} if sampling.stop else {})


def _kill(process_ids: list[int], deadline_s: float) -> None:
    """Kills these children and what they started, and waits until they are gone, though not for ever.

    The kernel may take long to give a GPU's memory back. What is left then is logged, and no error: it would hide why
    the generator ends.
    """
    children = {child.pid: child for child in psutil.Process().children(recursive=True)}  # others have ended
    processes: list[psutil.Process] = []
    for child in (children[process_id] for process_id in process_ids if process_id in children):
        with suppress(psutil.NoSuchProcess):
            processes += [child, *child.children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, left = psutil.wait_procs(processes, timeout=deadline_s)
    if left:
        logger().error("engine_processes_left", waited_s=deadline_s, processes=[str(process) for process in left])


def _completion(answer: dict[str, Any], asked_at: Version, seed: int) -> Completion:
    """The completion; if it waited through an update, its first token counts as old as the prefix that it may use."""
    meta = answer["meta_info"]
    token_ids = answer["output_ids"]
    logprobs = [logprob for logprob, *_ in meta["output_token_logprobs"]][: len(token_ids)]
    spans = [VersionSpan(span["end"], Version.parse(span["version"])) for span in meta["weight_versions"]]
    if spans and spans[0].version != asked_at:
        spans = [VersionSpan(1, asked_at), *(span for span in spans if span.end > 1)]
    return Completion(
        token_ids=wire.int_bytes(token_ids),
        logprobs=np.minimum(np.asarray(logprobs, dtype="<f4"), 0.0).tobytes(),
        versions=wire.span_bytes([span for span in spans if span.end > 0]),
        finish_reason=FinishReason((meta["finish_reason"] or {"type": "abort"})["type"]),
        seed=seed,
    )


def _routes_of(answer: dict[str, Any], num_tokens: int, shape: RouteShape) -> bytes:
    meta = answer["meta_info"]
    chosen = np.frombuffer(base64.b64decode(meta.get("routed_experts", "")), dtype=np.int32)
    try:
        return encode_routes(chosen, num_tokens, shape)
    except WireError as error:
        raise EngineError(f"SGLang answered {meta['id']} with wrong routes: {error}") from error

"""Stand-ins for the parts of vLLM that ``lvlm_decode.vllm`` touches, so that its contract is tested where vLLM is not installed.

They have vLLM's names and leading parameters, which ``benchmarks/serving/run.py`` compares with an installed vLLM, and a
behaviour of their own: a scheduler that serves first what came first, in blocks, with a budget of tokens a step.
"""

from __future__ import annotations

import enum
import itertools
import sys
import types
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class RequestOutputKind(enum.Enum):
    CUMULATIVE = 0
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    """The settings that are read; the others have vLLM's neutral values."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    extra_args: dict[str, Any] | None = None
    eos_token_id: int | None = None


class RequestStatus(enum.IntEnum):
    WAITING = 1
    RUNNING = 2
    PREEMPTED = 3
    FINISHED_STOPPED = 4
    FINISHED_LENGTH_CAPPED = 5
    FINISHED_ABORTED = 6
    FINISHED_ERROR = 7


REASONS = {4: "stop", 5: "length", 6: "abort", 7: "error"}


class PauseState(enum.Enum):
    UNPAUSED = 0
    PAUSED_NEW = 1
    PAUSED_ALL = 2


class Request:
    """A request as the scheduler sees it."""

    def __init__(self, request_id: str, prompt: list[int], sampling_params: SamplingParams):
        self.request_id, self.prompt, self.sampling_params = request_id, list(prompt), sampling_params
        self.max_tokens = sampling_params.max_tokens
        self.output: list[int] = []
        self.status = RequestStatus.WAITING
        self.num_computed_tokens = self.num_output_placeholders = self.client_index = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    num_tokens_with_spec = num_tokens

    def is_finished(self) -> bool:
        return self.status > RequestStatus.PREEMPTED

    def get_finished_reason(self) -> str | None:
        return REASONS.get(int(self.status))


@dataclass
class EngineCoreOutput:
    request_id: str
    new_token_ids: list[int]
    finish_reason: Any = None


@dataclass
class EngineCoreOutputs:
    outputs: list[EngineCoreOutput] = field(default_factory=list)


class Queue(deque):  # type: ignore[type-arg]
    """Of waiting requests."""

    def add_request(self, request: Request) -> None:
        self.append(request)

    def remove_requests(self, requests: Any) -> None:
        kept = [one for one in self if not any(one is other for other in requests)]
        self.clear()
        self.extend(kept)


class KVCacheManager:
    """Counts blocks."""

    def __init__(self, blocks: int, block_size: int):
        self.block_size, self.held = block_size, {}
        self.block_pool = SimpleNamespace(
            num_gpu_blocks=blocks + 1, get_num_free_blocks=lambda: blocks - sum(self.held.values())
        )

    def get_blocks(self, request_id: str) -> Any:
        return SimpleNamespace(blocks=([None] * self.held.get(request_id, 0),))

    def truncate_computed_blocks(self, blocks: Any, num_computed_tokens: int) -> Any:
        return blocks

    def grow(self, request: Request, tokens: int) -> bool:
        """Blocks for the first ``tokens`` tokens, if there are enough."""
        want = -(-tokens // self.block_size)
        have = self.held.get(request.request_id, 0)
        if want - have > self.block_pool.get_num_free_blocks():
            return False
        self.held[request.request_id] = max(want, have)
        return True


class Scheduler:
    """First come, first served; preempts the last of the running requests where blocks are short."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any = None):
        self.vllm_config = vllm_config
        self.kv_cache_config = kv_cache_config or SimpleNamespace(kv_cache_groups=[None])
        shape = vllm_config.shape
        self.max_num_running_reqs, self.max_model_len, self.block_size = shape.rows, shape.longest, shape.block_size
        self.budget, self.warm = shape.budget, shape.warm
        self.kv_cache_manager = KVCacheManager(shape.blocks, shape.block_size)
        self.running: list[Request] = []
        self.waiting = Queue()
        self.requests: dict[str, Request] = {}
        self.prev_step_scheduled_req_ids: set[str] = set()
        self._pause_state = PauseState.UNPAUSED
        #: How often a request was preempted by this scheduler's own rule.
        self.own_preemptions = 0

    def add_request(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def finish_requests(self, request_ids: Any, finished_status: Any) -> list[Request]:
        ids = (
            [request_ids]
            if isinstance(request_ids, str)
            else list(self.requests if request_ids is None else request_ids)
        )
        found = [self.requests[one] for one in ids if one in self.requests and not self.requests[one].is_finished()]
        self.running = [one for one in self.running if not any(one is other for other in found)]
        self.waiting.remove_requests(found)
        for request in found:
            request.status = finished_status
            self._free_request(request)
        return found

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> None:
        self.kv_cache_manager.held.pop(request.request_id, None)
        del self.requests[request.request_id]

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        self.kv_cache_manager.held.pop(request.request_id, None)
        request.status, request.num_computed_tokens = RequestStatus.PREEMPTED, 0
        self.waiting.appendleft(request)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        return num_new_tokens

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        return True

    def _get_local_prefix_cache_hit(self, request: Request) -> Any:
        hit = (request.num_tokens - 1) // self.block_size * self.block_size if self.warm else 0
        return None, hit, 0, False

    def schedule(self, throttle_prefills: bool = False) -> Any:
        budget, scheduled, preempted, at = self.budget, {}, False, 0
        while at < len(self.running) and budget:
            request = self.running[at]
            new = min(request.num_tokens - request.num_computed_tokens, budget)
            new = self._reserve_prefill_lookahead(request, request.num_computed_tokens, new)
            if not new:
                at += 1
                continue
            while not self.kv_cache_manager.grow(request, request.num_computed_tokens + new):
                last = self.running.pop()
                self._preempt_request(last, 0.0)
                self.own_preemptions, preempted = self.own_preemptions + 1, True
                if last is request:
                    break
            else:
                scheduled[request.request_id] = new
                budget -= new
                at += 1
                continue
            break
        skipped = []
        while not preempted and budget and self._pause_state == PauseState.UNPAUSED and self.waiting:
            if len(self.running) >= self.max_num_running_reqs:
                break
            request = self.waiting[0]
            if not self._handle_blocked_waiting_request(request):
                skipped.append(self.waiting.popleft())
                continue
            _, computed, *_ = self._get_local_prefix_cache_hit(request)
            new = self._reserve_prefill_lookahead(request, computed, min(request.num_tokens - computed, budget))
            if not new or not self.kv_cache_manager.grow(request, computed + new):
                break
            self.running.append(self.waiting.popleft())
            request.status, request.num_computed_tokens = RequestStatus.RUNNING, computed
            scheduled[request.request_id] = new
            budget -= new
        self.waiting.extendleft(reversed(skipped))
        output = SimpleNamespace(num_scheduled_tokens=scheduled)
        self._update_after_schedule(output)
        return output

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        for name, new in scheduler_output.num_scheduled_tokens.items():
            self.requests[name].num_computed_tokens += new

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, EngineCoreOutputs]:
        """``model_runner_output`` is request -> token, for those whose tokens are all computed."""
        outputs: dict[int, EngineCoreOutputs] = {}
        for name, token in model_runner_output.items():
            if (request := self.requests.get(name)) is None:
                continue
            request.output.append(token)
            if token == request.sampling_params.eos_token_id:
                request.status = RequestStatus.FINISHED_STOPPED
            elif len(request.output) >= request.max_tokens or request.num_tokens >= self.max_model_len:
                request.status = RequestStatus.FINISHED_LENGTH_CAPPED
            if request.is_finished():
                self.running = [one for one in self.running if one is not request]
                self._free_request(request)
            told = outputs.setdefault(request.client_index, EngineCoreOutputs())
            told.outputs.append(EngineCoreOutput(name, [token], request.get_finished_reason()))
        return outputs


class AsyncScheduler(Scheduler):
    pass


class RowProcessor:
    """Base of processors of runner V1."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        return None

    def update_state(self, batch_update: Any) -> None:
        raise NotImplementedError

    def apply(self, logits: Any) -> Any:
        raise NotImplementedError

    def is_argmax_invariant(self) -> bool:
        raise NotImplementedError


class SlotProcessor:
    """Base of processors of runner V2."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return True

    def apply(self, logits: Any, ctx: Any) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class BatchUpdate:
    """What changed in the rows of runner V1."""

    added: list[Any] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    moved: list[Any] = field(default_factory=list)


def process_dict_updates(req_entries: dict[int, Any], batch_update: Any, new_state: Any) -> bool:
    """Bring the state of rows up to date: removed, then added, then moved rows."""
    if batch_update is None:
        return False
    for row in batch_update.removed:
        req_entries.pop(row, None)
    for row, params, prompt, output in batch_update.added:
        state = new_state(params, prompt, output)
        req_entries.pop(row, None)
        if state is not None:
            req_entries[row] = state
    for first, second, swap in batch_update.moved:
        one, other = req_entries.pop(first, None), req_entries.pop(second, None)
        if one is not None:
            req_entries[second] = one
        if swap and other is not None:
            req_entries[first] = other
    return True


def shape(
    rows: int = 8, blocks: int = 1000, block_size: int = 4, budget: int = 256, longest: int = 64, warm: bool = False
):
    """An engine's configuration, with what the stand-ins read.

    Args:
        warm: every request finds all full blocks before its last token in the prefix cache.
    """
    parallel = SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=1)
    return SimpleNamespace(
        shape=SimpleNamespace(
            rows=rows, blocks=blocks, block_size=block_size, budget=budget, longest=longest, warm=warm
        ),
        speculative_config=None,
        kv_transfer_config=None,
        parallel_config=parallel,
        scheduler_config=SimpleNamespace(policy="fcfs"),
    )


#: Module -> what it holds.
CONTENTS: dict[str, dict[str, Any]] = {
    "vllm": {"SamplingParams": SamplingParams, "__version__": "0.32.0"},
    "vllm.v1": {},
    "vllm.v1.core": {},
    "vllm.v1.core.kv_cache_manager": {"KVCacheManager": KVCacheManager},
    "vllm.v1.core.sched": {},
    "vllm.v1.core.sched.async_scheduler": {"AsyncScheduler": AsyncScheduler},
    "vllm.v1.core.sched.interface": {"PauseState": PauseState},
    "vllm.v1.core.sched.scheduler": {"Scheduler": Scheduler},
    "vllm.v1.engine": {"EngineCoreOutput": EngineCoreOutput, "EngineCoreOutputs": EngineCoreOutputs},
    "vllm.v1.request": {"RequestStatus": RequestStatus},
    "vllm.v1.sample": {},
    "vllm.v1.sample.logits_processor": {
        "LogitsProcessor": RowProcessor,
        "process_dict_updates": process_dict_updates,
    },
    "vllm.v1.worker": {},
    "vllm.v1.worker.gpu": {},
    "vllm.v1.worker.gpu.sample": {},
    "vllm.v1.worker.gpu.sample.logits_processor": {"LogitsProcessor": SlotProcessor},
}


def modules() -> dict[str, types.ModuleType]:
    """The stand-ins as modules, for ``sys.modules``."""
    found = {}
    for name, contents in CONTENTS.items():
        module = types.ModuleType(name)
        vars(module).update(contents, __path__=[])
        found[name] = module
    return found


def loaded() -> bool:
    """Whether the stand-ins, and not vLLM, are what ``import vllm`` finds."""
    return vars(sys.modules.get("vllm", types.ModuleType("none"))).get("SamplingParams") is SamplingParams


numbers = itertools.count()

"""What vLLM calls what is used here. No other file of this package names it, so a release that renames something is an edit here.

``probe()`` compares the names and signatures with those of the installed release; the scheduler asks it before it starts.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import vllm
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus
from vllm.v1.sample.logits_processor import LogitsProcessor as RowProcessor
from vllm.v1.sample.logits_processor import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotProcessor

from ..errors import DependencyError, UnsupportedError

#: Minor releases of vLLM whose engine ran the whole record of benchmarks/serving.
TESTED = ("0.32",)
RANGE = "vllm>=0.32,<0.33"
#: What is overridden or called, and its leading parameters.
SIGNATURES: dict[Any, dict[str, tuple[str, ...]]] = {
    Scheduler: {
        "add_request": ("self", "request"),
        "schedule": ("self", "throttle_prefills"),
        "finish_requests": ("self", "request_ids", "finished_status"),
        "update_from_output": ("self", "scheduler_output", "model_runner_output"),
        "_free_request": ("self", "request"),
        "_preempt_request": ("self", "request", "timestamp"),
        "_reserve_prefill_lookahead": ("self", "request", "num_computed_tokens", "num_new_tokens"),
        "_handle_blocked_waiting_request": ("self", "request"),
        "_get_local_prefix_cache_hit": ("self", "request"),
        "_update_after_schedule": ("self", "scheduler_output"),
    },
    KVCacheManager: {
        "get_blocks": ("self", "request_id"),
        "truncate_computed_blocks": ("self", "blocks", "num_computed_tokens"),
    },
    RowProcessor: {
        "update_state": ("self", "batch_update"),
        "apply": ("self", "logits"),
        "is_argmax_invariant": ("self",),
    },
    SlotProcessor: {
        "add_request": ("self", "req_idx", "sampling_params"),
        "apply": ("self", "logits", "ctx"),
    },
}
#: Attributes of a scheduler that stands.
ATTRIBUTES = (
    "running",
    "waiting",
    "requests",
    "max_num_running_reqs",
    "max_model_len",
    "block_size",
    "kv_cache_manager",
    "kv_cache_config",
    "prev_step_scheduled_req_ids",
    "_pause_state",
)


def probe(signatures: dict[Any, dict[str, tuple[str, ...]]] | None = None) -> list[str]:
    """What of vLLM is no longer as it was tested: one clause each; empty when all is."""
    moved = []
    for owner, names in (SIGNATURES if signatures is None else signatures).items():
        for name, wanted in names.items():
            if not callable(found := getattr(owner, name, None)):
                moved.append(f"{owner.__name__}.{name} is gone")
                continue
            have = tuple(inspect.signature(found).parameters)
            if have[: len(wanted)] != wanted:
                moved.append(f"{owner.__name__}.{name} takes ({', '.join(have)}), not ({', '.join(wanted)}, ...)")
    return moved


def check(moved: Sequence[str]) -> None:
    """Raise for what :func:`probe` found.

    Raises:
        DependencyError: says what moved, and which releases were tested.
    """
    if moved:
        raise DependencyError(
            f"vLLM {vllm.__version__} is not as lvlm_decode.vllm knows it: {'; '.join(moved)}; tested is vLLM "
            f"{', '.join(TESTED)}, so run: pip install '{RANGE}'"
        )


def check_configuration(config: Any, caches: int) -> None:
    """Raise for a configuration of the engine under which groups cannot be kept together.

    Args:
        config: vLLM's own.
        caches: kinds of keys and values that the model keeps.

    Raises:
        UnsupportedError: names the setting.
    """
    parallel = config.parallel_config
    trouble = {
        "speculative_config is set, and the drafts of a group's views would differ": config.speculative_config,
        "kv_transfer_config is set, which moves requests one by one": config.kv_transfer_config,
        "the model has several kinds of KV cache; pass disable_hybrid_kv_cache_manager=True": caches != 1,
        "scheduling_policy is 'priority', which would part groups": config.scheduler_config.policy != "fcfs",
        "pipeline_parallel_size is above 1, which was not tested": parallel.pipeline_parallel_size > 1,
        "data_parallel_size is above 1, which would send views to different engines": parallel.data_parallel_size > 1,
        "enable_batch_sharded_sampling parts the rows of a group": getattr(
            parallel, "enable_batch_sharded_sampling", False
        ),
    }
    for words, present in trouble.items():
        if present:
            raise UnsupportedError(f"lvlm_decode.vllm keeps the views of a sample together, and {words}.")


@dataclass(frozen=True)
class Facts:
    """What a client must know of an engine.

    Args:
        model, revision: folder or hub id, and which revision of it.
        gangs: its scheduler keeps groups together.
        embeds: it takes embeddings of whole prompts.
        normalizes: its device normalises pixels, so it expects them as they are in the picture.
    """

    model: str
    revision: str | None
    max_model_len: int
    max_num_seqs: int
    gangs: bool
    embeds: bool
    normalizes: bool


def facts(engine: Any) -> Facts:
    """Of a ``vllm.LLM`` or an ``AsyncLLM``."""
    config = getattr(engine, "llm_engine", engine).vllm_config
    model, schedule = config.model_config, config.scheduler_config
    named = schedule.scheduler_cls
    # vLLM takes a class or its name.
    text = named if isinstance(named, str) else f"{getattr(named, '__module__', '')}.{getattr(named, '__name__', '')}"
    return Facts(
        model.model,
        model.revision,
        model.max_model_len,
        schedule.max_num_seqs,
        text.startswith("lvlm_decode.vllm.scheduler."),
        bool(model.enable_prompt_embeds),
        bool(getattr(model.multimodal_config, "mm_device_do_normalize", False)),
    )


def run(llm: Any, prompts: Sequence[Mapping[str, Any]], params: Sequence[Any], progress: bool) -> list[Any]:
    """The outputs of a ``vllm.LLM``, in the order of the prompts."""
    return llm.generate(list(prompts), list(params), use_tqdm=progress)


def greedy(llm: Any, prompts: Sequence[Mapping[str, Any]], max_tokens: int) -> list[list[int]]:
    """Greedy answers of a ``vllm.LLM``, ids without the end token."""
    outputs = run(llm, prompts, [vllm.SamplingParams(temperature=0, max_tokens=max_tokens)] * len(prompts), False)
    return [said(output) for output in outputs]


def said(output: Any) -> list[int]:
    """The ids of an answer without the token that ended it."""
    (completion,) = output.outputs
    ids = list(completion.token_ids)
    return ids[:-1] if completion.finish_reason == "stop" else ids


#: For type checkers: what stands above vLLM's scheduler has its methods.
_Scheduler: Any = object


class Seams(_Scheduler):
    """Between vLLM's scheduler and :class:`~lvlm_decode.vllm.gangs.Gangs`: overrides by vLLM's names, questions by ours."""

    def __init__(self, *args: Any, **kwargs: Any):
        check(probe())
        super().__init__(*args, **kwargs)
        check([f"a scheduler has no {name}" for name in ATTRIBUTES if not hasattr(self, name)])
        own: Any = self
        check_configuration(own.vllm_config, len(own.kv_cache_config.kv_cache_groups))
        self.rows = own.max_num_running_reqs
        self.longest_request = own.max_model_len
        # One block holds nothing, by vLLM's convention.
        self.total_blocks = own.kv_cache_manager.block_pool.num_gpu_blocks - 1
        self._untold: list[Any] = []
        self._parted: list[Any] = []
        own.opened()

    # --- what groups ask ----------------------------------------------------------------------------------------------

    def free_blocks(self: Any) -> int:
        return self.kv_cache_manager.block_pool.get_num_free_blocks()

    def held_blocks(self: Any, request: Any) -> int:
        return len(self.kv_cache_manager.get_blocks(request.request_id).blocks[0])

    def to_go(self: Any, request: Any) -> int:
        """Tokens that a request has and has not computed; those of steps in flight count as there."""
        return request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens

    def is_running(self: Any, request: Any) -> bool:
        return request.status == RequestStatus.RUNNING

    def evict(self: Any, requests: list[Any]) -> None:
        """Preempt running requests; in the queue they keep their order."""
        now = time.monotonic()
        for request in reversed(requests):
            self.running.remove(request)
            self._preempt_request(request, now)
            # Under V1 a request that comes back in the next step must be sent to the worker anew.
            self.prev_step_scheduled_req_ids.discard(request.request_id)

    def queue_together(self: Any, requests: list[Any]) -> None:
        """Put waiting requests side by side at the end of the queue."""
        self.waiting.remove_requests(requests)
        for request in requests:
            self.waiting.add_request(request)

    def stop_admitting(self: Any) -> None:
        """Let no further waiting request in during this step."""
        if self._pause_state == PauseState.UNPAUSED:
            self._pause_state = PauseState.PAUSED_NEW

    def end(self: Any, requests: list[Any], failed: bool) -> None:
        """End requests whose clients do not know of it yet."""
        status = RequestStatus.FINISHED_ERROR if failed else RequestStatus.FINISHED_ABORTED
        self._untold += super().finish_requests([request.request_id for request in requests], status)

    # --- what vLLM calls ----------------------------------------------------------------------------------------------

    def add_request(self: Any, request: Any) -> None:
        new = request.request_id not in self.requests
        super().add_request(request)
        if new:
            self.arrived(request)

    def finish_requests(self: Any, request_ids: Any, finished_status: Any) -> list[Any]:
        if request_ids is None:
            return super().finish_requests(None, finished_status)
        ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        own = [self.requests[one] for one in ids if one in self.requests and not self.requests[one].is_finished()]
        others = self.companions(own)
        finished = super().finish_requests(ids, finished_status)
        self.end(others, False)
        return finished

    def _free_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        out = super()._free_request(request, *args, **kwargs)
        self.departed(request)
        return out

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._admitting_again():
            self.before_step()
            return super().schedule(*args, **kwargs)

    @contextmanager
    def _admitting_again(self: Any) -> Iterator[None]:
        before = self._pause_state
        try:
            yield
        finally:
            self._pause_state = before

    def _handle_blocked_waiting_request(self: Any, request: Any) -> bool:
        return self.admitted(request) and super()._handle_blocked_waiting_request(request)

    def _get_local_prefix_cache_hit(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        blocks, hit, *rest = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        kept = self.reusable(request, hit)
        if kept != hit:
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, kept)
        return (blocks, kept, *rest)

    def _reserve_prefill_lookahead(self: Any, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        new = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        return self.held(request, num_computed_tokens, new)

    def _update_after_schedule(self: Any, scheduler_output: Any) -> None:
        scheduled = scheduler_output.num_scheduled_tokens
        if self.gangs:
            pairs = [(self.requests[name], new) for name, new in scheduled.items()]
            self._parted += self.parted(request for request, new in pairs if new >= self.to_go(request))
        super()._update_after_schedule(scheduler_output)

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        if self._parted:
            # Their tokens are worth nothing; the engine and all others go on.
            self.end([request for request in self._parted if not request.is_finished()], True)
            self._parted = []
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if left := self.leftovers():
            self.end(left, False)
        for request in self._untold:
            told = outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
            told.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id, new_token_ids=[], finish_reason=request.get_finished_reason()
                )
            )
        self._untold = []
        return outputs


__all__ = [
    "RANGE",
    "TESTED",
    "AsyncScheduler",
    "RowProcessor",
    "Scheduler",
    "Seams",
    "SlotProcessor",
    "check",
    "check_configuration",
    "probe",
    "process_dict_updates",
]

"""The schedulers that :func:`lvlm_decode.vllm.engine_args` names."""

from __future__ import annotations

from typing import Any

from . import port
from .gangs import Gangs


class GangScheduler(port.Seams, Gangs, port.Scheduler):  # type: ignore[misc]
    """vLLM's scheduler, in which the views of a sample stay together."""


class AsyncGangScheduler(port.Seams, Gangs, port.AsyncScheduler):  # type: ignore[misc]
    """The same with vLLM's overlap of scheduling and forwards."""


def scheduler(overlap: bool) -> type[Any]:
    return AsyncGangScheduler if overlap else GangScheduler

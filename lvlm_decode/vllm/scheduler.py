"""The schedulers that :func:`lvlm_decode.vllm.engine_args` names."""

from __future__ import annotations

from . import port
from .gangs import Gangs


class GangScheduler(port.Seams, Gangs, port.Scheduler):
    """vLLM's scheduler, in which the views of a sample stay together."""


class AsyncGangScheduler(port.Seams, Gangs, port.AsyncScheduler):
    """The same with vLLM's overlap of scheduling and forwards."""

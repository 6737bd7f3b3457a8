"""Forward hooks and replaced forwards that are inert for every other call of the same model.

A hook is on a module for all who call it. Those made here look at a context variable first: they act in the thread, and
in the block, that opened them, and pass everything else through.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

_open: ContextVar[frozenset[object]] = ContextVar("lvlm_decode_hooks", default=frozenset())
_replacements: ContextVar[dict[nn.Module, Callable[..., Any]]] = ContextVar("lvlm_decode_forwards")
#: Guards how many blocks replace a module's forward; held for the count alone.
_LOCK = threading.Lock()


@contextmanager
def hooked(
    after: dict[nn.Module, Callable[..., Any]] | None = None,
    before: dict[nn.Module, Callable[..., Any]] | None = None,
) -> Iterator[None]:
    """Hooks on modules for the length of the block, for calls made inside it alone.

    Args:
        after: module -> (module, args, kwargs, output) -> another output or ``None``.
        before: module -> (module, args, kwargs) -> ``None``; it only looks.
    """
    key = object()

    def own(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *seen: hook(*seen) if key in _open.get() else None

    handles = [
        *(module.register_forward_hook(own(hook), with_kwargs=True) for module, hook in (after or {}).items()),
        *(module.register_forward_pre_hook(own(hook), with_kwargs=True) for module, hook in (before or {}).items()),
    ]
    token = _open.set(_open.get() | {key})
    try:
        yield
    finally:
        _open.reset(token)
        for handle in handles:
            handle.remove()


class _Dispatch:
    """The forward of a module that somebody replaces: each caller gets the one that belongs to its own block."""

    def __init__(self, module: nn.Module):
        self.module, self.before, self.count = module, module.__dict__.get("forward"), 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replacement = _replacements.get({}).get(self.module)
        if replacement is not None:
            return replacement(*args, **kwargs)
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


@contextmanager
def replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules compute by other functions for the length of the block, for calls made inside it alone.

    Args:
        forwards: module -> what runs in place of its ``forward``, with the same arguments.
    """
    with _LOCK:
        for module in forwards:
            dispatch = module.__dict__.get("forward")
            if type(dispatch) is not _Dispatch:
                dispatch = _Dispatch(module)
                module.__dict__["forward"] = dispatch
            dispatch.count += 1
    token = _replacements.set({**_replacements.get({}), **forwards})
    try:
        yield
    finally:
        _replacements.reset(token)
        with _LOCK:
            for module in forwards:
                dispatch = module.__dict__["forward"]
                dispatch.count -= 1
                if dispatch.count:
                    continue
                if dispatch.before is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = dispatch.before

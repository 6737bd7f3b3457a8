"""Keys and values: the one class that looks into a cache of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache, cache_utils

from ...errors import DependencyError, UnsupportedError
from .decoder import text_config

#: Layers that hold keys and values by position and nothing else.
_POSITIONAL = (
    cache_utils.DynamicLayer,
    cache_utils.DynamicSlidingWindowLayer,
    cache_utils.StaticLayer,
    cache_utils.StaticSlidingWindowLayer,
)
#: Slots that a branching cache gets beyond those it needs, so that it need not be copied for every token.
ROOM = 16


class _Buffered(cache_utils.DynamicLayer):
    """Keys and values (R, G, S, width) at the front of longer buffers: appending copies what is new."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._buffers: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.keys, self.values = self._append("keys", key_states), self._append("values", value_states)
        return self.keys, self.values

    def _append(self, name: str, new: Tensor) -> Tensor:
        states, buffer = getattr(self, name), self._buffers.get(name)
        start, end = states.shape[2], states.shape[2] + new.shape[2]
        # Rows that were reordered, or slots that were moved, are tensors of their own.
        if buffer is None or buffer.shape[2] < end or buffer.data_ptr() != states.data_ptr():
            buffer = new.new_empty(*new.shape[:2], end + ROOM, new.shape[3])
            buffer[:, :, :start] = states
            self._buffers[name] = buffer
        buffer[:, :, start:end] = new
        return buffer[:, :, :end]


class KV:
    """The keys and values of R rows: slots ``0 .. length - 1`` of every layer are in use.

    Args:
        cache: the cache of transformers that holds them; forwards are given this one.
    """

    def __init__(self, cache: Any):
        self.cache = cache
        # The cache's own; while a loop's calls are led elsewhere, the names on the cache are others.
        self._crop, self._reorder = cache.crop, cache.reorder_cache

    @classmethod
    def growing(cls, module: nn.Module) -> KV:
        """An empty cache that grows with every forward of ``module``."""
        return cls(DynamicCache(config=text_config(module)))

    @classmethod
    def fixed(cls, module: nn.Module, capacity: int) -> KV:
        """An empty cache of ``capacity`` slots whose memory never moves."""
        return cls(StaticCache(config=text_config(module), max_cache_len=capacity))

    @classmethod
    def branching(cls) -> KV:
        """An empty cache whose rows may branch, be left out and take tokens back: see :meth:`edit` and :meth:`select`."""
        return cls(transformers.Cache(layer_class_to_replicate=_Buffered))

    @property
    def length(self) -> int:
        """Slots in use."""
        return int(self.cache.get_seq_length())

    @property
    def rows(self) -> int | None:
        """Rows of the first layer; ``None`` for a layer that is empty or holds no keys."""
        keys = getattr(self.cache.layers[0], "keys", None) if self.cache.layers else None
        return None if keys is None else len(keys)

    @property
    def stored(self) -> int:
        """Slots that the first layer's tensors hold."""
        return self.cache.layers[0].keys.shape[2]

    @property
    def capacity(self) -> int | None:
        """The most slots there can be; ``None`` for a cache that grows."""
        # A fixed layer with a sliding window is shorter than the others.
        sizes = [layer.max_cache_len for layer in self.cache.layers if isinstance(layer, cache_utils.StaticLayer)]
        return max(sizes, default=None)

    def check_length(self, length: int) -> None:
        """Raise unless ``length`` slots are in use: a forward that did not write into this cache is found out here.

        Raises:
            DependencyError: the forward wrote elsewhere.
        """
        if self.length != length:
            raise DependencyError(
                f"transformers {transformers.__version__} ran a forward of {length} tokens, and the cache it was given holds "
                f"{self.length}; the cache is not handed over as this lvlm_decode does it; run: lvlm-decode doctor"
            )

    def check_branches(self, model: str) -> None:
        """Raise unless every layer holds keys and values alone.

        Raises:
            UnsupportedError: recurrent states.
        """
        if not all(hasattr(layer, "keys") for layer in self.cache.layers):
            raise UnsupportedError(
                f"{model} keeps recurrent states beside keys and values, which cannot be branched or rolled back token by "
                "token."
            )

    def check_rollback(self) -> None:
        """Raise unless single slots can be taken out of this cache again.

        Raises:
            UnsupportedError: a layer with a sliding window, which forgets slots that a rejection would need back; or one
                that holds more than keys and values by position: quantized states, a state of linear attention, an index.
        """
        for number, layer in enumerate(self.cache.layers):
            if getattr(layer, "is_sliding", False):
                raise UnsupportedError(
                    f"cache layer {number} has a sliding window, and rejected draft tokens cannot be taken back from it; "
                    "decode without a drafter."
                )
            # Not subclasses: what they hold beside keys and values would keep the rejected tokens.
            if type(layer) not in (cache_utils.DynamicLayer, cache_utils.StaticLayer):
                raise UnsupportedError(
                    f"cache layer {number} is a {type(layer).__name__}, which holds more than keys and values by position, "
                    "so rejected draft tokens cannot be taken back from it; decode without a drafter, or with a dynamic or "
                    "static cache."
                )

    def record(self) -> None:
        """From now on sliding layers keep what :meth:`drop` may need back."""
        self.cache.activate_past_recording()

    def drop(self, count: int) -> None:
        """Forget the newest ``count`` slots of every row.

        Also to be called with 0: a sliding window shrinks back to its size only when it is told that nothing is dropped.
        """
        self._crop(-count)

    def reorder(self, index: Tensor) -> None:
        """Row r becomes what row ``index[r]`` was; ``index`` (R,)."""
        self._reorder(index)

    @contextmanager
    def led(self, reorder: Callable[[Tensor], None], drop: Callable[[int], None]) -> Iterator[None]:
        """A loop's own calls on the cache go to ``reorder`` and ``drop`` for the length of the block."""
        led = {"reorder_cache": reorder, "crop": lambda count: drop(-count)}
        before = {name: self.cache.__dict__[name] for name in led if name in self.cache.__dict__}
        self.cache.__dict__.update(led)
        try:
            yield
        finally:
            for name in led:
                del self.cache.__dict__[name]
            self.cache.__dict__.update(before)

    def keep(self, base: int, count: int, slots: Tensor | None = None) -> None:
        """Leave the first ``base`` slots and ``count`` of those after them.

        Args:
            slots: (count,) which ones, counted from ``base``; ``None`` keeps the first.
        """
        for layer in self.cache.layers:
            if slots is not None:
                for states in (layer.keys, layer.values):
                    # index_select copies, so reading and writing the same slots is safe.
                    states[:, :, base : base + count] = states[:, :, base:].index_select(2, slots.to(states.device))
            self._free(layer, base + count)

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy slots ``source`` (R, m) of each row to its slots ``target`` (R, m), and free those from ``length`` on."""
        for layer in self.cache.layers:
            for states in (layer.keys, layer.values):
                shape = (-1, states.shape[1], -1, states.shape[3])
                old, new = (index.to(states.device)[:, None, :, None].expand(shape) for index in (source, target))
                states.scatter_(2, new, states.gather(2, old))
            self._free(layer, length)

    @staticmethod
    def _free(layer: Any, length: int) -> None:
        """Slots from ``length`` on are free again; a fixed layer keeps its buffers."""
        if isinstance(layer, cache_utils.StaticLayer):
            layer.cumulative_length.fill_(length)
        else:
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]

    def edit(self, change: Callable[..., Tensor], other: KV | None = None) -> None:
        """Put ``change(states)`` in the place of the keys and of the values (R, G, S, width) of every layer.

        Args:
            change: gets the states, and those of ``other`` beside them if it is given; it may write in place. Layers may be on
                devices of their own.
        """
        others = [None] * len(self.cache.layers) if other is None else other.cache.layers
        for layer, beside in zip(self.cache.layers, others):
            for name in ("keys", "values"):
                states = getattr(layer, name)
                states = change(states) if beside is None else change(states, getattr(beside, name))
                setattr(layer, name, states)

    def select(self, rows: Sequence[int], length: int) -> KV:
        """A branching copy of the first ``length`` slots of some rows."""
        out = KV.branching()
        for number, layer in enumerate(self.cache.layers):
            out.cache.update(layer.keys[:, :, :length][list(rows)], layer.values[:, :, :length][list(rows)], number)
        return out

    def give(self, target: Any, rows: int, lead: int) -> bool:
        """Put what the first ``rows`` rows hold into the cache ``target``, without their first ``lead`` slots.

        Args:
            target: a cache of the caller's shape; it may be the one that is read.
            lead: slots of padding that these rows have beyond the caller's prompt.

        Returns:
            whether that could be done; ``target`` is empty where it could not.
        """
        layers, capacity = self.cache.layers, self.capacity
        if target is self.cache and lead == 0 and self.rows == rows:
            return True
        if not all(type(layer) in _POSITIONAL and layer.is_initialized for layer in layers):
            target.reset()
            return False
        for layer in layers:
            length = int(layer.get_seq_length())
            held = min(length, layer.keys.shape[2])
            # A layer with a window holds the newest slots alone, so those in front may be gone already.
            size = layer.keys.shape[2] if capacity is None else min(layer.max_cache_len, capacity - lead)
            take = min(length - lead, held, size)
            for name in ("keys", "values"):
                # Copies, so that the other views' memory is free again.
                states = getattr(layer, name)[:rows, :, held - take : held].clone()
                fill = 0 if capacity is None else size - take
                setattr(layer, name, torch.nn.functional.pad(states, (0, 0, 0, fill)))
            if capacity is not None:
                layer.max_cache_len, layer.batch_size = size, rows
                layer.cumulative_length.fill_(length - lead)
                if hasattr(layer, "cumulative_length_int"):
                    layer.cumulative_length_int = length - lead
            elif hasattr(layer, "cumulative_length"):
                layer.cumulative_length = length - lead
        target.layers = layers
        return True

    @property
    def is_plain(self) -> bool:
        """Whether every layer grows and holds all keys and values, and nothing else."""
        return all(type(layer) is cache_utils.DynamicLayer for layer in self.cache.layers)

    def split(self, rows: int, lead: int) -> KV:
        """Everything that this cache holds, as another; this one then holds its first ``rows`` rows without ``lead`` slots.

        No memory is copied: both read the same.
        """
        whole = KV(DynamicCache())
        whole.cache.layers = self.cache.layers
        whole.show(self.cache, rows, lead)
        return whole

    def show(self, target: Any, rows: int, lead: int) -> None:
        """Let the cache ``target`` hold the first ``rows`` rows of this one without ``lead`` slots, on the same memory."""
        target.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in target.layers:
            layer.keys, layer.values = layer.keys[:rows, :, lead:], layer.values[:rows, :, lead:]

    def fill(self, other: KV, index: Tensor) -> None:
        """Put slots ``index`` (R, S) of each row of ``other`` into this cache, which is empty."""
        for number, layer in enumerate(other.cache.layers):
            shape = (-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            at = index.to(layer.keys.device)[:, None, :, None].expand(shape)
            wide = at[..., :1].expand(-1, -1, -1, layer.values.shape[3])
            self.cache.update(layer.keys.gather(2, at), layer.values.gather(2, wide), number)

    def clear(self) -> None:
        """Forget everything. For a cache of growing layers alone."""
        for layer in self.cache.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False

    def first_layers(self, count: int, rows: int, length: int) -> KV:
        """A growing view of what the first ``count`` layers hold of the first ``rows`` rows."""
        out = KV(DynamicCache())
        for number, layer in enumerate(self.cache.layers[:count]):
            out.cache.update(layer.keys[:rows, :, :length], layer.values[:rows, :, :length], number)
        return out


def is_fixed(cache: Any) -> bool:
    """Whether a loop was given a static cache."""
    return isinstance(cache, StaticCache)


def cache_among(values: Iterable[Any]) -> Any:
    """The cache among ``values``, the arguments of a call; ``None`` if there is none."""
    return next((value for value in values if isinstance(value, transformers.Cache)), None)


def is_own(cache: Any) -> bool:
    """Whether ``generate()`` was given this cache by the caller."""
    return bool(getattr(cache, "_is_user_defined", False))


def check_empty(values: Iterable[Any]) -> None:
    """Raise if one of ``values``, the arguments of a call, is a cache that holds tokens.

    Raises:
        UnsupportedError: such a cache. Views are read from the whole prompt, so its tokens would be read twice.
    """
    for value in values:
        if isinstance(value, transformers.Cache) and (length := int(value.get_seq_length())) > 0:
            raise UnsupportedError(
                f"the cache given to generate() holds {length} tokens already, and the views of a sample start from its whole "
                "prompt; leave out the cache and pass the whole conversation with its images."
            )


def check_own(cache: Any, name: str) -> None:
    """Raise if ``cache`` is the caller's own, which would come back empty or with the rows of other views.

    Raises:
        UnsupportedError: names what cannot fill it.
    """
    if is_own(cache):
        raise UnsupportedError(f"{name} keeps keys and values of its own and cannot fill a cache; leave it out.")


def check_plain(cache: Any, method: str) -> None:
    """Raise unless ``cache`` is the empty dynamic one that ``generate()`` makes by itself.

    Raises:
        UnsupportedError: a cache of the caller's, or one that is quantised, offloaded or static.
    """
    check_own(cache, method)
    if cache is None:
        return
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        raise UnsupportedError(
            f"{method} keeps keys and values in a dynamic cache of its own, and {type(cache).__name__} was asked "
            "for; leave out cache_implementation and the cache."
        )

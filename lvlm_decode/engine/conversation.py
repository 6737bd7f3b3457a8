"""A cache that goes on with a conversation: what every view's rows hold after a turn, and what of it the next turn can use.

The caller passes an empty cache in the first turn and the same cache, with the whole conversation, in the next. Views are
made afresh of the whole conversation; of each row the keys and values are taken over as far as its tokens, positions and
images are those that the cache was filled with, and the rest runs in one forward. So a turn answers what it would answer
without the cache, also where the answer's text was tokenized differently or a view became another.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..method import Method
from .hf import KV, Call, Encoded
from .samples import Sample

if TYPE_CHECKING:
    from .run import Run
    from .stack import Lane, Lanes

#: Where a cache carries what its views hold.
_NAME = "lvlm_decode_views"
#: By how much the features of one image may differ between two batches of the encoder, relative, for each token.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_ROUNDING = 3e-2


@dataclass(frozen=True)
class Held:
    """What the slots of one row hold, padding left out.

    Args:
        ids: (T,).
        positions: (T,) or (axes, T).
        images: in the order of their placeholders.
    """

    ids: Tensor
    positions: Tensor
    images: tuple[Encoded, ...]

    def shared(self, other: Held) -> int:
        """How many tokens both begin with: the same ids at the same positions, of the same images."""
        count = min(len(self.ids), len(other.ids))
        same = self.ids[:count] == other.ids[:count]
        at = (self.positions[..., :count] == other.positions[..., :count]).reshape(-1, count).all(0)
        return int((same & at).long().cumprod(0).sum())


@dataclass(frozen=True)
class Part:
    """What the rows of one forward hold.

    Args:
        views: their numbers.
        kv: (V*B rows, S slots).
        slots: per row the slots that hold its tokens.
        rows: V*B, view-major.
    """

    views: tuple[int, ...]
    kv: KV
    slots: list[Tensor]
    rows: list[Held]


@dataclass(frozen=True)
class Carried:
    """What a cache carries from one turn to the next.

    Args:
        model: that filled it.
        method: that made the views.
        sample_ids: of the first turn; the views of the next turns are drawn under them too.
        parts: one for each forward that the views run in, that of view 0 first.
        shown: rows of the samples, and slots of padding before the caller's.
    """

    model: weakref.ref[torch.nn.Module]
    method: Method
    sample_ids: list[Hashable]
    parts: list[Part]
    shown: tuple[int, int]

    def __deepcopy__(self, memo: dict[int, Any]) -> Carried:
        # A method may hold a model.
        return dataclasses.replace(self, parts=copy.deepcopy(self.parts, memo))


def kept_in(cache: Any, model: torch.nn.Module, method: Method) -> Carried | None:
    """What ``cache``, one that a call was given, carries; ``None`` for no cache and an empty one.

    Raises:
        UnsupportedError: a cache that holds tokens and no views of this model and method.
    """
    if cache is None or (length := KV(cache).length) == 0:
        return None
    kept = getattr(cache, _NAME, None)
    start = f"the cache given to generate() holds {length} tokens already, and "
    remedy = "; leave out the cache and pass the whole conversation with its images."
    if kept is None:
        raise UnsupportedError(
            f"{start}not those of the views: pass an empty cache in the first turn, with the method attached{remedy}"
        )
    if isinstance(kept, str):
        raise UnsupportedError(f"{start}cannot go on, because {kept}{remedy}")
    if kept.model() is not model or kept.method != method:
        raise UnsupportedError(f"{start}under {kept.method} of the model that filled it, not under {method}{remedy}")
    return kept


@contextmanager
def going_on(run: Run, cache: Any) -> Iterator[None]:
    """The caller's cache is empty for the turn that goes on; what it carried is with the run.

    A call that is refused leaves the cache as it was.
    """
    if run.kept is None:
        yield
        return
    delattr(cache, _NAME)
    KV(cache).clear()
    try:
        yield
    except BaseException:
        if (kept := run.kept) is not None:
            kept.parts[0].kv.show(cache, *kept.shown)
            setattr(cache, _NAME, kept)
        raise


def check(call: Call, what: str | None) -> None:
    """Raise for what cannot go on from a cache that holds a conversation.

    Args:
        what: a search or a drafter, by name.

    Raises:
        UnsupportedError: beams, drafts, a search, outputs for tokens that do not run again.
    """
    states = [name for name in ("output_attentions", "output_hidden_states") if getattr(call.config, name, False)]
    if what is None:
        what = {"beam_search": "num_beams", "beam_sample": "num_beams", "assisted_generation": "assisted decoding"}.get(
            call.mode, "num_return_sequences" if (call.config.num_return_sequences or 1) > 1 else None
        )
    if what is None and states and call.config.return_dict_in_generate:
        what = states[0]
    if what is not None:
        raise UnsupportedError(
            f"{what} cannot go on from a cache that holds a conversation; leave out the cache and pass the whole conversation, "
            f"or leave out {what}."
        )


def refusal(run: Run, call: Call) -> str | None:
    """Why the keys and values of this call cannot serve a next turn, in a clause; ``None`` where they can."""
    if call.mode not in ("greedy_search", "sample") or run.rows_per_sample > 1:
        return "it was filled under beams, drafts or several return sequences"
    if any(type(part).patch is not Method.patch for part in run.method.parts()) or any(v.patch for v in run.views):
        return (
            f"{run.method.name} changes attention or hidden states, so the keys of an answer are not those of a prompt"
        )
    if any("token_type_ids" in prepared.tokens for prepared in run.prepared):
        return (
            f"{run.family.config.model_type} reads prompts, or the images in them, in both directions, and a turn that goes on "
            "from a cache is read in one"
        )
    return None


def told(run: Run, lane: Lane) -> tuple[list[Held], list[Sample]]:
    """The prompts of a lane's rows, and the samples they are."""
    rows, samples = [], []
    for prepared, number in zip(lane.prepared, lane.views):
        for index, sample in enumerate(run.samples[number]):
            length = len(sample.input_ids)
            rows.append(Held(sample.input_ids, prepared.positions[..., index, -length:], sample.images))
            samples.append(sample)
    return rows, samples


def resume(run: Run, kept: Carried, lane: Lane) -> None:
    """Let ``lane`` begin with what ``kept`` holds of its prompts."""
    part = next((part for part in kept.parts if part.views == lane.views), None)
    rows, samples = told(run, lane)
    if part is None or len(part.rows) != len(rows):
        return
    spans = [sample.image_spans() for sample in samples]
    new = 1
    for old, row, places in zip(part.rows, rows, spans):
        # At least one token runs, for its logits.
        shared = min(old.shared(row), len(row.ids) - 1)
        for (start, _), image, before in zip(places, row.images, (*old.images, *[None] * len(row.images))):
            if before is None or not _same(image, before):
                shared = min(shared, start)
                break
        new = max(new, len(row.ids) - shared)
    # An image runs as a whole, in every row.
    inside = True
    while inside:
        cuts = [
            (len(row.ids), start)
            for row, places in zip(rows, spans)
            for start, stop in places
            if start < len(row.ids) - new < stop
        ]
        inside = bool(cuts)
        new = max([new, *(length - start for length, start in cuts)])
    width = lane.width
    if new >= width:
        return
    index = torch.zeros(len(rows), width - new, dtype=torch.long)
    for number, row in enumerate(rows):
        take = len(row.ids) - new
        if take > 0:
            index[number, -take:] = part.slots[number][:take].cpu()
    lane.kv.fill(part.kv, index)
    images = [
        image
        for row, places in zip(rows, spans)
        for (start, _), image in zip(places, row.images)
        if start >= len(row.ids) - new
    ]
    lane.resume(new, run.family.pack(images) if images else {})


def _same(image: Encoded, other: Encoded) -> bool:
    """Whether two encodings are of one image, up to the rounding of batches of unlike size."""
    for a, b in zip((image.features, *image.deep), (other.features, *other.deep)):
        if image.kind != other.kind or a.shape != b.shape:
            return False
        rounding = _ROUNDING.get(a.dtype, _HALF_ROUNDING)
        a, b = a.float(), b.float().to(a.device)
        if bool(((a - b).norm(dim=-1) > rounding * a.norm(dim=-1)).any()):
            return False
    return True


def keep(run: Run, call: Call, cache: Any, lanes: Lanes, kv: KV, sequences: Tensor) -> bool:
    """Let the caller's cache carry what all views hold; it shows the rows of the samples. Whether that could be done.

    Args:
        cache: the caller's.
        kv: of the loop's, which is the caller's unless its size is fixed.
        sequences: (B, P + T) what the loop returned.
    """
    reason = refusal(run, call)
    if reason is None and not all(lane.kv.is_plain for lane in lanes.lanes):
        reason = f"layers of {run.family.config.model_type} keep something else than all keys and values"
    if reason is not None:
        setattr(cache, _NAME, reason)
        return False
    shown = lanes.main.rows, lanes.lead
    whole = kv.split(*shown)
    parts = []
    for lane in lanes.lanes:
        prompts, _ = told(run, lane)
        count = lane.length - lane.width
        answers = sequences[:, call.prompt_length : call.prompt_length + count]
        rows = []
        for number, prompt in enumerate(prompts):
            further = prompt.positions[..., -1:] + torch.arange(1, count + 1, device=prompt.positions.device)
            ids = torch.cat([prompt.ids, answers[number % lane.rows].to(prompt.ids.device)])
            rows.append(Held(ids, torch.cat([prompt.positions, further], -1), prompt.images))
        seen = torch.ones(len(rows), lane.length, dtype=torch.bool) if lane.mask is None else lane.mask
        slots = [row.nonzero().flatten() for row in seen]
        parts.append(Part(lane.views, whole if lane is lanes.main else lane.kv, slots, rows))
    setattr(cache, _NAME, Carried(weakref.ref(run.model), run.given_method, run.sample_ids, parts, shown))
    return True

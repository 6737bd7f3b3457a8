"""Gang scheduling: the requests of a group sample in the same step or not at all.

A member may compute all but the last token of its prompt whenever vLLM likes, in chunks or from the prefix cache; the last one
is held until every member has come as far. From then on each has one token to go in every step, so they stay together:

- a group enters the running requests whole, and what waits behind it waits until it fits;
- before a step, whole groups are preempted from the back until the blocks of all others surely suffice, so that vLLM never has
  to preempt a single member after another was scheduled;
- a group ends whole: where one member is aborted or stops alone, the others are ended too, and their clients are told;
- a group that can never run here (more views than rows, more tokens than blocks, views that contradict each other) is ended
  when it is complete. Nothing that a client sends raises: an exception here would end the engine for everybody.

This file knows no engine. ``port.py`` says what vLLM calls what is used here.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import LvlmDecodeError
from .wire import Member, of_params

log = logging.getLogger(__name__)
#: How long, in seconds, the first views of a group wait for the others. Clients send them together.
PATIENCE = 60.0


def member_of(params: Any) -> Member | None:
    """The view that sampling parameters belong to; ``None`` also for what the frontend would have refused."""
    try:
        return of_params(params)
    except LvlmDecodeError as error:
        log.warning("served as an ordinary request: %s", error)
        return None


class Gang:
    """The members of one group that are here, by number of their view.

    Args:
        since: when the first of them came.
    """

    def __init__(self, member: Member, since: float):
        self.name, self.views, self.since = member.group, member.views, since
        self.members: dict[int, Any] = {}
        #: One of its members is gone, so the others have nothing left to do.
        self.broken = False
        #: All members have been here.
        self.whole = False

    @property
    def complete(self) -> bool:
        return len(self.members) == self.views

    def in_order(self) -> list[Any]:
        return [self.members[view] for view in sorted(self.members)]


class Gangs:
    """Mixin over a scheduler; see :class:`lvlm_decode.vllm.port.Seams` for what it is given and what it is asked."""

    # Given by the port.
    running: list[Any]
    rows: int
    block_size: int
    longest_request: int
    total_blocks: int
    free_blocks: Callable[[], int]
    held_blocks: Callable[[Any], int]
    to_go: Callable[[Any], int]
    is_running: Callable[[Any], bool]
    evict: Callable[[list[Any]], None]
    queue_together: Callable[[list[Any]], None]
    stop_admitting: Callable[[], None]
    end: Callable[[list[Any], bool], None]

    def opened(self) -> None:
        """The scheduler stands."""
        self.gangs: dict[str, Gang] = {}
        #: Id of a request -> its group; asked several times a step for every request.
        self._gang_of: dict[str, Gang] = {}
        #: Names of groups that broke before they were complete; their late members end at once. The oldest are forgotten.
        self._broken: deque[str] = deque(maxlen=4096)
        self.clock: Callable[[], float] = time.monotonic
        #: Groups of which every member may compute its last token in this step.
        self.may_sample: set[str] = set()
        #: How often whole groups were preempted, and how many groups were ended because vLLM parted them.
        self.gang_preemptions = self.gangs_parted = 0

    def gang_of(self, request: Any) -> Gang | None:
        """The group that a request is a member of; ``None`` for an ordinary one, and for a group of one view."""
        return self._gang_of.get(request.request_id)

    def member(self, request: Any) -> Member | None:
        found = member_of(request.sampling_params)
        # Alone it always samples whole.
        return None if found is None or found.views == 1 else found

    # --- arrival and departure --------------------------------------------------------------------------------------

    def arrived(self, request: Any) -> None:
        """A new request stands in the queue."""
        member = self.member(request)
        if member is None:
            return
        if member.group in self._broken:
            log.warning("group %s ended before its view %d came, which is ended too", member.group, member.view)
            self.end([request], False)
            return
        gang = self.gangs.setdefault(member.group, Gang(member, self.clock()))
        if member.view in gang.members or gang.broken:
            log.warning("group %s has a view %d already; the second one is ended", member.group, member.view)
            self.end([request], False)
            return
        gang.members[member.view] = request
        self._gang_of[request.request_id] = gang
        if gang.complete:
            gang.whole = True
            why = self.impossible(gang)
            if why:
                log.warning("group %s cannot run and is ended: %s", gang.name, why)
                self.end(gang.in_order(), False)
                return
            self.queue_together(gang.in_order())

    def impossible(self, gang: Gang) -> str:
        """Why a complete group can never run here, or nothing. What it may say is bounded by its longest member."""
        members = gang.in_order()
        if len({self._agreed(request) for request in members}) > 1:
            return "its views differ in more than their prompts"
        if gang.views > self.rows:
            return f"it has {gang.views} views, and max_num_seqs is {self.rows}"
        if any(getattr(request, "resumable", False) for request in members):
            return "a view of it is a session that takes further input"
        prompts = [request.num_prompt_tokens for request in members]
        if min(prompts) < 2:
            return "the prompt of a view has a single token"
        room = self.longest_request - max(prompts)
        if room < 1:
            return f"its longest view has {max(prompts)} tokens, and max_model_len is {self.longest_request}"
        for request in members:
            request.max_tokens = min(request.max_tokens, room)
        blocks = sum(self.blocks(n + members[0].max_tokens) for n in prompts)
        if blocks > self.total_blocks:
            return f"its views need {blocks} blocks of {self.block_size} tokens, and the cache has {self.total_blocks}"
        return ""

    def _agreed(self, request: Any) -> tuple[Any, ...]:
        params, member = request.sampling_params, self.member(request)
        stops = tuple(sorted(params.stop_token_ids or ()))
        return (member and member.common, request.max_tokens, stops, params.eos_token_id, params.min_tokens)

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def companions(self, requests: Iterable[Any]) -> list[Any]:
        """The other members of the groups of ``requests``, which end with them."""
        own = list(requests)
        found: dict[int, Any] = {}
        for request in own:
            if (gang := self.gang_of(request)) is not None:
                gang.broken = True
                found |= {id(other): other for other in gang.members.values()}
        return [other for other in found.values() if all(other is not request for request in own)]

    def departed(self, request: Any) -> None:
        """A request is finished and leaves the engine."""
        if (gang := self._gang_of.pop(request.request_id, None)) is None:
            return
        gang.members = {view: other for view, other in gang.members.items() if other is not request}
        gang.broken = True
        if not gang.members:
            del self.gangs[gang.name]
            if not gang.whole:
                self._broken.append(gang.name)

    def leftovers(self) -> list[Any]:
        """Members whose companions ended without them."""
        return [request for gang in self.gangs.values() if gang.broken for request in gang.in_order()]

    # --- one step -----------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Decide who may sample, and make room for it."""
        if not self.gangs:
            self.may_sample = set()
            return
        now = self.clock()
        for gang in [gang for gang in self.gangs.values() if not gang.whole and now - gang.since > PATIENCE]:
            log.warning("group %s is ended: %d of its %d views came", gang.name, len(gang.members), gang.views)
            self.end(gang.in_order(), False)
        self.may_sample = {
            gang.name
            for gang in self.gangs.values()
            if gang.complete
            and all(self.is_running(request) and self.to_go(request) == 1 for request in gang.members.values())
        }
        # Those that sample come first, so that the budget of tokens cannot part them.
        self.running.sort(key=lambda request: self.to_go(request) != 1)
        self.make_room()

    def make_room(self) -> None:
        """Preempt from the back, groups whole, until the tokens of all others surely find blocks."""
        free = self.free_blocks()
        if sum(self.to_go(request) // self.block_size + 1 for request in self.running) <= free:
            return
        while self.running:
            need = 0
            for request in self.running:
                end = min(request.num_computed_tokens + self.to_go(request), self.longest_request)
                need += max(0, self.blocks(end) - self.held_blocks(request))
            if need <= self.free_blocks():
                return
            last = self.running[-1]
            gang = self.gang_of(last)
            members = [last] if gang is None else gang.in_order()
            victims = [request for request in self.running if any(request is other for other in members)]
            if len(victims) == len(self.running):
                # Alone it fits: vLLM makes sure of it for a request, and ``impossible`` for a group.
                return
            self.evict(victims)
            if gang is not None:
                self.may_sample.discard(gang.name)
                self.gang_preemptions += 1
            # What was taken out would otherwise be let in again at once.
            self.stop_admitting()

    def admitted(self, request: Any) -> bool:
        """Whether a waiting request may enter the running ones now, if vLLM has a place for it."""
        gang = self.gang_of(request)
        if gang is None:
            return True
        if not gang.complete:
            return False
        members = gang.in_order()
        if any(self.is_running(other) for other in members):
            return True
        fits = len(self.running) + gang.views <= self.rows and (
            sum(self.blocks(other.num_tokens) for other in members) <= self.free_blocks()
        )
        if not fits:
            # First come, first served: without this, small requests would pass a large group for ever.
            self.stop_admitting()
        return fits

    def held(self, request: Any, computed: int, new: int) -> int:
        """How many of ``new`` tokens a request may compute, of which ``computed`` are there."""
        gang = self.gang_of(request)
        if gang is None or gang.name in self.may_sample:
            return new
        return min(new, request.num_computed_tokens + self.to_go(request) - computed - 1)

    def reusable(self, request: Any, hit: int) -> int:
        """How many cached tokens a request may take over: something must be left to compute before its last token."""
        if self.gang_of(request) is not None and hit >= request.num_tokens - 1:
            return max(0, hit - self.block_size)
        return hit

    def parted(self, sampling: Iterable[Any]) -> list[Any]:
        """The members of groups of which some sample in this step and some do not; ``sampling`` are all that do."""
        groups: dict[str, int] = {}
        for request in sampling:
            if (gang := self.gang_of(request)) is not None:
                groups[gang.name] = groups.get(gang.name, 0) + 1
        apart = [self.gangs[name] for name, rows in groups.items() if rows != self.gangs[name].views]
        self.gangs_parted += len(apart)
        return [request for gang in apart for request in gang.in_order()]

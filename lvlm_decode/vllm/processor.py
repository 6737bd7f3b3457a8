"""The logits processor that :func:`lvlm_decode.vllm.engine_args` names: one class for both runners of vLLM.

Runner V1 shows it rows by number, in its persistent batch; runner V2 shows it slots, whose rows change places every step. Both
show it also the rows of prompts that are not through. What it decides stands in ``combine.py``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import InputError
from . import port
from .combine import Row, decide
from .gangs import member_of
from .served import refused_setting
from .wire import Member, of_params


class Grouped(port.RowProcessor, port.SlotProcessor):
    """Gives all rows of a group the token that its method chooses."""

    def __init__(self, vllm_config: Any, *rest: Any):
        #: Of runner V1: row -> its view and the list in which its tokens appear.
        self.rows: dict[int, tuple[Member, list[int]]] = {}
        #: Of runner V2: slot -> its view.
        self.slots: dict[int, Member] = {}
        # V2 gives the state of its requests, V1 a device and whether memory is pinned.
        self.requests = rest[0] if len(rest) == 1 else None

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Called by the frontend for every request.

        Raises:
            InputError: a view that cannot be read, or with settings that belong to its group.
        """
        if of_params(sampling_params) is None:
            return
        own = refused_setting(sampling_params)
        if own is None and sampling_params.temperature != 0:
            own = f"temperature={sampling_params.temperature!r}"
        if own is not None:
            raise InputError(f"a view of a sample has {own}, and its draw belongs to its group; leave it out.")

    def is_argmax_invariant(self) -> bool:
        return False

    # --- runner V1 ------------------------------------------------------------------------------------------------------

    def update_state(self, batch_update: Any) -> None:
        def new(params: Any, prompt: Any, output: list[int]) -> tuple[Member, list[int]] | None:
            member = member_of(params)
            return None if member is None else (member, output)

        port.process_dict_updates(self.rows, batch_update, new)

    # --- runner V2 ------------------------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        member = member_of(sampling_params)
        # A slot keeps what its last request left there.
        self.slots.pop(req_idx, None)
        if member is not None:
            self.slots[req_idx] = member
        return member is not None

    def slot_rows(self, ctx: Any) -> list[Row]:
        """The rows of views in this step that sample. Only what the host knows is read: a device must not be waited for."""
        found = []
        for number, slot in enumerate(ctx.idx_mapping_np.tolist()):
            member = self.slots.get(slot)
            if member is None:
                continue
            seen = int(ctx.seq_lens_upper_bound_np[number])
            if seen < int(self.requests.prefill_len.np[slot]):  # type: ignore[union-attr]
                # Its prompt is not through, so what is sampled here is thrown away.
                continue
            found.append(Row(number, member, seen - int(self.requests.prompt_len.np[slot])))  # type: ignore[union-attr]
        return found

    # --- both -----------------------------------------------------------------------------------------------------------

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        if ctx is None:
            rows = [Row(number, member, len(said)) for number, (member, said) in self.rows.items()]
        else:
            rows = self.slot_rows(ctx)
        if rows:
            decide(logits, rows)
        return logits

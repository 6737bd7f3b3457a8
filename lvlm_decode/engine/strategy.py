"""How a run is decoded: by Hugging Face's loops on the stacked forward, by drafts, or by a search of a controller."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from ..errors import UnsupportedError
from ..method import Method
from . import conversation, hf, sampling
from .hf import Call
from .mitigated import mitigated
from .modes import check_modes
from .run import Run


class Strategy(Protocol):
    """Decodes what ``generate()`` prepared."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def decode(self, run: Run, call: Call) -> Any:
        """What ``generate()`` would return: (R, P + T) ids, or an output object."""


def decode(run: Run, call: Call, strategy: Strategy | None = None) -> Any:
    """Decode ``run``, after everything that it cannot honour is refused.

    Args:
        strategy: that of a drafter; by default the method's own if it searches by itself, else the stacked forward.

    Raises:
        UnsupportedError: a mode, a cache or a setting that the method or the engine cannot honour.
    """
    search = getattr(run.method, "decode", None) if strategy is None else strategy.decode
    if run.kept is not None:
        name = run.given_method.name if strategy is None else strategy.name
        conversation.check(call, None if search is None else name)
    call = checked(run, call, None if strategy is None else strategy.name)
    if search is None:
        return Stacked().decode(run, call)
    if call.synced:
        name = run.given_method.name if strategy is None else strategy.name
        raise UnsupportedError(
            f"{name} cannot run with synced_gpus=True: it ends when its own answers do, and other processes would wait for it; "
            "leave it out, or use a method without a search or a drafter."
        )
    return search(run, call)


def checked(run: Run, call: Call, drafter: str | None) -> Call:
    """The call as the strategies want it.

    Args:
        drafter: name of the drafter that is attached, if any.

    Raises:
        UnsupportedError: see :func:`decode`.
    """
    hf.check_mode(call)
    config, mode = call.config, call.mode
    beams, assisted = mode.startswith("beam"), mode == "assisted_generation"
    modes = ["beam" if beams else "sample" if config.do_sample else "greedy"]
    if config.do_sample and beams:
        modes.append("sample")
    modes += ["stream"] if call.streamer is not None else []
    modes += ["static"] if hf.is_fixed(call.cache) else []
    if drafter is not None and assisted:
        raise UnsupportedError(
            f"drafter {drafter} is attached, and assistant_model, prompt_lookup_num_tokens and assistant_early_exit "
            "draft too; leave those out of generate(), or attach without a drafter."
        )
    modes += ["speculation"] if drafter is not None or assisted else []
    modes += ["batch"] if len(run.batch.samples) > 1 else []
    check_modes(run.given_method, modes)
    if config.prefill_chunk_size is not None:
        raise UnsupportedError(
            "prefill_chunk_size splits the prompt over several forwards, and the views of a sample are prepared in one; "
            "leave it out."
        )
    if not config.use_cache:
        raise UnsupportedError("use_cache=False is not supported: the views keep their keys and values; leave it out.")
    # The loop's own forward scores all views, which no graph should hold; the model's steps inside of it may be compiled,
    # unless a method changes them: what it hooks in is made anew for each call, and a graph would be too.
    if all(type(part).patch is Method.patch for part in run.method.parts()):
        run.steps = hf.compiled(run.module, call)
    config.disable_compile = True
    if run.seed is not None and config.do_sample:
        if beams:
            raise UnsupportedError(
                "seed= keys the draw of each row, and beam sampling draws over all beams at once; call torch.manual_seed "
                "instead of passing seed=, or leave out num_beams."
            )
        draw = sampling.KeyedDraw(run.seed, run.row_ids, call.prompt_length)
        call = dataclasses.replace(call, processors=type(call.processors)([*call.processors, draw]))
    if hf.is_fixed(call.cache):
        if run.execution != "stacked":
            raise UnsupportedError(f"execution={run.execution!r} needs a dynamic cache; leave out the static one.")
    return call


class Stacked:
    """Hugging Face's own loops, on a forward that runs all views and answers with the combined scores."""

    def decode(self, run: Run, call: Call, ran: Callable[[], None] | None = None) -> Any:
        """See :class:`Strategy`.

        Args:
            ran: called after every forward, that of the prompts first.
        """
        assisted = call.mode == "assisted_generation"
        if assisted and call.assistant.get("assistant_model") is not None:
            # The draft model is prepared from these, so that it sees the image.
            images = [image for sample in run.samples[0] for image in sample.images]
            if images:
                packed = hf.with_images(run.family.pack(images))
                # generate() made positions without the grids of the images, which are no arguments of this call any more.
                placed = {"position_ids": run.prepared[0].positions} if run.family.position_keys else {}
                call = dataclasses.replace(call, inputs={**call.inputs, **placed, **packed})
        given, kv = call.cache, run.keys_for(call.cache)
        ends = call.config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        # Rows of beams and drafts are not those of the answer, and a streamer has said what comes.
        at_once = assisted or call.mode.startswith("beam") or call.streamer is not None
        guard = sampling.SomethingLeft(call.prompt_length, ends, at_once, bool(call.config.do_sample))
        call = dataclasses.replace(call, cache=kv.cache, processors=sampling.guarded(call.processors, guard))
        with run.method.patch(run):
            lanes = run.open(kv, record=assisted)
            with kv.led(lanes.reorder, lanes.drop):
                out = hf.run_loop(run.module, call, mitigated(run, lanes, call.prompt_length, ran))
        sequences = out if isinstance(out, Tensor) else out.sequences
        guard.check(sequences)
        # Its rows are those of every view; the caller is given those of the samples.
        kept = hf.is_own(given) and conversation.keep(run, call, given, lanes, kv, sequences)
        own = kept or kv.give(given, lanes.main.rows, lanes.lead)
        hf.give_cache(out, given if own else None)
        return out


__all__ = ["Call", "Stacked", "Strategy", "checked", "decode"]

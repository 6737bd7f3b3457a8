"""attach and detach: a Hugging Face model becomes the mitigated model for the length of each ``generate()`` call.

``attach`` sets one attribute on the instance, ``generate``, and ``detach`` takes it off. A call puts nothing on the instance,
so calls nest and run side by side, and an attached model can be copied, pickled and saved.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar, overload

import torch

from .engine import conversation, hf
from .engine.modes import check_modes, check_needs, rows_per_sample
from .engine.recorder import Recorder
from .engine.run import Run, Summary
from .engine.strategy import Strategy, decode
from .errors import InputError, UnsupportedError
from .families import family_of
from .families.base import Family
from .method import Method
from .methods import parse
from .speculative.drafters import parse as parse_drafter
from .speculative.drafters.base import Drafter
from .speculative.generate import Speculative

#: Held while a block of :func:`attached` begins or ends.
_BLOCKS = threading.Lock()
M = TypeVar("M", bound=torch.nn.Module)


class Attached:
    """What stands as ``generate`` on an attached model.

    A copy or a pickle of the model takes it along: it then belongs to the copy.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        method: Method | str,
        *,
        processor: Any = None,
        drafter: Drafter | str | None = None,
        execution: str = "stacked",
        family: type[Family] | None = None,
        recorder: Recorder | None = None,
    ):
        """Takes and raises what :func:`attach` does, and puts nothing on the model: for threads that share one."""
        hf.require()
        model = hf.unwrapped(model)
        method = parse(method) if isinstance(method, str) else method
        if not isinstance(method, Method):
            raise InputError(
                f"method is {type(method).__name__}; expected a Method such as VCD() or a name such as 'vcd'."
            )
        if drafter is not None:
            check_modes(method, ["speculation"])
            drafter = parse_drafter(drafter, model) if isinstance(drafter, str) else drafter
        self.model, self.method, self._family, self.processor = model, method, family, processor
        self.drafter, self.execution, self.recorder = drafter, execution, recorder
        #: What ``generate`` was on the instance before; nothing, usually.
        self.before: Any = model.__dict__.get("generate")
        #: What methods keep between the calls of this model.
        self.memory: dict[Any, Any] = {}
        #: No run itself: its views, images and keys are gigabytes on a large model.
        self.last_run: Summary | None = None
        check_needs(method, self.family)

    @property
    def __wrapped__(self) -> Any:
        # What documents and inspects generate() finds the model's own.
        return getattr(type(self.model), "generate")  # noqa: B009  (torch's type of a module knows no generate)

    @property
    def family(self) -> Family:
        return family_of(self.model) if self._family is None else self._family(self.model)

    def __getstate__(self) -> dict[str, Any]:
        # What was decoded and remembered belongs to no copy.
        return {**self.__dict__, "last_run": None, "memory": {}}

    def __call__(
        self,
        *args: Any,
        seed: int | None = None,
        sample_ids: Sequence[Hashable] | None = None,
        **kwargs: Any,
    ) -> Any:
        """``generate()`` of the mitigated model.

        Takes what the model's own takes, and:

        Args:
            seed: keys the views, 0 when it is left out: the same prompt and image have the same views in every process and
                batch. Given, it also keys the draws of a sampling run by (seed, sample id, position): then neither batch nor
                drafter nor a resumed run changes an answer. Without it token draws are Hugging Face's own.
            sample_ids: one key per row of the batch; by default a hash of the row's prompt and pixels.

        A conversation goes on from a cache: pass an empty ``DynamicCache`` in the first turn, and the same one with the whole
        conversation in the next. It then carries the keys of all views, and of each what is new alone runs; the views keep the
        ``sample_ids`` of the first turn. Methods that change attention or hidden states, searches, drafters and beams refuse.

        Raises:
            UnsupportedError: a mode the method cannot honour.
            InputError: images and prompts that do not belong together.
        """
        kwargs = {**hf.named(args), **kwargs}
        streamer, assistant_model = kwargs.pop("streamer", None), kwargs.pop("assistant_model", None)
        synced_gpus = kwargs.pop("synced_gpus", None)
        if kwargs.pop("custom_generate", None) is not None:
            raise UnsupportedError(
                f"{self.method.name} is attached to this model; detach it first, or leave out custom_generate."
            )
        cache = hf.cache_among(kwargs.values())
        kept = conversation.kept_in(cache, self.model, self.method)
        if (inputs := kwargs.pop("inputs", None)) is not None:
            kwargs["input_ids"] = inputs
        family = self.family
        if self._setting(family, kwargs, "token_healing"):
            raise UnsupportedError(
                "token_healing changes the end of the prompt after its views are made; leave it out, or heal the prompt before."
            )
        hf.check_inputs(kwargs, family.input_keys, family.config.model_type)
        # An input that is None is one that was not given; transformers would find it beside the one that is made here.
        names = ("input_ids", "attention_mask", "position_ids", *family.token_keys)
        text = {key: value for key in names if (value := kwargs.pop(key, None)) is not None}
        vision = {key: value for key in family.vision_keys if (value := kwargs.pop(key, None)) is not None}
        given = hf.take_images(kwargs)
        family.check_text(text)
        if "attention_mask" not in text:
            text["attention_mask"] = family.infer_mask(text["input_ids"], kwargs)
        assistant = {"assistant_model": assistant_model}
        assistant.update({key: kwargs[key] for key in ("tokenizer", "assistant_tokenizer") if key in kwargs})
        run = Run(
            self.model,
            self.method,
            {**text, **vision},
            processor=self.processor,
            seed=seed,
            sample_ids=kept.sample_ids if kept is not None and sample_ids is None else sample_ids,
            rows_per_sample=self._rows_per_sample(family, kwargs),
            execution=self.execution,
            family=family,
            features=family.unpack(given) if given else None,
            memory=self.memory,
            recorder=self.recorder,
            kept=kept,
        )
        # The run alone holds it: it lets go of it as soon as it can.
        del kept
        strategy: Strategy | None = None if self.drafter is None else Speculative(self.drafter)
        beside: dict[str, Any] = {
            "streamer": streamer,
            "assistant": assistant,
            "synced": hf.synced(run.module, synced_gpus),
        }
        try:
            with conversation.going_on(run, cache):
                return hf.generate(run.module, partial(decode, run, strategy=strategy), **beside, **text, **kwargs)
        finally:
            self.last_run = run.summary()

    def _setting(self, family: Family, kwargs: dict[str, Any], name: str) -> Any:
        """A setting of the call, or what the configurations it falls back on say; ``None`` where nobody says anything."""
        # A language model inside the LVLM whose loop decodes falls back on its own configuration.
        own = family.decoding_module(self.model).generation_config
        values = [kwargs.get(name), getattr(kwargs.get("generation_config"), name, None), getattr(own, name, None)]
        return next((value for value in values if value is not None), None)

    def _rows_per_sample(self, family: Family, kwargs: dict[str, Any]) -> int:
        """How many rows of the loop each sample takes."""
        beams, returns = (self._setting(family, kwargs, name) for name in ("num_beams", "num_return_sequences"))
        rows = rows_per_sample(beams, returns)
        # Here, because transformers would refuse it before the method is asked, and advise beams.
        check_modes(self.method, ["returns"] if (returns or 1) > 1 else [])
        return rows


def attach(
    model: M,
    method: Method | str,
    *,
    processor: Any = None,
    drafter: Drafter | str | None = None,
    execution: str = "stacked",
    family: type[Family] | None = None,
    recorder: Recorder | None = None,
) -> M:
    """Make ``model.generate(...)`` decode with ``method``; returns the same instance.

    Pipelines and evaluation harnesses that call ``model.generate`` then use the method without knowing it.

    Args:
        model: an LVLM of a supported family.
        method: for instance ``VCD(alpha=1.0)``, ``VCD() + RITUAL()``, or a name such as ``"vcd+ritual"``.
        processor: the model's processor, for methods that tokenize text; loaded from the model's path when left out.
        drafter: proposes tokens that the stacked forward verifies; a name or a drafter.
        execution: "stacked" or "sequential"; see :class:`~lvlm_decode.engine.run.Run`.
        family: the adapter of a model family that is not registered.
        recorder: receives what happens while the model decodes; :func:`lvlm_decode.explain` uses one.

    Raises:
        UnsupportedError: the model's family or a combination that cannot be honoured, or a model attached already.
        DependencyError: a version of torch or transformers that this library does not work with.
    """
    inner = hf.unwrapped(model)
    if (own := _of(inner)) is not None:
        raise UnsupportedError(
            f"{own.method.name} is already attached to this model; detach(model) first, or attach their sum."
        )
    inner.__dict__["generate"] = Attached(
        model,
        method,
        processor=processor,
        drafter=drafter,
        execution=execution,
        family=family,
        recorder=recorder,
    )
    return model


def detach(model: M) -> M:
    """Take the method off again; the instance is as it was before :func:`attach`. No error if none is attached."""
    own = _of(model)
    if own is None:
        return model
    inner = hf.unwrapped(model)
    if own.before is None:
        del inner.__dict__["generate"]
    else:
        inner.__dict__["generate"] = own.before
    return model


@overload
def attached(model: torch.nn.Module) -> Method | None: ...
@overload
def attached(model: M, method: Method | str, **options: Any) -> AbstractContextManager[M]: ...
def attached(model: torch.nn.Module, method: Method | str | None = None, **options: Any) -> Any:
    """``with attached(model, "vcd"):`` attaches a method for the length of the block; blocks nest.

    Without a method: the one that is attached to ``model`` now, or ``None``.

    Args:
        options: those of :func:`attach`.
    """
    if method is None:
        own = _of(model)
        return None if own is None else own.method
    return _attached(model, method, options)


@contextmanager
def _attached(model: M, method: Method | str, options: dict[str, Any]) -> Iterator[M]:
    inner, made = hf.unwrapped(model), Attached(model, method, **options)
    with _BLOCKS:
        made.before = inner.__dict__.get("generate")
        inner.__dict__["generate"] = made
    try:
        yield model
    finally:
        with _BLOCKS:
            _take_out(inner, made)


def _take_out(inner: torch.nn.Module, made: Attached) -> None:
    """End a block. Blocks of several threads end in any order, so each takes out itself and leaves what is above it."""
    above, found = None, inner.__dict__.get("generate")
    while isinstance(found, Attached) and found is not made:
        above, found = found, found.before
    if found is not made:
        # It was detached within the block, with all that stood above it.
        return
    if above is not None:
        above.before = made.before
    elif made.before is None:
        del inner.__dict__["generate"]
    else:
        inner.__dict__["generate"] = made.before


def last_run(model: torch.nn.Module) -> Summary | None:
    """What is known of the newest call of the attached model: counts, statistics and what was said on the way.

    Tensors are not kept after a call. Who needs them passes a :class:`~lvlm_decode.engine.recorder.Recorder` to :func:`attach`.
    Between calls these alone are kept, and all are bounded: the captions of MVP (the newest 4,096 images), the table of Token
    Recycling (four tokens for each of the vocabulary), the newest 100,000 tokens of earlier answers of the suffix automaton,
    and the weights of a draft head as they are multiplied.
    """
    own = _of(model)
    return None if own is None else own.last_run


def _of(model: torch.nn.Module) -> Attached | None:
    own = hf.unwrapped(model).__dict__.get("generate")
    return own if isinstance(own, Attached) else None

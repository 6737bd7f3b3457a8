"""What a decoding method is: views of a sample, and how to combine what the model says about them.

    scores = combine(logits of every view)          one stacked forward, see ``lvlm_decode.engine``
    where p(token) < beta * max p, under view 0, untempered, once, after combining:   scores[token] = l0 - max l0 - BELOW

The authors write -inf there. BELOW is as good for every draw and search (``exp(-BELOW)`` is 0), and where the caller's
processors ban all that the mask left, the sample's own order decides instead of nothing.

Letters: ``B`` samples, ``V`` views, ``T`` positions in this forward, ``N`` vocabulary, ``L`` layers, ``D`` width. View 0 is
the sample itself. Methods are frozen dataclasses without state; everything that one call needs travels in :class:`Step`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .engine import hf
from .errors import UnsupportedError
from .parameters import Checked

if TYPE_CHECKING:
    from .engine.run import Run
    from .engine.samples import Sample
    from .families.base import Family

#: How far below the best token, in nats, those come that a mask removes; ``exp(-BELOW)`` is 0, also at high temperatures.
BELOW = 1e4
#: Stands for the infinities of a model's own logits while methods reckon with them; ``exp(-FLOOR)`` is 0 in any sum of views.
FLOOR = 1e5


@dataclass(frozen=True)
class View:
    """One extra conditioning of the model on a sample.

    Made by the ``Sample.with_...`` methods. ``weight`` is signed: negative views are subtracted from view 0
    (``weight * (l_view - l0)``), positive ones are added (``weight * l_view``).

    Args:
        sample: the edited sample; view 0's sample is the user's own.
        weight: signed weight in the algebra of :class:`Contrast`.
        patch: changes the model for the rows of this view only, as a context manager around its forwards. Views that
            share a patch (the same object) run in one forward; a patched view cannot ride with the others.
        module: another model (an amateur) that runs this view; ``None`` is the attached model.
        mark: a name by which :meth:`Method.patch` finds the rows of this view, ``run.view_number(mark)``.
        rows: ``False`` for a view of partial depth, which has no rows of its own: :meth:`Method.patch` computes it, through
            ``run.branching(mark, branch)``.
    """

    sample: Sample
    weight: float = 0.0
    patch: Callable[[torch.nn.Module], AbstractContextManager[Any]] | None = None
    module: torch.nn.Module | None = None
    mark: str = ""
    rows: bool = True


@dataclass(frozen=True)
class Probes:
    """What a method must see inside the forward; nothing else is computed.

    Args:
        hidden: decoder layers whose hidden states are wanted, as ``output_hidden_states`` counts them: 0 is the
            embeddings, ``i`` the output of layer ``i``, the last one is after the final norm.
    """

    hidden: tuple[int, ...] = ()

    def __or__(self, other: Probes) -> Probes:
        return Probes(hidden=tuple(sorted(set(self.hidden) | set(other.hidden))))


@dataclass(frozen=True)
class Places:
    """Places of one image that a method singled out, for :func:`lvlm_decode.explain`.

    Args:
        title: what they are, in a clause.
        chosen: (P,) bool.
        weights: (P,) what they were chosen by, in any unit; ``None`` where it is not known.
        image: number of the image within its sample.
        encoder: P counts the vision encoder's patches; otherwise the image tokens of the language model.
    """

    title: str
    chosen: Tensor
    weights: Tensor | None = None
    image: int = 0
    encoder: bool = False


def no_projection(hidden: Tensor, normed: bool = True, view: int = 0) -> Tensor:
    """What a step made without a model projects with.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError("this step has no model behind it, so hidden states cannot be projected; pass project=.")


@dataclass(frozen=True)
class Step:
    """What :meth:`Method.combine` sees of one forward.

    Args:
        logits: (V, B, T, N) float32, view 0 first.
        positions: (B, T) long; how many tokens were generated before the one these logits choose. Absolute: the same
            in a plain step, in a batch and while a draft is verified.
        weights: signed weight of each of the V - 1 extra views: a number, or (B,) where samples differ in it.
        hidden: layer -> (V, B, T, D), for the layers the method's probes named.
        project: (..., D) hidden states of an intermediate layer -> (..., N) float32 logits, through the final norm
            and the language head; ``normed=False`` leaves the final norm out. ``view`` is the view they come from, for
            views that another model runs.
    """

    logits: Tensor
    positions: Tensor
    weights: tuple[float | Tensor, ...] = ()
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    project: Callable[..., Tensor] = no_projection

    @cached_property
    def best(self) -> Tensor:
        """(B, T, 1) the best logit of view 0."""
        return self.logits[0].amax(-1, keepdim=True)

    def finite(self) -> Step:
        """The step without -inf and NaN, of which no difference can be taken.

        What view 0 bans is next to impossible in it, and of what another view bans that view says what view 0 says.
        """
        logits = finite(self.logits)
        if len(logits) > 1:
            logits = torch.where(logits.abs() < FLOOR, logits, logits[:1])
        return dataclasses.replace(
            self,
            logits=logits,
            project=lambda *args, **kwargs: finite(self.project(*args, **kwargs)),
        )

    def of_views(self, start: int, stop: int) -> Step:
        """The step with view 0 and the extra views ``start..stop-1`` (counted from 0) alone."""
        rows = [0, *range(1 + start, 1 + stop)]

        def own(values: Tensor) -> Tensor:
            # Slices, because a list as an index would be sent to the device.
            return values[: 1 + stop] if start == 0 else torch.cat([values[:1], values[1 + start : 1 + stop]])

        return dataclasses.replace(
            self,
            logits=own(self.logits),
            weights=self.weights[start:stop],
            hidden={layer: own(states) for layer, states in self.hidden.items()},
            project=lambda x, normed=True, view=0: self.project(x, normed, rows[view]),
        )


@dataclass(frozen=True)
class Method(Checked):
    """Base of every decoding method: hyper-parameters and three pure functions.

    Class attributes describe the method to the command line, the documentation and the tests. Parameters may be given by the
    names of the authors' scripts too, ``VCD(cd_alpha=1.0)``; see ``aliases``.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    arxiv: ClassVar[str] = ""
    #: What it works by, see ``catalogue.KINDS``.
    kind: ClassVar[str] = "contrast"
    #: Other spellings of a parameter that users know from the authors' scripts.
    aliases: ClassVar[Mapping[str, str]] = {"cd_alpha": "alpha", "cd_beta": "beta"}
    #: What the extra views cost: "image" a vision pass each, "text" a prefill each, "layers" hidden states alone.
    costs: ClassVar[tuple[str, ...]] = ()
    #: Modes this method cannot honour: mode -> one sentence that says why. Checked before the first token.
    refuses: ClassVar[Mapping[str, str]] = {}
    #: Families it needs something of that they may lack; see ``families``.
    needs: ClassVar[tuple[str, ...]] = ()
    #: Parameters (of those it has) that switch it off: its scores are then the plain model's, under its mask where beta is not
    #: ``None``, and nothing else of it runs; see :meth:`needed`. ``None``: it has none.
    off: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0, "beta": None}
    #: Two methods that own the same rule cannot be added up.
    owns: ClassVar[str | None] = None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write these settings into ``generation_config.json`` of ``folder``; what else stands there is kept."""
        importlib.import_module(".hub", __package__).save_pretrained(self, folder)

    @staticmethod
    def from_pretrained(folder: str | Path) -> Method:
        """The method, of whatever class, that :meth:`save_pretrained` wrote into ``folder``.

        Raises:
            MissingFileError: no method stands there.
            FileFormatError: a file that cannot be read, an unknown method or parameter.
        """
        return importlib.import_module(".hub", __package__).from_pretrained(folder)

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        """The extra views of one sample; the same number for every sample. ``rng`` (CPU) belongs to the sample."""
        return []

    def probes(self, model: torch.nn.Module) -> Probes:
        """The hidden layers this method reads from ``model``."""
        return Probes()

    def check_model(self, family: Family) -> None:
        """Raise for a model that lacks what the family cannot tell: weights that somebody must have trained for it, say.

        Raises:
            UnsupportedError: names the method, what is lacking, and how to make it.
        """

    def patch(self, run: Run) -> AbstractContextManager[Any]:
        """A change of the model for the length of one call, for instance of the attention of view 0's rows.

        The change must be undone on exit, and must not touch other calls of the model: edits of attention go through
        ``run.editing``, hooks through :mod:`lvlm_decode.engine.hooks`.
        """
        return nullcontext()

    def observe(self, family: Family) -> AbstractContextManager[Any]:
        """Watches the vision encoder while it encodes the samples; what it yields reaches ``Sample.observed_by(name)``."""
        return nullcontext()

    def combine(self, step: Step) -> Tensor:
        """(B, T, N) scores, before the plausibility mask. Pure; per position."""
        return step.logits[0]

    def choices(self, step: Step) -> dict[str, Tensor]:
        """What :meth:`combine` decided on the way, by name, (B, T) each: the chosen layer, say. Asked by explain alone."""
        return {}

    def places(self, sample: Sample) -> list[Places]:
        """The places of the sample's images that the views were made with. Asked by explain alone."""
        return []

    @property
    def plausibility_beta(self) -> float | None:
        """beta of the plausibility mask if that is relative to view 0 as it is, or ``None``."""
        return None

    def kept_tokens(self, step: Step) -> Tensor | None:
        """(B, T, N) bool, which tokens survive the plausibility mask; ``None`` keeps all."""
        return (
            None
            if self.plausibility_beta is None
            else plausible_tokens(step.logits[0], self.plausibility_beta, step.best)
        )

    @property
    def mask_view(self) -> int | None:
        """The view whose arg max :meth:`kept_tokens` always keeps, counted within this method; ``None`` for no mask."""
        return None if self.plausibility_beta is None else 0

    def scores(self, step: Step) -> Tensor:
        """(B, T, N): :meth:`combine`, then the mask, once. What the model itself bans under view 0, with -inf, stays banned."""
        step = step.finite()
        scores, keep, main = self.combine(step), self.kept_tokens(step), step.logits[0]
        scores = scores if keep is None else masked(scores, keep, main, step.best)
        return scores.masked_fill(main <= -FLOOR, float("-inf"))

    def parts(self) -> tuple[Method, ...]:
        """The methods this one is a sum of; itself if it is not a sum."""
        return (self,)

    @property
    def is_off(self) -> bool:
        """Whether its parameters have the values of :attr:`off`, whatever beta is: its strength is 0."""
        known = {field.name for field in dataclasses.fields(self)} - {"beta"}
        values = {name: value for name, value in (self.off or {}).items() if name in known}
        return bool(values) and all(getattr(self, name) == value for name, value in values.items())

    def needed(self) -> Method:
        """What of this method a call has to run: at strength 0 its mask alone, without views, probes and patches."""
        return MaskOf(self) if self.is_off else self

    def processor(self, model: torch.nn.Module, inputs: Mapping[str, Any], **options: Any) -> Any:
        """The portable form, for ``generate(**inputs, logits_processor=[...])``; made anew for every call.

        Args:
            model: the LVLM that generates.
            inputs: what ``generate()`` is called with.
            options: ``seed``, ``sample_ids``, ``processor`` and ``family``, as in :func:`lvlm_decode.attach`.
        """
        return _entry().ViewsProcessor(self, model, dict(inputs), **options)

    def __call__(
        self,
        model: torch.nn.Module,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        *,
        seed: int | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """What ``generate(custom_generate=method)`` calls; not for calling by hand."""
        given = (input_ids, logits_processor, stopping_criteria, generation_config)
        return _entry().custom_generate(self, model, hf.given(*given, model_kwargs), seed)

    @property
    def __signature__(self) -> inspect.Signature:
        # generate() hands a callable only the inputs that its signature names, and those of the encoder have a name each in
        # every family.
        return _entry().signature()

    def __add__(self, other: Method) -> Method:
        if not isinstance(other, Method):
            return NotImplemented
        return Sum.of(self, other)

    def check_layers(self, name: str) -> None:
        layers = getattr(self, name)
        self.check(layers is None or 0 <= layers[0] <= layers[1], name, "the first and the last layer, or None")

    def check_beta(self) -> None:
        beta = getattr(self, "beta")  # noqa: B009  (not every method has one)
        self.check(beta is None or 0 < beta <= 1, "beta", "in (0, 1], or None for no plausibility mask")


def _entry() -> Any:
    """The engine's entries. It stands above this module, so it is looked up when a method is first used."""
    return importlib.import_module(".engine.entry", __package__)


@dataclass(frozen=True)
class Contrast(Method):
    """A method whose views add up with signed weights, which may differ from sample to sample.

    out = (1 + sum a_neg) * l0 - sum a_neg * l_neg + sum a_pos * l_pos
    """

    def combine(self, step: Step) -> Tensor:
        main = step.logits[0]
        out = main
        for logits, weight in zip(step.logits[1:], step.weights):
            if isinstance(weight, Tensor):
                weight = weight.to(main)[:, None, None]
                out = out + weight * (logits - torch.where(weight < 0, main, 0.0))
            else:
                out = torch.add(out, logits - main if weight < 0 else logits, alpha=weight)
        return out


@dataclass(frozen=True)
class MaskOf(Method):
    """What is left of a method whose strength is 0: view 0's scores under the method's mask.

    Args:
        method: its mask must be relative to view 0.
    """

    name: ClassVar[str] = "mask of a method"
    off: ClassVar[Mapping[str, Any] | None] = None

    method: Method = field(default_factory=Method)

    @property
    def plausibility_beta(self) -> float | None:
        return self.method.plausibility_beta

    @property
    def mask_view(self) -> int | None:
        return self.method.mask_view

    def kept_tokens(self, step: Step) -> Tensor | None:
        return self.method.kept_tokens(step)

    def scores(self, step: Step) -> Tensor:
        return own_scores(step) if self.mask_view is None else super().scores(step)


@dataclass(frozen=True)
class Sum(Method):
    """Several contrasts at once: the union of their views in one forward, the sum of their terms, one mask.

    out = l0 + sum over methods of (combine(views of that method) - l0)
    """

    name: ClassVar[str] = "sum"
    methods: tuple[Method, ...] = ()
    #: How many views each method has; filled by the engine once the views are made.
    counts: tuple[int, ...] = ()
    #: The hidden layers each method reads; filled by the engine once the model is known.
    reads: tuple[Probes, ...] = ()

    @staticmethod
    def of(*methods: Method) -> Method:
        """The sum of ``methods``.

        Raises:
            UnsupportedError: a controller, two methods that own the same rule, the same method twice, or masks that
                are relative to different views and could leave no token.
        """
        parts = tuple(part for method in methods for part in method.parts())
        owners: dict[str, str] = {}
        for part in parts:
            if "sum" in part.refuses:
                raise UnsupportedError(f"{part.name} cannot be added to another method: {part.refuses['sum']}")
            if part.owns is not None:
                if part.owns in owners:
                    raise UnsupportedError(
                        f"{owners[part.owns]} and {part.name} cannot be added: both own {part.owns}; use one of them."
                    )
                owners[part.owns] = part.name
        names = [part.name for part in parts]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise UnsupportedError(f"{twice} is added to itself; set its strength by its own parameters instead.")
        masking = [part for part in parts if part.mask_view is not None]
        foreign = next((part for part in masking if part.mask_view != 0), None)
        if foreign is not None and len(masking) > 1:
            other = next(part for part in masking if part is not foreign)
            raise UnsupportedError(
                f"{foreign.name} and {other.name} cannot be added with a mask each: {foreign.name}'s is relative to a view "
                "of its own, and together they may leave no token; set beta=None in one of them if it has one."
            )
        return Sum(methods=parts)

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        return [view for views in self.views_by_method(sample, lambda _: rng) for view in views]

    def views_by_method(self, sample: Sample, rng_of: Callable[[str], torch.Generator]) -> list[list[View]]:
        """The views of each method; ``rng_of(name)`` is the generator that method would have alone."""
        return [method.views(sample, rng_of(method.name)) for method in self.methods]

    @contextmanager
    def patch(self, run: Run) -> Iterator[None]:
        with ExitStack() as stack:
            for method in self.methods:
                stack.enter_context(method.patch(run))
            yield

    def with_counts(self, counts: tuple[int, ...]) -> Sum:
        return dataclasses.replace(self, counts=counts)

    def reading(self, model: torch.nn.Module) -> Sum:
        """The sum whose methods see the hidden layers they asked for, and not each other's."""
        return dataclasses.replace(self, reads=tuple(method.probes(model) for method in self.methods))

    def probes(self, model: torch.nn.Module) -> Probes:
        wanted = Probes()
        for method in self.methods:
            wanted = wanted | method.probes(model)
        return wanted

    def _steps(self, step: Step) -> list[tuple[Method, Step]]:
        out, start = [], 0
        for number, (method, count) in enumerate(zip(self.methods, self.counts)):
            own = step.of_views(start, start + count)
            if self.reads:
                wanted = self.reads[number].hidden
                own = dataclasses.replace(own, hidden={i: states for i, states in own.hidden.items() if i in wanted})
            out.append((method, own))
            start += count
        return out

    def combine(self, step: Step) -> Tensor:
        main = step.logits[0]
        out = main
        for method, own in self._steps(step):
            out = out + (method.combine(own) - main)
        return out

    def choices(self, step: Step) -> dict[str, Tensor]:
        return {
            f"{method.name} {name}": value
            for method, own in self._steps(step)
            for name, value in method.choices(own).items()
        }

    def places(self, sample: Sample) -> list[Places]:
        return [place for method in self.methods for place in method.places(sample)]

    @property
    def plausibility_beta(self) -> float | None:
        betas = [method.plausibility_beta for method in self.methods if method.plausibility_beta is not None]
        return max(betas) if betas else None

    def kept_tokens(self, step: Step) -> Tensor | None:
        kept = [keep for method, own in self._steps(step) if (keep := method.kept_tokens(own)) is not None]
        return None if not kept else torch.stack(kept).all(0)

    def parts(self) -> tuple[Method, ...]:
        return self.methods

    def needed(self) -> Method:
        return dataclasses.replace(self, methods=tuple(method.needed() for method in self.methods))


def own_scores(step: Step) -> Tensor:
    """(B, T, N) view 0's logits as scores; a token whose logit is NaN is never said."""
    # One operator, where reckoning with other views takes four.
    return torch.nan_to_num(step.logits[0], nan=float("-inf"), neginf=float("-inf"))


def finite(logits: Tensor) -> Tensor:
    """``logits`` with very low ones in the place of -inf and NaN, whose probability is 0."""
    return torch.nan_to_num(logits, nan=-FLOOR, neginf=-FLOOR, posinf=FLOOR)


def plausible_tokens(logits: Tensor, beta: float | Tensor, best: Tensor | None = None) -> Tensor:
    """Adaptive plausibility constraint: (..., N) bool, keeps tokens with p >= beta * max p at temperature 1.

    Ties at the threshold are kept, as in the authors' code of VCD (arXiv 2311.16922), and so is always the arg max.
    Reference: contrastive decoding (arXiv 2210.15097).

    Args:
        logits: (..., N) of view 0, before any processor.
        beta: in (0, 1]; a float or a tensor that broadcasts against (..., 1).
        best: (..., 1) the best of them, where it is known already.
    """
    # A number stays on the host: made into a tensor it would be sent to the device for every token.
    log_beta = beta.to(logits).log() if isinstance(beta, Tensor) else math.log(beta)
    return logits >= (logits.amax(-1, keepdim=True) if best is None else best) + log_beta


def masked(scores: Tensor, keep: Tensor, logits: Tensor, best: Tensor | None = None) -> Tensor:
    """(..., N) ``scores`` where ``keep``; all other tokens BELOW, in the order of ``logits``, those of view 0.

    Args:
        best: (..., 1) the best of ``logits``, where it is known already.
    """
    return torch.where(keep, scores, logits - (logits.amax(-1, keepdim=True) if best is None else best) - BELOW)

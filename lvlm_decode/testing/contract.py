"""The contract of a method: what must hold of every method on every family that has what it needs.

    import pytest
    from lvlm_decode.testing import method_checks
    from my_package import MyMethod

    @pytest.mark.parametrize("check", method_checks(MyMethod(alpha=1.0)), ids=str)
    def test_my_method(check):
        check()

or, in one line, ``check_method(MyMethod(alpha=1.0))``. Every check decodes a few tokens on a tiny random model (:mod:`.models`),
on the CPU and without a download, and raises ``AssertionError`` where the rule is broken. A mode that the method refuses
(``Method.refuses``) must be refused with its reason instead. Methods with a search of their own are not held to it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from ..attachment import attach, detach, last_run
from ..engine.hf.decoder import attention_of
from ..engine.modes import NEEDS
from ..engine.run import Run
from ..errors import InputError, UnsupportedError
from ..families import family_of
from ..families.base import Family
from ..method import BELOW, Method
from ..methods import load, parse
from .models import BUILDERS, Tiny, tiny

#: Tokens that every call generates.
NEW = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A method on a tiny model. The calls that several checks compare with are made once.

    Args:
        method: the method, with parameters under which it works on a model this small.
        zoo: the tiny model.
        adapter: the family's adapter, where no package registers it.
        masks: whether rules of the method's own remove tokens even where it is switched off.
    """

    method: Method
    zoo: Tiny
    adapter: type[Family] | None = None
    masks: bool = False

    def __str__(self) -> str:
        return f"{self.method.name} on {self.zoo.family}"

    @functools.cached_property
    def family(self) -> Family:
        return family_of(self.zoo.model) if self.adapter is None else self.adapter(self.zoo.model)

    @functools.cached_property
    def refusal(self) -> str | None:
        """The words of the reason why the method must refuse the family, or ``None``."""
        needs = [need for part in self.method.parts() for need in part.needs]
        return next((NEEDS[need] for need in needs if not getattr(self.family, f"has_{need}")), None)

    @functools.cached_property
    def rows(self) -> list[Any]:
        """Unequal prompts; a row with several images and a text-only one where the family can have them."""
        counts = [self.zoo.max_images, 0 if self.zoo.text_only else 1, 1]
        texts = ("is it a dog?", "ab", "no")
        return [self.zoo.row(text, n, seed=i) for i, (text, n) in enumerate(zip(texts, counts))]

    def decode(
        self,
        method: Method | None = None,
        rows: Sequence[int] = (0, 1, 2),
        execution: str = "stacked",
        **options: Any,
    ) -> tuple[Tensor, Any, Any]:
        """(tokens (B, NEW), the output of ``generate()``, its run) of a greedy call with a method, by default the case's own."""
        return self._generate(self.method if method is None else method, rows, execution, options)

    def decode_plain(self, rows: Sequence[int] = (0, 1, 2), **options: Any) -> tuple[Tensor, Any]:
        """What the model gives on its own, with nothing attached."""
        tokens, out, _ = self._generate(None, rows, "stacked", options)
        return tokens, out

    def _generate(
        self, method: Method | None, rows: Sequence[int], execution: str, options: dict[str, Any]
    ) -> tuple[Tensor, Any, Any]:
        model = self.zoo.model
        inputs = self.zoo.batch([self.rows[n] for n in rows])
        how: dict[str, Any] = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, num_beams=1)
        how |= dict(output_logits=True, output_scores=True, return_dict_in_generate=True) | options
        if method is None:
            out, run = model.generate(**inputs, **how), None
        else:
            attach(model, method, processor=self.zoo.processor, execution=execution, family=self.adapter)
            try:
                out = model.generate(**inputs, sample_ids=list(rows), seed=0, **how)
                run = last_run(model)
            finally:
                detach(model)
        return out.sequences[:, inputs["input_ids"].shape[1] :], out, run

    @functools.cached_property
    def stacked(self) -> tuple[Tensor, Any, Any]:
        return self.decode()

    @functools.cached_property
    def plain(self) -> tuple[Tensor, Any]:
        return self.decode_plain()

    def retold(self, rows: Sequence[int], tokens: Tensor, method: Method | None = None) -> Tensor:
        """(B, NEW, N) scores of given answers, from one verification of all of their tokens at once."""
        inputs = self.zoo.batch([self.rows[n] for n in rows])
        run = Run(
            self.zoo.model,
            self.method if method is None else method,
            inputs,
            processor=self.zoo.processor,
            seed=0,
            sample_ids=list(rows),
            family=self.family,
        )
        with torch.no_grad(), run.method.patch(run):
            lanes = run.open()
            first, _ = lanes.prefill(keep=1)
            rest, _ = lanes.extend(tokens[:, :-1])
        return torch.cat([first, rest], 1)


def scores(out: Any) -> Tensor:
    """(NEW, B, N) scores of a call."""
    return torch.stack(out.logits)


def kept(scores: Tensor) -> Tensor:
    """What no mask removed."""
    return scores > -BELOW / 2


def same_tokens(got: Tensor, want: Tensor, what: str) -> None:
    assert torch.equal(got, want), f"{what}: tokens {got.tolist()}, expected {want.tolist()}"


def same_scores(got: Tensor, want: Tensor, atol: float = 1e-5) -> None:
    """Equal to ``atol`` where both are kept, and masked at the same tokens.

    CODE's threshold is the divergence of its views: on a text-only row, whose views are equal, it is rounding error,
    and the tokens at its edge are ones of next to no probability.
    """
    moved = kept(got) != kept(want)
    if moved.any():
        best = want.amax(-1, keepdim=True).expand_as(want)
        assert (torch.maximum(got, want) < best - 8)[moved].all(), "another token is masked"
    both = kept(got) & kept(want)
    torch.testing.assert_close(got[both], want[both], atol=atol, rtol=1e-5)


@contextmanager
def raises(kind: type[BaseException], words: str = "") -> Iterator[None]:
    """The block must raise ``kind``, with these words in its message."""
    try:
        yield
    except kind as error:
        assert words in str(error), f"{kind.__name__} says {str(error)!r}; expected {words!r} in it"
    else:
        raise AssertionError(f"no {kind.__name__} was raised")


# --- what must hold


def what_a_family_cannot_do_raises_the_reason(case: Case) -> None:
    words = f"{case.method.name} needs {case.refusal}, which {case.zoo.family} does not have"
    with raises(UnsupportedError, words):
        case.decode()


def switched_off_equals_plain(case: Case) -> None:
    """Where no mask of the method's own rules removes a token, all scores are the plain model's, and no view has to run.

    The method's own sums are held to it too, over views that run although the strength is 0.
    """
    off = case.method.off
    if off is None:
        return
    known = {field.name for field in dataclasses.fields(case.method)}
    method = dataclasses.replace(case.method, **{key: value for key, value in off.items() if key in known})
    plain, wanted = case.plain
    for switched in (method, unaware(method)):
        tokens, out, run = case.decode(switched)
        same_tokens(tokens, plain, "switched off")
        got, want = scores(out), scores(wanted)
        assert bool(kept(got).all()) != case.masks, "tokens are masked although the method is switched off"
        gap = (got - want).masked_fill(~kept(got), float("nan"))
        # A constant per position is nothing to a softmax.
        gap = (gap - gap.nanmean(-1, keepdim=True))[kept(got)].abs().max()
        assert gap < 2e-5, f"switched off, scores differ from the plain model's by {float(gap):.2g}"
        assert switched is not method or not method.is_off or (run.views, run.forwards) == (1, NEW), (
            f"switched off, {run.views - 1} views run beside the sample, in {run.forwards} forwards for {NEW} tokens"
        )
    if getattr(case.method, "beta", None) is not None:
        masked = dataclasses.replace(method, **{"beta": getattr(case.method, "beta")})  # noqa: B009  (not every method has one)
        got, want = (scores(case.decode(one)[1]).log_softmax(-1) for one in (masked, unaware(masked)))
        same_scores(got, want, atol=2e-5)


def unaware(method: Method) -> Method:
    """``method``, all of which runs although its strength is 0."""
    own, maker = type(method), cast(Any, type(type(method)))
    kind = maker(own.__name__, (own,), {"off": None})
    return kind(**{field.name: getattr(method, field.name) for field in dataclasses.fields(method)})


def does_something(case: Case) -> None:
    """No method passes the others because its views are copies of view 0."""
    _, out, _ = case.stacked
    first, want = scores(out)[0].log_softmax(-1), scores(case.plain[1])[0].log_softmax(-1)
    both = kept(first)
    moved = (first - want)[both].abs().max() > 1e-3 or not bool(both.all())
    assert moved, "scores are the plain model's"


def stacked_equals_sequential(case: Case) -> None:
    tokens, out, run = case.stacked
    apart, want, alone = case.decode(execution="sequential")
    same_tokens(tokens, apart, "stacked against sequential")
    same_scores(scores(out), scores(want))
    assert len(run.lanes) == 1 and len(alone.lanes) == len(run.lanes[0]), (
        "one forward, or one for each view that has rows"
    )


def a_row_in_a_batch_equals_the_row_alone(case: Case) -> None:
    tokens, out, _ = case.stacked
    for row in range(3):
        alone, own, _ = case.decode(rows=[row])
        same_tokens(alone[0], tokens[row], f"row {row} alone")
        same_scores(scores(own)[:, 0], scores(out)[:, row], atol=3e-5)


def verifying_a_draft_equals_decoding_it(case: Case) -> None:
    tokens, out, _ = case.stacked
    got = case.retold(range(3), tokens)
    same_scores(got.transpose(0, 1), scores(out), atol=3e-5)


def beams_follow(case: Case) -> None:
    """The score of the best beam is the sum of its tokens' scores, told again without beams."""
    beams, out, _ = case.decode(num_beams=3)
    told = case.retold(range(3), beams).log_softmax(-1)
    # As under min_new_tokens in the search: it forbids the end token without renormalising.
    sums = told.gather(-1, beams[..., None])[..., 0].sum(-1) / NEW
    torch.testing.assert_close(out.sequences_scores, sums, atol=2e-5, rtol=1e-4)


def prompt_lookup_follows(case: Case) -> None:
    drafted, *_ = case.decode(rows=[0], prompt_lookup_num_tokens=3)
    same_tokens(drafted[0], case.stacked[0][0], "with prompt lookup")


def an_assistant_follows(case: Case) -> None:
    assistant = copy.deepcopy(case.zoo.model)
    with torch.no_grad():
        for parameter in assistant.get_output_embeddings().parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    drafted, *_ = case.decode(rows=[0], assistant_model=assistant)
    same_tokens(drafted[0], case.stacked[0][0], "with an assistant model")


def a_static_cache_gives_the_same_tokens(case: Case) -> None:
    got, own, _ = case.decode(cache_implementation="static")
    same_scores(scores(own), scores(case.stacked[1]))
    same_tokens(got, case.stacked[0], "with a static cache")


def several_answers_begin_with_the_best(case: Case) -> None:
    got, *_ = case.decode(num_beams=3, num_return_sequences=2)
    same_tokens(got[::2], case.decode(num_beams=3)[0], "num_return_sequences=2")


def runs_in_inference_mode(case: Case) -> None:
    """As evaluation harnesses call it; what a method changes for a call must come back there too."""
    with torch.inference_mode():
        tokens, *_ = case.decode()
    same_tokens(tokens, case.stacked[0], "in inference mode")
    assert not any(parameter.is_inference() for parameter in case.zoo.model.parameters())


def adds_to_vcd(case: Case) -> None:
    """The sum's views are its parts' views, and its scores their terms."""
    vcd, own = parse("vcd", alpha=0.5), case.method
    own = load("ritual")() if own.name == "vcd" else own
    tokens, out, run = case.decode(vcd + own)
    same_tokens(tokens, case.decode(vcd + own, execution="sequential")[0], "added to VCD, stacked against sequential")
    parts = [case.decode(method)[2] for method in (vcd, own)]
    assert run.views - 1 == sum(part.views - 1 for part in parts)
    changed = own.owns in ("the attention of view 0", "the hidden states of view 0")
    if not changed and run.views > 2:
        same_scores(case.retold(range(3), tokens, vcd + own).transpose(0, 1), scores(out), atol=3e-5)


def detached_equals_untouched(case: Case, methods: Sequence[Method] = ()) -> None:
    """Hooks, attributes, attention and weights are as before, also after an exception in the middle of a call.

    Args:
        methods: what is attached and detached, one after the other; by default the case's own method.
    """
    model = case.zoo.model
    inputs = case.zoo.batch(case.rows)
    parts = list(model.modules())

    def state() -> dict[str, Any]:
        return {
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in parts],
            "attention": [attention_of(m.config) for m in parts if hasattr(m, "config")],
            "attributes": [set(m.__dict__) for m in parts],
        }

    def weights() -> dict[str, Tensor]:
        return {key: value.clone() for key, value in model.state_dict().items()}

    # transformers puts its own hooks, once and for all, where hidden states are first asked for.
    model.generate(**inputs, max_new_tokens=1, output_hidden_states=True, return_dict_in_generate=True)
    before, loaded, plain = state(), weights(), case.decode_plain()[0]
    for method in methods or [case.method]:
        case.decode(method, rows=[0])
        attach(model, method, processor=case.zoo.processor, family=case.adapter)
        with raises(ZeroDivisionError):
            model.generate(**inputs, max_new_tokens=2, logits_processor=[lambda ids, s: 1 / 0])
        detach(model)
        after = state()
        for what in before:
            assert before[what] == after[what], f"{what} of the model are not as before {method.name} was attached"
    for key, value in weights().items():
        assert torch.equal(value, loaded[key]), f"weight {key} is not as before"
    same_tokens(case.decode_plain()[0], plain, "detached")


#: The rules, and for each the modes that it uses.
RULES: dict[Callable[[Case], None], tuple[str, ...]] = {
    switched_off_equals_plain: ("greedy", "batch"),
    does_something: ("greedy", "batch"),
    stacked_equals_sequential: ("greedy", "batch"),
    a_row_in_a_batch_equals_the_row_alone: ("greedy", "batch"),
    verifying_a_draft_equals_decoding_it: ("greedy", "batch"),
    beams_follow: ("beam", "batch"),
    prompt_lookup_follows: ("speculation",),
    an_assistant_follows: ("speculation",),
    a_static_cache_gives_the_same_tokens: ("static", "batch"),
    several_answers_begin_with_the_best: ("returns", "beam", "batch"),
    runs_in_inference_mode: ("greedy", "batch"),
    adds_to_vcd: ("sum", "batch"),
    detached_equals_untouched: ("greedy", "batch"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Check:
    """One rule about one case, to be called; ``str(check)`` names both."""

    rule: Callable[..., None]
    case: Any
    refused: str | None = None

    def __str__(self) -> str:
        return f"{self.rule.__name__} ({self.case})"

    def __call__(self) -> None:
        """Raise ``AssertionError`` where the rule is broken."""
        try:
            if self.refused is None:
                return self.rule(self.case)
            with raises(UnsupportedError, self.refused):
                self.rule(self.case)
        except AssertionError:
            raise
        except Exception as error:  # whatever the code of another package raises
            raise AssertionError(f"{self} raised {type(error).__name__}: {error}") from error


def run_all(checks: Sequence[Check]) -> None:
    """Run all checks, and raise one ``AssertionError`` that says which rules are broken and how."""
    broken = []
    for check in checks:
        try:
            check()
        except AssertionError as error:
            broken.append(f"{check}: {error}")
    verb = "is" if len(broken) == 1 else "are"
    assert not broken, f"{len(broken)} of {len(checks)} rules {verb} broken:\n" + "\n".join(broken)


def method_checks(
    method: Method | str,
    model: Tiny | str | None = None,
    *,
    family: type[Family] | None = None,
    masks: bool = False,
) -> list[Check]:
    """The contract of a method on a tiny model, as checks to be called.

    Args:
        method: an instance, with parameters under which it does something on a model of four layers; or a registered name.
        model: a family's name (see ``models.BUILDERS``) or a tiny model of your own; by default LLaVA, or the first family
            that has what the method needs.
        family: the adapter of the model's family, where it is not registered.
        masks: whether the method removes tokens by rules of its own even where ``Method.off`` switches it off.

    Raises:
        InputError: ``method`` is no method, or has a search of its own.
    """
    method = parse(method) if isinstance(method, str) else method
    if not isinstance(method, Method) or hasattr(method, "decode"):
        raise InputError(
            f"{getattr(method, 'name', method)!r} is no method that is held to this contract; pass an instance of a class that "
            "derives from Method and has no search of its own."
        )
    if model is None:
        cases = (Case(method, tiny(name), family, masks) for name in BUILDERS)
        case = next(case for case in cases if case.refusal is None)
    else:
        case = Case(method, tiny(model) if isinstance(model, str) else model, family, masks)
    if case.refusal is not None:
        return [Check(what_a_family_cannot_do_raises_the_reason, case)]
    checks = []
    for rule, modes in RULES.items():
        reasons = [part.refuses[mode] for part in method.parts() for mode in modes if mode in part.refuses]
        checks.append(Check(rule, case, reasons[0] if reasons else None))
    return checks


def check_method(
    method: Method | str,
    model: Tiny | str | None = None,
    *,
    family: type[Family] | None = None,
    masks: bool = False,
) -> None:
    """Hold a method to the contract; takes what :func:`method_checks` takes.

    Raises:
        AssertionError: names the rules that are broken, with what was expected.
        InputError: ``method`` is no method, or has a search of its own.
    """
    run_all(method_checks(method, model, family=family, masks=masks))

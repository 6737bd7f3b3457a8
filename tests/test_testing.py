"""The helpers for tests of other packages: what keeps the rules passes, and each broken rule is found and named."""

import copy
import dataclasses
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
import transformers
from helpers import full_but

from lvlm_decode.engine.hf import decoder
from lvlm_decode.errors import InputError
from lvlm_decode.families.base import Family
from lvlm_decode.method import Contrast
from lvlm_decode.methods import load
from lvlm_decode.speculative.drafters.lookup import PromptLookup
from lvlm_decode.speculative.tree import Tree
from lvlm_decode.testing import (
    check_drafter,
    check_evaluator,
    check_family,
    check_method,
    drafter_checks,
    evaluator_checks,
    family_checks,
    method_checks,
)
from lvlm_decode.testing.contract import RULES
from lvlm_decode.testing.evaluators import scoring_imports_no_torch
from lvlm_decode.testing.models import tiny
from lvlm_decode_evals import EVALUATORS
from lvlm_decode_evals.base import Column, Evaluator, Question, Row, ratio


def own(family="llava"):
    """A tiny model that may be left changed."""
    zoo = tiny(family)
    return dataclasses.replace(zoo, model=copy.deepcopy(zoo.model))


def broken(checks) -> set[str]:
    """The rules that are broken."""
    found = set()
    for check in checks:
        try:
            check()
        except AssertionError:
            found.add(check.rule.__name__)
    return found


# --- methods


@dataclass(frozen=True)
class Toy(Contrast):
    """Adds the predictions without the image; its children break one rule each."""

    name: ClassVar[str] = "toy"
    alpha: float = 0.5

    def views(self, sample, rng):
        return [sample.without_image(weight=self.alpha)]


class StaysOn(Toy):
    def combine(self, step):
        return super().combine(step) + 0.1 * step.logits[1]


class Idle(Toy):
    def combine(self, step):
        return step.logits[0]


class MixesRows(Toy):
    def combine(self, step):
        return super().combine(step) - self.alpha * step.logits[0].mean(0, keepdim=True)


class CountsPositions(Toy):
    def combine(self, step):
        ramp = torch.arange(step.logits.shape[-1]) / step.logits.shape[-1]
        return super().combine(step) + self.alpha * step.logits.shape[2] * ramp


class Patched(Toy):
    """Adds the number of rows in a forward to hidden states, whoever's they are."""

    @contextmanager
    def patch(self, run):
        def more(module, args, output):
            return output * (1 + 0.05 * self.alpha * len(output))

        with decoder.norm(run.module).register_forward_hook(more):
            yield


class LeavesAHook(Toy):
    @contextmanager
    def patch(self, run):
        decoder.norm(run.module).register_forward_hook(lambda module, args, output: None)
        yield


class ChangesAWeight(Toy):
    @contextmanager
    def patch(self, run):
        with torch.no_grad():
            decoder.norm(run.module).weight.mul_(1 + 1e-6)
        yield


def test_a_method_of_another_package_passes(site):
    check_method("toy")
    check_method(Toy(), "qwen2_vl")


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (StaysOn, "switched_off_equals_plain"),
        (Idle, "does_something"),
        (Patched, "stacked_equals_sequential"),
        (MixesRows, "a_row_in_a_batch_equals_the_row_alone"),
        (CountsPositions, "verifying_a_draft_equals_decoding_it"),
        (MixesRows, "beams_follow"),
        (LeavesAHook, "detached_equals_untouched"),
        (ChangesAWeight, "detached_equals_untouched"),
    ],
)
def test_a_broken_rule_is_found(kind, rule):
    (check,) = [check for check in method_checks(kind(), own()) if check.rule.__name__ == rule]
    assert str(check) == f"{rule} (toy on llava)"
    with pytest.raises(AssertionError):
        check()


def test_broken_rules_are_named_together():
    with pytest.raises(
        AssertionError, match=r"^1 of 13 rules is broken:\n *switched_off_equals_plain \(toy on llava\): "
    ):
        check_method(StaysOn())
    assert broken(method_checks(Toy())) == set() and len(RULES) == 13


@dataclass(frozen=True)
class Refusing(Toy):
    refuses: ClassVar[dict] = {"beam": "its scores are not those of sequences."}


def test_a_mode_that_is_refused_must_be_refused_with_its_reason():
    check_method(Refusing())
    checks = {check.rule.__name__: check for check in method_checks(Refusing())}
    assert checks["beams_follow"].refused == "its scores are not those of sequences."
    never = dataclasses.replace(checks["runs_in_inference_mode"], refused="it cannot.")
    with pytest.raises(AssertionError, match="no UnsupportedError was raised"):
        never()


def test_what_the_family_lacks_must_be_refused():
    (check,) = method_checks(load("scmoe")(), "llava")
    assert check.rule.__name__ == "what_a_family_cannot_do_raises_the_reason"
    check()
    assert {str(check.case) for check in method_checks(load("scmoe")())} == {"scmoe on qwen3_vl_moe"}
    with pytest.raises(InputError, match="is no method that is held to this contract"):
        method_checks("opera")


# --- families


class ToyConfig(transformers.LlavaConfig):
    model_type = "toy_lvlm"


class ToyLvlm(transformers.LlavaForConditionalGeneration):
    config_class = ToyConfig


class Blind(Family):
    """Says that images have no places of their own."""

    def drop_image(self, input_ids):
        return torch.ones_like(input_ids, dtype=torch.bool)


def toy_lvlm():
    zoo = tiny("llava")
    model = ToyLvlm(ToyConfig(**{**zoo.model.config.to_dict(), "model_type": "toy_lvlm"})).eval()
    model.load_state_dict(zoo.model.state_dict())
    model.generation_config = zoo.model.generation_config
    return dataclasses.replace(zoo, family="toy_lvlm", model=model)


def test_a_family_of_another_package_passes(site):
    """The rules of the family itself; `--full` runs a method of each kind on it too."""
    checks = family_checks(toy_lvlm())
    assert len(checks) > 60
    for check in checks[:4]:
        check()


@pytest.mark.full
def test_a_family_of_another_package_passes_with_a_method_of_each_kind(site):
    check_family(toy_lvlm())


def test_a_blind_model_and_a_wrong_adapter_are_found():
    zoo = own()
    with torch.no_grad():
        for parameter in zoo.model.model.multi_modal_projector.parameters():
            parameter.zero_()
    checks = family_checks(zoo)
    assert "reacts_to_its_image" in broken(checks[:4])
    assert "image_spans_hold_exactly_the_placeholders" in broken(family_checks("llava", family=Blind)[:4])


# --- drafters


@pytest.mark.parametrize("name", full_but(["lookup", "copyspec", "recycling", "automaton"], ["lookup"]))
def test_every_drafter_without_weights_passes(name):
    check_drafter(name)


def test_a_drafter_of_another_package_passes(site):
    check_drafter("toy-drafter")


@dataclass
class TooDeep(PromptLookup):
    name: ClassVar[str] = "too-deep"

    def begin(self, context):
        session = super().begin(context)
        session.propose = lambda room, propose=session.propose: propose(room + 3)
        return session


@dataclass
class Stale(PromptLookup):
    """Grows its tree from another token than the newest."""

    name: ClassVar[str] = "stale"

    def begin(self, context):
        session = super().begin(context)

        def propose(room, propose=session.propose):
            tree = propose(room)
            return Tree(tree.tokens.clone().index_fill(1, torch.tensor([0]), 40), tree.shapes)

        session.propose = propose
        return session


def test_a_drafter_that_breaks_a_rule_is_found():
    assert "proposals_fit_the_call" in broken(drafter_checks(TooDeep(longest=1)))
    assert broken(drafter_checks(Stale())) == {"drafting_changes_no_answer", "proposals_fit_the_call"}
    with pytest.raises(InputError, match="is no drafter"):
        check_drafter(None)


# --- evaluators


@pytest.mark.parametrize("name", sorted(set(EVALUATORS) - {"mmhal", "vallu"}))
def test_every_evaluator_passes(name):
    """The judged two have no questions about scenes; test_judges.py has theirs."""
    for check in evaluator_checks(name):
        check()


def test_an_evaluator_of_another_package_passes(site):
    check_evaluator("toy-pope")


@dataclass(frozen=True)
class Existence(Evaluator):
    name: ClassVar[str] = "existence"
    columns: ClassVar[tuple[Column, ...]] = (Column("accuracy", "Accuracy", paired=True),)

    def scene_questions(self, scenes, seed=0):
        return {"all": [Question(s.image_id, "Is there a dog?", str(s.image_id), "yes") for s in scenes]}

    def row(self, answer):
        return Row.of(answer, parsed=answer.answer, correct=answer.answer.startswith("Yes"), rule="prefix")

    def tally(self, rows):
        return {"n": len(rows), "right": sum(row.correct for row in rows)}

    def rates(self, totals):
        return {"accuracy": ratio(totals["right"], totals["n"])}


class SameIds(Existence):
    def scene_questions(self, scenes, seed=0):
        return {"all": [Question(1, "Is there a dog?", "a", "yes"), Question(1, "Is there a cat?", "a", "yes")]}


class LosesRows(Existence):
    def rows(self, answers):
        return [row for row in super().rows(answers) if row.answer]


class ScoresFailures(Existence):
    def rows(self, answers):
        return [self.row(answer) for answer in answers]


class Averages(Existence):
    def tally(self, rows):
        return {"n": len(rows), "right": sum(row.correct for row in rows) / 2}


class OneAtATime(Existence):
    """Adds up what belongs to several replicates."""

    def rates(self, totals):
        return {"accuracy": float(np.sum(totals["right"]) / totals["n"] if np.ndim(totals["n"]) == 0 else 0.5)}


class Heavy(Existence):
    __module__ = "lvlm_decode.method"


class NoNumber(Existence):
    columns = (Column("recall", "Recall"),)


def test_an_evaluator_that_breaks_a_rule_is_found():
    def found(kind):
        # This file imports torch itself.
        return broken([check for check in evaluator_checks(kind()) if check.rule is not scoring_imports_no_torch])

    assert found(Existence) == set()
    for kind, rule in (
        (SameIds, "questions_can_be_told_apart"),
        (LosesRows, "every_answer_has_its_row"),
        (ScoresFailures, "every_answer_has_its_row"),
        (Averages, "numbers_are_sums_over_clusters"),
        (OneAtATime, "numbers_are_sums_over_clusters"),
        (NoNumber, "columns_find_their_numbers"),
    ):
        assert rule in found(kind), kind.__name__


@pytest.mark.full
def test_an_evaluator_whose_module_imports_torch_is_found():
    (check,) = [check for check in evaluator_checks(Heavy()) if check.rule is scoring_imports_no_torch]
    with pytest.raises(AssertionError, match=r"lvlm_decode\.method imports torch"):
        check()


# --- nobody needs pytest


@pytest.mark.full
def test_the_helpers_need_no_pytest():
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "from lvlm_decode.testing import check_method; import lvlm_decode\n"
        "check_method(lvlm_decode.VCD())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

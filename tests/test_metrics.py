"""Statistics against brute force and closed forms: bootstrap clustered by image, exact McNemar, exact sign flips."""

import itertools
import math
import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_decode.errors import EvalError
from lvlm_decode_evals import evaluator
from lvlm_decode_evals.base import Answer, Column, Evaluator, Row, ratio, tallies
from lvlm_decode_evals.metrics import compare, intervals, mcnemar_exact, resample, sign_flip_exact, wilson
from lvlm_decode_evals.pope import Pope


@dataclass(frozen=True)
class Share(Evaluator):
    """The share of right answers and a ratio of two sums."""

    name: ClassVar[str] = "share"
    columns: ClassVar = (Column("share", "Share", paired=True), Column("length", "Length"))

    def row(self, answer):
        return Row.of(answer, parsed=answer.answer, correct=answer.answer == answer.label, rule="equal")

    def tally(self, rows):
        return {"n": len(rows), "right": sum(row.correct for row in rows), "letters": sum(len(r.answer) for r in rows)}

    def rates(self, totals):
        return {"share": ratio(totals["right"], totals["n"]), "length": ratio(totals["letters"], totals["n"])}


def rows_of(verdicts, per_image=1, word="right"):
    """Rows from a list of booleans; `per_image` consecutive ones share an image."""
    answers = (
        Answer(i, word if good else "wrong!", label=word, image=f"im{i // per_image}")
        for i, good in enumerate(verdicts)
    )
    return Share().rows(answers)


def brute_force_mcnemar(gained, lost):
    n = gained + lost
    outcomes = [sum(flips) for flips in itertools.product((0, 1), repeat=n)]
    return min(1.0, 2 * sum(k <= min(gained, lost) for k in outcomes) / 2**n)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 3), (7, 2), (2, 7), (0, 9), (10, 4)])
def test_mcnemar_equals_enumeration(gained, lost):
    assert mcnemar_exact(gained, lost) == pytest.approx(brute_force_mcnemar(gained, lost), abs=1e-15)


def test_mcnemar_closed_forms_and_large_counts():
    assert mcnemar_exact(5, 0) == 2 * 0.5**5
    assert mcnemar_exact(4, 4) == 1.0
    assert mcnemar_exact(1500, 1500) == 1.0
    # Normal approximation with continuity correction, far from the edge.
    z = (abs(1600 - 1400) - 1) / math.sqrt(3000)
    assert mcnemar_exact(1600, 1400) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)


@given(st.lists(st.integers(-4, 4), max_size=11))
@settings(max_examples=80, deadline=None)
def test_sign_flips_equal_enumeration(differences):
    observed = abs(sum(differences))
    sums = [
        abs(sum(s * abs(d) for s, d in zip(signs, differences)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    assert sign_flip_exact(differences) == pytest.approx(sum(s >= observed for s in sums) / len(sums), abs=1e-12)


@given(st.integers(0, 40), st.integers(0, 40))
def test_sign_flips_of_single_questions_are_mcnemar(gained, lost):
    assert sign_flip_exact([1] * gained + [-1] * lost + [0] * 5) == pytest.approx(
        mcnemar_exact(gained, lost), abs=1e-12
    )


def test_sign_flips_do_not_depend_on_the_unit():
    assert sign_flip_exact([6, -3, 3, 9]) == sign_flip_exact([2, -1, 1, 3])


def test_bootstrap_interval_equals_the_replicates_done_by_hand():
    rng = random.Random(4)
    rows = rows_of([rng.random() < 0.7 for _ in range(60)], per_image=3)
    _, (clusters, counts) = tallies(Share(), rows)
    by_hand = []
    for weights in resample(len(clusters), 400, seed=2):
        for drawn in weights:
            again = [
                row
                for name, times in zip(clusters, drawn)
                for _ in range(int(times))
                for row in rows
                if row.cluster == name
            ]
            by_hand.append(sum(row.correct for row in again) / len(again))
    found = intervals(Share(), [rows], replicates=400, seed=2)["share"]
    assert found.value == sum(row.correct for row in rows) / 60
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(by_hand, [0.025, 0.975])))
    assert counts.sum() == sum(len(row.answer) for row in rows) + 60 + sum(row.correct for row in rows)


def test_resampling_draws_as_many_clusters_as_there_are_and_blocks_do_not_matter(monkeypatch):
    whole = np.concatenate(list(resample(7, 50, seed=1)))
    assert whole.shape == (50, 7) and (whole.sum(axis=1) == 7).all()
    monkeypatch.setattr("lvlm_decode_evals.metrics._BLOCK", 21)
    assert (np.concatenate(list(resample(7, 50, seed=1))) == whole).all()


def test_questions_of_one_image_do_not_count_as_independent():
    rng = random.Random(0)
    together = [v for good in (rng.random() < 0.6 for _ in range(40)) for v in [good] * 6]
    clustered = intervals(Share(), [rows_of(together, per_image=6)])["share"]
    single = intervals(Share(), [rows_of(together, per_image=1)])["share"]
    assert clustered.value == single.value
    # Six equal answers an image carry the information of one: the interval is sqrt(6) = 2.4 times wider.
    assert (clustered.high - clustered.low) / (single.high - single.low) == pytest.approx(math.sqrt(6), rel=0.15)


def test_interval_width_agrees_with_the_binomial():
    rows = rows_of([i % 4 != 0 for i in range(400)])
    found = intervals(Share(), [rows])["share"]
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * math.sqrt(0.75 * 0.25 / 400), rel=0.1)


def test_paired_difference_is_tighter_than_two_intervals_and_signed_as_method_minus_control():
    rng = random.Random(1)
    control = [rng.random() < 0.5 for _ in range(200)]
    method = [good or i % 10 == 0 for i, good in enumerate(control)]
    found = compare(Share(), [rows_of(method)], [rows_of(control)])
    assert found.differences["share"].value == pytest.approx((sum(method) - sum(control)) / 200)
    assert found.differences["share"].low > 0 and found.differences["share"].excludes_zero
    assert (found.mcnemar.gained, found.mcnemar.lost) == (sum(method) - sum(control), 0)
    assert found.mcnemar.p == pytest.approx(found.mcnemar.p_clustered)
    back = compare(Share(), [rows_of(control)], [rows_of(method)])
    assert back.differences["share"].value == -found.differences["share"].value
    assert back.mcnemar.p == found.mcnemar.p


def test_rows_align_by_id_not_by_position_and_only_shared_ones_count():
    control = rows_of([True, False, True, True, False, False])
    shuffled = control[::-1]
    found = compare(Share(), [shuffled[:-1]], [control])
    assert found.questions == 5 and found.mcnemar.gained == found.mcnemar.lost == 0
    assert found.differences["share"].value == 0 and not found.differences["share"].excludes_zero
    with pytest.raises(EvalError, match="share no question id"):
        compare(Share(), [control[:2]], [control[3:]])


def test_identical_runs_differ_by_exactly_nothing():
    rows = rows_of([True, False] * 20, per_image=4)
    found = compare(Share(), [rows], [rows])
    assert (found.differences["share"].low, found.differences["share"].high) == (0, 0)
    assert found.mcnemar.p == found.mcnemar.p_clustered == 1.0


def test_seeds_are_averaged_and_their_verdicts_not_counted_as_new_questions():
    first, second = rows_of([True] * 30 + [False] * 10), rows_of([True] * 20 + [False] * 20)
    control = rows_of([True] * 10 + [False] * 30)
    both = compare(Share(), [first, second], [control])
    assert both.differences["share"].value == pytest.approx(0.375)
    assert both.mcnemar.p is None
    # One control run against two method runs: 20 + 10 gained; the sign-flip test still has one net gain an image.
    assert (both.mcnemar.gained, both.mcnemar.lost) == (30, 0)
    assert both.mcnemar.p_clustered == pytest.approx(sign_flip_exact([2] * 10 + [1] * 10))
    alone = compare(Share(), [first], [control])
    repeated = compare(Share(), [first, first, first], [control])
    assert repeated.mcnemar.p_clustered == pytest.approx(alone.mcnemar.p_clustered)
    assert repeated.differences["share"].value == pytest.approx(alone.differences["share"].value)
    assert repeated.differences["share"].low == pytest.approx(alone.differences["share"].low)


def test_ratios_with_nothing_below_are_zero_for_numbers_and_arrays():
    assert ratio(0, 0) == 0.0 and ratio(1, 4) == 0.25
    assert ratio(np.array([0, 3]), np.array([0, 4])).tolist() == [0.0, 0.75]


def test_rates_of_pope_are_the_same_for_a_replicate_as_for_a_number():
    pope = Pope()
    texts = ["Yes", "No", "Yes", "No", "yes", "perhaps"]
    rows = pope.rows(Answer(i, text, label="yes" if i % 2 else "no", image=str(i // 2)) for i, text in enumerate(texts))
    keys, (_, counts) = tallies(pope, rows)
    scalar = pope.rates(dict(zip(keys, counts.sum(axis=0).tolist())))
    arrays = pope.rates({key: np.array([counts[:, i].sum()] * 3) for i, key in enumerate(keys)})
    assert {name: values.tolist() for name, values in arrays.items()} == {k: [v] * 3 for k, v in scalar.items()}


def test_no_rows_is_an_error_not_a_number():
    with pytest.raises(EvalError, match="no scored answer"):
        intervals(Share(), [[]])


def test_wilson_against_worked_values():
    """Brown, Cai and DasGupta (2001) and the closed forms at the ends: n / (n + z^2), z^2 / (n + z^2)."""
    z2 = 1.959963984540054**2
    assert wilson(1.0, 10) == pytest.approx((10 / (10 + z2), 1))
    assert wilson(0.0, 40) == pytest.approx((0, z2 / (40 + z2)))
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.3, 0) == (0, 1)


@pytest.mark.parametrize("right", [True, False])
def test_at_its_end_a_rate_keeps_an_interval_that_shrinks_with_images(right):
    widths = []
    for images in (5, 50, 500):
        found = intervals(Share(), [rows_of([right] * 4 * images, per_image=4)])["share"]
        assert found.value == right and (found.low, found.high)[right] == right
        widths.append(found.high - found.low)
    z2 = 1.959963984540054**2
    assert widths == pytest.approx([z2 / (n + z2) for n in (5, 50, 500)])


def test_two_methods_at_the_end_may_still_differ():
    rows = rows_of([True] * 40, per_image=4)
    found = compare(Share(), [rows], [rows]).differences["share"]
    assert found.low == -found.high < 0 and not found.excludes_zero
    nothing = rows_of([False] * 40, per_image=4)
    found = compare(Share(), [rows], [nothing]).differences["share"]
    assert 0 < found.low < found.value == found.high == 1


def test_only_images_that_have_something_to_count_make_an_interval_narrow():
    """Recall over 30 images with objects is no surer because 70 images without any were captioned too."""
    chosen = evaluator("chair")
    answers = [Answer(i, "A dog.", label=["dog"] if i < 30 else [], image=f"{i}.jpg") for i in range(100)]
    found = intervals(chosen, [chosen.rows(answers)], 200)["recall"]
    assert (found.low, found.high) == pytest.approx(wilson(1.0, 30))

"""Pictures: both axes of a benchmark, and gain against ability."""

import numpy as np
import pytest
from runs import SAMPLE, captions, naturalbench, pope

from lvlm_decode_evals.metrics import intervals
from lvlm_decode_evals.plots import scatter, trades, write_pictures
from lvlm_decode_evals.price import lines
from lvlm_decode_evals.tables import gather

pytest.importorskip("matplotlib")


def points(panel):
    """label -> (x, y) of every method's point."""
    return {c.get_label(): tuple(float(v[0]) for v in c.lines[0].get_data()) for c in panel.containers}


def test_captions_are_drawn_against_recall_and_length():
    results = [captions("plain", "A dog and a cat on a car in a street."), captions("vcd", "A dog.")]
    ((key, methods),) = gather(results).items()
    figure = scatter(methods, key[1], 100)
    labels = [(panel.get_xlabel(), panel.get_ylabel()) for panel in figure.axes]
    assert labels == [("Recall (%)", "CHAIRi (%)"), ("Recall (%)", "CHAIRs (%)"), ("Length", "CHAIRs (%)")]
    shown = points(figure.axes[2])
    rates = {m.label: intervals(m.results[0].evaluator, m.runs, 100) for m in methods}
    for label, (x, y) in shown.items():
        assert (x, y) == pytest.approx((rates[label]["length"].value, 100 * rates[label]["chair_s"].value))
    assert len(shown) == 2 and len({*shown.values()}) == 2


def test_panels_that_a_run_lacks_are_left_out():
    ((key, methods),) = gather([pope("plain", 10), pope("vcd", 20, decoding=SAMPLE)]).items()
    figure = scatter(methods, key[1], 100)
    assert [panel.get_xlabel() for panel in figure.axes] == ["Yes-ratio (%)"]


def test_gain_against_ability_turns_what_falls_when_it_improves(tmp_path):
    results = [
        pope("plain", 10), pope("vcd", 30), naturalbench("plain", 30), naturalbench("vcd", 10),
        captions("plain", "A dog and a car."), captions("vcd", "A dog."),
    ]  # fmt: skip
    figure = trades(lines(results, 200))
    shown = {panel.get_ylabel(): points(panel)["vcd, greedy"] for panel in figure.axes}
    assert shown["gain in pope random: Accuracy (%)"] == pytest.approx((-50, 50))
    assert shown["gain in chair: CHAIRs (%)"] == pytest.approx((-50, 100))
    assert {panel.get_xlabel() for panel in figure.axes} == {"gain in naturalbench: gAcc (%)"}
    written = write_pictures(results, tmp_path, 100)
    assert {path.name for path in written} == {
        "chair-captions.png", "naturalbench-all.png", "pope-random.png", "gain-against-ability.png"
    }  # fmt: skip
    image = np.frombuffer((tmp_path / "gain-against-ability.png").read_bytes(), np.uint8)
    assert bytes(image[:4]) == b"\x89PNG"
    assert write_pictures(results, tmp_path / "again", 100)[-1].read_bytes() == image.tobytes()


def test_what_did_not_move_is_not_drawn_as_if_looked_at_closely():
    results = [pope("plain", 10), pope("vcd", 30), naturalbench("plain", 10), naturalbench("vcd", 10)]
    (panel,) = trades(lines(results, 200)).axes
    low, high = panel.get_xlim()
    assert high - low >= 2
    # The interval along an axis that did not move lies over the line that marks zero.
    bars = [line.get_zorder() for container in panel.containers for line in container.lines[2]]
    marks = [line.get_zorder() for line in panel.lines if line.get_color() == "0.6"]
    assert len(marks) == 2 and max(marks) < min(bars)


def test_without_ability_there_is_no_such_picture(tmp_path):
    assert trades(lines([pope("plain", 10), pope("vcd", 30)], 100)) is None
    assert [p.name for p in write_pictures([pope("plain", 10), pope("vcd", 30)], tmp_path, 100)] == ["pope-random.png"]

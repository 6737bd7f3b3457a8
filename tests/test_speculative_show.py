"""Drawings of drafts: every row has its place, and what was accepted is what is coloured."""

import matplotlib
import pytest

from lvlm_decode.attachment import attach, detach
from lvlm_decode.methods import parse
from lvlm_decode.speculative import drafters, show
from lvlm_decode.speculative.stats import Stats
from lvlm_decode.speculative.tree import ranked_shape, shape_of
from lvlm_decode.testing import models as zoo

matplotlib.use("Agg")


def test_rows_have_places_of_their_own():
    shape, _ = ranked_shape(30, (0.6, 0.2, 0.1), 5)
    places = show.layout(shape)
    assert len(set(places)) == 30 and all(y == -d for (_, y), d in zip(places, shape.depth))
    for row, children in enumerate(shape.children):
        if children:
            assert places[row][0] == pytest.approx(sum(places[c][0] for c in children) / len(children))


def test_traced_drafts_are_what_was_verified():
    tiny = zoo.tiny("llava")
    inputs = tiny.inputs(["is it"], seed=2)
    width = inputs["input_ids"].shape[1]
    drafter, drafts = show.traced(drafters.parse("recycling(rows=8,depth=3)"))
    attach(tiny.model, parse("plain"), drafter=drafter)
    try:
        out = tiny.model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None)
    finally:
        detach(tiny.model)
    answer = out[0, width:].tolist()
    seen = [answer[0]]
    for draft in drafts:
        assert draft.tokens[0] == seen[-1]
        assert [draft.tokens[row] for row in draft.path[1:]] == draft.committed[:-1]
        seen += draft.committed
    assert seen == answer[: len(seen)] and len(seen) > 10


def test_drawings_show_tokens_and_colours():
    draft = show.Draft([5, 6, 7, 8], shape_of((-1, 0, 0, 1)), [0, 1], [6, 9])
    ax = show.draw_tree(draft, lambda token: f"<{token}>")
    texts = {text.get_text(): text for text in ax.texts}
    assert set(texts) == {"<5>", "<6>", "<7>", "<8>", "<9>"}
    colour = lambda name: matplotlib.colors.to_hex(texts[name].get_bbox_patch().get_facecolor())  # noqa: E731
    assert [colour(f"<{t}>") for t in (5, 6, 7, 8)] == [show.ROOT, show.ACCEPTED, show.REFUSED, show.REFUSED]
    stats = Stats(cycles=2, accepted=1, reached=[2, 1], accepted_per_level=[1, 0])
    ax = show.draw_acceptance({"a": stats})
    assert ax.lines[0].get_ydata().tolist() == [0.5, 0.0]
    ax = show.draw_times({"a": {"ms_per_token_decode": 2.0}, "b": {"ms_per_token_decode": 1.0}})
    assert [bar.get_width() for bar in ax.patches] == [2.0, 1.0]

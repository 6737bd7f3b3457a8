"""Evidence of one answer: equal to what the formulas give, complete for every kind of method, and a page that works."""

import dataclasses
import json
import re

import browser
import pytest
import torch
from helpers import full_but
from typer.testing import CliRunner

import lvlm_decode
import lvlm_decode_data
from lvlm_decode.cli import app
from lvlm_decode.engine.hooks import hooked
from lvlm_decode.engine.recorder import Recorder
from lvlm_decode.errors import DependencyError, InputError, ParameterError, UnsupportedError
from lvlm_decode.methods import METHODS
from lvlm_decode_evals.runner import load

PROMPT = "Please describe this image in detail."
OPERA = "opera(threshold=2,min_rollback_index=2,num_beams=3,num_attn_candidates=3)"


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture(scope="module")
def explained(tiny):
    kept = {}

    def one(method, scene=3, **options):
        key = (str(method), scene, *options.items())
        if key not in kept:
            path = lvlm_decode_data.load_scenes()[scene].path
            given = {"max_new_tokens": 32, **options}
            kept[key] = lvlm_decode.explain(tiny.model, tiny.processor, path, PROMPT, method, **given)
        return kept[key]

    return one


def generated(tiny, method, scene=3, new=32, **options):
    """Ids of the answer, and the scores of every step, without a recorder."""
    from PIL import Image

    from lvlm_decode.evidence.explain import worded

    picture = Image.open(lvlm_decode_data.load_scenes()[scene].path).convert("RGB")
    inputs = tiny.processor(images=[picture], text=[worded(tiny.processor, PROMPT)], return_tensors="pt")
    with lvlm_decode.attached(tiny.model, method, processor=tiny.processor, **options):
        more = {} if "opera" in str(method) else {"output_logits": True, "return_dict_in_generate": True}
        out = tiny.model.generate(**inputs, do_sample=False, max_new_tokens=new, seed=0, **more)
    ids = out.sequences if more else out
    return ids[0, inputs["input_ids"].shape[1] :].tolist(), (out.logits if more else None), inputs


@pytest.mark.parametrize(
    "method",
    full_but(
        ["vcd", "vcd+ritual", "dola", "deco", "damro", "avisc", "sid", "pai", OPERA, "plain"],
        ["vcd+ritual", "dola", "avisc", OPERA],
    ),
)
def test_the_answer_is_that_of_generate(tiny, explained, method):
    ids, _, _ = generated(tiny, method)
    told = explained(method)
    assert [token.id for token in told.tokens] == ids
    assert "".join(token.text for token in told.tokens if not token.special).strip() == told.answer


@pytest.mark.parametrize("method", ["vcd", "dola", "pai", "sid"])
def test_probabilities_are_those_of_the_scores_and_of_plain_decoding(tiny, explained, method):
    told = explained(method)
    ids, scores, inputs = generated(tiny, method)
    # Plain decoding after the same words: one forward of the model itself over prompt and answer.
    whole = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
    with torch.no_grad():
        logits = tiny.model(input_ids=whole, pixel_values=inputs["pixel_values"]).logits[0]
    plain = logits[inputs["input_ids"].shape[1] - 1 : -1].float().log_softmax(-1)
    for at, token in enumerate(told.tokens):
        own = scores[at][0].float().log_softmax(-1)
        for candidate in token.candidates:
            # Two orders of the same sums in single precision.
            assert candidate.method == pytest.approx(float(own[candidate.id].exp()), abs=2e-5)
            assert candidate.plain == pytest.approx(float(plain[at, candidate.id].exp()), abs=2e-5)
        assert token.distance == pytest.approx(float((own.exp() - plain[at].exp()).abs().sum() / 2), abs=1e-4)
        assert token.shift == pytest.approx(float(own[token.id] - plain[at, token.id]), abs=1e-3)
        assert token.changed == (token.id != token.plain_id)
        listed = {candidate.id for candidate in token.candidates}
        assert {token.id, token.plain_id, int(own.argmax()), int(plain[at].argmax())} <= listed


def test_what_a_method_changes_is_found(explained):
    """Explanations of plain decoding change nothing, those of the others do: the fixture reacts to the method."""
    assert not explained("plain").changed and all(token.distance == 0 for token in explained("plain").tokens)
    assert explained("avisc").changed and explained("dola").changed
    assert any(token.distance > 0.1 for token in explained("avisc").tokens)
    still = explained("vcd(alpha=0,beta=null)")
    assert not still.changed and max(token.distance for token in still.tokens) < 1e-6
    assert still.views == () and explained("vcd").views, "at strength 0 no view runs, so none is shown"
    assert all(token.mask.kept >= 1 for token in explained("vcd(alpha=0)").tokens)


def test_the_mask_says_what_it_removed(explained):
    told = explained("dola")
    barred = [token for token in told.tokens if token.mask.barred]
    assert barred, "no token of this answer would have been another without the mask"
    for token in told.tokens:
        size = token.mask.kept + token.mask.removed
        assert token.mask.kept >= 1 and size > 1000 and 0 <= token.mask.removed_mass < 1
        assert all(candidate.method < 1e-6 for candidate in token.candidates if not candidate.kept)
    for token in barred:
        assert token.mask.barred[0] in {candidate.id for candidate in token.candidates if not candidate.kept}
    assert all(token.mask is None for token in explained("plain").tokens)


def test_layers_of_dola_and_deco(explained):
    assert {token.choices["layer"] for token in explained("dola").tokens} <= {2, 4}
    deco = explained("deco")
    assert all(0 <= token.choices["probability in that layer"] <= 1 for token in deco.tokens)


def test_places_on_the_picture(explained):
    damro, avisc = explained("damro").overlays[0], explained("avisc").overlays[0]
    assert damro.grid == avisc.grid == (8, 8) and damro.places == len(damro.weights) == 64
    top = sorted(range(64), key=lambda i: -damro.weights[i])[:10]
    assert set(damro.chosen) == set(top)
    limit = torch.tensor(avisc.weights)
    limit = limit.mean() + limit.std()
    assert set(avisc.chosen) == {i for i, w in enumerate(avisc.weights) if w > limit}
    other = explained("damro", scene=5).overlays[0]
    assert other.chosen != damro.chosen, "the places do not depend on the picture"


def test_rows_that_attention_methods_read_or_edited(explained):
    sid = explained("sid")
    keep = max(1, round(64 * 100 / 576))
    for token in sid.tokens:
        (row,) = token.attention
        low = sorted(range(64), key=lambda i: row.weights[i])[:keep]
        assert [i for i, c in enumerate(row.chosen) if c] == sorted(low)
    for token in explained("pai").tokens[1:]:
        before, after = token.attention
        assert sum(after.weights) > sum(before.weights) > 0
    assert explained("pai").tokens[0].attention == ()
    assert all(token.attention == () for token in explained("vcd").tokens)


def test_rollbacks_of_opera(explained):
    told = explained(OPERA)
    assert told.returns and all(r.kept < r.length and r.taken_back for r in told.returns)
    assert [token.leans_on for token in told.tokens if token.leans_on is not None]
    assert all(token.distance is None and token.candidates[0].method is None for token in told.tokens)
    assert told.tokens[0].candidates[0].plain == max(c.plain for c in told.tokens[0].candidates)


def test_accepted_runs_of_a_drafter(explained):
    with_draft, alone = explained("vcd", drafter="lookup"), explained("vcd")
    assert [token.id for token in with_draft.tokens] == [token.id for token in alone.tokens]
    assert with_draft.drafts and sum(draft.accepted for draft in with_draft.drafts) > 0
    assert 1 + sum(draft.committed for draft in with_draft.drafts) >= len(with_draft.tokens)
    drafted = {token.index for token in with_draft.tokens if token.drafted}
    runs = {p for d in with_draft.drafts for p in range(d.position, d.position + d.accepted)}
    assert drafted == {p for p in runs if p < len(with_draft.tokens)}
    for one, other in zip(with_draft.tokens, alone.tokens):
        assert one.distance == pytest.approx(other.distance, abs=1e-4), one.index
        assert one.plain_id == other.plain_id
    assert all(token.drafted is None for token in alone.tokens)


def test_a_view_is_described_by_what_it_changes(explained):
    vcd, ritual = explained("vcd+ritual").views
    assert vcd.title == ritual.title == "edited pixels" and vcd.picture != ritual.picture
    assert vcd.weight == -1.0 and ritual.weight > 0
    assert [view.title for view in explained("pai").views] == ["no image"]
    assert [view.title for view in explained("avisc").views] == ["edited image features"]
    assert [view.title for view in explained("damro").views] == ["fewer image tokens"]
    assert [view.title for view in explained("icd").views] == ["another prompt"]
    assert [view.title for view in explained("code").views] == ["other tokens in the image's place"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_explained(explained, name):
    try:
        told = explained(name, max_new_tokens=3)
    except (ParameterError, UnsupportedError) as error:
        pytest.skip(str(error))
    assert len(told.tokens) == 3 and told.html()
    assert all(token.candidates and token.id in {c.id for c in token.candidates} for token in told.tokens)
    noted = {"mvp": {"captions", "certainties"}, "vdgd": {"descriptions"}, "cntp": {"trials"}}
    assert set(told.facts) == noted.get(name, set())


def test_a_run_without_a_recorder_asks_for_nothing(tiny, monkeypatch):
    """The questions that only an explanation asks are asked by nobody else."""

    def never(*args, **kwargs):
        raise AssertionError("asked without a recorder")

    for name in ("choices", "places"):
        monkeypatch.setattr(lvlm_decode.Method, name, never)
        monkeypatch.setattr(lvlm_decode.DoLa, "choices", never)
    for name in ("step", "extended", "attended", "verified", "searched"):
        monkeypatch.setattr(Recorder, name, never)
    for method in ("dola", "sid", "pai"):
        generated(tiny, method, new=6)


def test_an_explanation_runs_no_further_forward(tiny):
    """A method that leaves view 0 as it is costs what its answer costs."""
    path = lvlm_decode_data.load_scenes()[3].path
    counts = []
    for run in (
        lambda: generated(tiny, "vcd", new=8),
        lambda: lvlm_decode.explain(tiny.model, tiny.processor, path, PROMPT, "vcd", max_new_tokens=8),
    ):
        calls = []
        with hooked(before={tiny.model.model.language_model.layers[0]: lambda *a, calls=calls: calls.append(1)}):
            run()
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_as_data(explained):
    told = explained("avisc")
    again = json.loads(json.dumps(told.to_dict()))
    assert again["answer"] == told.answer and len(again["tokens"]) == len(told.tokens)
    assert again["tokens"][3]["candidates"][0]["method"] == told.tokens[3].candidates[0].method
    assert {field.name for field in dataclasses.fields(told)} == set(again)


def test_as_a_data_frame(explained):
    pytest.importorskip("pandas")
    told = explained("avisc")
    frame = told.to_pandas()
    assert len(frame) == sum(len(token.candidates) for token in told.tokens)
    assert set(frame[frame.changed]["index"]) == {token.index for token in told.changed}


def test_without_pandas_it_says_what_to_install(explained, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(DependencyError, match="pip install pandas"):
        explained("avisc").to_pandas()


def test_bad_input(tiny):
    path = lvlm_decode_data.load_scenes()[3].path
    with pytest.raises(InputError, match="top is 0"):
        lvlm_decode.explain(tiny.model, tiny.processor, path, PROMPT, "vcd", top=0)
    with pytest.raises(InputError, match="image is int"):
        lvlm_decode.explain(tiny.model, tiny.processor, 3, PROMPT, "vcd")
    with pytest.raises(lvlm_decode.LvlmDecodeError, match="missing"):
        lvlm_decode.explain(tiny.model, tiny.processor, "nowhere.jpg", PROMPT, "vcd")


def test_a_qformer_has_no_grid_of_tokens_but_patches(tmp_path):
    loaded = load("tiny-instructblip")
    path = lvlm_decode_data.load_scenes()[3].path
    told = lvlm_decode.explain(loaded.model, loaded.processor, path, PROMPT, "avisc+damro", max_new_tokens=6)
    tokens, patches = told.overlays
    assert tokens.grid is None and patches.grid is not None and len(patches.chosen) == 4
    assert told.grid is None and len(told.tokens) <= 6


def test_the_command(tmp_path):
    page = tmp_path / "why.html"
    given = ["explain", "scene:3", "--method", "avisc", "--max-new-tokens", "24", "--page", str(page)]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert "instead of" in done.stdout and page.exists()
    data = CliRunner().invoke(app, [*given, "--json", "--param", "alpha=0", "--param", "beta=null"])
    assert json.loads(data.stdout)["parameters"]["alpha"] == 0


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_one_small_file_that_fetches_nothing(explained):
    for method in ("avisc", "pai", OPERA):
        page = explained(method).html()
        assert len(page.encode()) < 2_000_000
        assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "url(" not in page and "@import" not in page
        assert "default-src 'none'" in page


def test_what_a_model_says_is_text_on_the_page(explained):
    told = explained("avisc")
    evil = "</script><img src=x onerror=alert(1)>"
    tokens = (dataclasses.replace(told.tokens[3], text=evil, plain_text=evil), *told.tokens[4:])
    page = dataclasses.replace(told, tokens=tokens, prompt=evil, answer=evil).html()
    assert evil not in page


@pytest.fixture(scope="module")
def chromium():
    if why := browser.missing():
        pytest.skip(why)
    with browser.Browser() as opened:
        yield opened


@pytest.fixture
def page(explained, tmp_path):
    return explained("avisc").save(tmp_path / "page.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 800, 1400])
def test_the_page_fits_and_complains_of_nothing(chromium, page, width, scheme):
    chromium.open(page, width=width, scheme=scheme)
    assert chromium.overflow() <= 0
    # Text against its ground, by the formula of WCAG 2.1.
    ratio = chromium.run("""
        const level = (rgb) => rgb.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
          .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
          .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const paper = level(getComputedStyle(document.body).backgroundColor);
        const inks = [document.body, document.querySelector(".dim")].map((e) => level(getComputedStyle(e).color));
        return Math.min(...inks.map((ink) => (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)));""")
    assert ratio >= 4.5
    assert chromium.log() == []


def place(chromium, selector):
    found = chromium.run(
        "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center'});"
        "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]",
        selector,
    )
    return found


def heading(chromium):
    return chromium.run("return document.querySelector('#token h2').textContent")


def test_pointer_tap_and_keys_show_the_candidates(chromium, page, explained):
    told = explained("avisc")
    chromium.open(page)
    first = told.changed[0].index
    assert heading(chromium).startswith(f"Token {first + 1} of")
    chromium.move(*place(chromium, "#answer button:nth-child(8)"))
    assert heading(chromium).startswith("Token 8 of")
    chromium.move(*place(chromium, "#answer button:nth-child(3)"), click=True)
    chromium.move(*place(chromium, "#answer button:nth-child(9)"))
    assert heading(chromium).startswith("Token 3 of"), "a click keeps its token"
    chromium.key("\ue014")
    assert heading(chromium).startswith("Token 4 of")
    chromium.key("\ue010")
    assert heading(chromium).startswith(f"Token {len(told.tokens)} of")
    chromium.key("\ue013")
    assert heading(chromium).startswith(f"Token {told.changed[-1].index + 1} of")
    rows = chromium.run(
        "return [...document.querySelectorAll('#token tr')].slice(1).map((r) => r.cells[0].textContent)"
    )
    assert rows == [c.text.strip() or "␣" for c in told.changed[-1].candidates]


def test_colours_and_marks_follow_the_numbers(chromium, page, explained):
    told = explained("avisc")
    chromium.open(page)
    seen = chromium.run(
        "return [...document.querySelectorAll('#answer button')]"
        ".map((b) => [b.classList.contains('changed'), Number(b.style.getPropertyValue('--d'))])"
    )
    assert [changed for changed, _ in seen] == [token.changed for token in told.tokens]
    assert [d for _, d in seen] == pytest.approx([token.distance**0.5 for token in told.tokens], abs=0.02)


def test_the_places_are_drawn_where_they_are(chromium, page, explained):
    overlay = explained("avisc").overlays[0]
    chromium.open(page)
    drawn = chromium.run("""
        const pen = document.getElementById("overlay").getContext("2d"), found = [];
        for (let i = 0; i < 64; i++) {
          const [x, y] = [(i % 8) * 60, Math.floor(i / 8) * 60];
          const [r, g, b, a] = pen.getImageData(x + 3, y + 30, 1, 1).data;
          if (a > 200 && r > 150 && g < 100) found.push(i);
        }
        return found;""")
    assert drawn == list(overlay.chosen)

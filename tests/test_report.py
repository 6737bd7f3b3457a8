"""The page of a run: every answer, every verdict and every number of the tables, fluid with ten thousand rows."""

import json
import re
import shutil

import browser
import pytest
from typer.testing import CliRunner

import lvlm_decode_data
from lvlm_decode.cli import app
from lvlm_decode_evals import report
from lvlm_decode_evals.api import Evaluation, read_run
from lvlm_decode_evals.base import Answer, Question
from lvlm_decode_evals.plan import GREEDY, Cell, Settings, claim, write_questions
from lvlm_decode_evals.tables import Value

METHODS = ("plain", "vcd", "ritual")


def made_run(folder, questions, answers, split="random", data=None, evaluator="pope"):
    """A run's folder with these answers: method -> one text per question."""
    for method, texts in answers.items():
        cell = Cell(split, method, GREEDY, 0)
        place = cell.folder(folder, evaluator)
        decides = {
            "evaluator": evaluator,
            "split": split,
            "seed": 0,
            "method": {"name": method, "parameters": {}},
            "decoding": {"do_sample": False},
            "model": {"name": "made"},
            "data": data or {"questions": "emoji scenes"},
        }
        settings = Settings(decides, {})
        claim(place, settings, questions)
        write_questions(place.parents[2], questions)
        lines = [json.dumps(Answer.to(q, text).sealed(settings.key).record()) for q, text in zip(questions, texts)]
        (place / "answers.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def asked(count, images):
    return [
        Question(i, f"Is there a thing {i} in the image?", images[i % len(images)], "yes" if i % 2 else "no")
        for i in range(count)
    ]


def said(count, wrong_every):
    """Answers of which every n-th is wrong."""
    return [("No" if i % 2 else "Yes") if i % wrong_every == 0 else ("Yes" if i % 2 else "No") for i in range(count)]


@pytest.fixture(scope="module")
def scenes():
    return [str(scene.image_id) for scene in lvlm_decode_data.load_scenes()[:40]]


@pytest.fixture(scope="module")
def small(tmp_path_factory, scenes):
    questions = asked(120, scenes)
    answers = {method: said(120, n) for method, n in zip(METHODS, (3, 5, 7))}
    return made_run(tmp_path_factory.mktemp("small"), questions, answers)


def page_of(folder, **options):
    found = read_run(folder)
    return report.html(found.results, Evaluation(found.results).blocks(), "A run", **options)


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_every_answer_and_verdict_is_on_the_page(small):
    text, missing = page_of(small)
    (split,) = data_of(text)["splits"]
    assert missing == [] and split["title"] == "pope, random"
    found = {result.method: result for result in read_run(small).results}
    for label, answers in zip(split["methods"], split["answers"]):
        rows = found[label.partition(",")[0]].rows
        assert [(a[0], a[1]) for a in answers] == [(row.answer, int(row.correct)) for row in rows]
    assert [q[1] for q in split["questions"]] == [q.text for q in asked(120, ["x"])]
    assert 0 < sum(a[1] for a in split["answers"][0]) < 120


def test_every_number_of_the_tables_is_on_the_page(small):
    text, _ = page_of(small)
    blocks = Evaluation(read_run(small).results).blocks()
    numbers = [value.text() for block in blocks for line in block.lines for value in line if isinstance(value, Value)]
    assert len(numbers) > 20 and all(number.replace("<", "&lt;") in text for number in numbers)


def test_intervals_are_drawn_where_they_are():
    cells = [Value(0.5, "percent", 0.4, 0.6), Value(0.7, "percent", 0.6, 0.8)]
    scale = report._scale(cells)
    assert scale == (0.4, 0.8)
    assert "left:0.0%;width:50.0%" in report._cell(cells[0], scale)
    assert "left:50.0%;width:50.0%" in report._cell(cells[1], scale)
    assert report._scale([Value(0.2, "percent", 0.1, 0.3, signed=True)]) == (0.0, 0.3)


def test_each_picture_stands_on_the_page_once(small, scenes):
    data = data_of(page_of(small)[0])
    assert len(data["images"]) == len(set(data["images"])) == 40
    assert [q[2] for q in data["splits"][0]["questions"]] == [i % 40 for i in range(120)]
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in data["images"])


def test_pictures_of_a_folder_and_what_is_missing(tmp_path, scenes, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    for number, scene in enumerate(lvlm_decode_data.load_scenes()[:3]):
        shutil.copy(scene.path, images / f"{number}.jpg")
    (images / "3.jpg").write_bytes(b"no picture")
    questions = asked(8, ["0.jpg", "1.jpg", "2.jpg", "3.jpg"])
    run = made_run(tmp_path / "run", questions, {"plain": said(8, 3)}, data={"questions": "pope"})
    text, missing = page_of(run, images=images)
    assert len(data_of(text)["images"]) == 3
    assert missing == ["1 images are not shown: they are missing or cannot be read."]
    text, missing = page_of(run)
    assert data_of(text)["images"] == [] and "--images FOLDER" in missing[0] and missing[0] in text
    monkeypatch.setattr(report, "MOST_THUMBNAILS", 2)
    assert "a page holds at most 2" in " ".join(page_of(run, images=images)[1])


def test_a_page_fetches_nothing_and_answers_are_text(tmp_path, scenes):
    evil = "</script><img src=x onerror=alert(1)>"
    run = made_run(tmp_path, asked(4, scenes), {"plain": [evil, "Yes", "No", "Yes"]})
    text, _ = page_of(run)
    assert evil not in text and "default-src 'none'" in text
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)
    assert data_of(text)["splits"][0]["answers"][0][0][0] == evil


def test_the_command_writes_the_page_beside_the_run(tmp_path, small):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    done = CliRunner().invoke(app, ["table", str(folder), "--html"])
    assert done.exit_code == 0, done.output
    text = (folder / "report.html").read_text()
    assert f"<h1>{folder.name}: what the methods answered</h1>" in text
    again = CliRunner().invoke(app, ["table", str(folder)])
    assert again.stdout == done.stdout


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    if why := browser.missing():
        pytest.skip(why)
    with browser.Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page_of(small)[0])
    return path


def choose(chromium, name, value):
    chromium.run(
        "const c = document.getElementById(arguments[0]); c.value = arguments[1]; c.dispatchEvent(new Event('change'));"
        "c.dispatchEvent(new Event('input'))",
        name,
        value,
    )


def shown(chromium):
    """Number of questions the filter leaves, as the page says it."""
    return int(chromium.run("return document.getElementById('count').textContent").split()[0].replace(",", ""))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1400])
def test_the_page_fits_and_complains_of_nothing(chromium, page, width, scheme):
    chromium.open(page, width=width, scheme=scheme)
    assert chromium.overflow() <= 0 and chromium.log() == []
    ground = chromium.run("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_filters_by_verdict_and_disagreement(chromium, page):
    chromium.open(page)
    names = chromium.run("return [...document.getElementById('first').options].map((o) => o.text)")
    wrong = dict(zip(METHODS, ({i for i in range(120) if i % n == 0} for n in (3, 5, 7))))
    first, second = ("vcd", "plain")
    for control, method in (("first", first), ("second", second)):
        choose(chromium, control, str(next(i for i, name in enumerate(names) if name.startswith(method))))
    a, b = wrong[first], wrong[second]
    some = wrong["plain"] | wrong["vcd"] | wrong["ritual"]
    every = wrong["plain"] & wrong["vcd"] & wrong["ritual"]
    expected = {
        "all": 120,
        "right": 120 - len(a),
        "wrong": len(a),
        "differ": len(a ^ b),
        "gained": len(b - a),
        "lost": len(a - b),
        "any": len(some - every),
    }
    for which, count in expected.items():
        choose(chromium, "which", which)
        assert shown(chromium) == count, which
    choose(chromium, "which", "all")
    choose(chromium, "text", "thing 11")
    assert shown(chromium) == sum("thing 11" in q.text for q in asked(120, ["x"]))


def test_keys_move_and_open_an_answer_of_all_methods(chromium, page):
    chromium.open(page)
    chromium.run("document.getElementById('list').focus()")
    for _ in range(3):
        chromium.key("\ue015")
    assert chromium.run("return document.querySelector('.row[aria-selected=true]').id") == "row-2"
    chromium.key("\ue007")
    opened = chromium.run("const d = document.getElementById('one'); return [d.open, d.querySelectorAll('dt').length]")
    assert opened == [True, 3]
    assert "thing 2 " in chromium.run("return document.querySelector('#one h3').textContent")
    chromium.key("\ue00c")
    assert chromium.run("return document.getElementById('one').open") is False
    chromium.key("\ue010")
    assert chromium.run("return document.querySelector('.row[aria-selected=true]').id") == "row-119"


def test_hallucinated_words_are_marked(chromium, tmp_path):
    scene = lvlm_decode_data.load_scenes()[0]
    absent = next(name for name in ("dog", "pizza", "boat") if name not in scene.categories)
    question = Question(scene.image_id, "Describe.", str(scene.image_id), sorted(scene.categories))
    run = made_run(tmp_path, [question], {"plain": [f"There is a {absent} here."]}, "captions", evaluator="chair")
    path = tmp_path / "report.html"
    path.write_text(page_of(run)[0])
    chromium.open(path)
    assert chromium.run("return [...document.querySelectorAll('.row mark')].map((m) => m.textContent)")[:1] == [absent]


def test_ten_thousand_rows_stay_fluid(chromium, tmp_path, scenes):
    count = 10_000
    run = made_run(tmp_path, asked(count, scenes), {"plain": said(count, 3), "vcd": said(count, 5)})
    path = tmp_path / "report.html"
    path.write_text(page_of(run, replicates=200)[0])
    chromium.open(path)
    assert shown(chromium) == count
    # Few rows are in the document wherever one looks, and those are the right ones.
    for place in (0, 5_000, count - 1):
        chromium.run("const l = document.getElementById('list'); l.scrollTop = arguments[0] * 112", place)
        chromium.run("return new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)))")
        seen = chromium.run("return [...document.querySelectorAll('.row')].map((r) => Number(r.id.slice(4)))")
        assert place in seen and len(seen) < 40
    choose(chromium, "which", "lost")
    assert shown(chromium) == sum(i % 5 == 0 and i % 3 != 0 for i in range(count))

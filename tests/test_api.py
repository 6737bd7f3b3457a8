"""Evaluations from Python: the same numbers as the command line, as objects that a notebook shows."""

import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from runs import as_file, cli, questions_about, write

from lvlm_decode.errors import EvalError, LvlmDecodeError, SettingsError, UnknownNameError
from lvlm_decode_evals import evaluate, read_run, score
from lvlm_decode_evals.base import Answer, Question
from lvlm_decode_evals.pope import Pope
from lvlm_decode_evals.tables import Block, html


@pytest.fixture(scope="module")
def found(loaded):
    return evaluate(
        loaded.model, loaded.processor, "pope", methods=["vcd"], splits=["random"], limit=18, batch_size=9, quiet=True
    )


def test_rates_intervals_and_rows_of_every_line(found):
    assert list(found.rates) == [
        "plain, greedy, random", "plain, sample, random", "mask, sample, random", "vcd, sample, random"]  # fmt: skip
    rates, bounds = found.rates["vcd, sample, random"], found.intervals["vcd, sample, random"]
    assert 0 <= bounds["accuracy"].low <= rates["accuracy"] == bounds["accuracy"].value <= bounds["accuracy"].high <= 1
    ours = [row for row in found.rows if row["method"] == "vcd"]
    assert len(ours) == 18 and {"answer", "parsed", "correct", "seed", "split"} <= set(ours[0])
    assert rates["accuracy"] == sum(row["correct"] for row in ours) / 18 and found.problems == []


@pytest.mark.full
def test_the_command_line_prints_the_same_numbers(found, model_folder, tmp_path):
    done = cli("eval", "pope", "--model", model_folder, "--method", "vcd", "--split", "random", "--limit", "18",
               "--batch-size", "9", "--out", tmp_path)  # fmt: skip
    assert done.exit_code == 0 and str(found).strip() == done.stdout.strip()
    assert read_run(tmp_path).rates == found.rates
    assert str(read_run(tmp_path)) == cli("table", tmp_path).stdout


def test_with_a_folder_a_run_goes_on_where_it_was(loaded, tmp_path):
    how = {"methods": ["plain"], "splits": ["random"], "quiet": True, "out": tmp_path}
    evaluate(loaded.model, loaded.processor, "pope", limit=6, **how)
    before = next(tmp_path.rglob("answers.jsonl")).read_bytes()
    evaluate(loaded.model, loaded.processor, Pope(), limit=12, **how)
    after = next(tmp_path.rglob("answers.jsonl")).read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 12


def test_questions_may_be_objects(loaded, tmp_path):
    from PIL import Image

    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    asked = [Question(i, f"Is there a {name} in the image?", "a.png", "no") for i, name in enumerate(("dog", "cat"))]
    how = {"questions": asked, "images": tmp_path, "without": ["plain greedy", "plain sample", "mask"], "quiet": True}
    found = evaluate(loaded.model, loaded.processor, "pope", methods=["vcd"], **how)
    assert list(found.rates) == ["vcd, sample, questions"] and len(found.rows) == 2
    with pytest.raises(SettingsError, match="give the folder that holds them"):
        evaluate(loaded.model, loaded.processor, "pope", questions=asked)


def test_a_data_frame_has_a_line_for_each_method(found):
    import pandas

    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and list(frame["method"]) == ["plain", "plain", "mask", "vcd"]
    last = frame.iloc[-1]
    assert last["accuracy_low"] <= last["accuracy"] <= last["accuracy_high"]
    assert last["accuracy"] == found.rates["vcd, sample, random"]["accuracy"]


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_notebook_shows_the_tables(found):
    shown = Cells(found._repr_html_())
    assert not shown.open and "pope, random: method minus control" in shown.text and "95% bootstrap" in shown.text
    assert "&lt;b&gt;" in html([Block("<b>", ("a",), (("x",),))])


# --- scoring


def test_a_file_objects_and_records_score_the_same(tmp_path):
    asked = questions_about()
    answers = [Answer.to(question, "Yes") for question in asked]
    path = write(tmp_path / "a.jsonl", [answer.record() for answer in answers])
    scores = [score("pope", given) for given in (path, answers, [answer.record() for answer in answers])]
    assert [s.rates for s in scores] == [scores[0].rates] * 3 and scores[0].rates["accuracy"] == 0.5
    assert len(scores[0].rows) == 6 and scores[0].intervals["accuracy"].low < 0.5
    assert json.loads(cli("score", "pope", path, "--json").stdout) == scores[0].report
    assert "Accuracy" in str(scores[0]) and not Cells(scores[0]._repr_html_()).open


def test_captions_may_be_records_in_any_form_of_the_benchmark(tmp_path):
    objects = tmp_path / "o.json"
    objects.write_text('{"1": ["dog"]}')
    found = score("chair", [{"image_id": 1, "caption": "A dog and a cat."}], objects=str(objects))
    assert found.rates["chair_s"] == 1.0 and found.rows[0]["evidence"]["hallucinated"] == ["cat"]


def test_questions_decide_and_trouble_is_told(tmp_path):
    asked = questions_about()
    answers = [Answer(question.id, "Yes", label="yes") for question in asked[:4]]
    for questions in (asked, as_file(tmp_path / "q.json", asked)):
        found = score("pope", answers, questions)
        assert found.rates["accuracy"] == 0.5 and found.audit.missing == ("4", "5")
        assert len(found.problems) == 2 and "another label than their question" in found.problems[1]


def test_wrong_arguments_are_one_sentence():
    with pytest.raises(UnknownNameError, match="option of pope 'ruel' is unknown"):
        score("pope", [], ruel="vcd")
    with pytest.raises(EvalError, match="the answers, line 1: field 'answer'") as refused:
        score("pope", [{"question_id": 1}])
    assert "/tmp" not in str(refused.value)
    with pytest.raises(EvalError, match="has no answer that can be scored"):
        score("pope", [Answer(1, "", error="missing")])


def test_scoring_imports_no_torch():
    code = "import sys; from lvlm_decode_evals import score, read_run, Evaluation; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        (None, "answers is None; give a file's path, or a list of Answer objects"),
        (5, "answers is 5"),
        ({"1": "Yes"}, "answers is {'1': 'Yes'}"),
        (["Yes", "No"], r"or of records \(dicts\) of one form; a data frame has them as"),
        ([Answer(1, "Yes"), {"question_id": 2, "answer": "No"}], "a list of Answer objects or of records"),
        ([Answer(1, None)], "answer 1 is None; expected text"),
        ([{"question_id": 1, "answer": {"Yes"}}], "the records of the answers are no JSON"),
        ([{"question_id": 1, "answer": float("nan")}], "broken JSON"),
        ([], "the list of answers has no answer that can be scored"),
    ],
)
def test_answers_of_another_kind_are_refused_in_one_sentence(answers, sentence):
    with pytest.raises(LvlmDecodeError, match=sentence):
        score("pope", answers)
    with pytest.raises(LvlmDecodeError, match=r"questions is .*list of Question objects"):
        score("pope", [Answer(1, "Yes")], [{"id": 1}])

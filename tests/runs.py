"""What the tests of the evaluation share: the command line, runs with and without a model, question files, results."""

import json
import random
import sys
from pathlib import Path

from typer.testing import CliRunner

from lvlm_decode_evals import commands, evaluator
from lvlm_decode_evals.answers import Audit, append_answers
from lvlm_decode_evals.base import Answer, Question
from lvlm_decode_evals.plan import (
    GREEDY,
    Cell,
    Decoding,
    Result,
    Settings,
    claim,
    found_cells,
    read_cell,
    write_questions,
)
from lvlm_decode_evals.runner import EvaluationRun, Options

SAMPLE = Decoding(do_sample=True)
METHODS = [("vcd", SAMPLE)]
BATCH = 4
RIGHT = {("plain", GREEDY): 0.9, ("plain", SAMPLE): 0.7, ("mask", SAMPLE): 0.8, ("vcd", SAMPLE): 0.8}
WORDS = ("dog", "cat", "car", "bus", "cup", "pen")
#: Images of the results that ``pope``, ``naturalbench`` and ``captions`` make.
IMAGES = 40


# --- the command line


def cli(*arguments):
    """The result of the evaluation's commands, run in this process as typer's own tests do."""
    app = commands.typer.Typer()
    commands.add_to(app)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def main(*arguments, capsys):
    """(exit status, stdout, stderr) of the entry point, which turns errors into sentences."""
    before, sys.argv = sys.argv, ["lvlm-decode", *map(str, arguments)]
    try:
        commands.main()
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    finally:
        sys.argv = before
    return status, *capsys.readouterr()


# --- files


def write(path, records, lines=True):
    """A file of records, one in a line or as one list."""
    path.write_text("".join(json.dumps(r) + "\n" for r in records) if lines else json.dumps(records))
    return path


def files_of(folder):
    """relative path -> content of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def questions_about(words=WORDS, image="im"):
    return [
        Question(i, f"Is there a {word} in the image?", f"{image}{i}.jpg", ("yes", "no")[i % 2])
        for i, word in enumerate(words)
    ]


def as_file(path, questions):
    return write(path, [{"question_id": q.id, "image": q.image, "text": q.text, "label": q.label} for q in questions])


# --- runs


def run_of(loaded, source, out, **how):
    """A run of POPE on the small model, not yet executed."""
    options = how.pop("options", Options(batch_size=BATCH))
    return EvaluationRun(
        evaluator("pope"), source, loaded, Path(out), how.pop("methods", METHODS), options=options, quiet=True, **how
    )


def cell_folder(out, method="vcd", decoding=SAMPLE, seed=0):
    return Cell("adversarial", method, decoding, seed).folder(out, "pope")


def make_run(out, pairs=RIGHT, split="random", questions=120, seeds=(0,), model="tiny-llava", skip=(), parameters=None):
    """A finished run without a model: answers that are right with the given probability."""
    asked = [Question(i, "Is there a dog?", f"im{i // 6}", ("yes", "no")[i % 2]) for i in range(questions)]
    for (method, decoding), right in pairs.items():
        for seed in seeds if decoding.do_sample else seeds[:1]:
            folder = Cell(split, method, decoding, seed).folder(out, "pope")
            decides = {
                "evaluator": "pope",
                "split": split,
                "method": {"name": method, "parameters": (parameters or {}).get(method, {})},
                "decoding": dict(
                    do_sample=decoding.do_sample, temperature=decoding.temperature, num_beams=decoding.num_beams
                ),
                "seed": seed,
                "model": {"name": model},
            }
            settings = Settings(decides, {})
            claim(folder, settings, asked)
            write_questions(folder.parents[2], asked)
            rng = random.Random(f"{method} {decoding.name} {seed}")
            answers = [
                Answer.to(q, (q.label if rng.random() < right else {"yes": "no", "no": "yes"}[q.label]).capitalize(), 2)
                for q in asked
                if q.id not in skip
            ]
            append_answers(folder / "answers.jsonl", (answer.sealed(settings.key) for answer in answers))
    return out


def results_of(out):
    return [read_cell(folder) for folder in found_cells(out)]


def one_cell(out):
    (folder,) = found_cells(make_run(out, {("vcd", SAMPLE): 0.8}))
    return folder


# --- results without files


def result(name, split, method, answers, decoding=GREEDY, folder="nowhere", parameters=None, **settings):
    scorer = evaluator(name)
    settings = {"model": {"name": "m"}, "method": {"name": method, "parameters": parameters or {}}, **settings}
    return Result(scorer, split, method, decoding, 0, scorer.rows(answers), Audit(), settings, folder)


def pope(method, right, **how):
    answers = [Answer(i, "Yes" if i < right else "No", image=str(i), label="yes") for i in range(IMAGES)]
    return result("pope", "random", method, answers, **how)


def naturalbench(method, groups, **how):
    """Of 40 groups so many whole; in the others everything is Yes."""
    answers = [
        Answer(4 * g + k, ("Yes", "No", "No", "Yes")[k] if g < groups else "Yes", meta={"type": "yes_no"}, image=str(g))
        for g in range(IMAGES) for k in range(4)
    ]  # fmt: skip
    return result("naturalbench", "all", method, answers, **how)


def captions(method, text, **how):
    answers = [Answer(i, text, image=str(i), label=["dog", "cat"]) for i in range(IMAGES)]
    return result("chair", "captions", method, answers, **how)

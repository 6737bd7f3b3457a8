"""DASH-B: is there a ... in images that were searched for because models see it there? (Augustin et al., 2025; arXiv
2503.23573)

    TNR = right answers about images without the object      TPR = right answers about images with it
    harmonic = 2 TNR TPR / (TNR + TPR)

There are as many images with an object as without it, so accuracy is the mean of TNR and TPR. An answer with neither
yes nor no in it is wrong. Always yes gives 50 % accuracy, TNR 0 and harmonic 0. File names are no identity: most
images with an object serve several objects, so a question is told by gold answer, source, object and file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lvlm_decode.errors import EvalError, FileFormatError
from lvlm_decode.reading import read_json, read_records

from . import parsers
from .base import Answer, Column, Evaluator, Question, Row, confusion, need, ratio, share

PROMPT = "Can you see a {} in this image? Please answer only with yes or no."


@dataclass(frozen=True)
class DashB(Evaluator):
    """DASH-B scores.

    Args:
        rule: Rule that reads yes or no, a name of `parsers.RULES`; "repope" is the authors'.
    """

    rule: str = "repope"

    name: ClassVar[str] = "dash-b"
    paper: ClassVar[str] = "DASH-B (arXiv 2503.23573)"
    max_new_tokens: ClassVar[int] = 16
    axes: ClassVar[tuple[str, str]] = ("tpr", "tnr")
    columns: ClassVar[tuple[Column, ...]] = (
        Column("harmonic", "Harmonic", better=+1, paired=True),
        Column("accuracy", "Accuracy", better=+1, paired=True),
        Column("tnr", "TNR", better=+1, paired=True, of=("negatives",)),
        Column("tpr", "TPR", better=+1, paired=True, of=("positives",)),
        Column("yes_ratio", "Yes-ratio"),
        Column("unparsed", "Unparsed", better=-1),
        Column("n", "n", "count"),
    )

    def __post_init__(self) -> None:
        parsers.rule(self.rule)

    def scene_questions(self, scenes: Sequence, seed: int = 0) -> dict[str, list[Question]]:
        """About the object one would expect most in a scene that lacks it, and as often about a scene that has it."""
        from lvlm_decode_data.texts import CoOccurrence

        prior = CoOccurrence(scenes)
        tempting: dict[str, list] = {}
        for scene in scenes:
            tempting.setdefault(prior.expected(scene)[0], []).append(scene)
        questions = []
        for name, without in tempting.items():
            having = [scene for scene in scenes if name in scene.categories]
            for pair in zip(without, having):
                for scene, label in zip(pair, ("no", "yes")):
                    questions.append(_question(label, scene.theme, name, str(scene.image_id), str(scene.image_id)))
        return {"all": questions}

    def file_questions(self, path: Path) -> dict[str, list[Question]]:
        """The authors' two lists, {source: {object: [file]}}: a folder that holds both, or one of them; or the hub's rows.

        With the lists, images lie as in the authors' archives: `neg/SOURCE/OBJECT/FILE` and `pos/...`. The hub's rows
        (YanNeu/DASH-B) have question_id, object, answer and image.
        """
        path = Path(path)
        files = sorted(path.glob("dash_benchmark_*.json*")) if path.is_dir() else [path]
        sides = {side: file for file in files for side in ("neg", "pos") if f"_{side}." in file.name}
        if not sides and path.is_file() and "object" in (rows := read_records(path))[0][1]:
            return {"all": [_of_row(record, where) for where, record in rows]}
        if not sides:
            raise FileFormatError(f"{path}: expected dash_benchmark_neg.json and dash_benchmark_pos.json.")
        questions = []
        for side, file in sorted(sides.items()):
            listed = read_json(file)
            if not isinstance(listed, dict):
                raise FileFormatError(f"{file}: expected an object of source to object to list of files.")
            for source, objects in listed.items():
                if not isinstance(objects, dict) or not all(isinstance(names, list) for names in objects.values()):
                    raise FileFormatError(f"{file}: source {source!r} must map objects to lists of files.")
                for name, images in objects.items():
                    label = {"neg": "no", "pos": "yes"}[side]
                    questions += [
                        _question(label, source, name, str(image), f"{side}/{source}/{name}/{image}")
                        for image in images
                    ]
        return {"all": questions}

    def read_answers(self, path: Path) -> list[Answer]:
        """JSON lines of answers, or the authors' array of `img_id`, `object_name`, `gt`, `response`.

        The authors' recorded answers are scored by their own `gt`: most of their images are not on the released list.
        """
        records = read_records(path)
        if "object_name" not in records[0][1]:
            return super().read_answers(path)
        answers = []
        for where, record in records:
            label = str(need(record, "gt", where)).lower()
            if label not in ("yes", "no"):
                raise FileFormatError(f"{where}: field 'gt' must be yes or no, found {record['gt']!r}.")
            name, image = str(need(record, "object_name", where)), str(need(record, "img_id", where))
            question = _question(label, "", name, image, image)
            answers.append(Answer.to(question, str(need(record, "response", where) or "")))
        return answers

    def row(self, answer: Answer) -> Row:
        label = str(answer.label).lower()
        if label not in ("yes", "no"):
            raise EvalError(
                f"question {answer.question_id}: the gold answer must be yes or no, found {answer.label!r}; give "
                "--questions FILE."
            )
        name = answer.meta.get("object") or _object_in(answer.text)
        return parsers.row_of(answer, label, self.rule, object=name)

    def tally(self, rows: Sequence[Row]) -> dict[str, int]:
        return {
            "n": len(rows),
            "positives": sum(row.label == "yes" for row in rows),
            "negatives": sum(row.label == "no" for row in rows),
            "unclear": sum(not row.clear for row in rows),
            **confusion(rows),
        }

    def rates(self, totals: Mapping[str, Any]) -> dict[str, Any]:
        sides = share("tnr", totals["tn"], totals["negatives"]) | share("tpr", totals["tp"], totals["positives"])
        if len(sides) == 2:
            tnr, tpr = sides["tnr"], sides["tpr"]
            sides = {"harmonic": ratio(2 * tnr * tpr, tnr + tpr), **sides}
        return {
            **sides,
            "accuracy": ratio(totals["tp"] + totals["tn"], totals["n"]),
            "yes_ratio": ratio(totals["tp"] + totals["fp"], totals["n"]),
            "unparsed": ratio(totals["unclear"], totals["n"]),
        }

    def report(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The summary, and right / asked on both sides of every object."""
        objects: dict[str, dict[str, list[int]]] = {}
        for row in rows:
            sides = objects.setdefault(str(row.evidence["object"]), {"no": [0, 0], "yes": [0, 0]})
            sides[row.label][0] += bool(row.correct)
            sides[row.label][1] += 1
        return self.summary(rows) | {"objects": objects}


def _of_row(record: Mapping[str, Any], where: str) -> Question:
    label = str(record["label"] if "label" in record else need(record, "answer", where)).lower()
    if label not in ("yes", "no"):
        raise FileFormatError(f"{where}: field 'answer' must be yes or no, found {label!r}.")
    name, identity = str(record["object"]), need(record, "question_id", where)
    return Question(identity, PROMPT.format(name), str(need(record, "image", where)), label, meta={"object": name})


def _question(label: str, source: str, name: str, file: str, image: str) -> Question:
    identity = "/".join(part for part in (label, source, name, file) if part)
    meta = {"object": name} | ({"source": source} if source else {})
    return Question(identity, PROMPT.format(name), image, label, meta=meta)


def _object_in(text: str) -> str | None:
    found = re.match(r"Can you see an? (.*) in this image\?", text)
    return found[1] if found else None

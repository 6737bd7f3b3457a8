"""Answers in the forms that the authors' own scripts write; every other form is refused with those that are accepted."""

import json

import pytest
from conftest import shared_path
from runs import main, write

from lvlm_decode.errors import EvalError, FileFormatError
from lvlm_decode_evals import evaluator
from lvlm_decode_evals.joins import join

QUESTIONS = [
    {
        "question_id": 1,
        "image": "COCO_val2014_000000000001.jpg",
        "text": "Is there a dog in the image?",
        "label": "yes",
    },
    {"question_id": 2, "image": "COCO_val2014_000000000001.jpg", "text": "Is there a cat in the image?", "label": "no"},
    {"question_id": 3, "image": "COCO_val2014_000000000002.jpg", "text": "Is there a car in the image?", "label": "no"},
]
TEXTS = [question["text"] for question in QUESTIONS]
SAID = ["Yes", "No", "Yes"]


def scored(benchmark, answers, questions=None, **options):
    """Rows of a file of answers, joined with a question file as `lvlm-decode score` does it."""
    chosen = evaluator(benchmark, **options)
    found = chosen.read_answers(answers)
    if questions is not None:
        asked = [question for split in chosen.file_questions(questions).values() for question in split]
        found, contradicted = join(chosen.matched(found, asked, str(answers)), asked, str(answers))
        assert not contradicted
    return chosen.rows(found)


POPE_FORMS = {
    "ours": [{"question_id": i, "answer": a} for i, a in enumerate(SAID, 1)],
    "llava": [
        {"question_id": i, "prompt": t, "text": a, "answer_id": "x", "model_id": "m", "metadata": {}}
        for i, (t, a) in enumerate(zip(TEXTS, SAID), 1)
    ],
    "vcd": [
        {"question_id": i, "prompt": f"{t} Please answer this question with one word.", "text": a, "image": q["image"]}
        for i, (t, a, q) in enumerate(zip(TEXTS, SAID, QUESTIONS), 1)
    ],
    "damro": [
        {"question_id": i, "prompt": t, "output": a, "model_id": "m"} for i, (t, a) in enumerate(zip(TEXTS, SAID), 1)
    ],
    "popes own": [{"question": t.lower(), "answer": a} for t, a in zip(TEXTS, SAID)],
    "pai": [
        {"query": t, "label": n, "ans": a, "question": f"USER: {t}", "file_path": "f"}
        for t, n, a in zip(TEXTS, (1, 0, 0), SAID)
    ],
    "vista": [{"query": t, "label": n, "ans": a, "question": t} for t, n, a in zip(TEXTS, ("yes", "No", "no"), SAID)],
}


@pytest.mark.parametrize("form", POPE_FORMS)
def test_pope_answers_of_every_form(tmp_path, form):
    questions = write(tmp_path / "q.json", QUESTIONS)
    rows = scored("pope", write(tmp_path / "a.jsonl", POPE_FORMS[form]), questions)
    assert [row.correct for row in rows] == [True, True, False]
    assert [row.id for row in rows] == ["1", "2", "3"]


@pytest.mark.parametrize("form", ["pai", "vista"])
def test_pope_answers_that_carry_their_labels(tmp_path, form):
    rows = scored("pope", write(tmp_path / "a.jsonl", POPE_FORMS[form]))
    assert [(row.correct, row.label) for row in rows] == [(True, "yes"), (True, "no"), (False, "no")]


def test_repopes_nested_answers(tmp_path):
    nested = {
        str(i): {
            "question_id": i,
            "text": t,
            "label": q["label"],
            "dataset": "coco",
            "response": a,
            "answer": a.lower(),
        }
        for i, (t, q, a) in enumerate(zip(TEXTS, QUESTIONS, SAID), 1)
    }
    path = write(tmp_path / "a.json", {"random": nested}, lines=False)
    assert [row.correct for row in scored("pope", path)] == [True, True, False]
    assert [row.id for row in scored("pope", path, write(tmp_path / "q.json", QUESTIONS))] == ["1", "2", "3"]
    path.write_text(json.dumps({"random": nested, "popular": nested}, indent=1))
    assert len({row.id for row in scored("pope", path)}) == 6
    path.write_text(json.dumps({"random": nested | {"2": nested["2"] | {"question_id": 3}}}))
    with pytest.raises(FileFormatError, match="field 'random', field '2' is about question 3"):
        scored("pope", path)
    del nested["2"]["response"]
    path.write_text(json.dumps({"random": nested}))
    with pytest.raises(FileFormatError, match="field 'random', field '2' has no field 'response'"):
        scored("pope", path)


@pytest.mark.parametrize("form", ["popes own", "pai"])
def test_answers_without_ids_are_refused_where_they_do_not_belong(tmp_path, form):
    lines = POPE_FORMS[form]
    with pytest.raises(EvalError, match="2 answers without ids and 3 questions"):
        scored("pope", write(tmp_path / "a.jsonl", lines[:2]), write(tmp_path / "q.json", QUESTIONS))
    swapped = [lines[1], lines[0], lines[2]]
    with pytest.raises(EvalError, match=r"answer 1: .* was answered, and question 1 in the same place asks"):
        scored("pope", write(tmp_path / "a.jsonl", swapped), write(tmp_path / "q.json", QUESTIONS))


def test_popes_own_answers_need_their_questions(tmp_path):
    with pytest.raises(FileFormatError, match=r"has no label; .* give --questions FILE"):
        scored("pope", write(tmp_path / "a.jsonl", POPE_FORMS["popes own"]))


MME_TASKS = {
    "existence/a1.jpg": ("Is there a dog in this image?", "Is there a cat in this image?"),
    "posters/images/b2.png": ("Is this movie titled x?", "Is this movie titled y?"),
}
MME_QUESTIONS = [
    {"question_id": name, "image": name, "text": f"{text} Please answer yes or no.", "category": name.split("/")[0]}
    for name, texts in MME_TASKS.items()
    for text in texts
]
# Right, right; right, wrong.
MME_SAID = ["Yes", "No", "yes", "Yes."]


def mme_lines(suffix="", **names):
    asked = [(q["question_id"], q["text"]) for q in MME_QUESTIONS]
    return [
        {"question_id": name, "prompt": text + suffix, "text": said, "answer_id": "x", **names}
        for (name, text), said in zip(asked, MME_SAID)
    ]


@pytest.mark.parametrize("order", ["as asked", "turned round", "folder of questions"])
def test_mme_answers_share_an_id_and_meet_by_text(tmp_path, order):
    questions = write(tmp_path / "q.jsonl", MME_QUESTIONS)
    lines = mme_lines("\nAnswer the question using a single word or phrase.")
    if order == "turned round":
        lines = lines[::-1]
    if order == "folder of questions":
        questions = tmp_path / "tasks"
        questions.mkdir()
        for name, texts in MME_TASKS.items():
            task, file = name.split("/")[0], name.rsplit("/", 1)[-1]
            (questions / f"{task}.txt").write_text(
                "".join(
                    f"{file}\t{text}  Please answer yes or no.\t{gold}\n" for text, gold in zip(texts, ("Yes", "No"))
                )
            )
    rows = scored("mme", write(tmp_path / "a.jsonl", lines), questions)
    chosen = evaluator("mme")
    summary = chosen.summary(rows)
    assert len(rows) == 4 and summary["existence"] == 200 and summary["posters"] == 50
    assert summary["posters.images"] == summary["existence.images"] == 1


def test_mme_answers_without_a_prompt_meet_by_their_order(tmp_path):
    lines = [{"question_id": line["question_id"], "text": line["text"]} for line in mme_lines()]
    rows = scored("mme", write(tmp_path / "a.jsonl", lines), write(tmp_path / "q.jsonl", MME_QUESTIONS))
    assert [row.correct for row in rows] == [True, True, True, False]


def test_mme_answers_that_carry_the_gold_answer(tmp_path):
    lines = [
        {
            "question_id": q["question_id"],
            "gt_answer": gold,
            "category": q["category"],
            "prompt": q["text"],
            "output": said,
        }
        for q, gold, said in zip(MME_QUESTIONS, ("Yes", "No", "Yes", "No"), MME_SAID)
    ]
    rows = scored("mme", write(tmp_path / "a.jsonl", lines))
    assert evaluator("mme").summary(rows)["posters"] == 50


def test_mme_answers_to_other_questions_are_refused(tmp_path):
    questions = write(tmp_path / "q.jsonl", MME_QUESTIONS)
    other = [*mme_lines()[:3], {"question_id": "existence/a1.jpg", "prompt": "Is there a cow?", "text": "No"}]
    with pytest.raises(EvalError, match=r"answer 4: existence/a1\.jpg was asked 'Is there a cow\?'"):
        scored("mme", write(tmp_path / "a.jsonl", other), questions)
    with pytest.raises(EvalError, match="the questions ask nothing about it"):
        scored("mme", write(tmp_path / "a.jsonl", mme_lines()), write(tmp_path / "q.jsonl", MME_QUESTIONS[:2]))
    with pytest.raises(EvalError, match="give --questions FILE"):
        scored("mme", write(tmp_path / "a.jsonl", mme_lines()))


CAPTION = "A dog sits on a sofa."
CHAIR_FORMS = {
    "opera": [{"image_id": 42, "caption": CAPTION}],
    "ours": [{"question_id": "42", "answer": CAPTION}],
    "deco": [{"id": 42, "response": CAPTION}],
    "llava on a list": [
        {"question_id": 0, "image": "COCO_val2014_000000000042.jpg", "prompt": "Please describe.", "text": CAPTION}
    ],
    "marine": [
        {"question_id": 0, "image_id": "COCO_val2014_000000000042.jpg", "prompt": "Please describe.", "text": CAPTION}
    ],
}


@pytest.fixture
def truth(tmp_path):
    (tmp_path / "words.txt").write_text("dog, puppy\ncouch, sofa\n")
    (tmp_path / "objects.json").write_text('{"42": ["dog"]}')
    return {"vocabulary": str(tmp_path / "words.txt"), "objects": str(tmp_path / "objects.json")}


@pytest.mark.parametrize(
    "form", [*CHAIR_FORMS, "mapping", "mapping over lines", "mapping of files", "chair.json", "array"]
)
def test_captions_of_every_form(tmp_path, truth, form):
    path = tmp_path / "c.json"
    scores = {"overall": {"CHAIRs": 1.0}, "imgToEval": {"42": {"image_id": 42, "caption": CAPTION, "metrics": {}}}}
    whole = {
        "mapping": json.dumps({"42": CAPTION}),
        "mapping over lines": json.dumps({"42": CAPTION}, indent=1),
        "mapping of files": json.dumps({"COCO_val2014_000000000042.jpg": CAPTION}),
        "chair.json": json.dumps(scores),
        "array": json.dumps(CHAIR_FORMS["opera"]),
    }
    if form in whole:
        path.write_text(whole[form])
    else:
        write(path, CHAIR_FORMS[form])
    (row,) = scored("chair", path, **truth)
    assert row.id == "42" and row.evidence["hallucinated"] == ["couch"] and row.evidence["recalled"] == ["dog"]


def test_two_captions_of_an_image_are_chosen_by_name(tmp_path, truth):
    path = write(tmp_path / "c.jsonl", [{"image_id": 42, "caption_64": "A dog.", "caption_512": CAPTION}])
    with pytest.raises(FileFormatError, match=r"2 captions of an image .*-o caption_key=caption_64"):
        scored("chair", path, **truth)
    for name, invented in (("caption_64", []), ("caption_512", ["couch"])):
        (row,) = scored("chair", path, caption_key=name, **truth)
        assert row.evidence["hallucinated"] == invented
    path = write(tmp_path / "d.jsonl", [{"pic": "000000000042.jpg", "said": CAPTION}])
    (row,) = scored("chair", path, image_id_key="pic", caption_key="said", **truth)
    assert row.id == "42"
    with pytest.raises(
        FileFormatError, match="line 1: field 'words', given as caption_key, is missing; found pic, said"
    ):
        scored("chair", path, image_id_key="pic", caption_key="words", **truth)


def test_labels_are_lists_of_known_objects(tmp_path):
    path = tmp_path / "c.jsonl"
    for label, sentence in (
        ('"dog"', r"c\.jsonl, line 1: field 'label' must be a list, found 'dog'"),
        ('["dog", ["cat"]]', r"c\.jsonl, line 1: field 'label', entry 2 must be text"),
        ('["dgo"]', r"c\.jsonl, image 7, field 'label' has object 'dgo'.*the nearest is 'dog'"),
    ):
        path.write_text(f'{{"image_id": 7, "caption": "A dog.", "label": {label}}}\n')
        with pytest.raises(FileFormatError, match=sentence):
            scored("chair", path)
    path.write_text('{"image_id": 7, "caption": "A dog.", "label": ["dog"]}\n')
    assert scored("chair", path)[0].correct


def test_a_chair_file_whose_keys_are_other_images_is_refused(tmp_path, truth):
    path = write(tmp_path / "c.json", {"imgToEval": {"0": {"image_id": 42, "caption": CAPTION}}}, lines=False)
    with pytest.raises(
        FileFormatError, match="field 'imgToEval', field '0' is about image 42; the two must be the same"
    ):
        scored("chair", path, **truth)


def test_a_caption_of_two_images_is_refused(tmp_path, truth):
    """The id may be the place in a list, and then the objects of another image would be its truth."""
    (tmp_path / "objects.json").write_text('{"42": ["dog"], "99": ["couch"]}')
    path = write(
        tmp_path / "c.jsonl", [{"question_id": 42, "image": "COCO_val2014_000000000099.jpg", "answer": CAPTION}]
    )
    with pytest.raises(
        EvalError, match=r"caption 42 is about image COCO_val2014_000000000099\.jpg, and --objects has both"
    ):
        scored("chair", path, **truth)
    write(path, [{"question_id": 7, "image": "COCO_val2014_000000000099.jpg", "answer": CAPTION}])
    assert scored("chair", path, **truth)[0].evidence["truth"] == ["couch"]


@pytest.mark.parametrize("name", ["prediction", "response", "output", "model_answer", "pred", "generated_text"])
def test_a_gold_answer_is_never_taken_for_the_models(tmp_path, name):
    """Some scripts call the gold answer `answer`: scored, it would be right everywhere."""
    lines = [
        {"question_id": i, "answer": q["label"], name: "No", "label": q["label"]} for i, q in enumerate(QUESTIONS, 1)
    ]
    unnumbered = [{"question": q["text"], "answer": q["label"], name: "No"} for q in QUESTIONS]
    for records in (lines, unnumbered):
        with pytest.raises(FileFormatError, match=f"line 1: field 'answer' and field '{name}' are both there"):
            scored("pope", write(tmp_path / "a.jsonl", records), write(tmp_path / "q.json", QUESTIONS))
    lines = [{"question_id": i, name: "No"} for i in (1, 2, 3)]
    if name == "prediction":
        path = write(tmp_path / "a.jsonl", [line | {"answer": None} for line in lines])
        with pytest.raises(FileFormatError, match="both there"):
            scored("pope", path, write(tmp_path / "q.json", QUESTIONS))
        assert len(scored("pope", write(tmp_path / "a.jsonl", lines), tmp_path / "q.json")) == 3


@pytest.mark.parametrize("name", ["output", "response", "pred"])
def test_llavas_text_beside_other_words_of_the_model_is_refused(tmp_path, name):
    lines = [{"question_id": i, "prompt": t, "text": "Yes", name: "No", "label": "yes"} for i, t in enumerate(TEXTS)]
    with pytest.raises(FileFormatError, match=f"line 1: field 'text' and field '{name}' are both there"):
        scored("pope", write(tmp_path / "a.jsonl", lines))


def test_a_line_that_says_two_things_were_asked_is_refused(tmp_path):
    """LLaVA's own `text` is the answer, and a gold answer beside it makes it look like a question."""
    lines = [
        {"question_id": i, "prompt": t, "text": "No", "answer": "yes", "label": "yes"} for i, t in enumerate(TEXTS)
    ]
    with pytest.raises(
        FileFormatError, match=r"two fields say different things about what was asked \('No', 'Is there"
    ):
        scored("pope", write(tmp_path / "a.jsonl", lines))
    lines = [{"question_id": i, "prompt": f"USER: {t} ASSISTANT:", "text": t, "answer": "No", "label": "no"}
             for i, t in enumerate(TEXTS)]  # fmt: skip
    assert all(row.correct for row in scored("pope", write(tmp_path / "a.jsonl", lines)))


@pytest.mark.parametrize(
    "field", [{"prompt": "Is there a cow in the image?"}, {"question": "Is there a cow?"}, {"image_id": 9}, {"image": "9.jpg"},
              {"image_source": "COCO_val2014_000000000009"}])  # fmt: skip
def test_whatever_a_line_calls_them_its_question_and_image_are_compared(tmp_path, field):
    lines = [{"question_id": i, "answer": "No", **field} for i in (1, 2, 3)]
    with pytest.raises(EvalError, match="3 of 3 answers are about something else"):
        scored("pope", write(tmp_path / "a.jsonl", lines), write(tmp_path / "q.json", QUESTIONS))


def test_hallusionbench_answers_without_gold_meet_their_questions(tmp_path):
    place = {"category": "VD", "subcategory": "chart", "set_id": "0", "visual_input": "1", "question_id": "0"}
    asked = [
        place | {"figure_id": str(f), "question": "Is it?", "gt_answer": g, "filename": "a.png"}
        for f, g in ((0, "1"), (1, "0"))
    ]
    questions = write(tmp_path / "q.json", asked, lines=False)
    said = [{k: v for k, v in q.items() if k not in ("gt_answer", "filename")} for q in asked]
    for first, second in (("Yes.", "Yes."), (1, 1), ("1", "1")):
        answers = write(
            tmp_path / "a.json",
            [said[0] | {"model_prediction": first}, said[1] | {"model_prediction": second}],
            lines=False,
        )
        assert [row.correct for row in scored("hallusionbench", answers, questions)] == [True, False]
    (row, _) = scored(
        "hallusionbench",
        write(tmp_path / "a.json", [s | {"model_prediction": "2"} for s in said], lines=False),
        questions,
    )
    assert row.parsed == "other"
    with pytest.raises(EvalError, match="give --questions FILE"):
        scored("hallusionbench", answers)
    for name, value in (("category", "VX"), ("visual_input", "3"), ("visual_input", 7)):
        write(answers, [s | {"model_prediction": "Yes", name: value} for s in said], lines=False)
        with pytest.raises(FileFormatError, match=f"entry 1: field '{name}' must be one of"):
            scored("hallusionbench", answers, questions)
    for wrong in ((1, 7), (7, 1), ("1", "7"), (-1, 1), ("0", "3"), ("Yes.", 7), (1, "+1")):
        write(answers, [s | {"model_prediction": w} for s, w in zip(said, wrong)], lines=False)
        with pytest.raises(
            FileFormatError, match=r"entry \d: field 'model_prediction' is .*expected 0 \(no\), 1 \(yes\)"
        ):
            scored("hallusionbench", answers, questions)
    # A model may well answer with a number; beside answers in words it is one.
    write(answers, [s | {"model_prediction": w} for s, w in zip(said, ("Yes.", "7"))], lines=False)
    assert [row.parsed for row in scored("hallusionbench", answers, questions)] == ["yes", "other"]


@pytest.mark.parametrize(
    ("benchmark", "line"),
    [
        ("pope", {"id": 1, "verdict": "Yes"}),
        ("mme", {"image": "a.jpg", "yes": True}),
        ("chair", {"picture": 1, "words": "a dog"}),
        ("hallusionbench", {"question": "Is it?", "said": "Yes"}),
        ("vallu", {"question_id": 1, "said": "Yes"}),
        ("mmhal", {"question": "Is it?", "said": "Yes"}),
        ("amber", {"id": 1, "said": "Yes"}),
    ],
)
def test_any_other_form_is_refused_with_the_accepted_ones(tmp_path, capsys, benchmark, line):
    path = write(tmp_path / "a.jsonl", [line])
    status, out, err = main("score", benchmark, path, capsys=capsys)
    assert status == 1 and not out and "Traceback" not in err
    assert "a.jsonl, line 1: field" in err and "Accepted, each with an example line" in err
    # The example of this project's own form is one that it reads.
    assert '{"question_id": 1, "answer": "Yes"}' in err


def test_the_recorded_cases(capsys):
    mme = shared_path("cases/10-mme-llava-jsonl")
    status, out, err = main(
        "score", "mme", mme / "answers.jsonl", "--questions", mme / "questions.jsonl", capsys=capsys
    )
    assert status == 0 and "Existence 200.0" in out and not err
    status, out, err = main("score", "mme", mme / "answers.jsonl", capsys=capsys)
    assert status == 1 and "give --questions FILE" in err
    pope = shared_path("cases/11-pope-own-answer-format")
    status, out, err = main(
        "score", "pope", pope / "answers.jsonl", "--questions", pope / "labels.jsonl", capsys=capsys
    )
    assert status == 0 and "Accuracy 100.0%" in out and not err

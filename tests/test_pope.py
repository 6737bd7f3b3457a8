"""POPE: builder against the released questions, every parsing rule against recorded answers, loaders of every form."""

import gzip
import json
import subprocess
import sys
from collections import Counter

import pytest
from conftest import shared_path
from hypothesis import given
from hypothesis import strategies as st
from runs import cli

from lvlm_decode.errors import EvalError, FileFormatError, UnknownNameError
from lvlm_decode.reading import read_records
from lvlm_decode_evals import evaluator
from lvlm_decode_evals.answers import audit, read_answers
from lvlm_decode_evals.base import Answer, Question
from lvlm_decode_evals.parsers import RULES
from lvlm_decode_evals.pope import (
    STRATEGIES,
    Pope,
    build_questions,
    object_cooccurrence,
    object_frequency,
    question_text,
)

# Names of the rules in the recorded cases.
RECORDED = {
    "pope_official": "pope-official",
    "opera_recorder": "opera",
    "lmms_eval_pope": "lmms-eval",
    "vlmevalkit": "vlmevalkit",
    "icd_p1k0pan": "icd",
    "code_lowercase": "code",
    "mme_official": "mme",
    "lmms_eval_mme": "lmms-eval-mme",
}
SCENES = [(i, objects.split()) for i, objects in enumerate(["a b c d", "b a c", "d c b e", "a e b", "f g"])]


@pytest.fixture(scope="module")
def generator_case():
    with gzip.open(shared_path("data/pope/generator_case.json.gz")) as file:
        return json.load(file)


def image_number(name):
    return str(int(name.removesuffix(".jpg")[-12:]))


# --- the builder


def test_frequency_and_cooccurrence_break_ties_by_first_appearance():
    usable = SCENES[:4]
    assert object_frequency(usable) == {"a": 3, "b": 4, "c": 3, "d": 2, "e": 2}
    assert list(object_frequency(usable)) == ["a", "b", "c", "d", "e"]
    assert object_cooccurrence(usable)["d"] == ["b", "c", "a", "e"]


def test_an_object_listed_twice_in_an_image_counts_once():
    assert object_frequency([(1, ["a", "b", "a"])]) == {"a": 1, "b": 1}


def test_builder_alternates_asks_each_object_once_and_labels_by_presence():
    for strategy in STRATEGIES:
        questions = build_questions(SCENES, strategy, number=2)
        assert [q.id for q in questions] == list(range(1, len(questions) + 1))
        assert [q.label for q in questions] == ["yes", "no"] * (len(questions) // 2)
        for image, objects in SCENES:
            asked = [q for q in questions if q.image == str(image)]
            assert len({q.meta["object"] for q in asked}) == len(asked) == 4
            assert all((q.meta["object"] in objects) == (q.label == "yes") for q in asked)


def test_popular_and_adversarial_take_the_first_object_not_used():
    popular = build_questions(SCENES[:4], "popular", number=1)
    # frequency order b a c d e; images: abcd, bac, dcbe, aeb
    assert [q.meta["object"] for q in popular if q.label == "no"] == ["e", "d", "a", "c"]
    adversarial = build_questions(SCENES[:4], "adversarial", number=1)
    # of a: b c e d; of b: a c d e; of d: b c a e; of a again
    assert [q.meta["object"] for q in adversarial if q.label == "no"] == ["e", "d", "a", "c"]


def test_random_is_seeded_and_uniform_over_absent_objects():
    images = [(i, ["x", "y", "z"]) for i in range(300)] + [(900 + i, [name, "x", "y"]) for i, name in enumerate("abcd")]
    first = build_questions(images, "random", number=1, seed=1)
    assert first == build_questions(images, "random", number=1, seed=1)
    assert first != build_questions(images, "random", number=1, seed=2)
    drawn = Counter(q.meta["object"] for q in first[:600] if q.label == "no")
    assert (
        set(drawn) == set("abcd") and min(drawn.values()) > 45
    )  # 75 expected each, four standard deviations below is 45


def test_images_with_too_few_objects_are_left_out_and_sampling_is_seeded():
    images = [*SCENES, (9, list("cdefgh")), (10, list("ijk"))]
    assert {q.image for q in build_questions(images, "popular", number=3)} == {"0", "1", "2", "3", "9", "10"}
    many = [(i, [f"a{i}", f"b{i}"]) for i in range(20)]
    chosen = [q.image for q in build_questions(many, "popular", number=1, sample=5, seed=3)]
    assert len(set(chosen)) == 5
    assert chosen == [q.image for q in build_questions(many, "popular", number=1, sample=5, seed=3)]
    assert set(chosen) != {q.image for q in build_questions(many, "popular", number=1, sample=5, seed=4)}


def test_builder_errors_are_sentences():
    with pytest.raises(UnknownNameError, match="'hard' is unknown; known: adversarial, popular, random"):
        build_questions(SCENES, "hard")
    with pytest.raises(EvalError, match="No image has 9 different objects"):
        build_questions(SCENES, "random", number=9)
    with pytest.raises(EvalError, match="leaves no absent object"):
        build_questions([(7, ["a", "b"])], "random", number=1)


def test_article_and_its_historical_slip():
    assert question_text("dog") == "Is there a dog in the image?"
    assert question_text("orange") == "Is there an orange in the image?"
    assert question_text("orange", imange=True) == "Is there an orange in the imange?"
    assert question_text("dog", imange=True) == "Is there a dog in the image?"


def test_popular_questions_equal_the_released_file(generator_case):
    images = [(image["image_id"], image["objects"]) for image in generator_case["images"]]
    assert object_frequency(images) == generator_case["frequency_in_insertion_order"]
    released = Pope().file_questions(shared_path("data/pope/questions/coco_popular.jsonl.gz"))["coco-popular"]
    built = build_questions(images, "popular")
    assert [(q.id, q.image, q.text, q.label) for q in built] == [
        (q.id, image_number(q.image), q.text, q.label) for q in released
    ]
    for image, _ in images:
        negatives = [q.meta["object"] for q in built if q.image == str(image) and q.label == "no"]
        assert negatives == generator_case["expected_popular_negatives"][str(image)]


def test_random_file_has_the_positives_the_builder_takes(generator_case):
    images = [(image["image_id"], image["objects"]) for image in generator_case["images"]]
    released = Pope().file_questions(shared_path("data/pope/questions/coco_random.jsonl.gz"))["coco-random"]
    built = build_questions(images, "random")
    assert [q.label for q in built] == [q.label for q in released]
    assert [q.text for q in built if q.label == "yes"] == [q.text for q in released if q.label == "yes"]


def test_adversarial_negatives_match_the_released_counts(generator_case):
    images = [(image["image_id"], image["objects"]) for image in generator_case["images"]]
    questions = build_questions(images, "adversarial")
    counted = Counter(q.meta["object"] for q in questions if q.label == "no")
    # Counts of the released file. Three of its 1,500 negatives are uniform draws, which no seed of ours repeats.
    assert counted.most_common(3) == [("car", 288), ("dining table", 226), ("person", 146)]
    assert len({q.meta["object"] for q in questions}) == 79


# --- reading yes and no


def test_every_rule_reads_the_recorded_edge_cases_as_its_script_does():
    cases = json.loads(shared_path("data/pope/parse_edge_cases.json").read_text())
    assert len(cases) == 23
    for case in cases:
        for recorded, name in RECORDED.items():
            for label in ("yes", "no"):
                assert RULES[name](case["text"], label)[0] == case[recorded], (name, case["text"])
        assert (RULES["vcd"](case["text"], "yes")[0] == "yes") == case["contains_yes"], case["text"]
        assert (RULES["vcd"](case["text"], "no")[0] == "no") == case["contains_no"], case["text"]


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("label", ["yes", "no"])
def test_single_words_are_read_alike_by_all_rules(name, label):
    assert RULES[name]("Yes", label) == ("yes", True)
    assert RULES[name]("No", label) == ("no", True)


@pytest.mark.parametrize(
    ("text", "name", "label", "expected"),
    [
        ("There isn't a dog.", "pope-official", "no", ("yes", False)),
        ("There isn't a dog.", "opera", "no", ("no", True)),
        ("I know there is a dog", "vcd", "no", ("no", True)),
        ("", "pope-official", "no", ("yes", False)),
        ("", "vcd", "no", ("yes", False)),
        ("", "vcd", "yes", ("no", False)),
        ("Yes, not no", "vcd", "yes", ("yes", False)),
        ("Yes, not no", "vcd", "no", ("no", False)),
        ("Yes. There is no cat", "pope-official", "no", ("yes", True)),
        ("**Yes**, there is", "strict", "no", ("yes", True)),
        ("Nothing", "strict", "no", ("other", False)),
        ("The answer is no", "strict", "no", ("other", False)),
        ("yesterday", "strict", "no", ("other", False)),
    ],
)
def test_traps_of_the_rules(text, name, label, expected):
    assert RULES[name](text, label) == expected


@given(st.text(max_size=40), st.sampled_from(["yes", "no"]), st.sampled_from(sorted(RULES)))
def test_any_text_gets_a_verdict(text, label, name):
    verdict, clear = RULES[name](text, label)
    assert verdict in {"yes", "no", "other"}
    assert not (verdict == "other" and clear)


def test_an_unknown_rule_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="parsing rule 'poppy' is unknown; known: code, icd"):
        Pope(rule="poppy")


# --- scores

CASES = "llava-v1.5-13b__coco_random_2910", "cd_rethink_llava-v1.5-7b__coco_random_3000_greedy"
CASES += ("cd_rethink_llava-v1.5-7b__coco_popular_3000_sample",)


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_the_recorded_ones(case):
    expected = json.loads(shared_path("data/expected_shared.json").read_text())["pope_answers"][case]
    answers = read_answers(shared_path(f"data/pope/answers/{case}.jsonl.gz"))
    for rule, recorded in {"pope-official": "official", "vcd": "vcd_label_conditional"}.items():
        pope = Pope(rule)
        summary = pope.summary(pope.rows(answers))
        for ours, theirs in {"tp": "TP", "fp": "FP", "tn": "TN", "fn": "FN", "n": "n"}.items():
            assert summary[ours] == expected[recorded][theirs]
        for rate in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
            assert summary[rate] == pytest.approx(expected[recorded][rate], abs=1e-12)
        assert summary["unparsed"] == 0
    pope = Pope("lmms-eval")
    summary = pope.summary(pope.rows(answers))
    for rate in ("accuracy", "precision", "recall", "f1"):
        assert summary[rate] == pytest.approx(expected["lmms_eval"][rate], abs=1e-12)
    assert summary["yes_ratio"] == pytest.approx(expected["lmms_eval"]["predicted_yes_ratio"], abs=1e-12)


def answers_of(texts, labels):
    return [Answer(i, text, label=label, image=f"{i // 2}") for i, (text, label) in enumerate(zip(texts, labels))]


def test_yes_ratio_is_of_predictions_not_labels():
    pope = Pope()
    summary = pope.summary(pope.rows(answers_of(["Yes"] * 4, ["yes", "no"] * 2)))
    assert summary["yes_ratio"] == 1.0 and summary["accuracy"] == 0.5


def test_unparsed_answers_are_counted_and_leave_icd_s_accuracy():
    answers = answers_of(["Yes", "a dog", "No", "a cat"], ["yes", "yes", "no", "no"])
    strict, icd = ({**p.summary(p.rows(answers))} for p in (Pope("strict"), Pope("icd")))
    assert (strict["tp"], strict["fp"], strict["tn"], strict["fn"], strict["n"]) == (1, 0, 1, 0, 4)
    assert strict["accuracy"] == 0.5 and strict["unparsed"] == 0.5 and strict["recall"] == 1.0
    assert icd["accuracy"] == 1.0 and icd["yes_ratio"] == 0.25


def test_no_yes_at_all_gives_zero_not_a_crash():
    pope = Pope()
    summary = pope.summary(pope.rows(answers_of(["No", "No"], ["yes", "no"])))
    assert summary["precision"] == summary["recall"] == summary["f1"] == 0


def test_rows_keep_their_evidence():
    row = Pope("opera").row(Answer(5, "There isn't one.", text="Is there a dog?", label="no", image="7.jpg"))
    assert (row.id, row.cluster, row.answer, row.parsed) == ("5", "7.jpg", "There isn't one.", "no")
    assert row.correct and row.clear and row.rule == "opera" and row.evidence["text"] == "Is there a dog?"


# --- files


def test_known_files_are_told_apart_by_hash():
    splits = {
        "coco_random": ("coco-random", 3000),
        "coco_random_legacy2910": ("coco-random-2910", 2910),
        "coco_popular": ("coco-popular", 3000),
        "aokvqa_random": ("aokvqa-random", 3000),
        "gqa_random": ("gqa-random", 3000),
    }
    recorded = json.loads(shared_path("data/expected_shared.json").read_text())["pope_questions"]
    for name, (split, number) in splits.items():
        questions = Pope().file_questions(shared_path(f"data/pope/questions/{name}.jsonl.gz"))
        assert list(questions) == [split] and len(questions[split]) == number
        labels = Counter(q.label for q in questions[split])
        assert (labels["yes"], labels["no"]) == (recorded[name]["yes"], recorded[name]["no"])
        assert sum("imange" in q.text for q in questions[split]) == recorded[name]["imange_typos"]
        assert len({q.image for q in questions[split]}) == recorded[name]["images"]


def test_a_json_array_is_read_like_json_lines():
    questions = Pope().file_questions(shared_path("data/pope/questions/gqa_popular_seem_json_list_form.json.gz"))
    (only,) = questions.values()
    assert len(only) == 3000 and Counter(q.label for q in only) == {"yes": 1500, "no": 1500}


def test_chat_and_hub_forms(tmp_path):
    chat = tmp_path / "coco_pope_chat_random.json"
    chat.write_text(
        json.dumps({"chat_id": 0, "image": "a.jpg", "text": ["Q1?", "Q2?"], "label": ["yes", "no"]})
        + "\n"
        + json.dumps({"chat_id": 1, "image": "b.jpg", "text": ["Q3?"], "label": ["no"]})
    )
    (questions,) = Pope().file_questions(chat).values()
    assert [(q.id, q.image, q.text, q.label) for q in questions] == [
        (1, "a.jpg", "Q1?", "yes"),
        (2, "a.jpg", "Q2?", "no"),
        (3, "b.jpg", "Q3?", "no"),
    ]
    hub = tmp_path / "hub.jsonl"
    record = {
        "id": "0",
        "question_id": "1",
        "question": "Q?",
        "answer": "yes",
        "image_source": "COCO_val2014_000000310196",
    }
    lines = [{**record, "category": "popular"}, {**record, "category": "random"}, {**record, "category": "popular"}]
    hub.write_text("\n".join(json.dumps(line | {"question_id": str(i)}) for i, line in enumerate(lines)))
    questions = Pope().file_questions(hub)
    assert {split: [q.id for q in found] for split, found in questions.items()} == {
        "popular": ["0", "2"],
        "random": ["1"],
    }
    assert questions["random"][0].image == "COCO_val2014_000000310196.jpg"
    assert questions["random"][0].label == "yes"


def test_a_folder_gives_one_split_a_file(tmp_path):
    record = {"question_id": 1, "image": "a.jpg", "text": "Q?", "label": "yes"}
    for name in ("coco_pope_random.json", "coco_pope_popular.json"):
        (tmp_path / name).write_text(json.dumps(record) + "\n")
    assert sorted(Pope().file_questions(tmp_path)) == ["coco_pope_popular", "coco_pope_random"]


def test_broken_files_name_file_and_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": 1, "answer": "yes", "label": "yes"}\n{"question_id": 2, "answer"\n')
    with pytest.raises(FileFormatError, match=r"answers\.jsonl, line 2: broken JSON"):
        read_answers(path)
    path.write_text('{"question_id": 1, "label": "yes"}\n')
    with pytest.raises(FileFormatError, match=r"line 1: field 'answer' is missing; found question_id, label"):
        read_answers(path)
    path.write_text('{"question_id": 1, "image": "a", "text": "Q?", "label": "maybe"}\n')
    with pytest.raises(FileFormatError, match=r"line 1: label must be yes or no, found 'maybe'"):
        Pope().file_questions(path)
    path.write_text("[1, 2]")
    with pytest.raises(FileFormatError, match="entry 1: expected a JSON object, found int"):
        read_records(path)
    path.write_bytes(gzip.compress(b"{}")[:-9])
    with pytest.raises(FileFormatError, match="damaged gzip"):
        read_records(path)


def test_audit_counts_and_names_what_must_not_be_scored_silently():
    questions = [Question(i, "Q?", "a", "yes") for i in (1, 2, 3, 4)]
    answers = [
        Answer(2, "yes", label="yes"),
        Answer("2", "no", label="yes"),
        Answer(9, "yes"),
        Answer(1, " ", label="yes"),
    ]
    answers.append(Answer(3, "", label="yes", error="image a.jpg is missing"))
    usable, found = audit(answers, questions)
    assert [(a.question_id, a.answer) for a in usable] == [(1, " "), (2, "yes")]
    assert found.duplicate == ("2",) and found.unknown == ("9",) and found.missing == ("4",)
    assert found.failed == ("3",) and found.empty == ("1",)
    assert found.counts()["missing"] == {"count": 1, "ids": ["4"]}
    assert any(
        "answers to questions that were not asked" in sentence and "9" in sentence for sentence in found.sentences()
    )
    assert not audit([Answer(1, "yes")])[1]


def test_ids_may_be_text_and_line_separators_may_occur_in_answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"question_id": "q1", "answer": "Yes\u2028it is", "label": "yes"}, ensure_ascii=False))
    assert read_answers(path)[0].answer == "Yes\u2028it is"


def test_a_file_of_answers_is_scored_from_the_command_line(tmp_path):
    path = shared_path("data/pope/answers/llava-v1.5-13b__coco_random_2910.jsonl.gz")
    done = cli("score", "pope", path, "--rule", "pope-official", "--json", "--rows", tmp_path / "rows.jsonl")
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert {key: report[key] for key in ("n", "tp", "fp", "tn", "fn")} == dict(n=2910, tp=1182, fp=31, tn=1379, fn=318)
    assert report["accuracy"] == pytest.approx(0.88007, abs=1e-5) and report["rule"] == "pope-official"
    assert "problems" not in report and done.stderr == ""
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2910
    assert "Accuracy 88.0%" in cli("score", "pope", path).stdout


def test_trouble_in_a_file_of_answers_is_in_the_report_and_on_stderr(tmp_path):
    path = tmp_path / "answers.jsonl"
    lines = [(1, "Yes"), (1, "No"), (2, ""), (9, "No")]
    path.write_text("".join(json.dumps({"question_id": i, "answer": a, "label": "yes"}) + "\n" for i, a in lines))
    asked = tmp_path / "questions.jsonl"
    asked.write_text(
        "".join(json.dumps({"question_id": i, "image": "a", "text": "Q?", "label": "yes"}) + "\n" for i in (1, 2, 3))
    )
    done = cli("score", "pope", path, "--questions", asked, "--json")
    report = json.loads(done.stdout)
    assert report["n"] == 2 and report["tp"] == 2
    problems = {kind: found["ids"] for kind, found in report["problems"].items()}
    assert problems == {"duplicate": ["1"], "disagreeing": ["1"], "unknown": ["9"], "missing": ["3"], "empty": ["2"]}
    assert done.stderr.count("warning:") == 5


def test_llava_s_answer_files_take_their_labels_from_the_question_file(tmp_path):
    path, asked = tmp_path / "answers.jsonl", tmp_path / "questions.jsonl"
    path.write_text(
        json.dumps({"question_id": 1, "prompt": "Is there a dog?", "text": "No, there is not.", "model_id": "m"})
    )
    asked.write_text(json.dumps({"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "no"}))
    report = json.loads(cli("score", "pope", path, "--questions", asked, "--json").stdout)
    assert (report["tn"], report["n"]) == (1, 1)
    done = cli("score", "pope", path)
    assert done.exit_code == 1
    assert (
        done.stderr.strip() == "error: question 1 has no label; put `label` into the answers, or give --questions FILE."
    )


def test_a_broken_line_is_one_sentence_on_the_command_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": 1, "answer": "yes", "label": "yes"}\n{"question_id": 2,\n')
    done = cli("score", "pope", path)
    assert done.exit_code == 1 and "answers.jsonl, line 2: broken JSON" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert cli("score", "pope", tmp_path / "none.jsonl").stderr.startswith("error: ")


def test_scoring_imports_no_torch():
    code = (
        "import sys; from lvlm_decode_evals import pope, metrics, tables, loaders, answers, plots\n"
        "from lvlm_decode_evals import EVALUATORS, evaluator_class\n"
        "for name in EVALUATORS: evaluator_class(name)\n"
        "print(sorted(m for m in ('torch', 'transformers') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_registry_lists_known_names():
    with pytest.raises(UnknownNameError, match="evaluator 'poppe' is unknown; known: amber, beaf, chair"):
        evaluator("poppe")
    with pytest.raises(UnknownNameError, match="option of pope 'parser' is unknown; known: rule"):
        evaluator("pope", parser="x")

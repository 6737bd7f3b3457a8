"""Answers and questions are joined by id only where they are about the same thing; labels come from the questions."""

import json

import pytest
from conftest import shared_path
from runs import (
    RIGHT,
    SAMPLE,
    WORDS,
    as_file,
    cli,
    make_run,
    naturalbench,
    one_cell,
    pope,
    questions_about,
    results_of,
    write,
)

from lvlm_decode.errors import EvalError
from lvlm_decode_evals.answers import audit, resume_answers
from lvlm_decode_evals.base import Answer, Question
from lvlm_decode_evals.joins import join, same_image, same_text
from lvlm_decode_evals.plan import GREEDY, Decoding, found_cells, read_cell
from lvlm_decode_evals.price import lines as price_lines
from lvlm_decode_evals.price import price_blocks
from lvlm_decode_evals.tables import blocks, gather, markdown


def test_answers_about_the_same_questions_take_their_facts_from_them():
    asked = questions_about()
    joined, contradicted = join([Answer(q.id, "Yes") for q in asked], asked, "a.jsonl")
    assert [(a.text, a.image, a.label) for a in joined] == [(q.text, q.image, q.label) for q in asked]
    assert contradicted == ()


@pytest.mark.parametrize("other", [questions_about(image="other"), questions_about(WORDS[::-1])], ids=["image", "text"])
def test_answers_about_other_questions_are_refused_with_the_first_few_named(other):
    answers = [Answer.to(question, "Yes") for question in other]
    with pytest.raises(
        EvalError, match=r"a\.jsonl: 6 of 6 answers are about something else .*\(0: .*; 1: .*; 2: .*; \.\.\.\)"
    ):
        join(answers, questions_about(), "a.jsonl")


def test_one_answer_about_something_else_is_enough():
    asked = questions_about()
    answers = [Answer.to(question, "Yes") for question in asked]
    answers[4] = Answer(4, "Yes", text=asked[4].text, image="else.jpg")
    with pytest.raises(EvalError, match=r"1 of 6 answers .*4: image 'else\.jpg' was answered, 'im4\.jpg' is asked"):
        join(answers, asked, "a.jsonl")


def test_names_of_one_image():
    same = [("val2014/a.jpg", "a.jpg"), ("COCO_val2014_000000000042", "COCO_val2014_000000000042.jpg"),
            ("42", "COCO_val2014_000000000042.jpg"), ("./VD/1.png", "VD/1.png"), (None, "a.jpg")]  # fmt: skip
    other = [("existence/1.jpg", "color/1.jpg"), ("a.jpg", "b.jpg"), ("43", "COCO_val2014_000000000042.jpg"),
             ("COCO_train2014_000000000042.jpg", "COCO_val2014_000000000042.jpg")]  # fmt: skip
    assert all(same_image(*pair) and same_image(*pair[::-1]) for pair in same)
    assert not any(same_image(*pair) or same_image(*pair[::-1]) for pair in other)


def test_a_question_may_stand_in_a_longer_prompt_but_not_in_another():
    assert same_text("<image>\nIs there a dog?  Answer with one word.", "Is there a dog?")
    assert same_text("Is there an orange in the imange?", "Is there an orange in the image?")
    assert same_text("", "Is there a dog?") and not same_text("Is there a dog?", "Is there a cat?")


DOG = "Is there a dog in the image?"


@pytest.mark.parametrize(
    "longer",
    [
        f"{DOG} Please answer this question with one word.",
        f"USER: <image>\n{DOG} ASSISTANT:",
        f"<img>/data/a.jpg</img>{DOG} Answer:",
        f"user {DOG.lower()} answer yes or no",
        "Is there a dog\n in the  image ?",
        "Is there a dog in the image\nAnswer with one word",
        "is there a dog in the image",
    ],
)
def test_a_question_is_found_in_the_prompts_of_scripts(longer):
    short = DOG.rstrip("?") if "?" not in longer else DOG
    assert same_text(longer, short) and same_text(short, longer)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("dog", DOG),
        ("?", DOG),
        ("I", DOG),
        ("image?", DOG),
        ("Is there a do", DOG),
        ("s there a dog in the image?", DOG),
        ("Is there a dog", "Is there a dog house in the image?"),
        ("Is there a car in the image?", "Is there a cart in the image?"),
        ("Is there a bus stop", "Is there a bus stop sign?"),
        ("Is it red", "Is it reddish?"),
        ("图中有狗", "图中有狗窝吗?"),
    ],
)
def test_a_part_of_a_text_is_not_the_text(one, other):
    assert not same_text(one, other) and not same_text(other, one)


def test_texts_of_scripts_without_blanks_are_told_letter_by_letter():
    assert same_text("图中有狗吗?", "图中有狗吗?请用一个词回答。") and not same_text("图中有狗吗?", "图中有猫吗?")


def test_a_single_word_is_refused_with_both_texts_named(tmp_path):
    asked = questions_about()
    answers = write(tmp_path / "a.jsonl", [Answer(q.id, "Yes", text="there").record() for q in asked])
    done = cli("score", "pope", answers, "--questions", as_file(tmp_path / "q.json", asked))
    assert done.exit_code == 1 and "'there' was answered, 'Is there a dog in the image?' is asked" in done.output
    unnumbered = write(tmp_path / "b.jsonl", [{"question": "dog", "answer": "Yes"} for _ in asked])
    done = cli("score", "pope", unnumbered, "--questions", tmp_path / "q.json")
    assert (
        done.exit_code == 1 and "'dog' was answered" in done.output and "'Is there a dog in the image?'" in done.output
    )


def test_an_answer_to_a_longer_question_of_the_file_is_not_one_to_a_shorter(tmp_path):
    asked = [Question(1, "Is there a dog?", "a.jpg", "yes"), Question(2, "Is there a dog? Is it black?", "a.jpg", "no")]
    with pytest.raises(EvalError, match=r"1: 'Is there a dog. Is it black.' was answered, 'Is there a dog.' is asked"):
        join([Answer(1, "Yes", text=asked[1].text)], asked, "a.jsonl")
    assert join([Answer(1, "Yes", text=f"{asked[0].text} One word.")], asked, "a.jsonl")[1] == ()


def test_a_text_that_all_questions_share_tells_nothing():
    asked = [Question(i, "Please describe this image.", f"{i}.jpg") for i in range(3)]
    answers = [Answer(i, "A dog.", text="What is here?", image=f"{i}.jpg") for i in range(3)]
    assert len(join(answers, asked, "a.jsonl")[0]) == 3


def test_a_question_that_all_share_is_compared():
    asked = [Question(i, "Is it the same?", f"{i}.jpg", "yes") for i in range(3)]
    with pytest.raises(EvalError, match=r"3 of 3 answers .*0: 'Is that\?' was answered, 'Is it the same\?' is asked"):
        join([Answer(i, "Yes", text="Is that?") for i in range(3)], asked, "a.jsonl")


def test_a_label_in_an_answer_never_wins():
    asked = questions_about()
    answers = [Answer(q.id, "Yes", label="Yes ") for q in asked]
    joined, contradicted = join(answers, asked, "a.jsonl")
    assert [a.label for a in joined] == [q.label for q in asked] and contradicted == ("1", "3", "5")
    facts = [Question(1, "Is it?", "a.jpg", "yes", meta={"task": "color", "n": 1})]
    (answer,), contradicted = join([Answer(1, "Yes", meta={"task": "count", "model": "x"})], facts, "a.jsonl")
    assert answer.meta == {"task": "color", "n": 1, "model": "x"} and contradicted == ("1",)


def test_lists_of_objects_agree_in_any_order():
    asked = [Question(1, "Describe.", "a.jpg", ["dog", "cat"])]
    assert join([Answer(1, "x", label=["cat", "dog"])], asked, "")[1] == ()
    assert join([Answer(1, "x", label=["cat"])], asked, "")[1] == ("1",)


def test_score_says_that_labels_contradict_and_scores_by_the_questions():
    folder = shared_path("cases/label-contradicts-questions")
    done = cli("score", "pope", folder / "a.jsonl", "--questions", folder / "q.json")
    assert done.exit_code == 3 and "Accuracy 50.0%" in done.output, done.output
    assert (
        "3 answers that carry another label than their question or image has (scored by what that has): 2, 4, 6."
        in done.output
    )


def test_score_refuses_answers_of_another_question_file(tmp_path):
    answers = write(tmp_path / "a.jsonl", [Answer.to(q, "Yes").record() for q in questions_about()])
    wrong = as_file(tmp_path / "wrong.json", questions_about(WORDS[::-1]))
    done = cli("score", "pope", answers, "--questions", wrong)
    assert done.exit_code == 1 and "give the questions that were asked" in done.output and "Accuracy" not in done.output
    assert cli("score", "pope", answers, "--questions", as_file(tmp_path / "q.json", questions_about())).exit_code == 0


def test_missing_questions_make_the_exit_status_3(tmp_path):
    answers = write(tmp_path / "a.jsonl", [Answer.to(q, "Yes").record() for q in questions_about()[:4]])
    done = cli("score", "pope", answers, "--questions", as_file(tmp_path / "q.json", questions_about()))
    assert done.exit_code == 3 and "2 questions without an answer (not scored): 4, 5." in done.output


# --- a run's own files


def edit(path, before, after, count=1):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, count))


@pytest.mark.parametrize(
    ("before", "after"), [('"label": "no"', '"label": "yes"'), ('"answer": "No"', '"answer": "Yes"'),
                          ('"tokens": 2', '"tokens": 3')], ids=["label", "answer", "tokens"])  # fmt: skip
def test_an_edited_line_of_a_run_is_seen(tmp_path, before, after):
    folder = one_cell(tmp_path)
    assert not read_cell(folder).audit
    edit(folder / "answers.jsonl", before, after, 2)
    assert len(read_cell(folder).audit.edited) == 2
    for command in ("score", "table"):
        done = cli(command, tmp_path)
        assert done.exit_code == 3 and "2 answers that are not as the run wrote them" in done.output, done.output


def test_an_edited_label_of_a_run_changes_no_score(tmp_path):
    folder = one_cell(tmp_path)
    before = read_cell(folder).rows
    edit(folder / "answers.jsonl", '"label": "no"', '"label": "yes"', -1)
    after = read_cell(folder)
    assert after.rows == before and len(after.audit.contradicted) == len(after.audit.edited) == 60


def test_answers_of_another_cell_and_edited_settings_are_seen(tmp_path):
    make_run(tmp_path)
    ours, theirs = (
        folder for folder in found_cells(tmp_path) if folder.parent.name == "sample" and "vcd" not in str(folder)
    )
    (ours / "answers.jsonl").write_bytes((theirs / "answers.jsonl").read_bytes())
    assert len(read_cell(ours).audit.edited) == 120
    edit(theirs / "settings.json", '"seed": 0', '"seed": 1')
    assert len(read_cell(theirs).audit.edited) == 120


def test_a_line_without_a_checksum_is_told_from_an_edited_one(tmp_path):
    folder = one_cell(tmp_path)
    path = folder / "answers.jsonl"
    lines = path.read_text().splitlines()
    record = json.loads(lines[0])
    del record["checksum"]
    path.write_text("\n".join([json.dumps(record), *lines[1:]]) + "\n")
    found = read_cell(folder).audit
    assert found.unsealed == ("0",) and not found.edited and found.incomplete
    for command in ("score", "table"):
        done = cli(command, tmp_path)
        assert done.exit_code == 3 and "1 answers without the checksum that a run writes" in done.output, done.output


def test_several_answers_to_one_question_are_one_only_where_they_agree(tmp_path):
    asked = [Answer.to(q, "Yes") for q in questions_about()]
    same = write(tmp_path / "a.jsonl", [a.record() for a in [*asked, asked[0]]])
    done = cli("score", "pope", same)
    assert (
        done.exit_code == 0 and "1 ids that occur more than once (only the first answer is scored): 0." in done.output
    )
    other = write(tmp_path / "b.jsonl", [a.record() for a in [*asked, Answer.to(questions_about()[0], "No")]])
    done = cli("score", "pope", other)
    assert (
        done.exit_code == 3 and "1 ids whose answers differ, so that their order decides the score: 0." in done.output
    )


@pytest.mark.parametrize("order", [1, -1], ids=["failed first", "failed last"])
def test_a_sample_that_was_asked_again_is_its_answer_not_its_failure(order):
    """As a run leaves it that was stopped before it merged its lines."""
    question = questions_about()[0]
    answers = [Answer.to(question, "", error="image im0.jpg is missing"), Answer.to(question, "Yes")][::order]
    usable, found = audit(answers, [question])
    assert [answer.answer for answer in usable] == ["Yes"] and not found


def test_failed_answers_of_a_file_are_named_and_make_the_exit_status_3(tmp_path):
    asked = questions_about()
    said = [Answer.to(q, "Yes") for q in asked[:5]]
    whole = write(tmp_path / "a.jsonl", [answer.record() for answer in said])
    assert cli("score", "pope", whole).exit_code == 0
    said.append(Answer.to(asked[5], "", error="image im5.jpg is missing"))
    done = cli("score", "pope", write(tmp_path / "b.jsonl", [answer.record() for answer in said]))
    assert done.exit_code == 3 and "1 questions that could not be asked or scored (left out): 5." in done.output
    assert "Left out, 5: image im5.jpg is missing" in done.output and "Accuracy 60.0%" in done.output


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda lines: lines[:5] + lines[6:], "(119 questions of 120 that were asked)"),
        (lambda lines: lines[:-1], "(119 questions of 120 that were asked)"),
        (lambda lines: [*lines[:3], lines[3].replace('"no"', '"yes"'), *lines[4:]], "(other questions than the 120"),
        (lambda lines: lines[::-1], "(other questions than the 120 that were asked)"),
    ],
    ids=["a line less", "the last line less", "another label", "another order"],
)
@pytest.mark.parametrize("answers", ["stay", "go too"])
def test_a_changed_file_of_questions_is_seen(tmp_path, change, found, answers):
    """Also where the answers go with their questions, so that none is missing and none unknown."""
    folder = one_cell(tmp_path)
    path = folder.parents[2] / "questions.jsonl"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    if answers == "go too":
        kept = {json.loads(line)["id"] for line in path.read_text().splitlines()}
        said = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
        (folder / "answers.jsonl").write_text("".join(a for a in said if json.loads(a)["question_id"] in kept))
    (told,) = read_cell(folder).audit.altered
    assert told.startswith(str(path)) and found in told
    for command in ("score", "table"):
        done = cli(command, tmp_path)
        assert done.exit_code == 3 and "1 files of questions that are not as the run wrote them" in done.output


@pytest.mark.parametrize("what", ["gone", "empty"])
def test_a_cell_without_answers_is_named_by_tables_too(tmp_path, what):
    make_run(tmp_path)
    answers = next(folder for folder in found_cells(tmp_path) if "vcd" in str(folder)) / "answers.jsonl"
    answers.unlink() if what == "gone" else answers.write_text("")
    for command in ("score", "table"):
        done = cli(command, tmp_path)
        assert done.exit_code == 3 and "vcd, sample, random, seed 0: 120 questions without an answer" in done.stderr


def test_only_what_a_run_writes_is_read_as_its_answers(tmp_path):
    folder = one_cell(tmp_path)
    text = (folder / "answers.jsonl").read_text()
    for name in ("answers-old.jsonl", "answers (copy).jsonl", "answers.bak.jsonl"):
        (folder / name).write_text(text.replace('"Yes"', '"No"'))
    assert not read_cell(folder).audit
    (folder / "settings.json").unlink()
    make_run(tmp_path / "other")
    for command in ("score", "table"):
        done = cli(command, tmp_path)
        assert done.exit_code == 1 and f"{folder / 'answers.jsonl'} lies there without its settings.json" in done.stderr


def test_a_question_that_a_run_has_twice_is_named_with_its_file(tmp_path):
    path = one_cell(tmp_path).parents[2] / "questions.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[3])
    done = cli("score", tmp_path)
    assert done.exit_code == 1 and f"{path}: question 3 is there twice" in done.stderr


def test_a_record_of_what_was_asked_that_is_gone_is_seen(tmp_path):
    folder = one_cell(tmp_path)
    settings = json.loads((folder / "settings.json").read_text())
    del settings["asked"]
    write(folder / "settings.json", settings, lines=False)
    assert "settings.json does not say what was asked" in read_cell(folder).audit.altered[0]


def test_a_shorter_run_beside_a_longer_one_is_whole(tmp_path):
    """Two cells of one split, asked 60 and 120 questions: questions.jsonl holds the longer list, and both know theirs."""
    make_run(tmp_path, {("vcd", SAMPLE): 0.8}, questions=120)
    make_run(tmp_path, {("plain", SAMPLE): 0.8}, questions=60)
    assert [result.audit.altered for result in results_of(tmp_path)] == [(), ()]
    path = next(tmp_path.rglob("questions.jsonl"))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:90]))
    assert {r.method: bool(r.audit.altered) for r in results_of(tmp_path)} == {"plain": False, "vcd": True}


def test_answers_in_a_folder_of_other_questions_are_refused(tmp_path):
    folder = one_cell(tmp_path)
    edit(folder.parents[2] / "questions.jsonl", '"image": "im0"', '"image": "other"', -1)
    with pytest.raises(EvalError, match="6 of 120 answers are about something else"):
        read_cell(folder)


def test_a_run_without_its_questions_says_that_answers_may_be_missing(tmp_path):
    folder = one_cell(tmp_path)
    (folder.parents[2] / "questions.jsonl").unlink()
    found = read_cell(folder).audit
    assert len(found.unasked) == 120 and found.incomplete
    result = cli("score", tmp_path)
    assert result.exit_code == 3 and "questions.jsonl" in result.stderr


@pytest.mark.parametrize("read", ["a.jsonl", "q.jsonl"])
def test_rows_never_overwrite_what_is_read(tmp_path, read):
    asked = write(tmp_path / "q.jsonl", [{"question_id": 1, "image": "a", "text": "Is it?", "label": "no"}])
    said = write(tmp_path / "a.jsonl", [{"question_id": 1, "answer": "No"}])
    (tmp_path / "link").symlink_to(tmp_path / read)
    before = (tmp_path / read).read_bytes()
    for rows in (tmp_path / read, tmp_path / "link"):
        result = cli("score", "pope", said, "--questions", asked, "--rows", rows)
        assert result.exit_code == 1 and "would overwrite" in result.stderr
    assert (tmp_path / read).read_bytes() == before


# --- tables never merge what is unlike


def test_runs_of_two_models_are_two_lines_with_a_model_column(tmp_path):
    make_run(tmp_path / "a", model="llava")
    make_run(tmp_path / "b", model="blip", seeds=(1,))
    table, differences = blocks(results_of(tmp_path), 200)
    place = {title: i for i, title in enumerate(table.columns)}
    assert {line[place["Model"]] for line in table.lines} == {"llava", "blip"} and len(table.lines) == 8
    assert all(line[place["Seeds"]] == "1" for line in table.lines)
    # Controls are those of the same model.
    assert all(line[0].split(",")[0] == line[1].split(",")[0] for line in differences.lines) and differences.lines
    assert "Model" not in blocks(results_of(tmp_path / "a"), 200)[0].columns


def test_models_of_one_name_are_told_apart_by_their_weights(tmp_path):
    for name, weights in (("a", "1111"), ("b", "2222")):
        make_run(tmp_path / name)
        for path in (tmp_path / name).rglob("settings.json"):
            edit(path, '"name": "tiny-llava"', f'"name": "tiny-llava", "weights": "{weights}"')
    (methods,) = gather(results_of(tmp_path)).values()
    assert {method.model for method in methods} == {"tiny-llava (1111)", "tiny-llava (2222)"}


def test_runs_of_two_limits_are_two_tables(tmp_path):
    make_run(tmp_path / "a", questions=60)
    make_run(tmp_path / "b", questions=120, seeds=(1,))
    made = blocks(results_of(tmp_path), 200)
    assert {block.title for block in made if "Seeds" in block.columns} == {
        "pope, random, 60 questions", "pope, random, 120 questions"}  # fmt: skip
    assert "±" not in "".join(text for line in markdown(made).splitlines() if line.startswith("|") for text in line)


def test_a_setting_that_differs_makes_a_line_of_its_own(tmp_path):
    make_run(tmp_path / "a", seeds=(0,))
    make_run(tmp_path / "b", seeds=(1,))
    for path in (tmp_path / "b").rglob("settings.json"):
        edit(path, '"seed": ', '"suffix": " One word.", "seed": ')
    table = blocks(results_of(tmp_path), 200)[0]
    shown = [line[table.columns.index("Settings")] for line in table.lines]
    assert sorted(set(shown)) == ["", "suffix=' One word.'"] and len(table.lines) == 8


def test_a_parameter_that_differs_makes_a_line_of_its_own(tmp_path):
    for name, alpha in (("a", 0.5), ("b", 1.0)):
        make_run(tmp_path / name, {("plain", SAMPLE): 0.7, ("vcd", SAMPLE): 0.8}, seeds=(0 if name == "a" else 1,))
        for path in (tmp_path / name).rglob("vcd/**/settings.json"):
            edit(path, '"parameters": {}', f'"parameters": {{"alpha": {alpha}}}')
    (methods,) = gather(results_of(tmp_path)).values()
    assert [(m.name, m.variant, len(m.results)) for m in methods] == [
        ("plain", "", 2), ("vcd", "alpha=0.5", 1), ("vcd", "alpha=1.0", 1)]  # fmt: skip


SETTINGS_APART = [
    {},
    {"drafter": "recycling"},
    {"drafter": "vispec"},
    {"suffix": " One word."},
    {"template": "USER: {question}"},
    {"max_new_tokens": 64},
    {"engine": {"kind": "server", "name": "x"}},
    {"parameters": {"alpha": 0.5}},
    {"parameters": {"alpha": 1}},
    {"parameters": {"alpha": True}},
    {"model": {"name": "m", "dtype": "float16"}},
    {"model": {"name": "m", "weights": "1"}},
]


def test_lines_that_differ_in_anything_never_look_equal():
    """Each alone, and each pair of them, in the block of rates, in the differences and in what it costs."""
    runs = [pope(method, right, **how) for how in SETTINGS_APART for method, right in (("plain", 20), ("vcd", 30))
            if method == "vcd" or "parameters" not in how]  # fmt: skip
    (methods,) = gather(runs).values()
    assert len(methods) == len(runs) == len({method.label for method in methods})
    table, differences = blocks(runs, 100)
    words = [tuple(cell for cell in line if isinstance(cell, str)) for line in table.lines]
    assert len(set(words)) == len(words)
    (cost,) = price_blocks(runs, 100)
    for block in (differences, cost):
        assert len({line[:2] for line in block.lines}) == len(block.lines)
    for one in range(len(SETTINGS_APART)):
        for two in range(one):
            (pair,) = gather([pope("vcd", 20, **SETTINGS_APART[i]) for i in (one, two)]).values()
            assert len({method.label for method in pair}) == 2, (SETTINGS_APART[one], SETTINGS_APART[two])


def test_what_a_file_leaves_out_and_what_it_says_is_null_are_one():
    empty = {"drafter": None, "suffix": None, "engine": {}, "model": {"name": "m", "weights": None}}
    with pytest.raises(EvalError, match="both hold seed 0"):
        gather([pope("vcd", 20), pope("vcd", 20, **empty)])
    alphas = [{"parameters": {"alpha": alpha}} for alpha in (1, 1.0)]
    with pytest.raises(EvalError, match="both hold seed 0"):
        gather([pope("vcd", 20, **how) for how in alphas])


def test_one_method_at_two_strengths_on_two_benchmarks_is_two_lines_of_what_it_costs():
    def vcd(alpha):
        return {"parameters": {"alpha": alpha}}

    runs = [pope("plain", 20), naturalbench("plain", 20), pope("vcd", 30, **vcd(0.5))]
    assert len(price_lines([*runs, naturalbench("vcd", 30, **vcd(0.5))], 100)) == 1
    made = price_lines([*runs, naturalbench("vcd", 30, **vcd(1.0))], 100)
    assert [line.label for line in made] == ["vcd, greedy, alpha=0.5", "vcd, greedy, alpha=1.0"]


def test_a_decoding_without_draws_is_one_whatever_draws_would_follow():
    assert Decoding(False, 0.2, 0.5, 7) == GREEDY and Decoding(num_beams=3, temperature=0) == Decoding(num_beams=3)
    near = [Decoding(True, 0.7), Decoding(True, 0.7000001), Decoding(True, top_p=0.9), Decoding(True, top_p=0.90000001)]
    assert len({decoding.name for decoding in near}) == 4


def test_a_copied_folder_is_refused(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    with pytest.raises(EvalError, match=r"both hold seed 0 of .*a table takes each seed once"):
        gather(results_of(tmp_path))
    done = cli("table", tmp_path)
    assert done.exit_code == 1 and "Seeds" not in done.output


def test_seeds_in_two_folders_are_seeds(tmp_path):
    make_run(tmp_path / "a", RIGHT, seeds=(0,))
    make_run(tmp_path / "b", RIGHT, seeds=(1,))
    table = blocks(results_of(tmp_path), 200)[0]
    assert [line[table.columns.index("Seeds")] for line in table.lines] == ["1", "2", "2", "2"]


def test_score_says_which_folder_a_row_is_from(tmp_path):
    make_run(tmp_path / "a", {("vcd", SAMPLE): 0.8})
    make_run(tmp_path / "b", {("vcd", SAMPLE): 0.8}, model="other", skip=(3,))
    done = cli("score", tmp_path)
    assert done.exit_code == 3
    for name in ("a", "b"):
        assert f"{tmp_path / name}/pope/random/vcd/sample/seed-0: vcd, sample, random, seed 0: Accuracy" in done.output
    (ours, theirs) = json.loads(cli("score", tmp_path, "--json").stdout)
    assert ours["folder"] != theirs["folder"] and {ours["model"], theirs["model"]} == {"tiny-llava", "other"}
    assert len(resume_answers(next((tmp_path / "b").rglob("answers.jsonl")))) == 119

"""AMBER: nouns against annotated truth, yes/no halves; identities, then the recorded LLaVA-1.5 descriptions."""

import gzip
import json

import pytest
from conftest import shared_path
from hypothesis import given
from hypothesis import strategies as st

import lvlm_decode_data
from lvlm_decode.errors import DependencyError, EvalError, MissingFileError, UnknownNameError
from lvlm_decode_evals import amber, api, chair
from lvlm_decode_evals.amber import TYPES, Amber, Knowledge, nltk_nouns, pattern_nouns, score_nouns
from lvlm_decode_evals.base import Answer

TABLES = Knowledge(
    {"person": ("man", "woman"), "dog": (), "tree": ("forest",), "sea": ("water",), "cup": ()}, frozenset({"line"}), {}
)


def score(nouns, truth=("person", "tree"), hallu=("dog",), **kwargs):
    return score_nouns(nouns, truth, hallu, TABLES, **kwargs)


def test_nouns_by_hand():
    found = score(["man", "dog", "forest", "cup", "line"])
    assert found == {"hallucinated": ["dog", "cup"], "covered": [0, 1], "typical": [0]}


def test_a_word_annotated_twice_is_covered_once():
    assert score(["person", "person"], truth=("person", "person"))["covered"] == [0]


def test_associated_words_win_over_the_word_itself():
    tables = Knowledge({"tree": ("forest",), "forest": ("tree",)}, frozenset(), {})
    assert score_nouns(["forest"], ("forest", "tree"), (), tables)["covered"] == [1]


def test_similar_words_are_forgiven_and_mark_typical_ones():
    def similar(word, other):
        return {word, other} in ({"cup", "tree"}, {"sea", "dog"})

    found = score(["cup", "sea"], similar=similar)
    assert found == {"hallucinated": ["sea"], "covered": [1], "typical": [0]}


WORDS = st.sampled_from(["person", "man", "dog", "tree", "forest", "sea", "water", "cup", "line"])


@given(st.lists(WORDS, max_size=12), st.lists(WORDS, max_size=4, unique=True), st.lists(WORDS, max_size=4, unique=True))
def test_counts_hold_together(nouns, truth, hallu):
    found = score(nouns, truth, hallu)
    assert len(found["hallucinated"]) <= len(nouns)
    assert len(found["covered"]) <= min(len(truth), len(set(nouns)))
    assert len(found["typical"]) <= min(len(hallu), len(set(found["hallucinated"])))
    assert score(nouns, [*truth, *nouns], hallu)["hallucinated"] == []


def test_nouns_without_a_language_library():
    vocabulary = frozenset({"dog", "glass", "can", "bus", "person"})
    text = "Two dogs and a glass can be seen. People wait for the bus."
    assert pattern_nouns(text, vocabulary) == ["dog", "glass", "person", "bus"]


def test_official_nouns_keep_tagged_nouns_of_the_vocabulary(monkeypatch):
    class Nltk:
        word_tokenize = staticmethod(str.split)

        @staticmethod
        def pos_tag(words):
            return [(word, {"runs": "VBZ"}.get(word, "NNS")) for word in words]

    monkeypatch.setattr(chair, "load_nltk", lambda: Nltk)
    monkeypatch.setattr(chair, "_lemmatizer", lambda: lambda word, pos: word.removesuffix("s"))
    assert nltk_nouns("Dogs dogs runs trees", frozenset({"dog", "run"})) == ["dog"]


def discriminative(kind, label, text):
    return Answer(f"{kind}/{label}/{text}", text, image="a", label=label, meta={"type": kind})


def summary(*answers, **options):
    scorer = Amber(**options)
    return scorer.summary(scorer.rows(answers))


def test_the_answer_no_is_the_positive_class():
    result = summary(
        discriminative("discriminative-hallucination", "no", "No"),
        discriminative("discriminative-attribute-state", "yes", "No"),
        discriminative("discriminative-attribute-number", "yes", "Yes"),
        discriminative("relation", "no", "Yes"),
    )
    assert (result["accuracy"], result["precision"], result["recall"]) == (1 / 2, 1 / 2, 1 / 2)
    assert (result["existence_f1"], result["relation_f1"], result["attribute_accuracy"]) == (1, 0, 1 / 2)
    assert result["state_accuracy"] == 0 and result["number_accuracy"] == 1 and "action_f1" not in result


@pytest.mark.parametrize("text", ["yes", "Yes.", " Yes", "NO", ""])
def test_the_official_rule_is_exact_and_a_lenient_one_has_a_name(text):
    label = "no" if text == "NO" else "yes"
    answer = discriminative("discriminative-relation", label, text)
    assert summary(answer)["accuracy"] == 0 and summary(answer)["unparsed"] == 1
    assert summary(answer, rule="strict")["accuracy"] == (text != "")


def test_both_halves_give_the_amber_score():
    meta = {"type": "generative", "hallu": ["cup"]}
    described = Answer("d", "A dog and a cup.", image="a", label=["dog"], meta=meta)
    result = summary(described, discriminative("relation", "no", "No"))
    assert (result["chair"], result["cover"], result["hal"], result["cog"]) == (1 / 2, 1, 1, 1)
    assert result["f1"] == 1 and result["amber"] == 75


# AMBER's own files -------------------------------------------------------------------------------------------------


@pytest.fixture
def official(tmp_path):
    annotations = [
        {"id": 1, "type": "generative", "truth": ["person", "tree"], "hallu": ["dog"]},
        {"id": 2, "type": "relation", "truth": "no"},
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    (tmp_path / "relation.json.gz").write_bytes(gzip.compress(json.dumps(dict(TABLES.association)).encode()))
    (tmp_path / "safe_words.txt").write_text("line\n")
    return Amber(data=str(tmp_path))


def test_official_response_and_query_files(official, tmp_path):
    responses = tmp_path / "responses.json"
    responses.write_text(
        json.dumps(
            [{"id": 1, "response": "Men and a dog in a line."}, {"id": 2, "response": "No"}, {"id": 9, "response": ""}]
        )
    )
    answers = official.read_answers(responses)
    assert [answer.error is None for answer in answers] == [True, True, False]
    rows = official.rows(answers)
    assert rows[0].evidence["hallucinated"] == ["dog"] and rows[0].evidence["covered"] == ["person"]
    result = official.summary(rows)
    assert (result["nouns"], result["hallucinated_nouns"], result["truth_words"]) == (2, 1, 2)
    assert result["relation_f1"] == 1
    query = tmp_path / "query_generative.json"
    query.write_text(json.dumps([{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}]))
    (question,) = official.file_questions(query)["generative"]
    assert question.label == ["person", "tree"] and question.meta["hallu"] == ["dog"]
    query.write_text(json.dumps([{"id": 7, "image": "AMBER_7.jpg", "query": "?"}]))
    with pytest.raises(EvalError, match="entry 1: AMBER has no annotation for id 7"):
        official.file_questions(query)


def test_missing_files_and_names_are_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"annotations\.json.*data get amber"):
        Amber(data=str(tmp_path)).tables()
    responses = tmp_path / "responses.json"
    responses.write_text('[{"id": 1, "response": "A dog."}]')
    with pytest.raises(EvalError, match="-o data=FOLDER"):
        Amber().read_answers(responses)
    for options in ({"parser": "x"}, {"similarity": "x"}, {"rule": "x"}):
        with pytest.raises(UnknownNameError, match="'x' is unknown"):
            Amber(**options)
    with pytest.raises(EvalError, match="field 'type'"):
        Amber().row(Answer(1, "Yes", label="yes"))


def test_similarity_without_its_vectors_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    amber._spacy_similar.cache_clear()
    with pytest.raises(DependencyError, match=r"en_core_web_lg.*'none'"):
        amber.SIMILARITY["spacy"]()
    amber._spacy_similar.cache_clear()


def test_similarity_asks_spacy(monkeypatch):
    class Token(str):
        def similarity(self, other):
            return 0.81 if self[0] == other[0] else 0.8

    class Model:
        class vocab:
            vectors_length = 300

        def __call__(self, word):
            return Token(word)

    class Spacy:
        @staticmethod
        def load(name):
            assert name == "en_core_web_lg"
            return Model()

    monkeypatch.setitem(__import__("sys").modules, "spacy", Spacy)
    amber._spacy_similar.cache_clear()
    similar = amber.SIMILARITY["spacy"]()
    assert similar("cup", "cap") and not similar("cup", "dog")
    amber._spacy_similar.cache_clear()


# Recorded ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded():
    folder = shared_path("data/amber")
    scorer = Amber(data=str(folder))
    with gzip.open(folder / "llava15_expected_per_response.jsonl.gz", "rt") as file:
        expected = [json.loads(line) for line in file]
    totals = json.loads(shared_path("data/expected_shared.json").read_text())["amber_generative_exact_match_only"]
    return scorer, scorer.read_answers(folder / "llava15_generative_responses.json.gz"), expected, totals


COUNTS = {
    "chair_score": "hallucinated_nouns",
    "chair_num": "nouns",
    "cover_score": "covered",
    "cover_num": "truth_words",
    "cog_score": "typical",
    "cog_num": "hallu_words",
    "responses": "responses",
    "hal_responses": "hal_responses",
}
RATES = {"CHAIR": "chair", "Cover": "cover", "Hal": "hal", "Cog": "cog"}


def test_recorded_nouns_are_scored_exactly(recorded, monkeypatch):
    """The scorer given the nouns that the official tagger found."""
    scorer, answers, expected, totals = recorded
    nouns = {str(line["id"]): line["nouns"] for line in expected}
    by_text = {answer.answer: nouns[str(answer.question_id)] for answer in answers}
    monkeypatch.setitem(amber.NOUNS, "pattern", lambda text, vocabulary: by_text[text])
    rows = scorer.rows(answers)
    for row, line in zip(rows, expected, strict=True):
        assert row.evidence["hallucinated"] == line["hallucinated"], row.id
        assert (len(row.evidence["covered"]), len(row.evidence["typical"])) == (line["covered"], line["cog"]), row.id
    summary, known = scorer.summary(rows), totals["llava-1.5_odd_ids"]
    assert {name: summary[ours] for name, ours in COUNTS.items()} == {name: known[name] for name in COUNTS}
    for name, ours in RATES.items():
        assert 100 * summary[ours] == pytest.approx(known[name], rel=1e-12)


def test_recorded_descriptions_with_nltk(recorded):
    try:
        chair.load_nltk()
    except DependencyError as error:
        pytest.skip(str(error))
    scorer, answers, expected, totals = recorded
    official = Amber(data=scorer.data, parser="nltk-pos")
    rows = official.rows(answers)
    assert [row.evidence["nouns"] for row in rows] == [line["nouns"] for line in expected]
    summary, known = official.summary(rows), totals["llava-1.5_odd_ids"]
    assert {name: summary[ours] for name, ours in COUNTS.items()} == {name: known[name] for name in COUNTS}


def test_recorded_descriptions_without_a_language_library(recorded):
    """How far the dependency-free way is from the official one, as its docstring says."""
    scorer, answers, expected, totals = recorded
    rows = scorer.rows(answers)
    equal = sum(row.evidence["nouns"] == line["nouns"] for row, line in zip(rows, expected))
    assert equal > 0.8 * len(rows)
    summary, known = scorer.summary(rows), totals["llava-1.5_odd_ids"]
    away = {name: abs(100 * summary[ours] - known[name]) for name, ours in RATES.items()}
    assert away["CHAIR"] < 0.2 and away["Cover"] < 0.3 and away["Hal"] < 0.9 and away["Cog"] < 0.1


@pytest.mark.parametrize("word", ["No", "Yes"])
def test_recorded_degenerate_answers(recorded, word):
    scorer = recorded[0]
    known = json.loads(shared_path("data/expected_shared.json").read_text())["amber_discriminative_degenerate"]
    items = [item for item in scorer.tables().annotations.values() if item["type"] in TYPES]
    answers = [Answer(i["id"], word, label=i["truth"], meta={"type": i["type"]}) for i in items]
    summary = scorer.summary(scorer.rows(answers))
    for category, expected in known[f"always_{word}"].items():
        prefix = "" if category == "all" else f"{category}_"
        assert summary[f"{category}.n"] == expected["n"] and summary[f"{category}.gold_no"] == expected["gt_no"]
        for ours, name in (
            ("accuracy", "accuracy"),
            ("precision", "precision_no"),
            ("recall", "recall_no"),
            ("f1", "f1_no"),
        ):
            assert 100 * summary[prefix + ours] == pytest.approx(expected[name], rel=1e-9), (category, ours)


@pytest.mark.parametrize(
    ("own", "named"),
    [({}, False), ({"label": "no"}, False), ({"label": "yes"}, True), ({"type": "discriminative-action"}, True),
     ({"label": "yes", "type": "relation"}, True)],
)  # fmt: skip
def test_what_an_answer_says_of_its_item_never_overrides_the_annotations(official, tmp_path, own, named):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question_id": 2, "answer": "No", **own}) + "\n")
    found = api.score(official, path)
    (row,) = found.rows
    assert row["correct"] and row["label"] == "no" and row["evidence"]["type"] == "relation"
    assert found.audit.contradicted == (("2",) if named else ())


def test_ambers_own_lines_are_compared_as_well(official, tmp_path):
    queries, path = tmp_path / "query.json", tmp_path / "a.json"
    queries.write_text(json.dumps([{"id": 2, "image": "AMBER_2.jpg", "query": "Is there a tree?"}]))
    line = {"id": 2, "response": "No"}
    for more in ({"truth": "yes"}, {"query": "Is there a dog?"}, {"image": "AMBER_9.jpg"}):
        path.write_text(json.dumps([line | more]))
        if "truth" in more:
            assert api.score(official, path, queries).audit.contradicted == ("2",)
        else:
            with pytest.raises(EvalError, match="1 of 1 answers are about something else"):
                api.score(official, path, queries)
    path.write_text(json.dumps([line | {"truth": "no", "query": "Is there a tree?", "image": "AMBER_2.jpg"}]))
    assert not api.score(official, path, queries).audit


def test_an_item_annotated_twice_is_refused(official, tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), {"id": 2, "type": "relation", "truth": "yes"}]))
    amber.knowledge.cache_clear()
    with pytest.raises(EvalError, match="id 2 is there twice"):
        official.tables()


def test_an_answer_about_another_image_than_its_query_is_refused(official, tmp_path):
    queries = tmp_path / "query.json"
    queries.write_text(json.dumps([{"id": 2, "image": "AMBER_2.jpg", "query": "Is there a tree?"}]))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question_id": 2, "answer": "No", "image": "AMBER_9.jpg"}) + "\n")
    with pytest.raises(EvalError, match=r"image 'AMBER_9\.jpg' was answered, 'AMBER_2\.jpg' is asked"):
        api.score(official, path, queries)


# Emoji scenes ------------------------------------------------------------------------------------------------------


def test_scene_questions_of_both_halves():
    scenes = lvlm_decode_data.load_scenes()[:40]
    splits = Amber().scene_questions(scenes)
    by_id = {str(scene.image_id): scene for scene in scenes}
    assert len(splits["generative"]) == len(scenes)
    for question in splits["generative"]:
        assert not set(question.label) & set(question.meta["hallu"])
    kinds = {question.meta["type"] for question in splits["discriminative"]}
    assert kinds == set(TYPES) - {"discriminative-attribute-action"}
    for question in splits["discriminative"]:
        if question.meta["type"] == "discriminative-hallucination":
            assert question.label == "no"
            names = [name for name in by_id[question.image].categories if f" {name} " in question.text]
            assert not [name for name in names if question.text.startswith(f"Is there a {name} in")]
    every = [question for questions in splits.values() for question in questions]
    assert len({question.id for question in every}) == len(every)
    spoken = [
        Answer.to(q, "There is " + ", a ".join(q.label) if isinstance(q.label, list) else q.label.capitalize())
        for q in every
    ]
    perfect = summary(*spoken)
    assert (perfect["chair"], perfect["cover"], perfect["f1"], perfect["amber"]) == (0, 1, 1, 100)

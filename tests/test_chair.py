"""CHAIR: words, synonym table, ground truth, scores; identities first, then the recorded captions of published runs."""

import gzip
import json
import math
import zipfile
from dataclasses import replace

import pytest
import typer
from conftest import ROOT, shared_path
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import lvlm_decode_data
from lvlm_decode.errors import DependencyError, EvalError, FileFormatError, UnknownNameError
from lvlm_decode_evals import chair, evaluator
from lvlm_decode_evals.base import Answer
from lvlm_decode_evals.chair import DOUBLE_WORDS, PARSERS, Chair, Vocabulary, build_objects, image_key, vocabulary_file
from lvlm_decode_evals.commands import add_to
from lvlm_decode_evals.words import singular, tokenize

RECORDED = {
    "opera__llava-1.5__greedy": "opera/llava-1.5/greedy",
    "opera__llava-1.5__ours": "opera/llava-1.5/ours",
    "opera__instructblip__greedy": "opera/instructblip/greedy",
    "pope__I1__mplug": "pope/I1/mplug",
    "pope__I2__minigpt-4": "pope/I2/minigpt-4",
}
COUNTS = (
    "captions",
    "hallucinated_captions",
    "hallucinated_words",
    "object_words",
    "recalled",
    "gt_objects",
    "tokens",
)
SYNONYMS = {
    "person": ["person", "man", "child"],
    "dog": ["dog", "puppy"],
    "bus": ["bus"],
    "train": ["train"],
    "toilet": ["toilet"],
    "chair": ["chair", "seat"],
    "traffic light": ["traffic light", "stop light"],
    "wine glass": ["wine glass"],
    "tie": ["tie"],
    "motorcycle": ["motorcycle", " motor bike"],
}


def lines(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def found(text, parser="pattern", vocabulary=None):
    table = vocabulary or Vocabulary.of(SYNONYMS)
    return table.objects(PARSERS[parser].reduce(text))[1]


@pytest.fixture
def command():
    app = typer.Typer()
    add_to(app)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


# Words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("people", "person"),
        ("men", "man"),
        ("policemen", "policeman"),
        ("children", "child"),
        ("mice", "mouse"),
        ("geese", "goose"),
        ("knives", "knife"),
        ("babies", "baby"),
        ("skis", "ski"),
        ("boxes", "box"),
        ("benches", "bench"),
        ("buses", "bus"),
        ("shoes", "shoe"),
        ("gloves", "glove"),
        ("sheep", "sheep"),
        ("scissors", "scissors"),
        ("movies", "movie"),
        # The published scorer reduces too much, and its numbers depend on it.
        ("bus", "bu"),
        ("glass", "glas"),
        ("ties", "ty"),
        ("has", "ha"),
        ("this", "thi"),
        ("s", "s"),
        ("dog", "dog"),
    ],
)
def test_singular(word, expected):
    assert singular(word) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog's bowl, full.", ["a", "dog", "'s", "bowl", ",", "full", "."]),
        ("well-kept 24/7 at 10:30 for 3,000", ["well-kept", "24/7", "at", "10:30", "for", "3,000"]),
        ("they don't (really).", ["they", "do", "n't", "(", "really", ")", "."]),
        ("mr. smith. the u.s. flag.", ["mr.", "smith", ".", "the", "u.s.", "flag", "."]),
        ("1. a cat", ["1.", "a", "cat"]),
        ("at 10.", ["at", "10", "."]),
        ("wait... what--no", ["wait", "...", "what", "--", "no"]),
        ("the dogs' food", ["the", "dogs", "'", "food"]),
        ("one person’s bag", ["one", "person", "’", "s", "bag"]),
        ("i cannot", ["i", "can", "not"]),
        ("", []),
    ],
)
def test_tokenize(text, expected):
    assert tokenize(text) == expected


@given(st.text(max_size=200))
def test_tokens_are_the_text_without_blanks(text):
    assert "".join(tokenize(text)) == "".join(text.split())


# Vocabulary --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two men and a puppy.", ["person", "dog"]),
        ("A dog, a dog and dogs", ["dog", "dog", "dog"]),
        ("A traffic light and a stop light", ["traffic light", "traffic light"]),
        ("a train on the train tracks", ["train"]),
        ("a passenger train", ["train"]),
        ("a baby dog", ["dog"]),
        ("a wine glass", ["wine glass"]),
        ("a bow tie", ["tie"]),
        ("several ties", []),
        ("a bus", []),
        ("two buses", ["bus"]),
        ("a motor bike", []),
        ("the toilet seat and a chair", ["toilet", "chair"]),
        ("the seat of the toilet", ["toilet"]),
        ("a seat", ["chair"]),
        ("seated", []),
        ("a child's dog", ["person", "dog"]),
        ("", []),
    ],
)
def test_objects_of_a_caption(text, expected):
    assert found(text) == expected


def test_length_counts_words_and_punctuation_after_pairs_before_the_toilet_rule():
    words, objects, tokens = Vocabulary.of(SYNONYMS).objects(
        PARSERS["pattern"].reduce("A traffic light, a toilet, a seat.")
    )
    assert words == objects == ["traffic light", "toilet"]
    assert tokens == 9


def test_double_words_are_the_published_ones():
    recorded = json.loads(shared_path("data/chair/vocabulary.json").read_text())["double_words"]
    assert recorded == DOUBLE_WORDS


def test_own_table_finds_every_word_in_singular_and_plural():
    for name, words in lvlm_decode_data.synonyms().items():
        for word in words:
            assert found(f"There is one {word}, I think.", vocabulary=Chair().table()) == [name], word


def test_own_table_refuses_ambiguous_and_unreachable_words():
    with pytest.raises(EvalError, match="also means"):
        Vocabulary.reduced({"a": ["bat"], "b": ["bats"]}, PARSERS["pattern"])
    with pytest.raises(EvalError, match="at most two"):
        Vocabulary.reduced({"a": ["one two three"]}, PARSERS["pattern"])


def test_synonym_files_in_both_forms(tmp_path):
    text = tmp_path / "synonyms.txt"
    text.write_text("dog, puppy\nmotorcycle,  motor bike\n")
    table = vocabulary_file(text)
    # Two blanks leave a key with a leading one, which no caption can contain: kept as published.
    assert table.category == {"dog": "dog", "puppy": "dog", "motorcycle": "motorcycle", " motor bike": "motorcycle"}
    text.write_bytes(b"dog, puppy\r\nmotorcycle,  motor bike\r\n")
    assert vocabulary_file(text).category == table.category
    packed = tmp_path / "table.json.gz"
    packed.write_bytes(gzip.compress(json.dumps({"synonyms": {"dog": ["dog"]}, "double_words": {"a b": "c"}}).encode()))
    assert vocabulary_file(packed).pairs == {"a b": "c"}
    text.write_text('{"synonyms": {"Dog": ["Dog"], "cat": ["cat"]}}')
    with pytest.raises(FileFormatError, match=r"object 'Dog' has no word in lower case.* write 'dog'"):
        vocabulary_file(text)
    for content in ("dog, puppy\ncat, puppy", '{"synonyms": {"dog": ["puppy"], "cat": ["cat", "puppy"]}}'):
        text.write_text(content)
        with pytest.raises(FileFormatError, match=r"synonyms\.txt: Synonym 'puppy' of 'cat' also means 'dog'"):
            vocabulary_file(text)
    text.write_text("dog, puppy, dog\ncat, kitten\ndog, hound")
    with pytest.raises(FileFormatError, match=r"two lines are about 'dog'"):
        vocabulary_file(text)
    for content, message in (
        ("{}", "'synonyms' is missing"),
        ('{"synonyms": {"dog": "dog"}}', "'dog'"),
        ("dog", "comma"),
    ):
        text.write_text(content)
        with pytest.raises(FileFormatError, match=message):
            vocabulary_file(text)


# Scores ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    (tmp_path / "table.json").write_text(json.dumps({"synonyms": SYNONYMS, "double_words": DOUBLE_WORDS}))
    (tmp_path / "objects.json.gz").write_bytes(
        gzip.compress(json.dumps({"1": ["dog", "person"], "2": ["toilet"], "3": []}).encode())
    )
    return Chair(vocabulary=str(tmp_path / "table.json"), objects=str(tmp_path / "objects.json.gz"))


def test_scores_by_hand(files):
    captions = {1: "A man with a dog, a dog and a chair.", 2: "A toilet.", 3: ""}
    rows = files.rows([Answer(image, caption) for image, caption in captions.items()])
    summary = files.summary(rows)
    expected = {
        "captions": 3,
        "hallucinated_captions": 1,
        "hallucinated_words": 1,
        "object_words": 5,
        "recalled": 3,
        "gt_objects": 3,
        "tokens": 15,
        "split": 13,
        "empty": 1,
        "chair_s": 1 / 3,
        "chair_i": 1 / 5,
        "recall": 1.0,
        "length": 5.0,
        "length_split": 13 / 3,
    }
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    assert (summary["distinct_objects"], summary["chair_s_64"], summary["shorter_64"]) == (4 / 3, 1 / 3, 3)
    assert rows[0].evidence["objects"] == ["person", "dog", "dog", "chair"]
    assert rows[0].evidence["words"] == ["man", "dog", "dog", "chair"]
    assert rows[0].evidence["hallucinated"] == ["chair"]
    assert [row.correct for row in rows] == [False, True, True]


def test_no_mention_and_no_truth_give_zero_rates_with_counts_beside_them(files):
    summary = files.summary(files.rows([Answer(3, "Nothing here.")]))
    assert (summary["object_words"], summary["gt_objects"]) == (0, 0)
    assert (summary["chair_i"], summary["recall"], summary["chair_s"]) == (0.0, 0.0, 0.0)


def test_other_names_are_not_taken_apart():
    assert [image_key(name) for name in ("a/42.jpg", "n42.jpg", "x_42.jpg", "v/COCO_val2014_42.jpg")] == [
        "a/42.jpg",
        "n42.jpg",
        "x_42.jpg",
        "42",
    ]


@pytest.mark.parametrize("spelling", [42, "42", "000000000042", "000000000042.jpg", "COCO_val2014_000000000042.jpg"])
def test_spellings_of_an_image_id(spelling):
    assert image_key(spelling) == "42"


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog. A cat sits on", "A dog."),
        ("A dog. A cat.", "A dog. A cat."),
        ('It says "stop." The dog', 'It says "stop."'),
        ("At 10.30 a dog", "At 10.30 a dog"),
        ("A dog", "A dog"),
        ("", ""),
    ],
)
def test_the_unfinished_end_of_a_caption(caption, expected):
    assert chair.finished(caption) == expected


def test_unfinished_sentences_are_dropped_on_request(files):
    answer = Answer(1, "A dog. A chair and a")
    keep, drop = files.row(answer), replace(files, unfinished="drop").row(answer)
    assert keep.evidence["objects"] == ["dog", "chair"] and drop.evidence["objects"] == ["dog"]
    assert drop.evidence["tokens"] == 3 and drop.answer == answer.answer
    with pytest.raises(UnknownNameError, match="keep"):
        replace(files, unfinished="cut")


WORDS = st.sampled_from("a the dog dogs man men chair seat toilet bus light traffic stop train track . , puppy".split())
CAPTIONS = st.lists(WORDS, max_size=12).map(" ".join)
OBJECTS = st.sets(st.sampled_from(sorted(SYNONYMS)))


@given(st.lists(st.tuples(CAPTIONS, OBJECTS), min_size=1, max_size=6), OBJECTS)
@settings(max_examples=60, deadline=None)
def test_counts_hold_together(cases, more):
    table = Vocabulary.of(SYNONYMS)

    class Local(Chair):
        def table(self):
            return table

    local = Local()

    def score(extra=frozenset()):
        answers = [Answer(i, text, label=sorted(truth | extra)) for i, (text, truth) in enumerate(cases)]
        rows = local.rows(answers)
        return local.summary(rows), local.summary(rows[::-1])

    summary, reversed_summary = score()
    assert summary == reversed_summary
    assert summary["hallucinated_captions"] <= min(summary["captions"], summary["hallucinated_words"])
    assert summary["hallucinated_words"] <= summary["object_words"] <= summary["tokens"]
    assert summary["recalled"] <= min(summary["gt_objects"], summary["object_words"])
    richer, _ = score(frozenset(more))
    assert richer["hallucinated_words"] <= summary["hallucinated_words"]
    assert richer["object_words"] == summary["object_words"]
    everything, _ = score(frozenset(SYNONYMS))
    assert everything["hallucinated_words"] == 0


# Ground truth ------------------------------------------------------------------------------------------------------


def coco(tmp_path, name, categories, images, annotations):
    content = {"images": [{"id": image} for image in images], "annotations": annotations}
    if categories:
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(categories, 1)]
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return path


def test_ground_truth_is_instances_and_captions(tmp_path, capsys):
    instances = coco(
        tmp_path,
        "instances.json",
        ["dog", "chair"],
        [7, 8],
        [
            {"id": 1, "image_id": 7, "category_id": 1, "iscrowd": 1},
            {"id": 2, "image_id": 7, "category_id": 1, "iscrowd": 0},
        ],
    )
    captions = coco(
        tmp_path,
        "captions.json",
        None,
        [7, 9],
        [{"id": 1, "image_id": 7, "caption": "Two men."}, {"id": 2, "image_id": 9, "caption": "A toilet seat."}],
    )
    table = build_objects([instances], [captions], Vocabulary.of(SYNONYMS))
    assert table == {"7": ["dog", "person"], "8": [], "9": ["toilet"]}
    assert build_objects([instances], [], Vocabulary.of(SYNONYMS)) == {"7": ["dog"], "8": []}
    assert capsys.readouterr().out == ""


def test_ground_truth_names_files_that_are_not_cocos(tmp_path):
    path = coco(tmp_path, "instances.json", ["zebra"], [1], [])
    with pytest.raises(FileFormatError, match=r"instances\.json: category 'zebra'"):
        build_objects([path], [], Vocabulary.of(SYNONYMS))
    path.write_text("[]")
    with pytest.raises(FileFormatError, match="no 'annotations' section"):
        build_objects([], [path], Vocabulary.of(SYNONYMS))


def test_recorded_ground_truth_cases(tmp_path):
    cases = lines(shared_path("data/chair/gt_builder_cases.jsonl.gz"))
    vocabulary = vocabulary_file(shared_path("data/chair/vocabulary.json"))
    names = sorted({name for case in cases for name in case["segmentation_categories"]})
    images = [case["image_id"] for case in cases]
    segments = [
        {"id": i, "image_id": case["image_id"], "category_id": names.index(name) + 1}
        for i, (case, name) in enumerate((c, n) for c in cases for n in c["segmentation_categories"])
    ]
    said = [
        {"id": i, "image_id": image, "caption": caption}
        for i, (image, caption) in enumerate((c["image_id"], text) for c in cases for text in c["captions"])
    ]
    instances = coco(tmp_path, "instances.json", names, images, segments)
    captions = coco(tmp_path, "captions.json", None, images, said)
    table = build_objects([instances], [captions], vocabulary)
    assert table == {str(case["image_id"]): sorted(case["objects_A_pattern"]) for case in cases}


# Recorded captions -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Ground truths A (published) and segmentation only, as OBJECTS files."""
    folder = tmp_path_factory.mktemp("truth")
    with gzip.open(shared_path("data/coco_val2014_objects.json.gz"), "rt") as file:
        images = json.load(file)
    tables = {
        "A": {image: sorted({*parts["seg"], *parts["cap_pattern"]}) for image, parts in images.items()},
        "B": {image: sorted({*parts["seg"], *parts["cap_wordnet"]}) for image, parts in images.items()},
        "seg": {image: parts["seg"] for image, parts in images.items()},
    }
    for name, table in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(table))
    return folder


def recorded(parser, truth, name):
    return Chair(
        parser=parser,
        vocabulary=str(shared_path("data/chair/vocabulary.json")),
        objects=str(truth / f"{name}.json"),
    )


@pytest.mark.full
@pytest.mark.parametrize("name", RECORDED)
def test_pattern_equals_the_recorded_captions(name, truth):
    expected = json.loads(shared_path("data/expected_shared.json").read_text())["chair"][RECORDED[name]]
    per_caption = lines(shared_path(f"data/chair/{name}.expected_per_caption.jsonl.gz"))
    scorer = recorded("pattern", truth, "A")
    rows = scorer.rows(scorer.read_answers(shared_path(f"data/chair/{name}.captions.jsonl.gz")))
    assert [row.id for row in rows] == [str(line["image_id"]) for line in per_caption]
    equal = sum(row.evidence["objects"] == line["objects_pattern"] for row, line in zip(rows, per_caption))
    assert equal >= 0.998 * len(rows)
    summary, known = scorer.summary(rows), expected["results"]["pattern|A"]
    for key, column in (("chair_s", "CHAIRs"), ("chair_i", "CHAIRi"), ("recall", "Recall")):
        assert 100 * summary[key] == pytest.approx(known[column], abs=0.05)
    # More than the tolerance asks: this parser has been brought to equal counts, and a change that loses them is news.
    assert {count: summary[count] for count in COUNTS} == {count: known[count] for count in COUNTS}
    for row, line in zip(rows, per_caption):
        assert row.evidence["hallucinated"] == line["hallucinated_pattern_A"], row.id
        assert row.evidence["tokens"] == line["n_tokens_pattern"], row.id
    if "Len_split_space" in expected:
        assert summary["length_split"] == pytest.approx(expected["Len_split_space"])


def test_pattern_against_the_other_ground_truth(truth):
    known = json.loads(shared_path("data/expected_shared.json").read_text())["chair"]["opera/llava-1.5/greedy"]
    captions = shared_path("data/chair/opera__llava-1.5__greedy.captions.jsonl.gz")
    other = recorded("pattern", truth, "B")
    summary = other.summary(other.rows(other.read_answers(captions)))
    assert {count: summary[count] for count in COUNTS} == {c: known["results"]["pattern|B"][c] for c in COUNTS}
    without_captions = recorded("pattern", truth, "seg")
    alone = without_captions.summary(without_captions.rows(without_captions.read_answers(captions)))
    assert alone["chair_s"] > summary["chair_s"] + 0.05


MATCHED = ("hallucinated_captions", "hallucinated", "mentions", "recalled", "gt", "tokens")


def matched_counts(scorer, rows, cut=""):
    summary = scorer.summary(rows)
    names = ("hallucinated_captions", "hallucinated_words", "object_words", "recalled")
    counts = [summary[f"{name}{cut}"] for name in names]
    length = int(cut[1:]) if cut else None
    tokens = sum(len(row.evidence["reduced"][:length]) for row in rows)
    return dict(zip(MATCHED, [*counts, summary["gt_objects"], tokens]))


def test_length_matched_counts_of_public_captions(truth):
    """OPERA's own captions: at equal length its LLaVA-1.5 row is no better than greedy."""
    known = json.loads(shared_path("data/benchmarks/chair_length_matched.json").read_text())["counts"]["llava-1.5"]
    scorer = recorded("pattern", truth, "A")
    names = {"greedy": "greedy", "opera": "ours"}
    runs = {
        name: scorer.rows(scorer.read_answers(shared_path(f"data/chair/opera__llava-1.5__{file}.captions.jsonl.gz")))
        for name, file in names.items()
    }
    equal = dict(zip(runs, scorer.equal_length(list(runs.values()))))
    for name, rows in runs.items():
        for cut in (32, 64):
            assert matched_counts(scorer, rows, f"_{cut}") == known[f"{name}@{cut}"]
        whole = matched_counts(scorer, rows)
        assert {k: v for k, v in whole.items() if k != "tokens"} == {
            k: v for k, v in known[name].items() if k != "tokens"
        }
        assert matched_counts(scorer, equal[name]) == known[f"{name}@min"]
    gain = [
        scorer.summary(found["greedy"])["chair_s"] - scorer.summary(found["opera"])["chair_s"]
        for found in (runs, equal)
    ]
    assert [round(100 * points, 1) for points in gain] == [0.2, -2.2]


def test_the_page_on_equal_length_has_the_recorded_counts():
    """The published captions of four models, whole and cut, as the page prints them."""
    known = json.loads(shared_path("data/benchmarks/chair_length_matched.json").read_text())["counts"]
    page = json.loads((ROOT / "benchmarks" / "length-matched" / "results.json").read_text())["models"]
    prose = (ROOT / "benchmarks" / "length-matched" / "README.md").read_text()
    names = {"LLaVA-1.5": "llava-1.5", "Shikra": "shikra", "MiniGPT-4": "minigpt4", "InstructBLIP": "instructblip"}
    ours = ("hallucinated_captions", "hallucinated_words", "object_words", "recalled", "gt_objects", "tokens")
    assert page.keys() == names.keys()
    for model, name in names.items():
        gains = []
        for kind, cut in (("whole", ""), ("equal length", "@min")):
            found = page[model][kind]
            for run, theirs in (("greedy", "greedy"), ("OPERA", "opera")):
                assert dict(zip(MATCHED, (found[run][key] for key in ours))) == known[name][f"{theirs}{cut}"]
                at_64 = known[name][f"{theirs}@64"]["hallucinated_captions"]
                assert kind != "whole" or found[run]["hallucinated_captions_64"] == at_64
            points = (found["greedy"]["hallucinated_captions"] - found["OPERA"]["hallucinated_captions"]) / 5
            assert found["difference"]["chair_s"]["value"] == pytest.approx(-points / 100)
            gains.append(f"{points:.1f}")
        assert f"| {model} | {' | '.join(gains)} |" in prose


def test_a_pair_that_the_cut_parts_is_lost_and_the_toilet_rule_is_applied_to_the_rest(files):
    long = "A dog near a traffic light and a seat of a toilet."
    for length, expected in (
        (5, ["dog"]),
        (6, ["dog", "traffic light"]),
        (9, [*_LIGHT, "chair"]),
        (12, [*_LIGHT, "toilet"]),
    ):
        (_, cut) = files.equal_length([[files.row(Answer(1, " ".join(["so"] * length)))], [files.row(Answer(1, long))]])
        assert cut[0].evidence["objects"] == expected, length
        assert len(cut[0].evidence["reduced"]) == length


_LIGHT = ("dog", "traffic light")


def test_equal_length_takes_the_shortest_of_all_runs_and_shared_images_only(files):
    def run(**captions):
        return [files.row(Answer(int(name[1:]), text)) for name, text in captions.items()]

    runs = [run(i1="a dog and a dog", i2="a dog"), run(i1="a dog", i2="a dog and a train"), run(i1="a dog and", i3="a")]
    cut = files.equal_length(runs)
    assert [[row.id for row in rows] for rows in cut] == [["1"]] * 3
    assert [len(row.evidence["reduced"]) for rows in cut for row in rows] == [2, 2, 2]
    whole = files.equal_length([runs[0], runs[0]])
    assert [files.summary(rows) for rows in whole] == [files.summary(runs[0])] * 2


def test_recorded_surface_forms():
    with gzip.open(shared_path("data/chair/surface_forms.json.gz"), "rt") as file:
        forms = json.load(file)
    assert {word: singular(word) for word in forms} == {word: known["pattern"] for word, known in forms.items()}


# The parser that needs NLTK ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED)
def test_wordnet_equals_the_recorded_captions(name, truth):
    try:
        chair.load_nltk()
    except DependencyError as error:
        pytest.skip(str(error))
    expected = json.loads(shared_path("data/expected_shared.json").read_text())["chair"][RECORDED[name]]["results"]
    captions = shared_path(f"data/chair/{name}.captions.jsonl.gz")
    for ground in ("A", "B", "seg"):
        scorer = recorded("wordnet-pos", truth, ground)
        summary = scorer.summary(scorer.rows(scorer.read_answers(captions)))
        known = expected[f"wordnet_pos|{ground}"]
        assert {count: summary[count] for count in COUNTS} == {count: known[count] for count in COUNTS}


def test_wordnet_lemmatises_by_part_of_speech(monkeypatch):
    """The plumbing, with a stand-in for NLTK: lower-case, tag, lemma by tag, everything unknown as a noun."""
    tags = {"seated": "VBN", "dogs": "NNS", "better": "JJR", "quickly": "RB", "the": "DT"}
    lemmas = {("seated", "v"): "seat", ("dogs", "n"): "dog", ("better", "a"): "good", ("quickly", "r"): "quick"}

    class Nltk:
        word_tokenize = staticmethod(str.split)

        @staticmethod
        def pos_tag(words):
            return [(word, tags[word]) for word in words]

    monkeypatch.setattr(chair, "load_nltk", lambda: Nltk)
    monkeypatch.setattr(chair, "_lemmatizer", lambda: lambda word, pos: lemmas.get((word, pos), f"{word}/{pos}"))
    words = PARSERS["wordnet-pos"].reduce("The dogs seated better quickly")
    assert words == ["the/n", "dog", "seat", "good", "quick"]
    assert found("The dogs seated", "wordnet-pos") == ["dog", "chair"]


def test_missing_nltk_data_is_named(monkeypatch):
    nltk = pytest.importorskip("nltk", reason="NLTK is an extra and not installed")
    monkeypatch.setattr(nltk.data, "path", ["/nowhere"])
    chair.load_nltk.cache_clear()
    with pytest.raises(DependencyError, match=r"punkt_tab.*wordnet missing.*nltk\.downloader.*/nowhere"):
        PARSERS["wordnet-pos"].reduce("a dog")
    chair.load_nltk.cache_clear()


@pytest.mark.parametrize("packed", [True, False])
def test_nltk_data_is_found_as_its_downloader_leaves_it(monkeypatch, tmp_path, packed):
    nltk = pytest.importorskip("nltk", reason="NLTK is an extra and not installed")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    (tmp_path / "tokenizers" / "punkt_tab" / "english").mkdir(parents=True)
    (tmp_path / "taggers" / "averaged_perceptron_tagger_eng").mkdir(parents=True)
    (tmp_path / "corpora").mkdir()
    if packed:
        with zipfile.ZipFile(tmp_path / "corpora" / "wordnet.zip", "w") as archive:
            archive.writestr("wordnet/index.noun", "x")
    else:
        (tmp_path / "corpora" / "wordnet").mkdir()
    chair.load_nltk.cache_clear()
    assert chair.load_nltk() is nltk
    chair.load_nltk.cache_clear()


def test_missing_nltk_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nltk", None)
    chair.load_nltk.cache_clear()
    with pytest.raises(DependencyError, match=r"pip install lvlm-decode\[chair\]"):
        chair.load_nltk()
    chair.load_nltk.cache_clear()


# Files and the command line ----------------------------------------------------------------------------------------


def test_score_command_prints_counts_rates_and_what_is_wrong(files, tmp_path, command):
    captions = tmp_path / "captions.jsonl"
    records = [
        {"image_id": 1, "caption": "A man and a chair."},
        {"image_id": "COCO_val2014_000000000002.jpg", "caption": ""},
        {"image_id": 99, "caption": "A dog."},
        {"image_id": "000001.jpg", "caption": "A second caption."},
    ]
    captions.write_text("\n".join(map(json.dumps, records)))
    arguments = ("--objects", files.objects, "--vocabulary", files.vocabulary, "--parser", "pattern", "--json")
    result = command("score", "chair", captions, *arguments)
    assert result.exit_code == 3, result.output
    report = json.loads(result.stdout)
    assert report["captions"] == 2 and report["hallucinated_words"] == 1 and report["empty"] == 1
    assert report["chair_s"] == 0.5 and report["parser"] == "pattern"
    problems = report["problems"]
    assert problems["duplicate"] == {"count": 1, "ids": ["1"]}
    assert problems["failed"] == {"count": 1, "ids": ["99"]}
    assert problems["empty"]["ids"] == ["2"]
    assert "99" in result.stderr


@pytest.mark.parametrize("known", ["objects", "scene"])
def test_a_label_that_contradicts_what_is_known_of_the_image_is_named_and_never_wins(tmp_path, command, known):
    scene = lvlm_decode_data.load_scenes()[0]
    truth = sorted(scene.categories)
    absent = next(name for name in lvlm_decode_data.synonyms() if name not in truth)
    image, options = scene.image_id, ()
    if known == "objects":
        image = 7
        (tmp_path / "o.json").write_text(json.dumps({"7": truth}))
        options = ("--objects", tmp_path / "o.json")
    captions = tmp_path / "captions.jsonl"
    for label, status in ((truth, 0), (truth[::-1], 0), ([*truth, absent], 3), ([absent], 3), (["no such thing"], 3)):
        captions.write_text(json.dumps({"image_id": image, "caption": f"A {absent}.", "label": label}))
        done = command("score", "chair", captions, "--json", *options)
        assert done.exit_code == status, done.output
        report = json.loads(done.stdout)
        assert report["hallucinated_words"] == 1 and report["gt_objects"] == len(truth)
        assert ("contradicted" in report.get("problems", {})) == (status == 3)
        assert ("another label than their question or image has" in done.stderr) == (status == 3)


def test_images_of_any_name_are_scored_where_their_objects_are_known(tmp_path, command):
    (tmp_path / "o.json").write_text('{"cat_photo": ["cat"], "garden": ["dog"]}')
    captions = tmp_path / "captions.json"
    captions.write_text('{"cat_photo": "A cat.", "garden": "A cat."}')
    done = command("score", "chair", captions, "--objects", tmp_path / "o.json", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["hallucinated_words"] == 1
    captions.write_text('{"cat_photo": "A cat.", "attic": "A cat."}')
    done = command("score", "chair", captions, "--objects", tmp_path / "o.json", "--json")
    assert done.exit_code == 3 and json.loads(done.stdout)["problems"]["failed"]["ids"] == ["attic"]
    for options in ((), ("--objects", tmp_path / "p.json")):
        (tmp_path / "p.json").write_text('{"other": ["cat"]}')
        done = command("score", "chair", captions, *options)
        assert done.exit_code == 1 and "whose names have digits or are in --objects" in done.stderr


def test_score_command_on_scene_captions(tmp_path, command):
    scene = lvlm_decode_data.load_scenes()[0]
    captions = tmp_path / "captions.jsonl"
    captions.write_text(json.dumps({"image_id": scene.image_id, "caption": f"A {sorted(scene.categories)[0]}."}))
    report = json.loads(command("score", "chair", captions, "--json").stdout)
    assert report["hallucinated_words"] == 0 and report["recalled"] == 1
    assert report["gt_objects"] == len(scene.categories)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image_id": 1, "caption": "a"}\n{"image_id": 2, "capti', r"captions\.jsonl, line 2: broken JSON"),
        ('{"caption": "a"}', r"captions\.jsonl, line 1: field 'image_id' is missing"),
        ('{"image_id": 1}', r"line 1: field 'caption' is missing"),
        ('{"image_id": 1, "caption": 5}', r"line 1: field 'caption' must be text"),
        ("[1]", "expected a JSON object"),
        ("", "is empty"),
        ('{"image_id": 5, "caption": "a"}', "no caption has a known image"),
    ],
)
def test_broken_captions_are_named(files, tmp_path, content, message):
    path = tmp_path / "captions.jsonl"
    path.write_text(content)
    with pytest.raises(EvalError, match=message):
        files.read_answers(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"1": ["dragon"]}', "image 1 has object 'dragon'"),
        ('{"1": {"seg": []}}', "field '1' must be a list"),
        ("[]", "expected an object, found"),
        ('{"1": [', "broken JSON"),
    ],
)
def test_broken_objects_are_named(files, tmp_path, content, message):
    (tmp_path / "captions.jsonl").write_text('{"image_id": 1, "caption": "a"}')
    (tmp_path / "wrong.json").write_text(content)
    scorer = Chair(vocabulary=files.vocabulary, objects=str(tmp_path / "wrong.json"))
    with pytest.raises(FileFormatError, match=message):
        scorer.read_answers(tmp_path / "captions.jsonl")


def test_questions_from_a_list_of_images(tmp_path):
    path = tmp_path / "images.jsonl"
    path.write_text('{"image_id": 42}\n{"image_id": 7, "image": "mine.png"}\n{"image_id": "x"}')
    (questions,) = Chair(prompt="Describe.").file_questions(path).values()
    assert [(q.id, q.image) for q in questions] == [
        ("42", "COCO_val2014_000000000042.jpg"),
        ("7", "mine.png"),
        ("x", "x"),
    ]
    assert {question.text for question in questions} == {"Describe."}
    path.write_text('{"image": "a.jpg"}')
    with pytest.raises(FileFormatError, match="line 1: field 'image_id' is missing"):
        Chair().file_questions(path)


def test_files_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "table.txt"
    path.write_bytes(b"dog, \xff\xfe")
    with pytest.raises(FileFormatError, match=r"table\.txt is not UTF-8 text"):
        vocabulary_file(path)


def test_unknown_parser_is_named():
    with pytest.raises(UnknownNameError, match=r"'spacy'.*pattern, wordnet-pos"):
        Chair(parser="spacy")


def test_scene_questions_ask_for_a_caption_of_each_scene():
    scenes = lvlm_decode_data.load_scenes()[:5]
    (questions,) = evaluator("chair").scene_questions(scenes).values()
    assert [question.label for question in questions] == [sorted(scene.categories) for scene in scenes]
    perfect = [Answer.to(q, "There is " + " and ".join(f"a {name}" for name in q.label) + ".") for q in questions]
    summary = Chair().summary(Chair().rows(perfect))
    assert summary["chair_i"] == 0 and summary["recall"] == 1 and math.isfinite(summary["length"])

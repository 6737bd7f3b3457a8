"""The emoji scenes: reproducible, disjoint splits, truthful ground truth, texts that say what is true."""

import json
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import lvlm_decode_data
from lvlm_decode_data import load_scenes, synonyms, texts
from lvlm_decode_data.claims import false_claims
from lvlm_decode_data.scenes import (
    CATEGORIES,
    COLOURS,
    GRID,
    MIN_VISIBLE,
    SIZE,
    SPLITS,
    THEMES,
    USUAL_COLOUR,
    Scene,
    SceneObject,
    cell_owners,
    render,
    scene_seed,
    split_of,
)


@pytest.fixture(scope="module")
def heldout():
    return load_scenes()


def one(category="dog", box=(10, 10, 40, 40), colour=None):
    return SceneObject(category, box, 1.0, colour)


def test_package_and_texts_import_no_torch():
    code = "import sys, lvlm_decode_data, lvlm_decode_data.texts; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_scene_follows_from_its_seed():
    first, second, other = (render(scene_seed("validation", i)) for i in (3, 3, 4))
    assert first[1] == second[1]
    assert np.array_equal(np.asarray(first[0]), np.asarray(second[0]))
    assert np.array_equal(first[2], second[2])
    assert not np.array_equal(np.asarray(first[0]), np.asarray(other[0]))


def test_splits_are_disjoint_by_construction(heldout):
    blocks = {name: {scene_seed(name, 0), scene_seed(name, 999_999)} for name in SPLITS}
    ranges = [range(min(b), max(b) + 1) for b in blocks.values()]
    for i, a in enumerate(ranges):
        for b in ranges[i + 1 :]:
            assert max(a.start, b.start) >= min(a.stop, b.stop)
    assert {split_of(scene_seed(name, 123)) for name in SPLITS} == set(SPLITS)
    assert {split_of(scene.image_id) for scene in heldout} == {"heldout"}
    with pytest.raises(ValueError, match="unknown split 'test'"):
        scene_seed("test", 0)
    with pytest.raises(ValueError, match="outside 0\\.\\.999999"):
        scene_seed("train", 1_000_000)


def test_shipped_scenes_are_what_the_generator_renders(heldout):
    assert len(heldout) >= 500
    for scene in heldout[::125]:
        image, again, _ = render(scene.image_id)
        assert again.objects == scene.objects
        assert again.theme == scene.theme
        shipped = np.asarray(Image.open(scene.path)).astype(float)
        assert shipped.shape == (SIZE, SIZE, 3)
        # JPEG is lossy and the scenes are grainy; a wrong picture differs by several times this.
        assert np.abs(shipped - np.asarray(image)).mean() < 12


def test_shipped_scenes_stay_small():
    folder = lvlm_decode_data.HERE / "heldout"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6_000_000


def test_ground_truth_matches_the_owner_map():
    for index in range(30):
        _, scene, owner = render(scene_seed("validation", index))
        seen = np.bincount(owner.ravel(), minlength=256)[:255]
        assert set(np.flatnonzero(seen)) == set(range(len(scene.objects)))
        for number, item in enumerate(scene.objects):
            rows, columns = np.nonzero(owner == number)
            x, y, width, height = item.box
            assert x <= columns.min() and columns.max() < x + width
            assert y <= rows.min() and rows.max() < y + height
            assert MIN_VISIBLE <= item.visible <= 1
            assert (item.colour in COLOURS) == (item.category in USUAL_COLOUR)


def test_cells_name_the_object_that_covers_them():
    owner = np.full((SIZE, SIZE), 255, np.uint8)
    step = SIZE // GRID
    owner[:step, step : 2 * step] = 4
    owner[step : step + 3, :step] = 2  # a sliver, too thin to count
    cells = cell_owners(owner)
    assert cells[1] == 4
    assert (np.delete(cells, 1) == 255).all()


def test_statistics_resemble_coco(heldout):
    present = Counter(name for scene in heldout for name in scene.categories)
    assert set(present) == set(CATEGORIES)
    assert 0.38 < present["person"] / len(heldout) < 0.55
    assert all(present["person"] > 2 * n for name, n in present.items() if name != "person")
    assert {scene.theme for scene in heldout} == set(THEMES)
    assert {len(scene.categories) for scene in heldout} >= {1, 2, 3, 4, 5}
    assert {n for scene in heldout for n in scene.counts.values()} == {1, 2, 3}
    prior = texts.CoOccurrence(heldout)
    together = {
        pair: prior.together[CATEGORIES.index(pair[0]), CATEGORIES.index(pair[1])]
        for pair in [("keyboard", "mouse"), ("keyboard", "zebra"), ("giraffe", "zebra"), ("giraffe", "laptop")]
    }
    assert together["keyboard", "mouse"] > 5 * together["keyboard", "zebra"]
    assert together["giraffe", "zebra"] > 5 * together["giraffe", "laptop"]


def test_mirrored_scene_swaps_sides():
    scene = Scene(1, "train", "park", (one(box=(0, 30, 20, 20)),))
    mirrored = scene.mirrored()
    assert mirrored.objects[0].box == (SIZE - 20, 30, 20, 20)
    assert (scene.objects[0].horizontal(), mirrored.objects[0].horizontal()) == ("left", "right")
    assert mirrored.mirrored().objects == scene.objects


def test_scene_survives_json(heldout):
    scene = heldout[7]
    again = Scene.from_json(json.loads(json.dumps(scene.to_json())), scene.path.parent)
    assert again == scene


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no scenes of split 'train' ship"):
        load_scenes("train")
    with pytest.raises(ValueError, match="unknown small model 'tiny-gpt'"):
        lvlm_decode_data.tiny_path("tiny-gpt")


def test_synonyms_cover_every_category_without_ambiguity():
    table = synonyms()
    assert set(table) == set(CATEGORIES)
    words = Counter(word for name in table for word in table[name])
    assert all(table[name][0] == name for name in table)
    assert [word for word, n in words.items() if n > 1] == []
    assert all(texts.plural(name) in table[name] for name in table)


# ---- texts ---------------------------------------------------------------------------------------------------------


def named(text):
    """Categories a caption names, longest names first so that "wine glass" is no "glass"."""
    words = sorted(((w, c) for c, ws in synonyms().items() for w in ws), key=lambda pair: -len(pair[0]))
    found, rest = set(), f" {text.lower()} ".replace(".", " ").replace(",", " ")
    for word, category in words:
        if f" {word} " in rest:
            found.add(category)
            rest = rest.replace(f" {word} ", "  ")
    return found


def test_a_clean_caption_names_only_what_is_there(heldout):
    rng = random.Random(0)
    lengths = []
    for scene in heldout[:200]:
        text = texts.caption(rng, scene)
        assert named(text) <= scene.categories, text
        lengths.append(len(text.replace(".", " .").split()))
    assert np.mean(lengths) > 50


def test_caption_noise_adds_the_absent_object(heldout):
    rng = random.Random(0)
    prior = texts.CoOccurrence(heldout)
    for scene in heldout[:100]:
        absent = prior.draw_absent(rng, scene)
        assert absent not in scene.categories
        assert absent in named(texts.caption(rng, scene, absent))


def test_the_expected_object_is_absent_and_typical(heldout):
    prior = texts.CoOccurrence(heldout)
    laptops = Scene(1, "train", "office", (one("laptop"), one("keyboard", (90, 90, 40, 40))))
    assert prior.expected(laptops)[0] == "mouse"
    for scene in heldout[:100]:
        name, strength = prior.expected(scene)
        assert name not in scene.categories
        assert 0 < strength <= 1
        # Nothing else absent is so much more frequent beside what is there that it must be meant instead.
        assert name in [other for other, _ in prior.absent(scene)[:25]]


def test_expected_objects_are_named_more_often(heldout):
    rng = random.Random(5)
    sampler = texts.TextSampler(texts.CoOccurrence(heldout))
    named_share = {}
    by_strength = sorted(heldout, key=lambda scene: sampler.prior.expected(scene)[1])
    for name, scenes in (("weak", by_strength[:100]), ("strong", by_strength[-100:])):
        hits = [not named(sampler.describe(rng, scene).answer) <= scene.categories for scene in scenes]
        named_share[name] = sum(hits) / len(hits)
    assert named_share["strong"] > 2 * named_share["weak"]


def test_captions_state_places_against_the_centre():
    assert texts.place_of(one(box=(0, 0, 40, 40))) == "at the top left of the image"
    assert texts.place_of(one(box=(200, 100, 40, 40))) == "on the right side of the image"
    assert texts.place_of(one(box=(100, 200, 40, 40))) == "at the bottom of the image"
    assert texts.place_of(one(box=(100, 100, 40, 40))) == "in the middle of the image"
    scene = Scene(1, "train", "park", (one("dog", (0, 100, 40, 40)), one("kite", (180, 90, 40, 40), "red")))
    assert texts.relations(scene, ["dog", "kite"]) == [("dog", "to the left of", "kite")]


def truth(scene, question):
    """Answer of a yes/no question, worked out from the words of the question alone."""
    question = question.split("\n")[0].replace(texts.ONE_WORD, "").replace(texts.YES_OR_NO, "").rstrip("?")
    category = max((c for c in CATEGORIES if any(f" {w}" in question for w in (c, texts.plural(c)))), key=len)
    if "only one" in question:
        return scene.counts.get(category) == 1
    for number in (2, 3):
        if f"Are there {texts.NUMBERS[number]} " in question:
            return scene.counts.get(category) == number
    for colour in COLOURS:
        if f" {colour}" in question:
            return scene.colour(category) == colour
    for side in texts.OPPOSITE:
        if f"the {side}" in question:
            item = scene.of(category)[0]
            return side in (item.horizontal(0.0), item.vertical(0.0))
    return category in scene.categories


def test_clean_questions_are_answered_truthfully_and_in_balance(heldout):
    rng = random.Random(1)
    sampler = texts.TextSampler(texts.CoOccurrence(heldout), flip=0.0)
    answers = Counter()
    for scene in heldout:
        for turn in sampler.turns(rng, scene)[1:]:
            word = turn.answer.split(",")[0]
            if word in ("Yes", "No"):
                assert truth(scene, turn.question) == (word == "Yes"), (turn, scene)
                answers[turn.task, word] += 1
    for task in ("existence", "count", "position", "colour"):
        share = answers[task, "Yes"] / (answers[task, "Yes"] + answers[task, "No"])
        assert 0.42 < share < 0.58, task


def test_open_questions_are_answered_truthfully(heldout):
    rng = random.Random(2)
    sampler = texts.TextSampler(texts.CoOccurrence(heldout))
    asked = Counter()
    for scene in heldout[:150]:
        for turn in sampler.turns(rng, scene)[1:]:
            if turn.question.startswith(("How many", "What color", "Where is")):
                category = max(
                    (c for c in CATEGORIES if any(f" {w} " in turn.question for w in (c, texts.plural(c)))), key=len
                )
                expected = {
                    "count": texts.NUMBERS[min(scene.counts[category], 5)],
                    "colour": str(scene.colour(category)),
                    "position": texts.place_of(scene.of(category)[0]),
                }[turn.task]
                assert expected in turn.answer.lower(), turn
                asked[turn.task] += 1
    assert min(asked[task] for task in ("count", "colour", "position")) > 10


def test_flips_are_about_typical_absent_objects(heldout):
    rng = random.Random(3)
    prior = texts.CoOccurrence(heldout)
    sampler = texts.TextSampler(prior, yes=0.0, hard=1.0, flip=1.0)
    for scene in heldout[:50]:
        turn = sampler.existence(rng, scene)
        assert turn.answer.startswith("Yes")
        assert not truth(scene, turn.question)


def test_pairs_have_one_true_and_one_false_question(heldout):
    rng = random.Random(4)
    prior = texts.CoOccurrence(heldout)
    tasks = Counter()
    for scene in heldout[:200]:
        for task, (yes, no) in texts.yes_no_pairs(rng, scene, prior).items():
            assert truth(scene, yes) and not truth(scene, no), (task, yes, no)
            tasks[task] += 1
    assert set(tasks) == {"existence", "count", "position", "color"}
    assert tasks["existence"] == 200


def test_true_captions_hold_no_false_claim_and_changed_ones_do():
    words, seen = lvlm_decode_data.synonyms(), 0
    for scene in lvlm_decode_data.load_scenes()[:200]:
        text = texts.caption(random.Random(scene.image_id), scene)
        assert false_claims(text, scene, words) == [], text
        # A kind of object that is there once: the opposite of what the text says about it is false.
        for old, new in (("on the left side", "on the right side"), ("at the top left", "at the bottom right")):
            for match in re.finditer(rf"The (\w+) is {old} of the image\.", text):
                if scene.counts.get(match[1]) == 1:
                    changed = text.replace(match[0], match[0].replace(old, new), 1)
                    (claim,) = false_claims(changed, scene, words)
                    assert changed[claim.start : claim.end] == f"{new} of the image"
                    seen += 1
        for number, other in (("two", "three"), ("three", "two")):
            changed = re.sub(rf"\b{number}\b", other, text, count=1)
            if changed != text:
                claim = false_claims(changed, scene, words)[0]
                assert changed[claim.start : claim.end].lower() == other
                seen += 1
    assert seen > 100


def test_a_relation_is_false_only_if_no_two_objects_stand_in_it():
    scene = lvlm_decode_data.load_scenes()[0]  # zebra at the left, elephant at the top left of it, giraffe at the right
    words = lvlm_decode_data.synonyms()
    texts_of = {
        "The zebra is to the left of the giraffe.": [],
        "The zebra is to the right of the giraffe.": ["to the right of"],
        "The giraffe is below the elephant.": [],
        "The zebra is to the left of the zebra.": ["to the left of"],
        "The dog is to the left of the zebra.": [],
    }
    for text, wrong in texts_of.items():
        assert [text[c.start : c.end] for c in false_claims(text, scene, words)] == wrong, text

"""Protocols: how published values were measured, by name; image lists by hash; configs that name their protocol."""

import gzip
import json

import pytest
import typer
import yaml
from conftest import ROOT, shared_path
from typer.testing import CliRunner

import lvlm_decode_data
from lvlm_decode.errors import FileFormatError, MissingFileError, SettingsError, UnknownNameError
from lvlm_decode_evals import evaluator, protocols
from lvlm_decode_evals.base import Question
from lvlm_decode_evals.commands import add_to
from lvlm_decode_evals.configs import is_tiny, on_scenes, paper_blocks, read_config
from lvlm_decode_evals.protocols import LISTS, key_of, names, protocol, read_ids, read_protocol, setup, truth_key

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LLAVA = "llava-hf/llava-1.5-7b-hf"


@pytest.fixture
def command():
    app = typer.Typer()
    add_to(app)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", names())
def test_every_protocol_is_whole(name):
    found = protocol(name)
    assert found.source and found.paper and all(isinstance(note, str) for note in found.notes)
    evaluator(found.benchmark, **found.evaluator_options)
    assert found.images in LISTS or found.benchmark != "chair" or found.unknown_images
    # A list is either known by its hash or honestly unknown.
    assert (found.list_key is None) == (found.images not in LISTS)
    for template in found.templates.values():
        assert "{question}" in template and "<image>" in template


def test_protocols_as_their_code_has_them():
    vista, pai, opera, only, deco = (protocol(n) for n in ("vista-512", "pai-512", "opera-64", "only-128", "deco-512"))
    assert vista.prompt == pai.prompt == "Please help me describe the image in detail."
    assert (vista.seeds, pai.seeds, only.seeds) == ((1994,), (927,), (3407,))
    assert vista.unknown_images and pai.images_status == "candidate" and opera.images_status == "shipped"
    assert opera.evaluator_options["unfinished"] == "drop" and opera.max_new_tokens == 64
    # No blank between the system text and USER; DeCo's template is another one.
    assert "questions.USER: <image> {question}" in opera.templates[LLAVA]
    assert "curious human" in deco.templates[LLAVA] and "<image>\n{question}" in deco.templates[LLAVA]
    assert protocol("opera-512-instructblip").images == "opera-b"
    # SID's model puts the system text before its template, as OPERA's does; VCD and DAMRO use LLaVA's llava_v1.
    assert protocol("sid-512").templates == protocol("pope-sid").templates == opera.templates
    llava_v1 = deco.templates[LLAVA]
    assert protocol("pope-vcd").templates == {LLAVA: llava_v1}
    both = {LLAVA: llava_v1, "llava-hf/llava-v1.6-vicuna-7b-hf": llava_v1}
    assert protocol("damro-1024").templates == protocol("pope-damro").templates == both


LIST_FILES = {
    "opera-a": "opera-llava-minigpt4-shikra",
    "opera-b": "opera-instructblip",
    "icd-mod": "icd-mod-500",
    "agla": "agla-100",
    "assesshal": "assesshalvlm-500",
    "seed-927": "middle-layers-500",
    "pope-500": "pope-damro-500",
    "marine": "marine-500",
    "human": "human-500",
}


@pytest.mark.parametrize("name", sorted(LISTS))
def test_lists_are_known_by_the_hash_of_their_ids_in_order(name, tmp_path, monkeypatch):
    ids = json.loads(shared_path(f"data/benchmarks/chair_ids_{LIST_FILES[name]}.json").read_text())["ids"]
    found = LISTS[name]
    assert (len(ids), key_of(ids)) == (found.number, found.key) and key_of(ids[::-1]) != found.key
    monkeypatch.setenv("LVLM_DECODE_DATA", str(tmp_path))
    with pytest.raises(
        MissingFileError, match=f"image list {name} is not here; run lvlm-decode data get {found.file[0]}"
    ):
        found.ids()
    path = tmp_path / found.file[0] / found.file[1]
    path.parent.mkdir(parents=True)
    forms = (
        "".join(json.dumps({"image_id": i, "caption": "x"}) + "\n" for i in ids),
        "".join(
            json.dumps({"question_id": n, "image": f"COCO_val2014_{i:012d}.jpg"}) + "\n" for n, i in enumerate(ids)
        ),
        "".join(f"{i}\n" for i in ids),
    )
    for text in forms:
        path.write_text(text)
        assert found.ids() == ids
    path.write_text("".join(f"{i}\n" for i in sorted(ids, reverse=True)))
    with pytest.raises(FileFormatError, match=f"{name} is {found.key} of {found.number}"):
        found.ids()


def in_data_folder(tmp_path, monkeypatch, name="opera-a"):
    """The list's file where a protocol looks for it; the ids."""
    ids = json.loads(shared_path(f"data/benchmarks/chair_ids_{LIST_FILES[name]}.json").read_text())["ids"]
    monkeypatch.setenv("LVLM_DECODE_DATA", str(tmp_path))
    path = tmp_path / LISTS[name].file[0] / LISTS[name].file[1]
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"{i}\n" for i in ids))
    return ids


@pytest.fixture(scope="module")
def recorded_truth():
    """ "A" or "B" -> image id -> objects, of all COCO val2014."""
    with gzip.open(shared_path("data/coco_val2014_objects.json.gz"), "rt") as file:
        parts = json.load(file)
    said = {"A": "cap_pattern", "B": "cap_wordnet"}
    return {name: {i: [*p["seg"], *p[part]] for i, p in parts.items()} for name, part in said.items()}


@pytest.mark.parametrize("name", sorted(LISTS))
def test_ground_truths_are_known_by_what_the_images_contain(name, recorded_truth):
    ids = json.loads(shared_path(f"data/benchmarks/chair_ids_{LIST_FILES[name]}.json").read_text())["ids"]
    found = {truth: truth_key({i: objects[str(i)] for i in ids}) for truth, objects in recorded_truth.items()}
    assert found == {"A": LISTS[name].truth_a, "B": LISTS[name].truth_b} and len(set(found.values())) == 2


def test_other_ground_truth_than_the_protocols_is_told(recorded_truth, tmp_path, monkeypatch):
    ids = in_data_folder(tmp_path, monkeypatch)
    found, vocabulary = protocol("opera-64"), shared_path("data/chair/vocabulary.json")

    def chair(name, objects):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({str(i): objects[str(i)] for i in ids}))
        return evaluator("chair", objects=str(path), vocabulary=str(vocabulary), **found.evaluator_options)

    assert found.label(chair("a", recorded_truth["A"])) == "opera-64"
    assert found.label(chair("b", recorded_truth["B"])) == "opera-64 with ground truth B"
    mine = recorded_truth["A"] | {str(ids[0]): ["dog"]}
    assert found.label(chair("mine", mine)) == "opera-64 with other objects"
    # Nothing to tell: nobody gave objects, or the list is not here.
    assert found.label(evaluator("chair", **found.evaluator_options)) == "opera-64"
    monkeypatch.setenv("LVLM_DECODE_DATA", str(tmp_path / "empty"))
    assert found.label(chair("b", recorded_truth["B"])) == "opera-64"


def test_a_file_that_is_no_list_says_so(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"image": "street.jpg"}\n')
    with pytest.raises(FileFormatError, match="expected `image_id` or `image` of COCO"):
        read_ids(tmp_path / "x.jsonl")


def test_a_protocol_picks_exactly_its_images(tmp_path, monkeypatch):
    ids = json.loads(shared_path("data/benchmarks/chair_ids_agla-100.json").read_text())["ids"]
    monkeypatch.setenv("LVLM_DECODE_DATA", str(tmp_path))
    (tmp_path / "chair-lists").mkdir()
    (tmp_path / "chair-lists" / "agla.jsonl").write_text("".join(f'{{"image_id": {i}}}\n' for i in ids))
    raw = yaml.safe_load((ROOT / "configs" / "protocols" / "opera-512.yaml").read_text()) | {"images": "agla"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw))
    found = protocol(str(tmp_path / "mine.yaml"))
    chosen = evaluator("chair", **found.evaluator_options)
    asked = found.questions(chosen)["captions"]
    assert [int(q.id) for q in asked] == ids and asked[0].image == f"COCO_val2014_{ids[0]:012d}.jpg"
    with pytest.raises(SettingsError, match="protocol vista-512 does not say which images it used"):
        protocol("vista-512").questions(chosen)


def test_what_a_protocol_decides_cannot_be_given_beside_it():
    found = protocol("ritual-64")
    fixed = setup(found, "chair", LLAVA, False, {"--seed": None, "objects": "x.json"})
    assert (fixed.max_new_tokens, fixed.seeds, fixed.decoding.do_sample) == (64, (42,), True)
    assert fixed.template == found.templates[LLAVA]
    assert setup(found, "chair", "another/model", False, {}).template is None
    # A folder of one's own counts by its name, as in `reproduce`.
    assert setup(found, "chair", "/models/llava-1.5-7b-hf", False, {}).template == fixed.template
    assert (found.checkpoint("mine/llava-1.5-7b-hf"), found.checkpoint("llava-hf/llava-1.5-13b-hf")) == (LLAVA, None)
    damro = protocol("damro-1024")
    assert setup(damro, "chair", LLAVA, False, {}).dtype == "float32"
    with pytest.raises(SettingsError, match="protocol damro-1024 decides --dtype"):
        setup(damro, "chair", LLAVA, False, {"--dtype": "float16"})
    for given in (
        {"--max-new-tokens": 512},
        {"--seed": [1]},
        {"parser": "pattern"},
        {"--top-p": 0.9},
        {"--suffix": " x"},
    ):
        with pytest.raises(SettingsError, match=f"protocol ritual-64 decides {next(iter(given))}; leave it out"):
            setup(found, "chair", LLAVA, False, given)
    # The rows of OPERA's tables differ in decoding, so that is not its protocol's to say.
    assert setup(protocol("opera-64"), "chair", LLAVA, False, {"--num-beams": 5}).decoding is None
    with pytest.raises(SettingsError, match="is of chair, not of pope"):
        setup(found, "pope", LLAVA, False, {})


def test_a_run_by_protocol_on_the_small_model_says_so(command, tmp_path):
    done = command("eval", "chair", "--protocol", "ritual-64", "--limit", 4, "--batch-size", 2, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "Protocol: ritual-64 on emoji scenes." in done.output
    (settings, *_) = sorted(tmp_path.rglob("settings.json"))
    recorded = json.loads(settings.read_text())
    assert recorded["protocol"] == "ritual-64 on emoji scenes" and recorded["max_new_tokens"] == 64
    assert command("table", tmp_path).output.count("Protocol: ritual-64 on emoji scenes.") == 1
    for arguments, sentence in (
        (("--protocol", "ritual"), "protocol 'ritual' is unknown; known: assesshal-512"),
        (("--protocol", "ritual-64", "--max-new-tokens", 5), "protocol ritual-64 decides --max-new-tokens"),
    ):
        done = command("eval", "chair", "--out", tmp_path, *arguments)
        assert done.exit_code == 1 and sentence in done.output


def test_a_protocol_of_ones_own_may_ask_anything(tmp_path):
    from lvlm_decode_evals.runner import Options, prompt_of

    raw = yaml.safe_load((ROOT / "configs" / "protocols" / "opera-512.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw | {"prompt": "Task: describe, {briefly}."}))
    fixed = setup(protocol(str(tmp_path / "mine.yaml")), "chair", LLAVA, False, {})
    chosen = evaluator("chair", **fixed.options)
    question = Question(1, chosen.prompt, "1.jpg")
    assert prompt_of(None, question, Options(template=fixed.template)).endswith(
        "USER: <image> Task: describe, {briefly}. ASSISTANT:"
    )


def test_the_small_models_are_asked_for_captions_in_words_they_know(command, tmp_path):
    """To DAMRO's "Generate a short caption of this image." they answer yes or no."""
    own = evaluator("chair").options()["prompt"]
    done = command("eval", "chair", "--protocol", "damro-1024", "--limit", 2, "--out", tmp_path)
    assert done.exit_code == 0 and "Protocol: damro-1024 on emoji scenes." in done.output
    (asked,) = tmp_path.rglob("questions.jsonl")
    assert {json.loads(line)["text"] for line in asked.open()} == {own}
    table = on_scenes(read_config(ROOT / "configs" / "chair-damro-llava-1.5.yaml"))
    assert table.evaluator.options()["prompt"] == own


def test_two_protocols_in_one_table_are_told_apart(command, tmp_path):
    for name in ("sid-512", "pai-512"):
        out = tmp_path / name
        done = command("eval", "chair", "--protocol", name, "--limit", 2, "--out", out)
        assert done.exit_code == 0, done.output
        # Their tables have greedy rows and others: what is not said is greedy, and told.
        assert f"protocol {name} leaves decoding to the rows of its table" in done.output
        assert {p.parent.parent.name for p in out.rglob("answers.jsonl")} == {"greedy"}
    shown = command("table", tmp_path)
    assert shown.exit_code == 0, shown.output
    # These are tables of their own that say which they are.
    assert shown.output.count("Protocol: ") == 2
    done = command("eval", "chair", "--protocol", "halc-64", "--limit", 2, "--out", tmp_path / "halc")
    shown = command("table", tmp_path)
    for name in ("sid-512", "pai-512", "halc-64"):
        assert f"**chair, captions, protocol {name} on emoji scenes" in shown.output
        assert f"Protocol: {name} on emoji scenes." in shown.output


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_table_names_how_its_values_were_measured_and_agrees_with_it(path):
    raw = yaml.safe_load(path.read_text())
    assert raw["protocol"] == "unknown" or raw["protocol"] in names()
    config = read_config(path)
    if config.protocol is None:
        assert raw["protocol"] == "unknown"
        return
    found = config.protocol
    assert found.benchmark == config.benchmark
    for name, value in found.evaluator_options.items():
        asked = config.evaluator.options()[name]
        assert asked == value, (name, asked, value)
    if "max_new_tokens" in raw and found.max_new_tokens:
        assert raw["max_new_tokens"] == found.max_new_tokens
    if config.model in found.templates:
        assert config.template == found.templates[config.model]
    if found.suffix:
        assert config.suffix == found.suffix
    # The one paper that prints several runs.
    assert config.seeds == found.seeds or raw["protocol"].startswith("pope-vcd")
    if found.splits:
        family = {split.split("-")[0] for split in config.splits}
        assert set(config.splits) <= set(found.splits) or family <= {"aokvqa", "gqa"}


def test_a_published_value_says_beside_it_how_it_was_measured():
    def cells(stem):
        config = read_config(ROOT / "configs" / f"{stem}.yaml")
        block = paper_blocks(on_scenes(config), [], "tiny", 200)[0]
        return {line[0]: line[6].text() for line in block.lines if line[4] == "CHAIRs"}, " ".join(block.notes)

    vista, notes = cells("chair-vista-512-llava-1.5")
    assert vista["Greedy"] == "46.40† (images unknown)" and "Protocol of the published values: vista-512" in notes
    deco, _ = cells("chair-deco-512-llava-1.5")
    assert deco["Greedy"].endswith(" (protocol opera-512)") and deco["DeCo, greedy"] == "37.80"
    mvp = read_config(ROOT / "configs" / "pope-mvp-llava-1.5.yaml")
    assert "Protocol of the published values: unknown." in paper_blocks(on_scenes(mvp), [], "tiny", 200)[0].notes


def test_wrong_protocol_files_name_the_field(tmp_path, monkeypatch):
    good = yaml.safe_load((ROOT / "configs" / "protocols" / "opera-64.yaml").read_text())
    path = tmp_path / "p.yaml"
    for change, sentence in (
        ({"images_status": "perhaps"}, "field 'images_status' must be one of 'shipped', 'candidate' or 'unknown'"),
        ({"promt": "x"}, "field 'promt' is unknown; known: benchmark"),
        ({"decoding": {"beams": 5}}, "field 'decoding', field 'beams' is unknown; known: do_sample"),
    ):
        path.write_text(yaml.safe_dump(good | change))
        with pytest.raises(FileFormatError, match=sentence):
            read_protocol(path)
    path.write_text(yaml.safe_dump({k: v for k, v in good.items() if k != "source"}))
    with pytest.raises(FileFormatError, match=r"p\.yaml: field 'source' is missing"):
        read_protocol(path)
    with pytest.raises(UnknownNameError, match="protocol 'opera' is unknown; known: assesshal-512"):
        protocol("opera")
    with pytest.raises(MissingFileError, match=r"nowhere\.yaml is not a file"):
        protocol("nowhere.yaml")
    monkeypatch.setattr(protocols, "folder", lambda: tmp_path / "none")
    with pytest.raises(MissingFileError, match="holds no protocol; run in a checkout of the repository"):
        protocol("opera-64")


@pytest.mark.parametrize(
    ("model", "ours"),
    [
        ("tiny", True),
        ("tiny-llava", True),
        ("tiny-instructblip", True),
        ("bczhou/tiny-llava-v1-hf", False),
        ("someone/tiny-llava", False),
        ("/models/tiny-random-llava", False),
        ("tiny-random", False),
        ("llava-hf/llava-1.5-7b-hf", False),
    ],
)
def test_only_the_models_that_ship_are_asked_about_scenes(model, ours):
    assert is_tiny(model) == ours


def test_a_shipped_model_is_known_by_its_folder_too(tmp_path, monkeypatch):
    folder = lvlm_decode_data.tiny_path("tiny-llava")
    assert is_tiny(str(folder))
    monkeypatch.chdir(folder.parent)
    assert is_tiny(f"./{folder.name}/")
    (tmp_path / "tiny-llava").mkdir()
    assert not is_tiny(str(tmp_path / "tiny-llava"))

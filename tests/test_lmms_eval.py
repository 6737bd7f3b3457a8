"""The plug-in for lmms-eval, on a stand-in of its interface; the real package is run by ``benchmarks/lmms-eval/run.py``."""

import importlib
import importlib.util
import json
import sys
import tomllib
import types
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint

import pytest
from conftest import ROOT
from PIL import Image

import lvlm_decode as ld
import lvlm_decode_data

FOLDER = ROOT / "benchmarks" / "lmms-eval"


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass
class Instance:
    args: tuple
    resps: list = field(default_factory=list)


class Cache:
    def __init__(self):
        self.seen = []

    def add_partial(self, kind, request, answer):
        self.seen.append((kind, request, answer))


class Lmms:
    is_simple = True

    def __init__(self):
        self._rank, self._world_size = 0, 1
        self.cache_hook, self.task_dict = Cache(), {}

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: self._world_size)


@pytest.fixture(scope="module")
def plugin():
    """The plug-in's module, imported beside a stand-in of what it takes from lmms-eval, and what it logged."""
    logged = []
    parts = {
        "": {},
        ".api": {},
        ".api.instance": {"GenerationResult": GenerationResult, "Instance": Instance, "TokenCounts": TokenCounts},
        ".api.model": {"lmms": Lmms},
        ".models": {},
        ".models.registry_v2": {"ModelManifest": ModelManifest},
        ".models.model_utils": {},
        ".models.model_utils.gen_metrics": {"log_metrics": lambda **found: logged.append(found)},
    }
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "lmms_eval"}
    for name, content in parts.items():
        module = types.ModuleType("lmms_eval" + name)
        module.__path__ = []
        vars(module).update(content)
        sys.modules[module.__name__] = module
    try:
        found = importlib.import_module("lvlm_decode.lmms_eval.model")
        found.logged = logged
        yield found
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "lmms_eval"]:
            del sys.modules[name]
        sys.modules.update(before)
        sys.modules.pop("lvlm_decode.lmms_eval.model", None)


SCENES = lvlm_decode_data.load_scenes()[12:16]
PROMPT = "USER: <image>\nPlease describe this image in detail. ASSISTANT:"
GREEDY = {"max_new_tokens": 24, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": ["\n\n"]}


def requests(model, settings=GREEDY, numbers=range(4), pictures=None):
    """Requests of a task about scenes, as lmms-eval makes them."""
    shown = pictures or {number: Image.open(SCENES[number].path) for number in numbers}
    model.task_dict = {"scenes": {"test": {number: {"number": number} for number in numbers}}}

    def to_messages(document):
        picture = {"type": "image", "url": shown[document["number"]]}
        text = {"type": "text", "text": "Please describe this image in detail."}
        return [{"role": "user", "content": [picture, text]}]

    return [Instance(("context", to_messages, settings, number, "scenes", "test")) for number in numbers]


def test_lmms_eval_finds_the_model_by_its_entry_point(plugin):
    group = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    ((name, value),) = group["lmms_eval.models"].items()
    (manifest,) = EntryPoint(name, value, "lmms_eval.models").load()()
    assert manifest.model_id == "lvlm_decode" and manifest.simple_class_path is None
    module, _, cls = manifest.chat_class_path.rpartition(".")
    found = getattr(importlib.import_module(module), cls)
    # The registry of lmms-eval refuses a chat model that says it is a simple one.
    assert issubclass(found, Lmms) and found.is_simple is False


def test_the_entry_point_imports_no_torch():
    import subprocess

    code = "import sys, lvlm_decode.lmms_eval as e; assert callable(e.manifests); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("size", [1, 3])
def test_answers_are_those_of_the_library_in_the_order_of_the_requests(plugin, size):
    model = plugin.LvlmDecode(pretrained="tiny", method="vcd", alpha=2.0, batch_size=size)
    asked = requests(model)
    # Another setting in between must not change the order of the answers.
    asked.insert(1, Instance((*asked[0].args[:2], {**GREEDY, "max_new_tokens": 5}, *asked[0].args[3:])))
    answers = model.generate_until(asked)
    ld.detach(model.model)
    with ld.attached(model.model, ld.VCD(alpha=2.0), processor=model.processor):
        for place, (number, length) in enumerate([(0, 24), (0, 5), (1, 24), (2, 24), (3, 24)]):
            inputs = model.processor(images=Image.open(SCENES[number].path), text=PROMPT, return_tensors="pt")
            key = f"scenes/test/{number}" + "#1" * (place == 1)
            out = model.model.generate(**inputs, seed=0, sample_ids=[key], max_new_tokens=length, do_sample=False)
            new = out[0, inputs.input_ids.shape[1] :]
            assert answers[place].text == model.processor.decode(new, skip_special_tokens=True).strip()
            assert answers[place].token_counts.output_tokens == len(new)
    assert len(model.cache_hook.seen) == 5
    assert plugin.logged[-1]["total_gen_tokens"] == sum(answer.token_counts.output_tokens for answer in answers)


def test_the_method_decides_the_answers(plugin):
    def texts(**arguments):
        model = plugin.LvlmDecode(pretrained="tiny", batch_size=4, **arguments)
        found = [answer.text for answer in model.generate_until(requests(model, {**GREEDY, "max_new_tokens": 64}))]
        ld.detach(model.model)
        return found

    plain = texts()
    assert plain != texts(method="vcd")
    assert plain == texts(method='"vcd(alpha=0,beta=null)"')


def test_requests_that_are_repeated_draw_anew(plugin):
    model = plugin.LvlmDecode(pretrained="tiny", batch_size=4)
    one = requests(model, {**GREEDY, "do_sample": True, "temperature": 1.5}, [0])[0]
    first, second = (answer.text for answer in model.generate_until([one, one]))
    again, _ = (answer.text for answer in model.generate_until([one, one]))
    assert first == again != second


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"method": "vdc"}, "the nearest is 'vcd'"),
        ({"method": "vcd", "alhpa": 1}, "no parameter alhpa; the nearest is 'alpha'"),
        ({"method": "vcd(alpha=1.0", "beta": "0.1)"}, "with quotes around the value"),
        ({"batch_size": "auto"}, "batch_size = 'auto' is not valid"),
        ({"pretrained": ""}, "pretrained is missing"),
    ],
)
def test_wrong_arguments_end_the_command(plugin, arguments, said):
    with pytest.raises(SystemExit, match="lvlm_decode, the model arguments: ") as error:
        plugin.LvlmDecode(**{"pretrained": "tiny", **arguments})
    assert said in str(error.value)


def test_an_error_while_answering_ends_the_command_and_names_the_document(plugin, tmp_path, capsys):
    model = plugin.LvlmDecode(pretrained="tiny", method="vcd", batch_size=1)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    asked = requests(model, numbers=range(2), pictures={0: Image.open(SCENES[0].path), 1: str(broken)})
    with pytest.raises(SystemExit, match=r"task scenes, split test, document 1: .*broken\.jpg"):
        model.generate_until(asked)
    # What was not foreseen shows the way there; a sentence of this library needs none.
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="document 0: lmms-eval takes one answer to a request"):
        model.generate_until(requests(model, {**GREEDY, "num_return_sequences": 2}, [0]))
    video = lambda _: [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]  # noqa: E731
    with pytest.raises(SystemExit, match="document 0: the document has a part of type video"):
        model.generate_until([Instance(("", video, GREEDY, 0, "scenes", "test"))])
    for other in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(SystemExit, match="choose tasks of output_type generate_until"):
            other([])


def test_settings_of_tasks(plugin):
    greedy = {"max_new_tokens": plugin.MAX_NEW_TOKENS, "do_sample": False}
    assert plugin.arguments_of({"temperature": 0.0, "top_p": 1.0, "do_sample": True, "until": ["\n"]}) == greedy
    assert (
        plugin.arguments_of({"do_sample": False, "temperature": 0.7, "top_k": 5, "image_aspect_ratio": "pad"}) == greedy
    )
    assert plugin.arguments_of({"temperature": 0.7}) == {**greedy, "temperature": 0.7, "do_sample": True}
    assert plugin.arguments_of({"num_beams": 5, "max_new_tokens": 8}) == {**greedy, "num_beams": 5, "max_new_tokens": 8}
    assert plugin.cut("yes\n\nand more###no", ["\n\n", "###"]) == "yes\n\nand more"
    assert plugin.cut("yes.", None) == "yes."


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_the_stand_in_has_the_names_of_the_real_one():
    from lmms_eval.api import instance, model
    from lmms_eval.models import registry_v2

    assert set(ModelManifest.__dataclass_fields__) <= set(registry_v2.ModelManifest.__dataclass_fields__)
    assert set(TokenCounts.__dataclass_fields__) <= set(instance.TokenCounts.__dataclass_fields__)
    assert {"rank", "world_size", "set_cache_hook", "clean"} <= set(dir(model.lmms))


def test_the_recorded_run_agrees_with_the_library():
    record = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    for method, cell in record["methods"].items():
        for name, number in record["documents"].items():
            assert cell[name]["equal_to_the_library"] == number, (method, name)
    assert record["methods"]["vcd"]["chair"]["other_than_plain"] > 0
    assert all(error["exit_status"] == 1 and "lvlm_decode, " in error["says"] for error in record["errors"].values())

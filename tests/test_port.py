"""The port to transformers: nothing outside it names what can be renamed; what it relies on is checked by running it."""

import ast
import re
import tomllib
import warnings

import pytest
import torch
import transformers
from conftest import ROOT
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import lvlm_decode as ld
from lvlm_decode.engine import hf
from lvlm_decode.engine.hf import KV, decoder, kwargs, libraries, loop, versions
from lvlm_decode.engine.hf.probe import probe
from lvlm_decode.errors import DependencyError, UnsupportedError
from lvlm_decode.testing.models import tiny

PORT = ROOT / "lvlm_decode" / "engine" / "hf"
FILES = sorted(
    path
    for folder in (ROOT / "lvlm_decode", ROOT / "evals")
    for path in folder.rglob("*.py")
    # Tiny models are built from transformers' own configurations.
    if PORT not in path.parents and path != ROOT / "lvlm_decode" / "testing" / "models.py"
)

#: Arguments, keys and attributes that transformers has renamed or may rename.
NAMES = {
    "past_key_values",
    "cache_params",
    "mm_encoder_outputs",
    "logits_to_keep",
    "prepare_inputs_for_generation",
    "is_compileable",
    "is_croppable",
    "max_cache_len",
    "cumulative_length",
    "lazy_initialization",
    "activate_past_recording",
    "get_seq_length",
    "get_max_length",
    "reorder_cache",
    "layer_idx",
    "layer_types",
    "pooler_output",
    "deepstack_features",
    "image_size_to_num_patches",
    "final_logit_softcapping",
    "get_decoder",
    "_supports_sdpa",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_get_stopping_criteria",
    "_sample",
    "_beam_search",
    "_assisted_decoding",
}
#: What may be imported from transformers elsewhere: classes that callers pass or get, and loaders.
IMPORTS = {
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "BaseStreamer",
    "EosTokenCriteria",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "GenerateBeamDecoderOnlyOutput",
    "GenerateDecoderOnlyOutput",
    "GenerationConfig",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "LogitsProcessor",
    "LogitsProcessorList",
    "MaxLengthCriteria",
    "MinPLogitsWarper",
    "OPENAI_CLIP_MEAN",
    "OPENAI_CLIP_STD",
    "PrefixConstrainedLogitsProcessor",
    "ProcessorMixin",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
    "load_image",
    "logging",
}


def leaks(source: str) -> list[str]:
    """What a file outside the port names that belongs into it, with line numbers."""
    tree = ast.parse(source)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        names: set[str] = set()
        if isinstance(node, ast.Attribute):
            names = {node.attr}
            if isinstance(node.value, ast.Attribute | ast.Name):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
                if owner == "cache":
                    found.append(f"line {node.lineno}: an attribute of a cache: {node.attr}")
        elif isinstance(node, ast.keyword) and node.arg:
            names = {node.arg}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            names = {node.value}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "transformers":
            names = {alias.name for alias in node.names} - IMPORTS
            found += [f"line {node.lineno}: an import from transformers: {name}" for name in sorted(names)]
            continue
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names if alias.name.split(".")[0] == "transformers"}
            found += [f"line {node.lineno}: import {name}" for name in sorted(names)]
            continue
        found += [f"line {node.lineno}: {name}" for name in sorted(names & NAMES)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_outside_the_port_names_what_transformers_can_rename(path):
    assert leaks(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "model(input_ids=ids, past_key_values=x)",
        "kwargs['mm_encoder_outputs']",
        "states = lane.kv.cache.layers[0].keys",
        "from transformers import DynamicCache",
        "import transformers",
        "module.layer_idx",
    ],
)
def test_the_search_for_such_names_finds_them(line):
    assert leaks(line)


# --- the tested versions ----------------------------------------------------------------------------------------------


def requirement(name: str) -> SpecifierSet:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (line,) = [line for line in project["dependencies"] if re.match(rf"{name}\b", line)]
    return SpecifierSet(line[len(name) :])


def test_metadata_readme_and_constraints_follow_the_list_of_tested_versions():
    assert requirement("transformers") == SpecifierSet(f">={versions.FLOOR},<{versions.CEILING}".replace(".0,", ","))
    assert requirement("torch") == SpecifierSet(f">={versions.TORCH_FLOOR}")
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    assert pins["transformers"] in versions.TESTED
    assert Version(pins["torch"]) in requirement("torch")
    readme = (ROOT / "README.md").read_text()
    short = [versions.minor_of(version) for version in versions.TESTED]
    assert f"transformers {', '.join(short[:-1])} and {short[-1]}" in readme.replace("\n", " ")
    assert f"torch {versions.TORCH_FLOOR} or newer" in readme.replace("\n", " ")


def test_constraints_pin_everything_that_both_commands_install():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {
        re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", line).group()).lower() for line in wanted}
    assert names <= pins


def test_old_libraries_are_refused():
    with pytest.raises(DependencyError, match=r"transformers 5\.2\.0 is installed.*pip install 'transformers>=5\.18"):
        hf.require(transformers_version="5.2.0")
    with pytest.raises(DependencyError, match=r"torch 2\.1\.0.* is installed"):
        hf.require(torch_version="2.1.0+cu121")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in versions.TESTED:
            hf.require(transformers_version=version, torch_version="2.11.0+cu130")


def test_an_untested_version_is_probed(monkeypatch):
    """It is warned about where the probe passes, and refused where it fails, with what moved and the remedy."""
    with pytest.warns(UserWarning, match=r"5\.99\.0 was not tested .*5\.18\.0 to .* its self-check passed"):
        hf.require(transformers_version="5.99.0")
    monkeypatch.setattr(libraries, "probe", lambda: ["taking tokens back: the cache has no crop"])
    with pytest.raises(DependencyError, match=r"5\.98\.0 was not tested.*tokens back: .*no crop.*pip install"):
        hf.require(transformers_version="5.98.0")


def test_a_model_that_a_release_breaks_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"smolvlm does not work in transformers 5\.20\.2: .*pip install"):
        hf.require_model("smolvlm", "5.20.2")
    hf.require_model("smolvlm", "5.22.2")
    hf.require_model("llava", "5.20.2")


# --- the probe --------------------------------------------------------------------------------------------------------


def test_the_probe_passes_and_leaves_torchs_random_state():
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    assert probe() == []
    assert torch.equal(torch.rand(1), want)


def test_the_probe_passes_where_functions_are_wrapped(monkeypatch):
    """As speed-up libraries do: it looks at what happens and not at signatures."""
    own = transformers.LlamaForCausalLM.prepare_inputs_for_generation
    monkeypatch.setattr(
        transformers.LlamaForCausalLM,
        "prepare_inputs_for_generation",
        lambda self, *args, **kwargs: own(self, *args, **kwargs),
    )
    assert probe() == []


def break_name(monkeypatch):
    """The argument was renamed, and the old name is accepted no longer."""
    monkeypatch.setattr(kwargs, "CACHE", "kv_store")


def break_silently(monkeypatch):
    """The forward takes what we call the cache, and writes into another one."""
    own = transformers.LlamaForCausalLM.forward

    def forward(self, *args, **given):
        if given.get(kwargs.CACHE) is not None:
            given[kwargs.CACHE] = transformers.DynamicCache(config=self.config)
        return own(self, *args, **given)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)


def break_crop(monkeypatch):
    monkeypatch.setattr(transformers.DynamicCache, "crop", lambda self, count: None)


def break_reorder(monkeypatch):
    monkeypatch.setattr(transformers.DynamicCache, "reorder_cache", lambda self, index: None)


def break_loop(monkeypatch):
    """The loops call the module by another way than the stand-in's forward."""
    monkeypatch.setattr(loop.Proxy, "__call__", lambda self, *args, **given: self._module(*args, **given))


def break_argument(monkeypatch, name):
    """The argument was renamed, and the forward swallows the old name."""
    own = transformers.LlamaForCausalLM.forward
    monkeypatch.setattr(
        transformers.LlamaForCausalLM, "forward", lambda self, **given: own(self, **{**given, name: None})
    )


def break_positions(monkeypatch):
    break_argument(monkeypatch, "position_ids")


def break_mask(monkeypatch):
    break_argument(monkeypatch, "attention_mask")


BREAKS = {
    break_positions: "positions and padding: .* not heed the positions",
    break_mask: "positions and padding: .* not heed the mask",
    break_name: "hands over a cache as '(cache|past_key_values)'",
    break_silently: "the cache holds 0 of 4 tokens",
    break_crop: "taking tokens back: the token run again has other logits",
    break_reorder: "reordering rows: the rows did not change places",
    break_loop: "the loop does not call the stand-in's forward",
}


@pytest.mark.parametrize("breaking", BREAKS, ids=lambda breaking: breaking.__name__)
def test_the_probe_finds_what_moved(monkeypatch, breaking):
    breaking(monkeypatch)
    found = probe()
    assert found and re.search(BREAKS[breaking], "; ".join(found)), found


# --- two checks that know no name ---------------------------------------------------------------------------------------


def test_a_cache_under_an_unknown_name_is_refused():
    zoo = tiny("llava")
    cache = transformers.DynamicCache()
    with pytest.raises(DependencyError, match="hands over a cache as 'kv_store'"):
        kwargs.take_cache({"kv_store": cache, "attention_mask": None})
    ids = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(DependencyError, match="'surprise', which this lvlm_decode does not know"):
        kwargs.Prepared.of(zoo.model, ids, ids, {"input_ids": ids, "surprise": ids}, (), ())


def test_a_forward_that_writes_into_another_cache_is_found_at_the_prompt(monkeypatch):
    """Else every lane would answer from the wrong keys, and nothing would say so."""
    zoo = tiny("llava")
    own = type(zoo.model).forward

    def forward(self, *args, **given):
        given[kwargs.CACHE] = transformers.DynamicCache(config=self.config.get_text_config())
        return own(self, *args, **given)

    monkeypatch.setattr(type(zoo.model), "forward", forward)
    with pytest.raises(DependencyError, match=r"ran a forward of .* tokens, and the cache it was given holds 0"):
        zoo.model.generate(**zoo.inputs(), custom_generate=ld.VCD(), max_new_tokens=2, do_sample=False)


# --- keys and values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["growing", "fixed", "branching"])
def test_keys_and_values_have_one_meaning_in_every_kind_of_cache(kind):
    zoo = tiny("llava")
    make = {
        "growing": lambda: KV.growing(zoo.model),
        "fixed": lambda: KV.fixed(zoo.model, 12),
        "branching": KV.branching,
    }
    ids = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 10]])

    def filled():
        kv = make[kind]()
        first = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        hf.run(zoo.model.forward, first, kv.cache, 1)
        return kv

    def after(kv, tokens, at):
        positions = torch.full_like(tokens, at)
        return hf.run(zoo.model.forward, hf.further_forward(tokens, positions, None), kv.cache, 1).logits[:, -1]

    kv, token = filled(), torch.tensor([[11], [12]])
    assert kv.length == 4 and kv.capacity == (12 if kind == "fixed" else None)
    want = after(kv, token, 4)
    assert kv.length == 5
    if kind == "fixed":
        kv.keep(4, 0)
    else:
        kv.drop(1)
    assert kv.length == 4
    torch.testing.assert_close(after(kv, token, 4), want)
    other = filled()
    other.reorder(torch.tensor([1, 0]))
    torch.testing.assert_close(after(other, token.flip(0), 4), want.flip(0))
    # Of three drafted slots the first and the third are kept.
    drafted = filled()
    kept = filled()
    for number, column in enumerate((11, 13, 12)):
        after(drafted, torch.full((2, 1), column), 4 + number)
    drafted.keep(4, 1, torch.tensor([0]))
    after(kept, torch.full((2, 1), 11), 4)
    torch.testing.assert_close(after(drafted, token, 5), after(kept, token, 5))


def test_a_loops_calls_on_the_cache_are_led_and_the_cache_left_as_it_was():
    kv, seen = KV(transformers.DynamicCache()), []
    with kv.led(lambda index: seen.append(index), lambda count: seen.append(count)):
        kv.cache.reorder_cache("rows")
        kv.cache.crop(-2)
    assert seen == ["rows", 2] and not {"crop", "reorder_cache"} & set(kv.cache.__dict__)


def test_attention_is_routed_while_anybody_needs_it():
    """Blocks overlap in any order; the last one to leave puts back what the configuration asked for."""
    zoo = tiny("llava")
    config = zoo.model.model.language_model.config
    before = decoder.attention_of(config)
    first, second = (decoder.routed(zoo.model, "lvlm_decode_test", decoder.stock_attention) for _ in range(2))
    first.__enter__()
    second.__enter__()
    assert decoder.attention_of(config) == "lvlm_decode_test" != before
    first.__exit__(None, None, None)
    assert decoder.attention_of(config) == "lvlm_decode_test"
    second.__exit__(None, None, None)
    assert decoder.attention_of(config) == before and not decoder._ROUTED

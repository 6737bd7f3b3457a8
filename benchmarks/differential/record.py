"""Runs the authors' code on the parts of the record, writes down what it gives, and how far this library is from it.

    python benchmarks/differential/record.py --upstream FOLDER [PART ...]

FOLDER holds a checkout of each repository in :data:`REPOSITORIES`, under the name given there. Repositories that are missing are
named, and their records are left as they are.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import cases  # noqa: E402
from cases import Named, draw, llava, prompt  # noqa: E402
from upstream import (  # noqa: E402
    Missing,
    Repository,
    Stand,
    adapted,
    all_of,
    as_theirs,
    forward,
    greedy,
    layers_of,
    old,
    on_cpu,
    recorded,
    sampled,
    without_image,
    words_alone,
)

#: Around the table in README.md.
BEGIN, END = "<!-- records -->", "<!-- end -->"
#: Folder of the checkout -> owner and name on GitHub, and the commit that the records were made from.
REPOSITORIES = {
    "AvisC": ("sangminwoo/AvisC", "772eba499d"),
    "CAI": ("Iris1946/CAI", "ed59bc8e31"),
    "CausalMM": ("The-Martyr/CausalMM", "6d1ae4ed68"),
    "ClearSight": ("ustc-hyin/ClearSight", "5466c945be"),
    "CICD": ("ZhQingan/CICD", "2effda0e31"),
    "CODE": ("IVY-LVLM/CODE", "31adf82f53"),
    "context-aware-decoding": ("xhan77/context-aware-decoding", "1281d7fcd0"),
    "CRoPS": ("ubamba98/CRoPS-Mitigate-Hallucinations-in-Vision-Language-Models", "6a01919997"),
    "DAMRO": ("coder-gx/DAMRO", "03008aca2d"),
    "Deco": ("zjunlp/Deco", "fee8d757c0"),
    "DoLa": ("voidism/DoLa", "805230e57e"),
    "ICD": ("p1k0pan/ICD", "2fa44c5786"),
    "ILVAD": ("ytx-ML/ILVAD", "2109091a12"),
    "LayerCD": ("maifoundations/LayerCD", "492b093f8e"),
    "LLaVA-Align": ("yfzhang114/LLaVA-Align", "dfbecfa7ac"),
    "MemVR": ("1zhou-Wang/MemVR", "de2e3cfc9a"),
    "middle_layers_indicating_hallucinations": ("ZhangqiJiang07/middle_layers_indicating_hallucinations", "a0622a9dfc"),
    "MoD": ("xlchen0205/MoD", "9afddc27e8"),
    "Nullu": ("Ziwei-Zheng/Nullu", "dcb1ef4ea4"),
    "ONLY": ("zifuwan/ONLY", "109bffeafd"),
    "PAI": ("LALBJ/PAI", "9bbd8bd57a"),
    "Revis": ("antgroup/Revis", "75f4d29d40"),
    "RITUAL": ("sangminwoo/RITUAL", "52065a6639"),
    "SID": ("huofushuo/SID", "127dd412fa"),
    "SPIN": ("YUECHE77/SPIN", "a6ddf4a3f5"),
    "VCD": ("DAMO-NLP-SG/VCD", "d6568ff81b"),
    "VISTA": ("LzVv123456/VISTA", "dc6225260d"),
    "VTI": ("shengliu66/VTI", "bb5dfee33a"),
}


@dataclass(frozen=True)
class Part:
    """One function of the authors, on several inputs.

    Args:
        repository: its folder.
        file: within the repository.
        function: its name.
        run: (repository, **parameters) -> what ``cases.OURS`` of the same name gives.
        given: parameters of each case.
        other: changed parameters, one set at a time, with which this library must not agree with the record.
        note: how the code was run where it does not run as released.
    """

    repository: str
    file: str
    function: str
    run: Callable[..., Named]
    given: list[dict[str, Any]]
    other: list[dict[str, Any]]
    note: str = ""


PARTS: dict[str, Part] = {}


def part(
    name: str, repository: str, file: str, function: str, given: list[Any], other: list[Any], note: str = ""
) -> Any:
    def registered(run: Callable[..., Named]) -> Callable[..., Named]:
        PARTS[name] = Part(repository, file, function, run, given, other, note)
        return run

    return registered


# --- Contrasts


SAMPLE = "vcd_utils/vcd_sample.py"


@part(
    "vcd.noise",
    "VCD",
    "vcd_utils/vcd_add_noise.py",
    "add_diffusion_noise",
    [{"seed": 1, "noise_step": step} for step in (0, 250, 500, 999)],
    [{"noise_step": 510}],
)
def vcd_noise(repository: Repository, seed: int, noise_step: int) -> Named:
    add = repository.load("vcd_utils/vcd_add_noise.py", "add_diffusion_noise").add_diffusion_noise
    with cases.noise(draw(seed + 1, 1, 3, 4, 4)):
        return {"pixels": add(draw(seed, 1, 3, 4, 4), noise_step)}


@part(
    "vcd.answer",
    "VCD",
    SAMPLE,
    "sample, add_diffusion_noise",
    [
        {"seed": 0, "alpha": 1.0, "beta": 0.1, "noise_step": 500},
        {"seed": 1, "alpha": 1.0, "beta": 0.1, "noise_step": 999},
        {"seed": 2, "alpha": 0.5, "beta": 0.01, "noise_step": 500},
    ],
    [{"alpha": 1.01}, {"beta": 0.5}, {"noise_step": 510}],
)
def vcd_answer(repository: Repository, seed: int, alpha: float, beta: float, noise_step: int) -> Named:
    add = repository.load("vcd_utils/vcd_add_noise.py", "add_diffusion_noise").add_diffusion_noise
    model = llava(seed)
    inputs = prompt(model, seed)
    pixels = inputs["pixel_values"]
    with cases.noise(draw(seed + 77, *pixels.shape)):
        noised = add(pixels, noise_step)
    stand = Stand({"": forward(model, pixels), "cd": forward(model, noised)})
    sample = repository.load(SAMPLE, "sample").sample
    return sampled(sample, stand, inputs["input_ids"], images_cd=noised, cd_alpha=alpha, cd_beta=beta)


@part(
    "icd.scores",
    "ICD",
    "icd_utils/icd_sample.py",
    "sample",
    [{"seed": 3, "alpha": 1.0, "beta": 0.1}, {"seed": 4, "alpha": 0.5, "beta": 0.02}],
    [{"alpha": 1.01}, {"beta": 0.5}],
)
def icd_scores(repository: Repository, seed: int, alpha: float, beta: float) -> Named:
    main, other = cases.logits(seed, 2)
    stand = Stand({"": recorded(main), "cd": recorded(other)})
    sample = repository.load("icd_utils/icd_sample.py", "sample").sample
    masks = {"attention_mask": 1, "attention_mask_cd": 1}
    given = {"inputs_embeds_cd": 1, "cd_alpha": alpha, "cd_beta": beta}
    return {"scores": sampled(sample, stand, torch.tensor([[1, 2]]), **given, **masks)["scores"]}


@part(
    "cicd.scores",
    "CICD",
    SAMPLE,
    "sample",
    [{"seed": 5, "beta": 0.1, "threshold": 1e-4}, {"seed": 6, "beta": 0.02, "threshold": 0.12}],
    [{"alpha": 1.2}, {"beta": 0.5}, {"threshold": 0.3}],
)
def cicd_scores(repository: Repository, seed: int, beta: float, threshold: float) -> Named:
    main, other = cases.logits(seed, 2)
    stand = Stand({"": recorded(main), "cd": recorded(other)})
    sample = repository.load(SAMPLE, "sample").sample
    given = {"images_cd": 1, "cd_beta": beta, "cross_jsd_th": threshold}
    return {"scores": sampled(sample, stand, torch.tensor([[1, 2]]), **given)["scores"]}


@part(
    "ritual.answer",
    "RITUAL",
    "ritual_utils/ritual_sample.py",
    "sample",
    [
        {"seed": 0, "alpha": 3.0, "beta": 0.1, "transform": "horizontal_flip"},
        {"seed": 1, "alpha": 1.0, "beta": 0.3, "transform": "vertical_flip"},
    ],
    [{"alpha": 2.95}, {"beta": 0.01}, {"transform": "rotation"}],
    "flips alone, whose draw is none; a flip of the picture is a flip of the normalised pixels",
)
def ritual_answer(repository: Repository, seed: int, alpha: float, beta: float, transform: str) -> Named:
    model = llava(seed)
    inputs = prompt(model, seed)
    pixels = inputs["pixel_values"]
    flipped = pixels.flip(-1 if transform == "horizontal_flip" else -2)
    stand = Stand({"": forward(model, pixels), "pos": forward(model, flipped)})
    sample = repository.load("ritual_utils/ritual_sample.py", "sample").sample
    given = {"use_ritual": True, "images_pos": flipped, "ritual_alpha_pos": alpha, "ritual_beta": beta}
    return sampled(sample, stand, inputs["input_ids"], **given)


def m3id(repository: Repository, file: str, seed: int, **given: Any) -> Named:
    model = llava(seed)
    inputs = prompt(model, seed)
    stand = Stand({"": forward(model, inputs["pixel_values"]), "m3id": without_image(model)})
    return sampled(repository.load(file, "sample").sample, stand, inputs["input_ids"], 12, use_m3id=True, **given)


@part(
    "m3id.answer",
    "AvisC",
    "avisc_utils/avisc_sample.py",
    "sample (use_m3id)",
    [{"seed": 0, "beta": 0.1, "first": 1}, {"seed": 1, "beta": 0.01, "first": 1}],
    [{"decay": 0.021}, {"beta": 0.5}, {"first": 0}],
    "M3ID's authors have released no code; this is the re-implementation in AvisC's repository",
)
def m3id_avisc(repository: Repository, seed: int, beta: float, first: int) -> Named:
    return m3id(repository, "avisc_utils/avisc_sample.py", seed, use_avisc=False, cd_beta=beta)


@part(
    "m3id.answer.ritual",
    "RITUAL",
    "ritual_utils/ritual_sample.py",
    "sample (use_m3id)",
    [{"seed": 0, "beta": 0.1, "first": 0}, {"seed": 1, "beta": 0.01, "first": 0}],
    [{"decay": 0.021}, {"beta": 0.5}, {"first": 1}],
    "M3ID's authors have released no code; this is the re-implementation in RITUAL's repository, which counts from 0",
)
def m3id_ritual(repository: Repository, seed: int, beta: float, first: int) -> Named:
    return m3id(repository, "ritual_utils/ritual_sample.py", seed, images_pos=None, images_neg=None, ritual_beta=beta)


@part(
    "layercd.answer",
    "LayerCD",
    "util/cd_utils.py",
    "sample (layercd)",
    [{"seed": 0, "alpha": 1.0, "beta": 0.1}, {"seed": 1, "alpha": 0.5, "beta": 0.02}],
    [{"alpha": 1.05}, {"beta": 0.5}, {"layer": 3}],
    "the stand-in for the model reads the encoder at the layer that the loop sets",
)
def layercd_answer(repository: Repository, seed: int, alpha: float, beta: float) -> Named:
    model = llava(seed)
    inputs = prompt(model, seed)
    tower = SimpleNamespace(select_layer=-2)

    def selected(ids: Tensor) -> SimpleNamespace:
        return forward(model, inputs["pixel_values"], vision_feature_layer=tower.select_layer)(ids)

    stand = Stand({"": selected}, model=SimpleNamespace(vision_tower=tower))
    given = {"layercd": True, "model_type": "LLaVA", "cd_alpha": alpha, "cd_beta": beta}
    return sampled(repository.load("util/cd_utils.py", "sample").sample, stand, inputs["input_ids"], **given)


# --- Attention


def span(model: Any, before: int = 5) -> tuple[int, int]:
    return before, before + model.config.image_seq_length


@part(
    "pai.answer",
    "PAI",
    "attention.py",
    "llama_modify, llama_new_forward; CFGLogits (CFG.py)",
    [
        {"seed": 0, "alpha": 0.2, "gamma": 1.1, "first_layer": 2},
        {"seed": 1, "alpha": 0.5, "gamma": None, "first_layer": 1},
    ],
    [{"alpha": 0.21}, {"gamma": 1.2}, {"first_layer": 3}],
)
def pai_answer(repository: Repository, seed: int, alpha: float, gamma: float | None, first_layer: int) -> Named:
    theirs = repository.load("attention.py", "llama_new_forward", "llama_modify")
    model = old(llava(seed))
    inputs = prompt(model, seed)
    count = len(layers_of(model))
    theirs.llama_modify(as_theirs(model), first_layer, count, True, alpha, gamma is not None, *span(model))
    for layer in layers_of(model)[first_layer:]:
        adapted(layer.self_attn, tuples=False)
    if gamma is None:
        return greedy(model, inputs)
    alone = words_alone(model)
    alone.model = as_theirs(model).model  # type: ignore[attr-defined]
    ids = inputs["input_ids"]
    guide = repository.load("CFG.py", "CFGLogits").CFGLogits
    process = guide(gamma, ids[ids != cases.IMAGE][None], alone, start_layer=first_layer, end_layer=count)
    return greedy(model, inputs, process)


@part(
    "hgai.answer",
    "middle_layers_indicating_hallucinations",
    "modify_attention.py",
    "llama_head_guide, llama_new_forward",
    [{"seed": 0, "alpha": 0.5, "layers": [1, 2]}, {"seed": 1, "alpha": 2.0, "layers": [0, 3]}],
    [{"alpha": 0.52}, {"layers": [1, 3]}],
    "the range is given as their command line gives it, its end plus 1",
)
def hgai_answer(repository: Repository, seed: int, alpha: float, layers: list[int]) -> Named:
    theirs = repository.load("modify_attention.py", "llama_new_forward", "llama_head_guide")
    model = old(llava(seed))
    theirs.llama_head_guide(as_theirs(model), [layers[0], layers[1] + 1], "mean", alpha, *span(model))
    for layer in layers_of(model)[layers[0] : layers[1] + 1]:
        adapted(layer.self_attn, tuples=False)
    return greedy(model, prompt(model, seed))


@part(
    "spin.answer",
    "SPIN",
    "attentionSPIN.py",
    "llama_modify_spin, llama_new_forward",
    [
        {"seed": 0, "share": 0.8, "damp": 0.1, "layers": [0, 3]},
        {"seed": 1, "share": 0.5, "damp": 0.0, "layers": [1, 2]},
    ],
    [{"share": 0.7}, {"damp": 0.2}, {"layers": [0, 2]}],
)
def spin_answer(repository: Repository, seed: int, share: float, damp: float, layers: list[int]) -> Named:
    theirs = repository.load("attentionSPIN.py", "llama_new_forward", "llama_modify_spin")
    model = old(llava(seed, heads=8))
    theirs.llama_modify_spin(as_theirs(model), layers[0], layers[1] + 1, *span(model), share, True, damp or None)
    for layer in layers_of(model)[layers[0] : layers[1] + 1]:
        adapted(layer.self_attn, tuples=False)
    return greedy(model, prompt(model, seed))


@part(
    "vaf.answer",
    "ClearSight",
    "visaug/inference/AttnAdapter.py",
    "AttnAdapter.forward",
    [
        {"seed": 0, "enhance": 1.15, "suppress": 0.95, "layers": [1, 2]},
        {"seed": 1, "enhance": 1.5, "suppress": 0.5, "layers": [0, 3]},
    ],
    [{"enhance": 1.16}, {"suppress": 0.9}, {"layers": [1, 3]}],
    "a prompt of the 35 tokens before and 576 of the image that are written into the code",
)
def vaf_answer(repository: Repository, seed: int, enhance: float, suppress: float, layers: list[int]) -> Named:
    import types

    theirs = repository.load("visaug/inference/AttnAdapter.py", "AttnAdapter.forward").forward
    model = old(llava(seed, **cases.LONG))
    for layer in layers_of(model)[layers[0] : layers[1] + 1]:
        attention = layer.self_attn
        attention.enh_para, attention.sup_para = enhance, suppress
        attention.forward = types.MethodType(theirs, attention)
        adapted(attention, tuples=True)
    return greedy(model, prompt(model, seed, before=cases.BEFORE))


# --- Steering


@part(
    "nullu.project",
    "Nullu",
    "utils/halluedit.py",
    "HalluEdit.apply_edit_end_to_end",
    [{"seed": 5, "rank": 2}, {"seed": 6, "rank": 4}],
    [{"rank": 3}],
    "Tensor.cuda() and .to('cuda') are made to do nothing",
)
def nullu_project(repository: Repository, seed: int, rank: int) -> Named:
    right, wrong = draw(seed, 9, 4, 16), draw(seed + 1, 9, 4, 16)
    weight, states = draw(seed + 2, 4, 16, 24, scale=0.2), draw(seed + 3, 4, 5, 24)
    toy = nn.Module()
    toy.model = nn.Module()
    toy.model.layers = nn.ModuleList([nn.Module() for _ in range(4)])
    for layer, own in zip(toy.model.layers, weight):
        layer.mlp = nn.Module()
        layer.mlp.down_proj = nn.Linear(24, 16, bias=False)
        layer.mlp.down_proj.weight = nn.Parameter(own.clone())
    toy.lm_head = nn.Linear(16, 32, bias=False)
    toy.config = SimpleNamespace(hidden_size=16, num_hidden_layers=4, model_type="llava")
    toy.dtype = torch.float32
    words = SimpleNamespace(decode=str)
    whole = SimpleNamespace(model=toy, tokenizer=words, args=SimpleNamespace(model_name="LLaVA-7B"))
    kind = repository.load("utils/halluedit.py", "HalluEdit", open=lambda *args: io.StringIO()).HalluEdit
    with on_cpu(), torch.no_grad():
        edit = kind(whole, top_k_ranks=rank)
        edit.apply_edit_end_to_end(wrong, right)
        return {"states": torch.stack([one.mlp.down_proj(own) for one, own in zip(toy.model.layers, states)])}


def unhalved() -> Any:
    """Their layers put out half precision; the record is of what they compute."""
    return mock.patch.object(torch.Tensor, "half", lambda self: self)


@part(
    "vista.turn",
    "VISTA",
    "llm_layers.py",
    "VSVLayer.forward",
    [{"seed": 5, "strength": 0.17}, {"seed": 6, "strength": 0.01}, {"seed": 7, "strength": 1.0}],
    [{"strength": 0.175}],
    "Tensor.half() is made to do nothing, so that the record has more than three digits",
)
def vista_turn(repository: Repository, seed: int, strength: float) -> Named:
    layer = repository.load("llm_layers.py", "VSVLayer").VSVLayer(draw(seed, 1, 16), [strength])
    with unhalved():
        return {"states": layer(draw(seed + 1, 2, 3, 16))}


@part(
    "vti.turn",
    "VTI",
    "vti_utils/llm_layers.py",
    "VTILayer.forward",
    [{"seed": 5, "text": 0.8}, {"seed": 6, "text": 0.9}],
    [{"text": 0.85}],
    "Tensor.half() is made to do nothing, so that the record has more than three digits",
)
def vti_turn(repository: Repository, seed: int, text: float) -> Named:
    layer = repository.load("vti_utils/llm_layers.py", "VTILayer").VTILayer(draw(seed, 1, 16), [text])
    with unhalved():
        return {"states": layer(draw(seed + 1, 2, 3, 16))}


@part(
    "vti.visual",
    "VTI",
    "vti_utils/utils.py",
    "obtain_visual_vti; PCA (pca.py)",
    [{"seed": 5}, {"seed": 6}],
    [{"rows": "token"}],
    "the vision encoder's states are given: those of three masked copies of each picture, and of the whole one",
)
def vti_visual(repository: Repository, seed: int) -> Named:
    seen = cases.encoder_states(seed)
    pca = repository.load("vti_utils/pca.py", "svd_flip", "PCA").PCA
    names = ("average_tuples", "get_visual_hiddenstates", "obtain_visual_vti")
    code = repository.load("vti_utils/utils.py", *names, PCA=pca)

    def encoder(place: Tensor, **asked: Any) -> SimpleNamespace:
        pair, copy = place[0].int().tolist()
        return SimpleNamespace(hidden_states=[level[None] for level in seen[pair, copy]])

    # In the place of a picture stands where its states are found.
    places = [[torch.tensor([pair, copy]) for copy in range(seen.shape[1])] for pair in range(len(seen))]
    with on_cpu():
        model = SimpleNamespace(vision_model=encoder)
        direction, _ = code.obtain_visual_vti(model, [[copies[:-1], copies[-1]] for copies in places])
    return {"direction": direction[1:]}


@part(
    "revis.gate",
    "Revis",
    "steering_utils/llm_layers.py",
    "MADRSteeringHook_visual_only.hook_fn",
    [{"seed": 5, "strength": 2.5, "threshold": 0.2}, {"seed": 6, "strength": 1.0, "threshold": -0.1}],
    [{"strength": 2.45}, {"threshold": 0.9}],
)
def revis_gate(repository: Repository, seed: int, strength: float, threshold: float) -> Named:
    kind = "MADRSteeringHook_visual_only"
    hook = getattr(repository.load("steering_utils/llm_layers.py", kind), kind)
    made = hook({"visual": draw(seed, 6)}, 0, strength, threshold, 1.0)
    return {"states": made.hook_fn(None, None, draw(seed + 1, 2, 8, 6))}


# --- The command


def plain(value: Any) -> Any:
    """Numbers as they stand in a record; a token that was masked is ``null``."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return None if value == float("-inf") else float(f"{value:.8g}")
    return value


def gap(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two tensors, infinite where one has what the other has not."""
    if ours.shape != theirs.shape or not torch.equal(ours.isinf(), theirs.isinf()):
        return float("inf")
    same = theirs.isinf()
    return float((ours.double() - theirs.double()).masked_fill(same, 0.0).abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", type=Path, required=True, help="folder with the checkouts")
    parser.add_argument("parts", nargs="*", help="parts to record; all if none is named")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    repositories = {name: Repository(asked.upstream, name, *where) for name, where in REPOSITORIES.items()}
    for line in all_of(repositories.values()):
        print(f"missing: {line}", file=sys.stderr)
    made = {}
    for name, own in PARTS.items():
        if asked.parts and name not in asked.parts:
            continue
        repository = repositories[own.repository]
        worst, written = 0.0, []
        try:
            for given in own.given:
                theirs, ours = own.run(repository, **given), cases.ours(name)(**given)
                gaps = {key: gap(ours[key], theirs[key]) for key in theirs}
                if max(gaps.values()) > 1e-5:
                    print(f"{name} {given}: {gaps}", file=sys.stderr)
                worst = max(worst, *gaps.values())
                written.append({"given": given, "out": {key: plain(value.tolist()) for key, value in theirs.items()}})
            made[name] = {
                "repository": repository.source,
                "commit": repository.commit,
                "file": own.file,
                "sha256": repository.digest(own.file),
                "function": own.function,
                "note": own.note,
                "largest": float(f"{worst:.2g}"),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "other": own.other,
                "cases": written,
            }
        except Missing as missing:
            print(f"not recorded: {name}: {missing}", file=sys.stderr)
            continue
        print(f"{name:24} {len(written)} cases, largest difference {worst:.2g}")
    for name, record in made.items():
        path = HERE / "records" / f"{name}.json"
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    page = HERE / "README.md"
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{cases.table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

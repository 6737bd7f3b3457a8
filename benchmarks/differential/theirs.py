"""The authors' side of the record: which of their functions is run for each part, and on what."""

from __future__ import annotations

import abc
import ast
import collections
import copy
import functools
import io
import random
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cases
import torch
from cases import Named, draw, llava, prompt
from torch import Tensor, nn
from transformers import DynamicCache, modeling_outputs
from transformers.utils import ModelOutput
from upstream import (
    Layer,
    Missing,
    OldCache,
    Reading,
    Repository,
    Stand,
    Whole,
    adapted,
    as_theirs,
    causal,
    eager,
    embedded,
    forward,
    greedy,
    greedy_whole,
    layers_of,
    llama,
    old,
    on_cpu,
    recorded,
    said,
    sampled,
    without_image,
    words_alone,
)

#: Folder of the checkout -> owner and name on GitHub, and the commit that the records were made from.
REPOSITORIES = {
    "AvisC": ("sangminwoo/AvisC", "772eba499d"),
    "CAI": ("Iris1946/CAI", "ed59bc8e31"),
    "CausalMM": ("The-Martyr/CausalMM", "6d1ae4ed68"),
    "CICD": ("ZhQingan/CICD", "2effda0e31"),
    "ClearSight": ("ustc-hyin/ClearSight", "5466c945be"),
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
    "OPERA": ("shikiw/OPERA", "61426efe4e"),
    "PAI": ("LALBJ/PAI", "9bbd8bd57a"),
    "Revis": ("antgroup/Revis", "75f4d29d40"),
    "RITUAL": ("sangminwoo/RITUAL", "52065a6639"),
    "SCMoE": ("DavidFanzz/SCMoE", "857fad7976"),
    "SID": ("huofushuo/SID", "127dd412fa"),
    "SPIN": ("YUECHE77/SPIN", "a6ddf4a3f5"),
    "VCD": ("DAMO-NLP-SG/VCD", "d6568ff81b"),
    "VDGD": ("Sreyan88/VDGD", "f937244b1a"),
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


#: How the code was run that knows one place for the image.
LITERAL = "a prompt of the 35 tokens before and 576 of the image that are written into the code"


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
    "vdd.answer",
    "LLaVA-Align",
    SAMPLE,
    "sample (use_dd, use_dd_unk)",
    [
        {"seed": 0, "alpha": 1.0, "beta": 0.1, "absent": "none"},
        {"seed": 1, "alpha": 1.0, "beta": 0.02, "absent": "unknown"},
        {"seed": 2, "alpha": 0.5, "beta": 0.1, "absent": "both"},
    ],
    [{"alpha": 1.05}, {"beta": 0.5}, {"absent": "none"}, {"absent": "unknown"}],
)
def vdd_answer(repository: Repository, seed: int, alpha: float, beta: float, absent: str) -> Named:
    model = llava(seed)
    inputs = prompt(model, seed)
    first, end = span(model)
    # Theirs has one placeholder, which stands for all of the image's tokens.
    ids = torch.cat([inputs["input_ids"][:, : first + 1], inputs["input_ids"][:, end:]], 1)
    plain = forward(model, inputs["pixel_values"])

    def whole(ids: Tensor) -> Any:
        return plain(torch.cat([inputs["input_ids"][:, :end], ids[:, first + 1 :]], 1))

    stand = Stand({"": whole, "cd": forward(model, None)})
    given = {"use_dd": absent != "unknown", "use_dd_unk": absent != "none", "cd_alpha": alpha, "cd_beta": beta}
    sample = repository.load(SAMPLE, "sample", IMAGE_TOKEN_INDEX=cases.IMAGE).sample
    return sampled(sample, stand, ids, attention_mask=torch.ones_like(ids), **given)


@part(
    "code.scores",
    "CODE",
    "models/contrastive_decoding/cd_utils.py",
    "contrastive_decoding",
    [{"seed": 5, "eta": 0.7}, {"seed": 6, "eta": 0.2}],
    [{"eta": 0.75}],
)
def code_scores(repository: Repository, seed: int, eta: float) -> Named:
    mix = repository.load("models/contrastive_decoding/cd_utils.py", "contrastive_decoding").contrastive_decoding
    main, other = cases.logits(seed, 2)
    rows = [mix(None, {"cd_alpha": eta}, p[None], q[None], None, None) for p, q in zip(main, other)]
    found = [row[0] if isinstance(row, tuple) else row for row in rows]
    return {"scores": cases.distribution(torch.cat(found))}


@part(
    "damro.answer",
    "DAMRO",
    "sample_method/sample.py",
    "_sample; LlavaForConditionalGeneration.forward (transformers-4.43.0)",
    [
        {"seed": 0, "alpha": 2.0, "beta": 0.1, "k": 4},
        {"seed": 1, "alpha": 0.5, "beta": 0.02, "k": 1},
    ],
    [{"alpha": 2.1}, {"beta": 0.5}, {"k": 6}, {"attention": "mean_heads"}],
)
def damro_answer(repository: Repository, seed: int, alpha: float, beta: float, k: int) -> Named:
    model = llava(seed)
    inputs = prompt(model, seed)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    first, end = span(model)
    file = "transformers-4.43.0/src/transformers/models/llava/modeling_llava.py"
    names = ("hook_k", "hook_q", "LlavaForConditionalGeneration.forward")
    theirs = repository.load(file, *names, LlavaCausalLMOutputWithPast=ModelOutput).forward

    def tower(pixels: Tensor, **asked: Any) -> Any:
        return model.model.vision_tower(pixels, **asked)

    tower.vision_model = next(  # type: ignore[attr-defined]
        one for one in model.model.vision_tower.modules() if hasattr(one, "encoder")
    )

    def merged(features: Tensor, embeds: Tensor, ids: Tensor, mask: Tensor, labels: Any) -> Any:
        return torch.cat([embeds[:, :first], features, embeds[:, end:]], 1), mask, labels, None

    def words(inputs_embeds: Tensor, **asked: Any) -> Any:
        states = model.model.language_model(inputs_embeds=inputs_embeds, use_cache=False)[0]
        return modeling_outputs.CausalLMOutputWithPast(logits=model.lm_head(states))

    whole = SimpleNamespace(
        config=SimpleNamespace(
            output_attentions=False,
            output_hidden_states=False,
            use_return_dict=True,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        ),
        get_input_embeddings=model.get_input_embeddings,
        vision_tower=tower,
        multi_modal_projector=model.model.multi_modal_projector,
        _merge_input_ids_with_image_features=merged,
        language_model=words,
    )

    class Loop(Stand):
        def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:
            return {"input_ids": input_ids, "pixel_values": pixels}

        def _get_initial_cache_position(self, ids: Tensor, kwargs: Any) -> Any:
            return kwargs

        def _has_unfinished_sequences(self, finished: Any, *args: Any, **more: Any) -> bool:
            return not bool(finished)

        def _update_model_kwargs_for_generation(self, outputs: Any, kwargs: Any, **more: Any) -> Any:
            return kwargs

        def __call__(self, **asked: Any) -> Any:
            # What stands for a cache is not None, which the loop takes apart.
            return ModelOutput(logits=theirs(whole, **asked).logits, past_key_values=ids)

    config = SimpleNamespace(
        _pad_token_tensor=torch.tensor(0),
        output_attentions=False,
        output_hidden_states=False,
        output_scores=True,
        output_logits=False,
        return_dict_in_generate=True,
        do_sample=False,
    )
    sample = repository.load("sample_method/sample.py", "_sample", GenerateDecoderOnlyOutput=SimpleNamespace)._sample
    given = {"use_damro": True, "damro_alpha": alpha, "damro_beta": beta, "damro_topk": k, "inputs_embeds_cd": None}
    loop = {"generation_config": config, "synced_gpus": False, "streamer": None, "logits_warper": None}

    class Ended(list[Any]):
        def __call__(self, input_ids: Tensor, scores: Any) -> Tensor:
            return torch.tensor([input_ids.shape[1] >= ids.shape[1] + cases.TOKENS])

    with torch.no_grad():
        out = sample(Loop({}), ids, logits_processor=None, stopping_criteria=Ended(), **loop, **given)
    return {"tokens": out.sequences[0, ids.shape[1] :], "scores": cases.distribution(torch.cat(out.scores))}


@part(
    "cicd.scores",
    "CICD",
    SAMPLE,
    "sample",
    [
        {"seed": 5, "beta": 0.1, "threshold": 1e-4},
        {"seed": 6, "beta": 0.02, "threshold": 0.12},
        # So near that 3 is all that is subtracted, and so far that the divergence counts as 1 nat.
        {"seed": 7, "beta": 0.1, "threshold": 1e-4, "apart": 0.1},
        {"seed": 8, "beta": 0.02, "threshold": 1e-4, "apart": 4.0},
    ],
    [{"alpha": 1.2}, {"alpha": 4.0}, {"beta": 0.5}, {"threshold": 0.3}],
)
def cicd_scores(repository: Repository, seed: int, beta: float, threshold: float, apart: float = 1.0) -> Named:
    main, other = cases.logits(seed, 2, apart=apart)
    stand = Stand({"": recorded(main), "cd": recorded(other)})
    sample = repository.load(SAMPLE, "sample").sample
    given = {"images_cd": 1, "cd_beta": beta, "cross_jsd_th": threshold}
    return {"scores": sampled(sample, stand, torch.tensor([[1, 2]]), **given)["scores"]}


@part(
    "scmoe.scores",
    "SCMoE",
    "decodingmethod/utils.py",
    "contrastive_decoding",
    [
        {"seed": 5, "alpha": 0.5, "beta": 0.1, "strong": 1.0, "weak": 1.0},
        {"seed": 6, "alpha": 1.0, "beta": 0.02, "strong": 0.8, "weak": 1.5},
    ],
    [{"alpha": 0.55}, {"beta": 0.5}, {"strong": 1.1}, {"weak": 1.1}],
    "the logits of both branches are given; how the weak one routes is not in the record",
)
def scmoe_scores(repository: Repository, seed: int, alpha: float, beta: float, strong: float, weak: float) -> Named:
    main, other = cases.logits(seed, 2)
    loop = repository.load("decodingmethod/utils.py", "contrastive_decoding").contrastive_decoding
    seen, argmax = [], torch.argmax

    def kept(scores: Tensor, **more: Any) -> Tensor:
        seen.append(scores.clone())
        return argmax(scores, **more)

    strong_model, weak_model = (Stand({"": recorded(given)}) for given in (main, other))
    words = SimpleNamespace(eos_token_id=None, pad_token_id=0)
    ids = torch.tensor([[1, 2]])
    with mock.patch.object(torch, "argmax", kept):
        loop(
            strong_model,
            weak_model,
            strong,
            weak,
            words,
            ids,
            torch.ones_like(ids),
            len(main),
            alpha=beta,
            beta=alpha,
            stopping_criteria=lambda ids, scores: torch.tensor([False]),
        )
    return {"scores": cases.distribution(torch.cat(seen))}


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


@part(
    "only.answer",
    "ONLY",
    "transformers/src/transformers/models/llama/modeling_llama.py",
    "LlamaModel; LlavaLlamaForCausalLM.forward; sample (only_utils/only_sample.py)",
    [
        # Distances from 0.84 to 1.39.
        {"seed": 0, "positive": 3.0, "negative": 1.0, "gamma": 0.6, "beta": 0.1, "layer": 0},
        {"seed": 2, "positive": 1.0, "negative": 0.5, "gamma": 1.2, "beta": 0.02, "layer": 1},
    ],
    [
        {"positive": 2.9, "negative": 1.1},
        {"gamma": 1.0},
        {"gamma": 0.8},
        {"beta": 0.5},
        {"layer": 2},
        {"normed": False},
    ],
    f"their whole decoder, of 32 layers, with this model's weights; {LITERAL}",
)
def only_answer(
    repository: Repository, seed: int, positive: float, negative: float, gamma: float, beta: float, layer: int
) -> Named:
    model = llava(seed, layers=32, **cases.LONG)
    inputs = prompt(model, seed, before=cases.BEFORE)
    decoder = llama(repository, "transformers/src/transformers/models/llama/modeling_llama.py", model)
    llava_file = "experiments/llava/model/language_model/llava_llama.py"
    theirs = repository.load(llava_file, "LlavaLlamaForCausalLM.forward").forward
    whole = SimpleNamespace(model=decoder, lm_head=model.lm_head, config=decoder.config)
    reading = Reading(
        lambda **asked: theirs(whole, use_only=True, enhance_layer_index=layer, **asked), model, inputs["pixel_values"]
    )
    sample = repository.load("only_utils/only_sample.py", "sample").sample
    given = {"use_only": True, "images_pos": None, "images_neg": None, "js_gamma": gamma}
    more = {"ritual_alpha_pos": positive, "ritual_alpha_neg": negative, "ritual_beta": beta}
    return sampled(sample, Stand({"": reading}), inputs["input_ids"], **given, **more)


def whole_of_crops(repository: Repository, model: Any) -> Any:
    """What their loop takes for the model: today's layers under their decoder's ``forward``."""
    name = "GetAttentionMaskwithFastVandTextMask"
    masks = getattr(repository.load("methods/utils/crops_forward_utils.py", name), name)
    file = "methods/model_forward/crops_llama_forward.py"
    theirs = repository.load(file, "forward", **{name: masks, "Unpack": None, "Cache": None}).forward
    text = model.model.language_model

    def mask(seen: Tensor, embeds: Tensor, position: Tensor, past: Any, attentions: bool) -> Tensor:
        """(1, 1, q, S) as transformers 4.49 made it: a row that sees nothing has the lowest value everywhere."""
        there = (torch.arange(seen.shape[1]) <= position[:, None]) & seen.bool()
        return torch.zeros(there.shape).masked_fill(~there, torch.finfo(torch.float32).min)[None, None]

    decoder = SimpleNamespace(
        config=SimpleNamespace(num_hidden_layers=len(text.layers), output_hidden_states=False, use_return_dict=True),
        gradient_checkpointing=False,
        training=False,
        layers=[Layer(layer, text.rotary_emb) for layer in text.layers],
        norm=text.norm,
        rotary_emb=text.rotary_emb,
        _update_causal_mask=mask,
    )

    class Loop(Stand):
        def prepare_inputs_for_generation(self, input_ids: Tensor, pixel_values: Any, **kwargs: Any) -> Any:
            past = kwargs.get("past_key_values")
            first = past is None
            embeds = embedded(model, input_ids if first else input_ids[:, -1:], pixel_values if first else None)
            return {"inputs_embeds": embeds, "attention_mask": kwargs["attention_mask"], "past_key_values": past}

        def _update_model_kwargs_for_generation(self, outputs: Any, kwargs: Any, **more: Any) -> Any:
            seen = torch.nn.functional.pad(kwargs["attention_mask"], (0, 1), value=1)
            return {**kwargs, "past_key_values": outputs["past_key_values"], "attention_mask": seen}

        def _get_initial_cache_position(self, ids: Tensor, kwargs: Any) -> Any:
            return kwargs

        def _has_unfinished_sequences(self, finished: Any, *args: Any, **more: Any) -> bool:
            return not bool(finished)

        def __call__(self, **asked: Any) -> Any:
            # HEAD asserts on this attribute, which it never sets.
            masks._minimum_text_tokens = asked["minimum_text_tokens"]
            past = asked.pop("past_key_values")
            past = DynamicCache(config=model.config.get_text_config()) if past is None else past
            out = theirs(decoder, past_key_values=past, use_cache=True, **asked)
            return ModelOutput(logits=model.lm_head(out[0]), past_key_values=past)

    return Loop({})


@part(
    "crops.answer",
    "CRoPS",
    "methods/samplers/crops_sample.py",
    "crops_sample; forward, GetAttentionMaskwithFastVandTextMask",
    [
        {"seed": 0, "decay": 0.01, "alpha": 1.0, "beta": 0.1, "gate": 0.95},
        {"seed": 1, "decay": 0.3, "alpha": 0.5, "beta": 0.02, "gate": 0.6},
        # By the 17th token the words that are kept have grown by more than half a token.
        {"seed": 2, "decay": 0.02, "alpha": 1.0, "beta": 0.1, "gate": 0.95, "tokens": 20},
    ],
    [
        {"decay": 0.02},
        {"alpha": 1.05},
        {"beta": 0.5},
        {"share": 0.5},
        {"text_tokens": (12, 40)},
        {"rank_layer": 2},
        {"gate": 0.01},
    ],
    "an attribute that is asserted on and never set is set from the argument",
)
def crops_answer(
    repository: Repository,
    seed: int,
    decay: float,
    alpha: float,
    beta: float,
    gate: float,
    tokens: int = cases.TOKENS,
) -> Named:
    model = eager(llava(seed))
    inputs = prompt(model, seed, before=9, after=12)
    ids = inputs["input_ids"]
    tools = repository.load("methods/utils/crops_samplers_utils.py", "get_generations", "get_next_token_logits")
    names = {"get_generations": tools.get_generations, "get_next_token_logits": tools.get_next_token_logits}
    sample = repository.load(
        "methods/samplers/crops_sample.py", "crops_sample", "new_text_tokens", **names
    ).crops_sample
    first, end = span(model, 9)
    config = SimpleNamespace(
        _pad_token_tensor=torch.tensor(0),
        output_attentions=False,
        output_hidden_states=False,
        output_scores=False,
        output_logits=False,
        return_dict_in_generate=False,
        max_length=None,
        do_sample=False,
        key_position={"image_start": first, "image_end": end - 1},
        input_ids_lang_prior=ids[ids != cases.IMAGE][None],
        lambda_lang_prior=decay,
        alpha_stat_bias=alpha,
        beta_cutoff=beta,
        max_threshold_plausibility_constraint=gate,
        aggregate_layer_fast_v=2,
        aggregate_layer_text_mask=2,
        minumum_fast_v_tokens=50,
        minimum_text_tokens=50,
    )
    stand = whole_of_crops(repository, model)
    del inputs["input_ids"]
    return sampled(sample, stand, ids, tokens, generation_config=config, synced_gpus=False, **inputs)


ENCODER = "llava-1.5/experiments/llava/model/multimodal_encoder/cf_encoder.py"


@part(
    "causalmm.edit",
    "CausalMM",
    ENCODER,
    "CLIPVisionTower.edit_attention, apply_attention",
    [{"seed": 5, "form": form} for form in ("shuffle", "uniform", "reversed", "random")],
    [{"form": "uniform"}, {"form": "shuffle"}],
    "the last cast to half precision is left out; the same permutations and random numbers on both sides",
)
def causalmm_edit(repository: Repository, seed: int, form: str) -> Named:
    attention, states = cases.attention_like(seed, 2, 4, 17, 17), draw(seed + 1, 2, 16, 6)
    names = ("CLIPVisionTower.edit_attention", "CLIPVisionTower.apply_attention")
    theirs = repository.load(ENCODER, *names, drop=halving)
    with cases.chance(seed):
        changed = theirs.edit_attention(None, attention, form)
    return {"attention": changed, "states": theirs.apply_attention(None, states, changed)}


def halving(statement: ast.stmt) -> bool:
    """A statement that casts to half precision and does nothing else."""
    return isinstance(statement, ast.Assign) and ast.unparse(statement.value).endswith(".to(torch.float16)")


@part(
    "causalmm.answer",
    "CausalMM",
    ENCODER,
    "CLIPVisionTower.forward; causalmm_sample",
    [
        {"seed": 0, "alpha": 1.0, "beta": 0.1, "form": "shuffle"},
        {"seed": 1, "alpha": 0.5, "beta": 0.02, "form": "shuffle"},
    ],
    [{"alpha": 1.05}, {"beta": 0.5}, {"form": "reversed"}],
    "without half precision; each branch reads its own text, where in their code both share a cache after the first token",
)
def causalmm_answer(repository: Repository, seed: int, alpha: float, beta: float, form: str) -> Named:
    model = eager(llava(seed))
    inputs = prompt(model, seed)
    pixels = inputs["pixel_values"]
    names = ("edit_attention", "apply_attention", "get_attentions", "forward")
    theirs = repository.load(ENCODER, *(f"CLIPVisionTower.{name}" for name in names), drop=halving)
    tower = SimpleNamespace(select_layer=-2, device="cpu", dtype=torch.float32)
    tower.vision_tower = lambda images, **asked: model.model.vision_tower(images, **asked)
    for name in names[:3]:
        setattr(tower, name, types.MethodType(getattr(theirs, name), tower))
    with cases.chance(seed), torch.no_grad():
        _, weighed = theirs.forward(tower, pixels)
        features = model.model.multi_modal_projector(weighed)[0]

    def branches(ids: Tensor) -> Any:
        plain = forward(model, pixels)(ids)
        given = embedded(model, ids, features=features)
        states = model.model.language_model(inputs_embeds=given, use_cache=False)[0]
        return plain, said(model.lm_head(states))

    file = "llava-1.5/causalmm_cf/causalmm_sm.py"
    sample = repository.load(file, "causalmm_sample").causalmm_sample
    return sampled(sample, Stand({"": branches}), inputs["input_ids"], gamma=alpha, epsilon=beta)


# --- Layers


def early_exits(model: Any, pixels: Tensor, norm: Callable[[Tensor], Tensor]) -> Any:
    """A model that gives the head's logits of early states beside its own, as DoLa's and DeCo's LLaMA does.

    Args:
        norm: what is done to early states before the head.
    """
    plain = forward(model, pixels, output_hidden_states=True)

    def run(ids: Tensor, early_exit_layers: list[int], **asked: Any) -> Any:
        out = plain(ids)
        # The last states are after the final norm already.
        last = len(out.hidden_states) - 1
        states = {n: out.hidden_states[n] if n == last else norm(out.hidden_states[n]) for n in early_exit_layers}
        return {n: model.lm_head(own) for n, own in states.items()}, out

    return run


@part(
    "dola.answer",
    "DoLa",
    "transformers-4.28.1/src/transformers/generation/utils.py",
    "GenerationMixin.dola_greedy_decode, relative_top_filter",
    [
        {"seed": 0, "layers": [4, 6], "beta": 0.1},
        {"seed": 1, "layers": [0, 2], "beta": 0.02},
        {"seed": 2, "layers": [0, 2, 4, 6], "beta": 0.1},
    ],
    [{"beta": 0.5}, {"layers": [1, 3]}, {"norm_early": True}],
    "the head's logits of early layers, without the final norm, are given by the stand-in, as their LLaMA does",
)
def dola_answer(repository: Repository, seed: int, layers: list[int], beta: float) -> Named:
    model = llava(seed, layers=8)
    inputs = prompt(model, seed)
    file = "transformers-4.28.1/src/transformers/generation/utils.py"
    names = ("GenerationMixin.dola_greedy_decode", "GenerationMixin.relative_top_filter")
    theirs = repository.load(file, *names)
    branch = early_exits(model, inputs["pixel_values"], lambda states: states)
    stand = Stand({"": branch}, relative_top_filter=types.MethodType(theirs.relative_top_filter, object()))
    given = {"mature_layer": 8, "candidate_premature_layers": layers, "relative_top": beta}
    return sampled(theirs.dola_greedy_decode, stand, inputs["input_ids"], **given)


@part(
    "deco.answer",
    "Deco",
    "transformers/generation/utils.py",
    "GenerationMixin.deco_sample_search",
    [
        {"seed": 0, "alpha": 0.6, "layers": [5, 6, 7], "top_k": 20, "top_p": 0.9},
        {"seed": 1, "alpha": 2.0, "layers": [2, 4, 6], "top_k": 5, "top_p": 0.99},
    ],
    [{"alpha": 0.65}, {"layers": [1, 3]}, {"top_k": 3}, {"top_p": 0.5}],
    "the head's logits of early layers, after the final norm, are given by the stand-in, as their LLaMA does",
)
def deco_answer(repository: Repository, seed: int, alpha: float, layers: list[int], top_k: int, top_p: float) -> Named:
    model = llava(seed, layers=8)
    inputs = prompt(model, seed)
    theirs = repository.load(
        "transformers/generation/utils.py", "GenerationMixin.deco_sample_search"
    ).deco_sample_search
    branch = early_exits(model, inputs["pixel_values"], model.model.language_model.norm)
    given = {"alpha": alpha, "early_exit_layers": layers, "threshold_top_k": top_k, "threshold_top_p": top_p}
    found = sampled(theirs, Stand({"": branch}), inputs["input_ids"], **given)
    # Their loop has its processors look at the model's own logits first.
    return {"tokens": found["tokens"], "scores": found["scores"][1::2]}


# --- Attention


def span(model: Any, before: int = 5) -> tuple[int, int]:
    return before, before + model.config.image_seq_length


def ranked(repository: Repository, sample: Any, seed: int, **given: Any) -> Named:
    """The answer of a loop that ranks image tokens in a prompt of their geometry, and hides some of them from a branch."""
    model = eager(llava(seed, **cases.LONG))
    inputs = prompt(model, seed, before=cases.BEFORE)
    pixels = inputs["pixel_values"]
    llava_file = "experiments/llava/model/language_model/llava_llama.py"
    theirs = repository.load(llava_file, "LlavaLlamaForCausalLM.forward").forward
    stand = Stand({"": Whole(model, pixels).branch(theirs), "method": Whole(model, pixels).branch(theirs)})
    with on_cpu():
        return sampled(sample, stand, inputs["input_ids"], **given)


@part(
    "avisc.answer",
    "AvisC",
    "avisc_utils/avisc_sample.py",
    "sample; LlavaLlamaForCausalLM.forward",
    [
        {"seed": 0, "alpha": 1.0, "beta": 0.1, "gamma": 0.5, "deviations": 1.0},
        {"seed": 1, "alpha": 2.5, "beta": 0.02, "gamma": 0.8, "deviations": 0.5},
    ],
    [{"alpha": 1.05}, {"beta": 0.5}, {"gamma": 0.1}, {"deviations": 1.2}],
    LITERAL,
)
def avisc_answer(
    repository: Repository, seed: int, alpha: float, beta: float, gamma: float, deviations: float
) -> Named:
    given = {"layer_gamma": gamma, "lamb": deviations, "cd_alpha": alpha, "cd_beta": beta, "masking_scheme": "zeros"}
    return ranked(repository, repository.load("avisc_utils/avisc_sample.py", "sample").sample, seed, **given)


@part(
    "mod.answer",
    "MoD",
    "MoD_utils/MoD_sampling.py",
    "sample; LlavaLlamaForCausalLM.forward",
    [
        # Divergences of 0.237 and 0.239 at the first token.
        {"seed": 0, "positive": 4.0, "negative": 1.0, "beta": 0.5, "threshold": 0.2, "share": 0.2},
        {"seed": 1, "positive": 4.0, "negative": 1.0, "beta": 0.1, "threshold": 0.3, "share": 0.2},
    ],
    [{"positive": 3.9, "negative": 1.1}, {"beta": 0.01}, {"share": 0.3}, {"threshold": 0.26}, {"threshold": 0.22}],
    f"{LITERAL}; as with a cache, which keeps the prompt's tokens; without the first statement, which reads a name that is "
    "assigned later",
)
def mod_answer(
    repository: Repository, seed: int, positive: float, negative: float, beta: float, threshold: float, share: float
) -> Named:
    given = {"JS_PH_alpha": positive, "JS_MH_alpha": negative, "JS_beta": beta, "JS_threshold": threshold}
    more = {"model_name": "llava-1.5", "use_JS_consis": True, "JS_top_attn": share}
    names = ("sample", "cal_JS_div", "softmax_with_temperature")
    loop = repository.load("MoD_utils/MoD_sampling.py", *names, drop=lambda one: isinstance(one, ast.Assert))
    return ranked(repository, loop.sample, seed, **given, **more)


@part(
    "mod.divergence",
    "MoD",
    "MoD_utils/MoD_sampling.py",
    "cal_JS_div",
    [{"seed": 5, "scale": 1.0}, {"seed": 6, "scale": 8.0}],
    [{"scale": 1.5}],
)
def mod_divergence(repository: Repository, seed: int, scale: float) -> Named:
    measure = repository.load("MoD_utils/MoD_sampling.py", "cal_JS_div", "softmax_with_temperature").cal_JS_div
    main, other = (scale * cases.logits(seed, 2)).numpy()
    return {"nats": torch.tensor([float(measure(p, q)) for p, q in zip(main, other)])}


@part(
    "sid.answer",
    "SID",
    "vcd_sample.py",
    "sample; LlamaModel, LlavaLlamaForCausalLM.forward",
    [
        {"seed": 0, "alpha": 1.0, "beta": 0.1, "kept": 3},
        {"seed": 1, "alpha": 0.5, "beta": 0.02, "kept": 6},
    ],
    [{"alpha": 1.05}, {"beta": 0.5}, {"kept": 8}, {"rank_layer": 2}],
    "their whole decoder with this model's weights",
)
def sid_answer(repository: Repository, seed: int, alpha: float, beta: float, kept: int) -> Named:
    model = llava(seed)
    inputs = prompt(model, seed)
    first, end = span(model)
    settings = {
        "use_fast_v": False,
        "fast_v_sys_length": None,
        "fast_v_image_token_length": None,
        "fast_v_attention_rank": kept,
        "fast_v_attention_rank_add": None,
        "fast_v_agg_layer": 2,
        "fast_v_inplace": False,
    }
    decoder = llama(repository, "transformers/src/transformers/models/llama/modeling_llama.py", model, **settings)
    theirs = repository.load("minigpt4/models/llava_llama.py", "LlavaLlamaForCausalLM.forward").forward
    whole = SimpleNamespace(model=decoder, lm_head=model.lm_head, config=decoder.config)
    whole.prepare_inputs_labels_for_multimodal = lambda ids, mask, past, labels, images: (
        ids,
        mask,
        past,
        whole.given,
        labels,
    )

    def forward_of(inputs_embeds: Tensor, **asked: Any) -> Any:
        whole.given = inputs_embeds
        return theirs(whole, **asked)

    reading = Reading(forward_of, model, inputs["pixel_values"])
    stand = Stand({"": reading, "cd": reading}, model=decoder)
    sample = repository.load("vcd_sample.py", "sample").sample
    where = {"image_start": first, "image_end": end - 1}
    given = {"images_cd": 1, "cd_alpha": alpha, "cd_beta": beta, "key_position": where, "output_attentions": True}
    return sampled(sample, stand, inputs["input_ids"], **given)


# --- Attention


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
        # Of 8 heads 5.6 are kept, which is 5.
        {"seed": 1, "share": 0.7, "damp": 0.0, "layers": [1, 2]},
    ],
    [{"share": 0.6}, {"share": 0.76}, {"damp": 0.2}, {"layers": [0, 2]}],
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
    LITERAL,
)
def vaf_answer(repository: Repository, seed: int, enhance: float, suppress: float, layers: list[int]) -> Named:
    theirs = repository.load("visaug/inference/AttnAdapter.py", "AttnAdapter.forward").forward
    model = old(llava(seed, **cases.LONG))
    for layer in layers_of(model)[layers[0] : layers[1] + 1]:
        attention = layer.self_attn
        attention.enh_para, attention.sup_para = enhance, suppress
        attention.forward = types.MethodType(theirs, attention)
        adapted(attention, tuples=True)
    return greedy(model, prompt(model, seed, before=cases.BEFORE))


@part(
    "cai.answer",
    "CAI",
    "utils/llava_utils.py",
    "set_cai_args, model_forward, attn_forward, sample, CFGLogits; LlamaModel",
    [
        {"seed": 0, "threshold": 0.5, "first_layer": 1, "gamma": None},
        {"seed": 1, "threshold": 0.9, "first_layer": 0, "gamma": 3.0},
    ],
    [{"threshold": 3.0}, {"first_layer": 2}, {"gamma": 2.9}],
    "torch.cuda.synchronize() is made to do nothing",
)
def cai_answer(repository: Repository, seed: int, threshold: float, first_layer: int, gamma: float | None) -> Named:
    model = llava(seed)
    inputs = prompt(model, seed)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    decoder = llama(repository, "transformers/src/transformers/models/llama/modeling_llama.py", model)
    names = ("set_cai_args", "model_forward", "attn_forward", "sample", "CFGLogits")
    old_functions = repository.load(
        "transformers/src/transformers/models/llama/modeling_llama.py",
        "rotate_half",
        "apply_rotary_pos_emb",
        "repeat_kv",
    )
    theirs = repository.load("utils/llava_utils.py", *names, time=time, **vars(old_functions))
    config = SimpleNamespace(num_hidden_layers=len(decoder.layers))
    theirs.set_cai_args(
        SimpleNamespace(model=decoder, lm_head=model.lm_head, config=config), threshold, first_layer, True
    )
    decoder.image_token_start, decoder.query_token_start = span(model)
    decoder.visual_feature = embedded(model, ids, pixels)[0, slice(*span(model))]

    def whole(inputs_embeds: Tensor, past_key_values: Any = None, **asked: Any) -> Any:
        out = decoder(inputs_embeds=inputs_embeds, past_key_values=past_key_values, **asked)
        return said(model.lm_head(out[0]), out, past=out.past_key_values)

    def alone(input_ids: Tensor, use_cache: bool = True, past_key_values: Any = None) -> Any:
        return whole(embedded(model, input_ids), past_key_values, use_cache=True)

    stand = Stand({"": Reading(whole, model, pixels)}, model=decoder)
    stand.config.num_hidden_layers = config.num_hidden_layers
    process = None if gamma is None else theirs.CFGLogits(gamma, alone, ids[ids != cases.IMAGE][None])
    with mock.patch.object(torch.cuda, "synchronize", lambda: None):
        return sampled(theirs.sample, stand, ids, process=process)


@part(
    "ilvad.map",
    "ILVAD",
    "main.py",
    "get_enhanced_map, compute_attention_heatmap",
    [
        {"seed": 5, "alpha": 5.0, "tau": 2.0},
        {"seed": 6, "alpha": 4.0, "tau": 1.5},
        # One token is more than three deviations above the others.
        {"seed": 22, "alpha": 5.0, "tau": 2.0},
    ],
    [{"alpha": 4.9}, {"tau": 1.0}],
)
def ilvad_map(repository: Repository, seed: int, alpha: float, tau: float) -> Named:
    attention = cases.attention_like(seed, 6, 4, 4, 24)[..., :16]
    seen = [[layer[None, :, None] for layer in token] for token in attention]
    return {"logarithms": enhanced(repository)(seen, 0, 16, alpha, tau).log()}


def enhanced(repository: Repository) -> Any:
    return repository.load("main.py", "get_enhanced_map", "compute_attention_heatmap").get_enhanced_map


@part(
    "ilvad.answer",
    "ILVAD",
    "ilvad.py",
    "AttentionEnhancerContext, llava_forward; get_enhanced_map (main.py)",
    [
        {"seed": 0, "alpha": 5.0, "tau": 1.5, "tokens": 6, "layers": [0, 3]},
        {"seed": 1, "alpha": 4.0, "tau": 1.2, "tokens": 4, "layers": [1, 2]},
    ],
    [{"alpha": 4.5}, {"tau": 5.0}, {"tokens": 3}, {"layers": [1, 3]}],
    "the image half: without the statement that weighs words",
)
def ilvad_answer(repository: Repository, seed: int, alpha: float, tau: float, tokens: int, layers: list[int]) -> Named:
    model = eager(old(llava(seed)))
    inputs = prompt(model, seed)
    first, end = span(model)
    seen = []
    ids = inputs["input_ids"]
    for _ in range(tokens):
        out = forward(model, inputs["pixel_values"], output_attentions=True)(ids)
        seen.append(out.attentions)
        ids = torch.cat([ids, out.logits[:, -1].argmax(-1, keepdim=True)], 1)
    raised = enhanced(repository)(seen, first, end, alpha, tau)

    def words(statement: ast.stmt) -> bool:
        return isinstance(statement, ast.AugAssign) and ast.unparse(statement.target).startswith("query_attn")

    names = ("EnhanceEvidenceAttention", "llava_forward", "AttentionEnhancerContext")
    given = {"functools": functools, "get_layers": layers_of, "Cache": None}
    context = repository.load("ilvad.py", *names, drop=words, **given).AttentionEnhancerContext
    model = old(llava(seed))
    for layer in layers_of(model):
        layer.self_attn.config.pretraining_tp = 1
    edited = range(layers[0], layers[1] + 1)
    with context(model, first, end, None, raised, edited, 0.0, "llava"):
        for layer in layers_of(model):
            adapted(layer.self_attn, tuples=False)
        return greedy(model, inputs)


# --- Searches


@part(
    "vdgd.scores",
    "VDGD",
    "LLaVA-Align/experiments/eval/sampling/vdgd.py",
    "vdgd, top_p_and_temp_filtering",
    [{"seed": 5, "reduction": "min"}, {"seed": 6, "reduction": "avg"}],
    [{"top_p": 0.7}, {"reduction": "min"}, {"reduction": "avg"}],
    "times the size of the vocabulary, by which their scores are divided; the nucleus of 0.5 at temperature 0.5 is written in",
)
def vdgd_scores(repository: Repository, seed: int, reduction: str) -> Named:
    own, described = cases.vdgd_logits(seed)
    rows, drawn = iter(own), []

    class Words:
        bos_token_id, eos_token_id, pad_token_id = 1, 0, 0

        def __len__(self) -> int:
            return own.shape[1]

        def batch_decode(self, ids: Tensor, **more: Any) -> list[str]:
            return [""]

    def ended(probabilities: Tensor, num_samples: int) -> Tensor:
        drawn.append(probabilities)
        # Any token but the end token, which would stop the loop.
        return torch.ones(len(probabilities), 1, dtype=torch.long)

    given = {
        "args": SimpleNamespace(kl_reduction=reduction),
        "Image": SimpleNamespace(open=lambda path: None),
        "tokenizer_image_token": lambda *args, **more: torch.tensor([1, 2]),
        "IMAGE_TOKEN_INDEX": cases.IMAGE,
    }
    model = SimpleNamespace(device="cpu", generate=lambda *args, **more: {"logits": [next(rows)[None].clone()]})
    picture = SimpleNamespace(preprocess=lambda image, **more: {"pixel_values": torch.zeros(1, 3, 2, 2)})
    file = "LLaVA-Align/experiments/eval/sampling/vdgd.py"
    theirs = repository.load(file, "vdgd", "top_p_and_temp_filtering", **given).vdgd
    said = tuple(described.log_softmax(-1))
    with mock.patch.object(torch, "multinomial", ended):
        theirs(model, Words(), picture, "", "", said, max_len=len(own))
    return {"scores": cases.distribution(torch.cat(drawn).log() * own.shape[1])}


@part(
    "opera.answer",
    "OPERA",
    "transformers-4.29.2/src/transformers/generation/utils.py",
    "GenerationMixin.opera_beam_search; BeamSearchScorer (beam_search.py), LlamaModel",
    [
        {"seed": 0, "num_beams": 3, "threshold": 4, "scale_factor": 50.0},
        {"seed": 1, "num_beams": 3, "threshold": 2, "scale_factor": 60.0},
        {"seed": 2, "num_beams": 5, "threshold": 4, "scale_factor": 50.0},
    ],
    [{"threshold": 15}, {"num_beams": 4}],
    "tokens alone, without an end token; their whole decoder with this model's weights",
)
def opera_answer(repository: Repository, seed: int, num_beams: int, threshold: int, scale_factor: float) -> Named:
    model = llava(seed)
    inputs = prompt(model, seed)
    first, end = span(model)
    root = "transformers-4.29.2/src/transformers"
    decoder = llama(repository, f"{root}/models/llama/modeling_llama.py", model, leave=("repeat_kv",))
    names = ("BeamScorer", "BeamSearchScorer", "BeamHypotheses")
    given = {"ABC": abc.ABC, "abstractmethod": abc.abstractmethod, "UserDict": collections.UserDict}
    scorer = repository.load(f"{root}/generation/beam_search.py", *names, **given).BeamSearchScorer
    search = repository.load(f"{root}/generation/utils.py", "GenerationMixin.opera_beam_search").opera_beam_search
    features = embedded(model, inputs["input_ids"], inputs["pixel_values"])[0, first:end]

    class Loop(Stand):
        def prepare_inputs_for_generation(self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
            return {"ids": input_ids, "past": past_key_values}

        def adjust_logits_during_generation(self, logits: Tensor, **kwargs: Any) -> Tensor:
            return logits

        def _reorder_cache(self, past: Any, order: Tensor) -> Any:
            return tuple(tuple(states.index_select(0, order) for states in layer) for layer in past)

        def __call__(self, ids: Tensor, past: Any, **asked: Any) -> Any:
            own = model.get_input_embeddings()
            if past is not None:
                embeds = own(ids[:, -1:])
            else:
                # Theirs has one placeholder, which stands for all of the image's tokens.
                image = features.expand(len(ids), -1, -1)
                embeds = torch.cat([own(ids[:, :first]), image, own(ids[:, first + 1 :])], 1)
            out = decoder(inputs_embeds=embeds, past_key_values=past, use_cache=True, output_attentions=True)
            # Their loop takes a failure of view() for an answer that does not go back.
            logits = model.lm_head(out[0]).contiguous()
            return ModelOutput(logits=logits, attentions=out.attentions, past_key_values=out.past_key_values)

    ids = torch.cat([inputs["input_ids"][:, : first + 1], inputs["input_ids"][:, end:]], 1)
    length = ids.shape[1] + cases.OPERA_TOKENS

    class Ended(list[Any]):
        max_length = length

        def __call__(self, input_ids: Tensor, scores: Any) -> bool:
            return input_ids.shape[1] >= length

    with torch.no_grad():
        out = search(
            Loop({}),
            ids.repeat(num_beams, 1),
            scorer(batch_size=1, num_beams=num_beams, device="cpu"),
            logits_processor=lambda ids, scores: scores,
            stopping_criteria=Ended([None]),
            pad_token_id=0,
            output_attentions=True,
            key_position={
                "image_start": first,
                "image_end": end - 1,
                "response_start": inputs["input_ids"].shape[1],
            },
            scale_factor=scale_factor,
            threshold=threshold,
            num_attn_candidates=num_beams,
            images=1,
            attention_mask=torch.ones(num_beams, ids.shape[1]),
        )
    return {"tokens": out[0, ids.shape[1] :]}


# --- Steering


@part(
    "vista.answer",
    "VISTA",
    "steering_vector.py",
    "obtain_vsv, get_hiddenstates; add_vsv_layers (llm_layers.py); LlavaLlamaForCausalLM.forward",
    [
        {"seed": 0, "strength": 0.17, "gamma": 0.3, "window": [1, 2]},
        {"seed": 1, "strength": 0.5, "gamma": 0.1, "window": [2, 2]},
    ],
    [{"strength": 0.2}, {"gamma": 0.35}, {"window": [0, 1]}, {"first_coordinate": "none"}],
    "Tensor.half() is made to do nothing",
)
def vista_answer(repository: Repository, seed: int, strength: float, gamma: float, window: list[int]) -> Named:
    model = copy.deepcopy(llava(seed))
    inputs = prompt(model, seed)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    paths = ("get_nested_attr", "find_longest_modulelist", "get_layers_path", "get_layers", "find_module")
    layers = repository.load("llm_layers.py", *paths, "VSVLayer", "add_vsv_layers", PreTrainedModel=None)
    pca = repository.load("myutils.py", "svd_flip", "PCA").PCA
    names = ("ResidualStream", "ForwardTrace", "ForwardTracer", "get_hiddenstates", "obtain_vsv")
    given = {"PCA": pca, "get_layers": layers.get_layers, "dataclass": dataclass, "PreTrainedModel": None}
    vectors = repository.load("steering_vector.py", *names, **given)
    without = {"input_ids": ids[ids != cases.IMAGE][None]}
    with unhalved(), torch.no_grad():
        found, _ = vectors.obtain_vsv(None, model, [[without, inputs]])
        layers.add_vsv_layers(model, torch.stack([found], 1), [strength], None)
        file = "llava/model/language_model/llava_llama.py"
        theirs = repository.load(file, "LlavaLlamaForCausalLM.forward").forward
        mixed = {"logits_aug": True, "logits_layers": ",".join(map(str, window)), "logits_alpha": gamma}
        branch = Whole(model, pixels, **mixed).branch(theirs)

        def answered(ids: Tensor) -> Any:
            return branch(ids, output_hidden_states=True)

        return greedy_whole(answered, ids)


@part(
    "memvr.answer",
    "MemVR",
    "memvr.py",
    "forward, LlamaMLP.forward",
    [
        {"seed": 0, "ratio": 0.12, "threshold": 0.75, "layers": [2, 5]},
        {"seed": 1, "ratio": 0.3, "threshold": 0.5, "layers": [1, 6]},
    ],
    [{"ratio": 0.13}, {"threshold": 0.97}, {"layers": [4, 5]}],
    "today's layers with their MLP; their range of layers leaves both its ends out",
)
def memvr_answer(repository: Repository, seed: int, ratio: float, threshold: float, layers: list[int]) -> Named:
    model = eager(llava(seed, layers=8))
    inputs = prompt(model, seed)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    text = model.model.language_model
    caches = {
        "Cache": OldCache,
        "StaticCache": OldCache,
        "DynamicCache": SimpleNamespace(from_legacy_cache=lambda past: past),
    }
    theirs = repository.load("memvr.py", "LlamaMLP", "forward", ACT2FN={"silu": nn.functional.silu}, **caches)
    config = SimpleNamespace(
        hidden_size=32, intermediate_size=48, hidden_act="silu", pretraining_tp=1, output_attentions=False
    )
    for layer in text.layers:
        own = theirs.LlamaMLP(config)
        own.load_state_dict(layer.mlp.state_dict())
        layer.mlp = own
    first = text.layers[0].mlp
    first.starting_layer, first.ending_layer = layers[0] - 1, layers[1] + 1
    first.entropy_threshold, first.apply_memvr = threshold, True
    for layer in text.layers:
        layer.mlp.retracing_ratio = ratio
    first.visual_token = embedded(model, ids, pixels)[0, slice(*span(model))]
    decoder = SimpleNamespace(
        config=SimpleNamespace(output_hidden_states=False, output_attentions=False, use_return_dict=True),
        gradient_checkpointing=False,
        training=False,
        layers=[Layer(layer, text.rotary_emb) for layer in text.layers],
        norm=text.norm,
        lm_head=model.lm_head,
        _update_causal_mask=lambda mask, embeds, position, past: causal(embeds.shape[1], past + embeds.shape[1]),
    )

    def whole(inputs_embeds: Tensor, past_key_values: Any = None, **asked: Any) -> Any:
        past = DynamicCache(config=text.config) if past_key_values is None else past_key_values
        out = theirs.forward(decoder, None, past_key_values=past, inputs_embeds=inputs_embeds, **asked)
        return said(model.lm_head(out[0]), past=past)

    return greedy_whole(Reading(whole, model, pixels), ids)


@part(
    "vti.direction",
    "VTI",
    "vti_utils/utils.py",
    "obtain_textual_vti; PCA (pca.py)",
    [{"seed": 5, "layers": 4}, {"seed": 6, "layers": 3}],
    [{"seed": 7}],
    "the states are given; those of the embeddings are the same in both captions, whose last token is",
)
def vti_direction(repository: Repository, seed: int, layers: int) -> Named:
    right, wrong = draw(seed, 6, layers, 8), draw(seed + 1, 6, layers, 8)
    pca = repository.load("vti_utils/pca.py", "svd_flip", "PCA").PCA
    names = ("get_hiddenstates", "obtain_textual_vti")
    code = repository.load("vti_utils/utils.py", *names, PCA=pca)

    def model(pair: int, which: int, **asked: Any) -> Any:
        states = torch.cat([torch.zeros(1, 8), (right if which else wrong)[pair]])
        return SimpleNamespace(hidden_states=[level[None, None] for level in states])

    # In the place of a prompt stands where its states are found.
    places = [[{"pair": pair, "which": which} for which in (0, 1)] for pair in range(len(right))]
    direction, _ = code.obtain_textual_vti(model, places, None)
    return {"direction": direction[1:]}


@part(
    "revis.vectors",
    "Revis",
    "steering_utils/vector_calculator.py",
    "_calculate_das_vectors_internal, get_pure_direction_with_pca",
    [{"seed": 50}, {"seed": 60}],
    [{"right": "wrong"}, {"nothing": "right, blind"}],
    "the states are given; the sign of each vector, which is scikit-learn's there, is made that of the mean difference",
)
def revis_vectors(repository: Repository, seed: int) -> Named:
    try:
        from sklearn.decomposition import PCA
    except ImportError as missing:
        raise Missing("scikit-learn, which their code calls; pip install scikit-learn") from missing
    states = cases.caption_states(seed)
    count = len(states["right"])
    rows = [{"caption": "right", "h_caption": "wrong", "image_id": number} for number in range(count)]
    number = iter(range(10**6))

    def given(model: Any, processor: Any, question: str, said: str, image: Any, model_name: str) -> Tensor:
        # Five states are asked for of every pair.
        pair = next(number) // 5
        name = said if said in ("right", "wrong") else "nothing"
        return states[name if image is not None else f"{name}, blind"][pair]

    opened = SimpleNamespace(open=lambda path: SimpleNamespace(convert=lambda mode: path))
    there = SimpleNamespace(path=SimpleNamespace(join=lambda *parts: parts[-1], exists=lambda path: True))
    names = ("get_random_unknown_response", "get_pure_direction_with_pca", "_calculate_das_vectors_internal")
    theirs = repository.load(
        "steering_utils/vector_calculator.py",
        *names,
        PCA=PCA,
        Image=opened,
        os=there,
        random=random,
        tqdm=lambda rows, desc: rows,
        load_steering_data=lambda file: rows,
        get_hidden_states_retrospective=given,
    )
    model = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=states["right"].shape[1] - 1))
    found = theirs._calculate_das_vectors_internal(model, None, "", "")
    vectors = torch.stack([found[layer]["visual"] for layer in range(1, states["right"].shape[1])])
    mean = (states["right"] - states["right, blind"]).mean(0)[1:]
    return {"vectors": vectors * (vectors * mean).sum(-1, keepdim=True).sign()}


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


@part(
    "nullu.answer",
    "Nullu",
    "utils/halluedit.py",
    "HalluEdit.apply_edit_end_to_end",
    [{"seed": 0, "rank": 4}, {"seed": 1, "rank": 2}],
    [{"rank": 3}, {"layers": [0, 7]}, {"layers": [5, 7]}],
    "the later half of the layers, as their script gives it; Tensor.cuda() and .to('cuda') are made to do nothing",
)
def nullu_answer(repository: Repository, seed: int, rank: int) -> Named:
    model = copy.deepcopy(llava(seed, layers=8))
    right, wrong = draw(seed + 1, 9, 8, 32), draw(seed + 2, 9, 8, 32)
    toy = nn.Module()
    toy.model, toy.lm_head = model.model.language_model, model.lm_head
    toy.config = SimpleNamespace(hidden_size=32, num_hidden_layers=8, model_type="llava")
    toy.dtype = torch.float32
    whole = SimpleNamespace(
        model=toy, tokenizer=SimpleNamespace(decode=str), args=SimpleNamespace(model_name="LLaVA-7B")
    )
    kind = repository.load("utils/halluedit.py", "HalluEdit", open=lambda *args: io.StringIO()).HalluEdit
    with on_cpu(), torch.no_grad():
        kind(whole, top_k_ranks=rank, edit_layer_range=range(4, 8)).apply_edit_end_to_end(wrong, right)
    return greedy(model, prompt(model, seed))


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
    "vti.answer",
    "VTI",
    "vti_utils/llm_layers.py",
    "add_vti_layers, VTILayer.forward",
    [{"seed": 0, "text": 0.8}, {"seed": 1, "text": 3.0}],
    [{"text": 0.85}],
    "Tensor.half() is made to do nothing",
)
def vti_answer(repository: Repository, seed: int, text: float) -> Named:
    model = copy.deepcopy(llava(seed))
    paths = ("get_nested_attr", "find_longest_modulelist", "get_layers_path", "get_layers", "find_module")
    theirs = repository.load("vti_utils/llm_layers.py", *paths, "VTILayer", "add_vti_layers", PreTrainedModel=None)
    theirs.add_vti_layers(model, draw(seed + 1, 4, 1, 32), [text])
    with unhalved():
        return greedy(model, prompt(model, seed))


@part(
    "revis.answer",
    "Revis",
    "steering_utils/llm_layers.py",
    "MADRSteeringHook_visual_only",
    [
        {"seed": 0, "strength": 2.5, "threshold": 0.05, "layer": 3},
        {"seed": 1, "strength": 1.0, "threshold": -0.1, "layer": 1},
    ],
    [{"strength": 2.45}, {"threshold": 0.5}, {"layer": 2}],
)
def revis_answer(repository: Repository, seed: int, strength: float, threshold: float, layer: int) -> Named:
    kind = "MADRSteeringHook_visual_only"
    hook = getattr(repository.load("steering_utils/llm_layers.py", kind), kind)
    model = copy.deepcopy(llava(seed))
    made = hook({"visual": draw(seed + 1, 4, 32)[layer]}, layer, strength, threshold, 1.0)
    made.attach(layers_of(model)[layer])
    return greedy(model, prompt(model, seed))


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

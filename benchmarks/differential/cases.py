"""What the differential record is computed on, and this library's side of it.

A part is one function of a method, or a whole greedy answer under it, on inputs that are drawn from seeds. :data:`OURS` maps
its name to a function of the part's parameters that gives named tensors; ``record.py`` computes the same names with the
authors' code, and ``tests/test_differential.py`` compares the two.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers as tf
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from lvlm_decode import attach, detach
from lvlm_decode.controllers.opera import OPERA
from lvlm_decode.controllers.vdgd import VDGD, Grounding
from lvlm_decode.engine.steer import Add, Project, Turn
from lvlm_decode.method import Method, Step
from lvlm_decode.methods.avisc import AvisC
from lvlm_decode.methods.cai import CAI
from lvlm_decode.methods.causalmm import CausalMM, edited, weights_of
from lvlm_decode.methods.cicd import CICD
from lvlm_decode.methods.code import CODE
from lvlm_decode.methods.crops import CRoPS
from lvlm_decode.methods.damro import DAMRO
from lvlm_decode.methods.deco import DeCo
from lvlm_decode.methods.dola import DoLa
from lvlm_decode.methods.hgai import HGAI
from lvlm_decode.methods.icd import ICD
from lvlm_decode.methods.ilvad import ILVAD, log_factors, most_looking
from lvlm_decode.methods.layercd import LayerCD
from lvlm_decode.methods.m3id import M3ID
from lvlm_decode.methods.memvr import MemVR
from lvlm_decode.methods.mod import MoD, divergence
from lvlm_decode.methods.nullu import Nullu
from lvlm_decode.methods.only import ONLY
from lvlm_decode.methods.pai import PAI
from lvlm_decode.methods.revis import Revis
from lvlm_decode.methods.ritual import RITUAL
from lvlm_decode.methods.scmoe import SCMoE
from lvlm_decode.methods.sid import SID
from lvlm_decode.methods.spin import SPIN
from lvlm_decode.methods.vaf import VAF
from lvlm_decode.methods.vcd import VCD, diffuse
from lvlm_decode.methods.vdd import VDD
from lvlm_decode.methods.vista import VISTA
from lvlm_decode.methods.vti import UNIT, VTI
from lvlm_decode.training.vectors import nullu, revis, visual_direction, vti

HERE = Path(__file__).resolve().parent
Named = dict[str, Tensor]
#: Part -> (parameters) -> named tensors.
OURS: dict[str, Callable[..., Named]] = {}

VOCABULARY, IMAGE, BOS = 64, 63, 1
#: Tokens of every recorded answer.
TOKENS = 5
#: OPERA goes back to what was said, so its answers are longer.
OPERA_TOKENS = 48
#: Log-probabilities below this were masked.
MASKED = -1e3


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers from numpy's frozen generator, which gives the same ones everywhere."""
    return torch.tensor(scale * np.random.RandomState(seed).standard_normal(shape), dtype=torch.float32)


def part(name: str) -> Callable[[Callable[..., Named]], Callable[..., Named]]:
    def registered(function: Callable[..., Named]) -> Callable[..., Named]:
        OURS[name] = function
        return function

    return registered


def ours(name: str) -> Callable[..., Named]:
    """This library's side of a part; what follows a second point in its name says whose code the record is of."""
    return OURS[".".join(name.split(".")[:2])]


def records() -> dict[str, dict[str, Any]]:
    """Part -> what ``record.py`` wrote of it."""
    found = sorted((HERE / "records").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in found}


def tensor(values: Any) -> Tensor:
    """What a record has of a tensor; ``null`` is a token that was masked."""

    def filled(value: Any) -> Any:
        return [filled(one) for one in value] if isinstance(value, list) else -math.inf if value is None else value

    return torch.tensor(filled(values))


def table() -> str:
    """The records as lines of a table."""
    lines = [
        "| part | authors' code | function | cases | largest difference | verdict | how it was run |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, record in records().items():
        where = f"{record['repository']} @ {record['commit'][:7]}: {record['file']}"
        verdict = "equal" if record["largest"] <= 1e-5 else "differs"
        cells = (
            name,
            where,
            record["function"],
            str(len(record["cases"])),
            f"{record['largest']:.1g}",
            verdict,
            record["note"] or "as it is",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def distribution(scores: Tensor) -> Tensor:
    """Log-probabilities (..., N) of scores, -inf for tokens that a mask removed: what a token is drawn from."""
    log_p = scores.float().log_softmax(-1)
    return log_p.masked_fill(log_p < MASKED, -math.inf)


# --- Models


@functools.cache
def llava(seed: int = 0, layers: int = 4, heads: int = 4, grid: int = 4, width: int = 32) -> Any:
    """A LLaVA with ``grid * grid`` image tokens, whose weights are drawn with unit gain."""
    vision = tf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=2 * grid,
        patch_size=2,
    )
    text = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
    )
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        image_seq_length=grid**2,
    )
    model = tf.LlavaForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if parameter.dim() < 2:
                # Norms are 1 and biases 0, whatever the library that makes the model gives them.
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            fan_in = 1 if "embed_tokens" in name else parameter[0].numel()
            gain = 2.0 if name.startswith("lm_head") else 1.0
            parameter.copy_(draw(1000 * seed + number, *parameter.shape, scale=gain * fan_in**-0.5))
        embeddings = next(part for part in model.modules() if hasattr(part, "class_embedding"))
        embeddings.class_embedding.copy_(draw(1000 * seed + 999, 16, scale=0.25))
        # No answer has the image's placeholder in it.
        model.lm_head.weight[IMAGE] = 0.0
    for config in (model.generation_config, model.config):
        config.eos_token_id, config.pad_token_id, config.bos_token_id = None, 0, BOS
    return model


def words(seed: int, count: int) -> Tensor:
    return torch.tensor(np.random.RandomState(seed).randint(4, IMAGE, count))


def prompt(model: Any, seed: int = 0, before: int = 5, after: int = 6) -> dict[str, Tensor]:
    """One row: ``before`` tokens, the first of them the begin token, one image, ``after`` tokens."""
    side = model.config.vision_config.image_size
    count = model.config.image_seq_length
    ids = torch.cat(
        [torch.tensor([BOS]), words(seed, before - 1), torch.full((count,), IMAGE), words(seed + 500, after)]
    )[None]
    # Pixels as a processor makes them of a picture, whose values go from 0 to 1.
    picture = torch.sigmoid(draw(seed + 900, 1, 3, side, side))
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": (picture - mean) / std}


#: The geometry that some authors wrote into their code: 35 tokens, then 576 of the image.
LONG = {"grid": 24}
BEFORE = 35


def answer(model: Any, method: Method, inputs: dict[str, Tensor], tokens: int = TOKENS) -> Named:
    """The tokens of a greedy answer, and the distribution that each of them is chosen from."""
    attach(model, method)
    try:
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=tokens, output_logits=True, return_dict_in_generate=True
        )
    finally:
        detach(model)
    return {
        "tokens": out.sequences[0, inputs["input_ids"].shape[1] :],
        "scores": distribution(torch.stack(out.logits)[:, 0]),
    }


def logits(seed: int, views: int, steps: int = TOKENS, size: int = 24, apart: float = 1.0) -> Tensor:
    """(V, steps, N) logits of views that are alike, as the branches of a model are; how much is in ``apart``."""
    return draw(seed, 1, steps, size, scale=2.0) + apart * draw(seed + 1, views, steps, size)


def scored(method: Method, given: Tensor, *weights: float) -> Named:
    """What a method makes of the logits (V, T, N) of one row."""
    step = Step(given[:, None], torch.arange(given.shape[1])[None], weights)
    return {"scores": distribution(method.scores(step)[0])}


# --- Contrasts


@contextmanager
def noise(values: Tensor) -> Iterator[None]:
    """Whoever draws noise of this shape gets these values."""
    randn, like = torch.randn, torch.randn_like

    def drawn(*shape: Any, **more: Any) -> Tensor:
        size = tuple(shape[0]) if isinstance(shape[0], list | tuple | torch.Size) else shape
        return values.clone() if size == tuple(values.shape) else randn(*shape, **more)

    def drawn_like(given: Tensor, **more: Any) -> Tensor:
        return values.clone() if given.shape == values.shape else like(given, **more)

    with mock.patch.object(torch, "randn", drawn), mock.patch.object(torch, "randn_like", drawn_like):
        yield


@part("vcd.noise")
def vcd_noise(seed: int, noise_step: int) -> Named:
    pixels, own = draw(seed, 1, 3, 4, 4), draw(seed + 1, 1, 3, 4, 4)
    with noise(own):
        return {"pixels": diffuse(pixels, noise_step, "code", torch.Generator())}


@part("vcd.answer")
def vcd_answer(seed: int, alpha: float, beta: float, noise_step: int) -> Named:
    model = llava(seed)
    inputs = prompt(model, seed)
    with noise(draw(seed + 77, *inputs["pixel_values"].shape)):
        return answer(model, VCD(alpha=alpha, beta=beta, noise_step=noise_step), inputs)


@part("icd.scores")
def icd_scores(seed: int, alpha: float, beta: float) -> Named:
    return scored(ICD(alpha=alpha, beta=beta), logits(seed, 2), -alpha)


@part("vdd.answer")
def vdd_answer(seed: int, alpha: float, beta: float, absent: Any) -> Named:
    model = llava(seed)
    return answer(model, VDD(alpha=alpha, beta=beta, absent=absent), prompt(model, seed))


@part("code.scores")
def code_scores(seed: int, eta: float) -> Named:
    return scored(CODE(eta=eta), logits(seed, 2), 0.0)


@part("damro.answer")
def damro_answer(seed: int, alpha: float, beta: float, k: int, attention: Any = "concat") -> Named:
    model = llava(seed)
    return answer(model, DAMRO(alpha=alpha, beta=beta, k=k, attention=attention), prompt(model, seed))


@part("cicd.scores")
def cicd_scores(seed: int, beta: float, threshold: float, alpha: float = 3.0, apart: float = 1.0) -> Named:
    method = CICD(images="never read: the other image's logits are given", alpha=alpha, beta=beta, threshold=threshold)
    return scored(method, logits(seed, 2, apart=apart), 1.0)


@part("scmoe.scores")
def scmoe_scores(seed: int, alpha: float, beta: float, strong: float, weak: float) -> Named:
    method = SCMoE(alpha=alpha, beta=beta, strong_temperature=strong, weak_temperature=weak)
    return scored(method, logits(seed, 2), 1.0)


@part("ritual.answer")
def ritual_answer(seed: int, alpha: float, beta: float, transform: str) -> Named:
    model = llava(seed)
    return answer(model, RITUAL(alpha=alpha, beta=beta, transform=transform), prompt(model, seed))


@part("m3id.answer")
def m3id_answer(seed: int, beta: float, first: int, decay: float = 0.02) -> Named:
    model = llava(seed)
    return answer(model, M3ID(beta=beta, first=first, decay=decay), prompt(model, seed), 12)


@part("layercd.answer")
def layercd_answer(seed: int, alpha: float, beta: float, layer: int = 1) -> Named:
    model = llava(seed)
    return answer(model, LayerCD(alpha=alpha, beta=beta, layer=layer), prompt(model, seed))


@contextmanager
def chance(seed: int) -> Iterator[None]:
    """Permutations, and numbers from 0 to 1, from numpy's frozen generator."""
    drawn = np.random.RandomState(seed)

    def permutation(count: int, **more: Any) -> Tensor:
        return torch.tensor(drawn.permutation(count))

    def uniform(*shape: Any, **more: Any) -> Tensor:
        size = tuple(shape[0]) if isinstance(shape[0], list | tuple | torch.Size) else shape
        return torch.tensor(drawn.random_sample(size), dtype=torch.float32)

    with mock.patch.object(torch, "randperm", permutation), mock.patch.object(torch, "rand", uniform):
        yield


def attention_like(seed: int, *shape: int) -> Tensor:
    return draw(seed, *shape, scale=2.0).softmax(-1)


@part("avisc.answer")
def avisc_answer(seed: int, alpha: float, beta: float, gamma: float, deviations: float) -> Named:
    model = llava(seed, **LONG)
    method = AvisC(alpha=alpha, beta=beta, gamma=gamma, deviations=deviations)
    return answer(model, method, prompt(model, seed, before=BEFORE))


@part("mod.answer")
def mod_answer(
    seed: int, positive: float, negative: float, beta: float, threshold: float, share: float, gate: Any = "first"
) -> Named:
    model = llava(seed, **LONG)
    method = MoD(positive=positive, negative=negative, beta=beta, threshold=threshold, share=share, gate=gate)
    return answer(model, method, prompt(model, seed, before=BEFORE))


@part("mod.divergence")
def mod_divergence(seed: int, scale: float) -> Named:
    return {"nats": divergence(*(scale * logits(seed, 2)))}


@part("sid.answer")
def sid_answer(seed: int, alpha: float, beta: float, kept: int, rank_layer: int = 1) -> Named:
    model = llava(seed)
    method = SID(alpha=alpha, beta=beta, share=kept / model.config.image_seq_length, rank_layer=rank_layer)
    return answer(model, method, prompt(model, seed))


@part("only.answer")
def only_answer(
    seed: int, positive: float, negative: float, gamma: float, beta: float, layer: int, normed: bool | None = None
) -> Named:
    model = llava(seed, layers=32, **LONG)
    method = ONLY(positive=positive, negative=negative, gamma=gamma, beta=beta, layer=layer, normed=normed)
    return answer(model, method, prompt(model, seed, before=BEFORE))


@part("crops.answer")
def crops_answer(
    seed: int,
    decay: float,
    alpha: float,
    beta: float,
    gate: float,
    share: float = 0.25,
    text_tokens: tuple[int, int] = (10, 40),
    rank_layer: int = 1,
    tokens: int = TOKENS,
) -> Named:
    model = llava(seed)
    method = CRoPS(
        decay=decay,
        alpha=alpha,
        beta=beta,
        gate=gate,
        share=share,
        text_tokens=(text_tokens[0], text_tokens[1]),
        rank_layer=rank_layer,
    )
    return answer(model, method, prompt(model, seed, before=9, after=12), tokens)


@part("causalmm.edit")
def causalmm_edit(seed: int, form: Any) -> Named:
    attention, states = attention_like(seed, 2, 4, 17, 17), draw(seed + 1, 2, 16, 6)
    with chance(seed):
        changed = edited(attention, form, torch.Generator())
    return {"attention": changed, "states": states * weights_of(changed)[..., None]}


@part("causalmm.answer")
def causalmm_answer(seed: int, alpha: float, beta: float, form: Any) -> Named:
    model = llava(seed)
    with chance(seed):
        return answer(model, CausalMM(alpha=alpha, beta=beta, form=form), prompt(model, seed))


# --- Layers


@part("dola.answer")
def dola_answer(seed: int, layers: list[int], beta: float, norm_early: bool = False) -> Named:
    model = llava(seed, layers=8)
    return answer(model, DoLa(layers=tuple(layers), beta=beta, norm_early=norm_early), prompt(model, seed))


@part("deco.answer")
def deco_answer(seed: int, alpha: float, layers: list[int], top_k: int, top_p: float) -> Named:
    model = llava(seed, layers=8)
    return answer(model, DeCo(alpha=alpha, layers=tuple(layers), top_k=top_k, top_p=top_p), prompt(model, seed))


# --- Attention


@part("pai.answer")
def pai_answer(seed: int, alpha: float, gamma: float | None, first_layer: int) -> Named:
    model = llava(seed)
    return answer(model, PAI(alpha=alpha, gamma=gamma, first_layer=first_layer), prompt(model, seed))


@part("hgai.answer")
def hgai_answer(seed: int, alpha: float, layers: list[int]) -> Named:
    model = llava(seed)
    return answer(model, HGAI(alpha=alpha, layers=(layers[0], layers[1])), prompt(model, seed))


@part("spin.answer")
def spin_answer(seed: int, share: float, damp: float, layers: list[int]) -> Named:
    model = llava(seed, heads=8)
    return answer(model, SPIN(share=share, damp=damp, layers=(layers[0], layers[1])), prompt(model, seed))


@part("vaf.answer")
def vaf_answer(seed: int, enhance: float, suppress: float, layers: list[int]) -> Named:
    model = llava(seed, **LONG)
    inputs = prompt(model, seed, before=BEFORE)
    return answer(model, VAF(enhance=enhance, suppress=suppress, layers=(layers[0], layers[1])), inputs)


@part("cai.answer")
def cai_answer(seed: int, threshold: float, first_layer: int, gamma: float | None) -> Named:
    model = llava(seed)
    return answer(model, CAI(threshold=threshold, first_layer=first_layer, gamma=gamma), prompt(model, seed))


@part("ilvad.map")
def ilvad_map(seed: int, alpha: float, tau: float) -> Named:
    # (tokens, L, H, n) attention of an answer's tokens to the image; the first of them is the prompt's.
    attention = attention_like(seed, 6, 4, 4, 24)[..., :16]
    looks = [most_looking(attention[1:, layer, :, None])[:, 0].mean(0) for layer in range(4)]
    return {"logarithms": log_factors(torch.stack(looks), alpha, tau)}


@part("ilvad.answer")
def ilvad_answer(seed: int, alpha: float, tau: float, tokens: int, layers: list[int]) -> Named:
    model = llava(seed)
    method = ILVAD(alpha=alpha, tau=tau, tokens=tokens, layers=(layers[0], layers[1]))
    return answer(model, method, prompt(model, seed))


# --- Searches


def vdgd_logits(seed: int) -> tuple[Tensor, Tensor]:
    """(T, N) logits of an answer, flat enough for a nucleus of several tokens, and of a description."""
    own, described = logits(seed, 2)
    return 0.3 * own, described


@part("vdgd.scores")
def vdgd_scores(seed: int, reduction: Any, top_p: float = 0.5) -> Named:
    own, described = vdgd_logits(seed)
    said = described.log_softmax(-1)
    grounds = said.amax(0) if reduction == "min" else said.mean(0)
    method = VDGD(candidates="nucleus", reduction=reduction, top_p=top_p)
    ranked = Grounding(method, grounds[None])(torch.zeros(len(own), 1, dtype=torch.long), own)
    return {"scores": distribution(ranked)}


@part("opera.answer")
def opera_answer(seed: int, num_beams: int, threshold: int, scale_factor: float, penalty_weights: float = 1.0) -> Named:
    model = llava(seed)
    method = OPERA(
        num_beams=num_beams,
        num_attn_candidates=num_beams,
        threshold=threshold,
        scale_factor=scale_factor,
        penalty_weights=penalty_weights,
    )
    inputs = prompt(model, seed)
    attach(model, method)
    try:
        out = model.generate(**inputs, do_sample=False, max_new_tokens=OPERA_TOKENS)
    finally:
        detach(model)
    return {"tokens": out[0, inputs["input_ids"].shape[1] :]}


# --- Steering


@part("vista.answer")
def vista_answer(seed: int, strength: float, gamma: float, window: list[int], first_coordinate: Any = "code") -> Named:
    model = llava(seed)
    method = VISTA(strength=strength, gamma=gamma, window=(window[0], window[1]), first_coordinate=first_coordinate)
    return answer(model, method, prompt(model, seed))


@part("memvr.answer")
def memvr_answer(seed: int, ratio: float, threshold: float, layers: list[int]) -> Named:
    model = llava(seed, layers=8)
    method = MemVR(ratio=ratio, threshold=threshold, layers=(layers[0], layers[1]))
    return answer(model, method, prompt(model, seed))


@part("vti.direction")
def vti_direction(seed: int, layers: int) -> Named:
    right, wrong = draw(seed, 6, layers, 8), draw(seed + 1, 6, layers, 8)
    return {"direction": vti(right - wrong)}


#: Whose states are drawn for Revis' vectors: right and hallucinated captions with the image and without, and a sentence that
#: says nothing.
CAPTIONS = ("right", "wrong", "right, blind", "wrong, blind", "nothing, blind")


def caption_states(seed: int) -> dict[str, Tensor]:
    """Caption -> (pairs, L + 1, D) states, those of the embeddings first."""
    return {name: draw(seed + number, 9, 4, 8) for number, name in enumerate(CAPTIONS)}


@part("revis.vectors")
def revis_vectors(seed: int, right: str = "right", nothing: str = "nothing, blind") -> Named:
    states = {name: own[:, 1:] for name, own in caption_states(seed).items()}
    return {"vectors": revis(states[right] - states["right, blind"], states["wrong, blind"] - states[nothing])}


@part("vista.turn")
def vista_turn(seed: int, strength: float) -> Named:
    vector, states = draw(seed, 16), draw(seed + 1, 2, 3, 16)
    return {"states": Turn({0: vector}, strength, boost=True).edit(0, states)}


@part("vti.turn")
def vti_turn(seed: int, text: float) -> Named:
    vector, states = draw(seed, 16), draw(seed + 1, 2, 3, 16)
    return {"states": Turn({0: vector}, UNIT * text).edit(0, states)}


def encoder_states(seed: int) -> Tensor:
    """(pairs, copies, l + 1, n, D) states of a vision encoder; the last copy of a picture is the whole one."""
    return draw(seed, 5, 4, 4, 3, 6)


@part("vti.visual")
def vti_visual(seed: int, rows: str = "code") -> Named:
    seen = encoder_states(seed)
    return {"direction": visual_direction(seen[:, :-1].mean(1) - seen[:, -1], rows)}


@part("vti.answer")
def vti_answer(seed: int, text: float) -> Named:
    model = llava(seed)
    return answer(model, VTI(vectors=draw(seed + 1, 4, 32), text=text), prompt(model, seed))


@part("revis.answer")
def revis_answer(seed: int, strength: float, threshold: float, layer: int) -> Named:
    model = llava(seed)
    method = Revis(vectors=draw(seed + 1, 4, 32), strength=strength, threshold=threshold, layer=layer)
    return answer(model, method, prompt(model, seed))


@part("revis.gate")
def revis_gate(seed: int, strength: float, threshold: float) -> Named:
    vector, states = draw(seed, 6), draw(seed + 1, 2, 8, 6)
    return {"states": Add({0: vector}, strength, -threshold).edit(0, states)}


@part("nullu.project")
def nullu_project(seed: int, rank: int) -> Named:
    right, wrong = draw(seed, 9, 4, 16), draw(seed + 1, 9, 4, 16)
    weight, states = draw(seed + 2, 4, 16, 24, scale=0.2), draw(seed + 3, 4, 5, 24)
    bases = nullu(right - wrong, rank)
    project = Project(dict(enumerate(bases)))
    return {"states": torch.stack([project.edit(i, states[i] @ weight[i].T) for i in range(4)])}


@part("nullu.answer")
def nullu_answer(seed: int, rank: int, layers: list[int] | None = None) -> Named:
    model = llava(seed, layers=8)
    right, wrong = draw(seed + 1, 9, 8, 32), draw(seed + 2, 9, 8, 32)
    method = Nullu(
        vectors=nullu(right - wrong, 6), rank=rank, layers=None if layers is None else (layers[0], layers[1])
    )
    return answer(model, method, prompt(model, seed))

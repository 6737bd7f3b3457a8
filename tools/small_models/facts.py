"""Is a small model a fair miniature? What it answers about the held-out scenes, with stock greedy ``generate``.

The same measurement feeds the tests on the shipped weights and the table in ``data/README.md``.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from lvlm_decode_data import CATEGORIES, load_scenes, render, texts
from lvlm_decode_data.scenes import cell_owners
from lvlm_decode_evals.base import Answer, Question
from lvlm_decode_evals.chair import Chair
from lvlm_decode_evals.mme import MME
from lvlm_decode_evals.pope import STRATEGIES, Pope, build_questions

QUESTION_IMAGES = 167  # six questions each make the 1,000 of a POPE split
CAPTIONS = 200
PAIR_IMAGES = 200
SWAPS = 100
TYPICAL = 10  # an invented object co-occurs when it is among this many most frequent companions of what is there


@dataclass
class TinyModel:
    """A small model, its processor and its name."""

    name: str
    model: torch.nn.Module
    processor: Any

    @classmethod
    def load(cls, path: Path) -> TinyModel:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        name = {"llava": "tiny-llava", "instructblip": "tiny-instructblip"}[model.config.model_type]
        return cls(name, model, AutoProcessor.from_pretrained(path))

    def prompt(self, question: str) -> str:
        """The question in the model's own format: InstructBLIP takes it as it is, LLaVA in its chat template."""
        if self.name == "tiny-instructblip":
            return question
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    @torch.no_grad()
    def answers(
        self, asked: Sequence[tuple[Image.Image, str]], new_tokens: int, batch: int = 64, **options: Any
    ) -> list[str]:
        """Answers to (image, question) pairs, in their order; questions of similar length share a batch."""
        said = [""] * len(asked)
        order = sorted(range(len(asked)), key=lambda i: len(asked[i][1]))
        for first in range(0, len(order), batch):
            rows = order[first : first + batch]
            inputs = self.processor(
                images=[asked[i][0] for i in rows],
                text=[self.prompt(asked[i][1]) for i in rows],
                padding=True,
                return_tensors="pt",
            )
            tokens = self.model.generate(**inputs, max_new_tokens=new_tokens, **{"do_sample": False, **options})
            new = tokens[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(rows, self.processor.batch_decode(new, skip_special_tokens=True)):
                said[i] = text.strip()
        return said


def pictures() -> dict[str, Image.Image]:
    """Image id -> the held-out picture."""
    return {str(scene.image_id): Image.open(scene.path).convert("RGB") for scene in load_scenes()}


def _ask(
    tiny: TinyModel, shown: Mapping[str, Image.Image], questions: Sequence[Question], tokens: int, **options: Any
) -> list[Answer]:
    said = tiny.answers([(shown[q.image], q.text) for q in questions], tokens, **options)
    return [Answer.to(question, answer) for question, answer in zip(questions, said)]


def pope_facts(tiny: TinyModel, shown: Mapping[str, Image.Image]) -> dict[str, Any]:
    """POPE summaries per split, greedy and sampled at temperature 1."""
    images = [(scene.image_id, [item.category for item in scene.objects]) for scene in load_scenes()]
    template = "Is there a {} in the image?" + texts.ONE_WORD
    facts: dict[str, Any] = {"greedy": {}, "sampled": {}}
    for split in STRATEGIES:
        questions = build_questions(images, split, sample=QUESTION_IMAGES, template=template)
        facts["greedy"][split] = Pope().summary(Pope().rows(_ask(tiny, shown, questions, 3)))
        torch.manual_seed(0)
        sampled = _ask(tiny, shown, questions, 3, do_sample=True, temperature=1.0, top_k=0)
        facts["sampled"][split] = Pope().summary(Pope().rows(sampled))
    return facts


def caption_facts(tiny: TinyModel, shown: Mapping[str, Image.Image]) -> dict[str, Any]:
    """CHAIR summary of greedy captions, what kind of objects are invented, and lengths in tokens."""
    scenes = load_scenes()
    chair = Chair()
    rows = chair.rows(_ask(tiny, shown, chair.scene_questions(scenes[:CAPTIONS])["captions"], 160))
    prior = texts.CoOccurrence(scenes)
    typical = {str(s.image_id): {name for name, _ in prior.absent(s)[:TYPICAL]} for s in scenes[:CAPTIONS]}
    absent = sum(len(CATEGORIES) - len(s.categories) for s in scenes[:CAPTIONS]) / CAPTIONS
    invented = Counter(name in typical[row.cluster] for row in rows for name in row.evidence["hallucinated"])
    lengths = [len(tiny.processor.tokenizer(row.answer, add_special_tokens=False)["input_ids"]) for row in rows]
    return chair.summary(rows) | {
        "invented": sum(invented.values()),
        "invented_typical": invented[True],
        "typical_by_chance": TYPICAL / absent,
        "mean_tokens": sum(lengths) / len(lengths),
        "ended": sum(row.answer.endswith(".") for row in rows),
    }


def pair_facts(tiny: TinyModel, shown: Mapping[str, Image.Image]) -> dict[str, Any]:
    """MME-style tasks: counts, accuracy and accuracy per pair, in percent."""
    questions = MME().scene_questions(load_scenes()[:PAIR_IMAGES])["all"]
    return MME().report(MME().rows(_ask(tiny, shown, questions, 3)))["tasks"]


def swap_facts(tiny: TinyModel, shown: Mapping[str, Image.Image]) -> dict[str, Any]:
    """An object of one scene is asked about with that scene and with another that lacks it."""
    rng = random.Random(0)
    scenes = load_scenes()
    asked = []
    while len(asked) < 2 * SWAPS:
        first, second = rng.sample(scenes, 2)
        if only := sorted(first.categories - second.categories):
            question = f"Is there {texts.with_article(rng.choice(only))} in the image?{texts.ONE_WORD}"
            asked += [(shown[str(first.image_id)], question), (shown[str(second.image_id)], question)]
    said = tiny.answers(asked, 3)
    return {
        "pairs": SWAPS,
        "changed": sum(said[i] != said[i + 1] for i in range(0, len(said), 2)),
        "right": sum(answer == ("Yes", "No")[i % 2] for i, answer in enumerate(said)),
    }


@torch.no_grad()
def attention_facts(tiny: TinyModel, shown: Mapping[str, Image.Image], scenes: int = 200) -> dict[str, Any]:
    """Do the patches the class token attends to most lie on objects or on the background?

    DAMRO (arXiv 2410.04514) rests on outliers in the background. Per layer: the share of the ten most attended patches
    that show an object, beside the share of all patches that do.
    """
    chosen = load_scenes()[:scenes]
    tower = tiny.model.model.vision_tower if tiny.name == "tiny-llava" else tiny.model.vision_model
    pixels = tiny.processor.image_processor([shown[str(s.image_id)] for s in chosen], return_tensors="pt")
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")  # the only one that returns attention
    try:
        layers = tower(pixel_values=pixels["pixel_values"], output_attentions=True).attentions
    finally:
        tower.set_attn_implementation(before)
    on_object = torch.stack([torch.from_numpy(cell_owners(render(s.image_id)[2])) < 255 for s in chosen])
    top = [attention.mean(1)[:, 0, 1:].topk(10, dim=-1).indices for attention in layers]
    return {
        "scenes": scenes,
        "patches_on_objects": on_object.float().mean().item(),
        "top10_on_objects": [on_object.gather(1, patches).float().mean().item() for patches in top],
    }


def measure(tiny: TinyModel) -> dict[str, Any]:
    """All facts; about a minute on one core."""
    shown = pictures()
    return {
        "model": tiny.name,
        "parameters": sum(p.numel() for p in tiny.model.parameters()),
        "pope": pope_facts(tiny, shown),
        "captions": caption_facts(tiny, shown),
        "pairs": pair_facts(tiny, shown),
        "swap": swap_facts(tiny, shown),
        "attention": attention_facts(tiny, shown),
    }


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The facts of several models as a Markdown table."""

    def percent(value: float) -> str:
        return f"{100 * value:.1f} %"

    lines = ["| held-out scenes, greedy | " + " | ".join(record["model"] for record in records) + " |"]
    lines.append("|---|" + "---:|" * len(records))

    def add(title: str, values: list[str]) -> None:
        lines.append(f"| {title} | " + " | ".join(values) + " |")

    add("parameters", [f"{record['parameters'] / 1e6:.1f} M" for record in records])
    for split in STRATEGIES:
        pope = [(record["pope"]["greedy"][split], record["pope"]["sampled"][split]) for record in records]
        add(f"POPE {split}: accuracy (n = {pope[0][0]['n']})", [percent(greedy["accuracy"]) for greedy, _ in pope])
        add(f"POPE {split}: yes-ratio", [percent(greedy["yes_ratio"]) for greedy, _ in pope])
        add(f"POPE {split}: accuracy when sampled, T = 1", [percent(sampled["accuracy"]) for _, sampled in pope])
    captions = [record["captions"] for record in records]
    add(f"captions that hallucinate, CHAIRs (n = {captions[0]['captions']})", [percent(c["chair_s"]) for c in captions])
    add("mentions that hallucinate, CHAIRi", [percent(c["chair_i"]) for c in captions])
    add("recall of objects", [percent(c["recall"]) for c in captions])
    shares = [percent(c["invented_typical"] / max(c["invented"], 1)) for c in captions]
    add(f"invented objects that usually co-occur (by chance {percent(captions[0]['typical_by_chance'])})", shares)
    add("tokens per caption", [f"{c['mean_tokens']:.0f}" for c in captions])
    for task in ("existence", "color", "count", "position"):
        pairs = [record["pairs"][task] for record in records]
        values = [f"{pair['acc']:.1f} % / {pair['acc_plus']:.1f} %" for pair in pairs]
        add(f"MME-style {task}: accuracy / both of a pair (n = {pairs[0]['questions']})", values)
    swaps = [percent(record["swap"]["changed"] / record["swap"]["pairs"]) for record in records]
    add("answers that change with the image", swaps)
    attention = [record["attention"] for record in records]
    add(
        f"patches on objects (n = {attention[0]['scenes']} scenes)",
        [percent(a["patches_on_objects"]) for a in attention],
    )
    for title, layer in (("second last", -2), ("last", -1)):
        values = [percent(a["top10_on_objects"][layer]) for a in attention]
        add(f"the class token's ten most attended patches, on objects, {title} layer", values)
    return "\n".join(lines) + "\n"

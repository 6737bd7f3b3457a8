"""Speculation measured on this machine: plain, VCD and VCD+RITUAL with every drafter, against Hugging Face's own loops.

A table is written beside each JSON.

    python benchmarks/speculative/run.py captions  --output benchmarks/speculative/captions.json
    python benchmarks/speculative/run.py replay    --output benchmarks/speculative/replay.json

``captions``: a small model that ships, captions of held-out scenes at batch 1.

``hf prompt lookup`` is told to suppress the image token: it copies placeholders out of the prompt otherwise, which the
model refuses to read. ``hf assisted`` needs an assistant of the same vocabulary; nobody has trained one, so it is the
model's own first layers under its own language head, the best that can be had without training.

``replay``: a LLaVA with random weights of at least 200 M parameters, whose text means nothing. Its drafts are *replayed*
from the answer it gave before, each token spoilt with a set probability: this measures what a drafter of that acceptance
would bring at that size, and says nothing about whether such a drafter exists.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lvlm_decode.bench.paired import Arm, circumstances, measure, mismatches, ratio, raw
from lvlm_decode.bench.speculative import WARM, summary
from lvlm_decode.bench.workloads import caption_inputs
from lvlm_decode.errors import InputError
from lvlm_decode.families import family_of
from lvlm_decode.methods import parse
from lvlm_decode.speculative import drafters
from lvlm_decode.testing.replay import Replay
from lvlm_decode_evals.runner import load

METHODS = ("plain", "vcd", "vcd+ritual")
DRAFTERS = (
    "lookup",
    "copyspec",
    "recycling(rows=12,depth=5)",
    "automaton(shortest=1)",
    "eagle",
    "msd",
    "vispec",
    "vispec(stop=0.3)",
    "vispec(depth=6,rows=8)",
    "vispec(top_k=2,depth=5,rows=12)",
    "vispec(contrast=True)",
)


def first_layers(model: torch.nn.Module, layers: int) -> torch.nn.Module:
    """A model of the same class with the first ``layers`` decoder layers of ``model``, and all its other weights."""
    config = copy.deepcopy(model.config)
    config.get_text_config().num_hidden_layers = layers
    assistant = type(model)(config).eval().to(model.dtype)
    kept = assistant.state_dict().keys()
    assistant.load_state_dict({name: value for name, value in model.state_dict().items() if name in kept})
    assistant.generation_config = copy.deepcopy(model.generation_config)
    return assistant


def controls(model: torch.nn.Module) -> dict[str, Arm]:
    """Hugging Face's own loops on the bare model, and this library's loop with drafts of no tokens."""
    arms = {
        "hf plain": Arm(),
        "hf prompt lookup": Arm(
            options={"prompt_lookup_num_tokens": 5, "suppress_tokens": [model.config.image_token_id]}
        ),
        "plain": Arm(parse("plain"), Replay(tokens=0)),
    }
    layers = model.config.get_text_config().num_hidden_layers
    # The whole of InstructBLIP hands over to its language model, whose assistant would have to be one too.
    if not family_of(model).has_qformer:
        for depth in (layers // 2, layers - 1):
            arms[f"hf assisted, {depth} of {layers} layers"] = Arm(
                options={"assistant_model": first_layers(model, depth)}
            )
    return arms


def captions(
    which: str, samples: int, tokens: int, rounds: int, methods: tuple[str, ...], drafting: tuple[str, ...]
) -> dict:
    loaded = load(which)
    model, processor = loaded.model, loaded.processor
    inputs = caption_inputs(processor, samples + WARM)
    arms = controls(model)
    for name in methods:
        if name != "plain":
            arms[name] = Arm(parse(name))
            arms[f"{name} sequential"] = Arm(parse(name), execution="sequential")
        for drafter in drafting:
            if name == "plain" and "contrast" in drafter:
                continue
            try:
                arms[f"{name} | {drafter}"] = Arm(parse(name), drafters.parse(drafter, model=model))
            except InputError as error:
                print(f"left out: {name} | {drafter}: {error}")
    # Views are keyed, so that every arm of a method sees the same noise.
    results = measure(
        model,
        processor,
        inputs[WARM:],
        arms,
        max_new_tokens=tokens,
        rounds=rounds,
        warm=inputs[:WARM],
        options={"seed": 0},
    )
    base = {name: results[name if name != "plain" else "hf plain"] for name in methods}
    drafted = {name: result for name, result in results.items() if "|" in name}
    # The best drafter is picked on every other sample and reported on those in between.
    picked_on, reported_on = slice(0, None, 2), slice(1, None, 2)

    def relative(arm: str, to: str, part: slice, decode_only: bool = False) -> float:
        return ratio(results[arm].only(part), results[to].only(part), decode_only)

    def both(arm: str, to: str) -> dict[str, float]:
        return {
            "call": round(relative(arm, to, reported_on), 3),
            "decode": round(relative(arm, to, reported_on, True), 3),
        }

    best = {
        method: min(
            (arm for arm in drafted if arm.startswith(f"{method} |")),
            key=lambda arm: relative(arm, "hf plain", picked_on),
        )
        for method in methods
    }
    heads = ("vispec", "msd", "eagle")
    targets = {
        "best_drafter": best,
        "plain_with_a_head_vs_plain": {
            arm: both(arm, "hf plain")
            for arm in drafted
            if arm.startswith("plain |") and arm.split("| ")[1].split("(")[0] in heads
        },
        "best_drafter_vs_plain": {method: both(best[method], "hf plain") for method in methods},
        "best_drafter_vs_sequential": {
            method: both(best[method], f"{method} sequential") for method in methods if method != "plain"
        },
    }
    return {
        "what": f"captions of {samples} held-out scenes by {which}, batch 1, greedy, at most {tokens} tokens",
        "mismatches": {arm: mismatches(result, base[arm.split(" |")[0]]) for arm, result in drafted.items()}
        | {arm: mismatches(results[arm], results["hf plain"]) for arm in results if arm == "plain" or arm[:3] == "hf "},
        "targets": targets,
        "arms": summary(results, "hf plain"),
        "raw": raw(results),
        "circumstances": circumstances(model),
    }


def random_llava(hidden: int = 1024, layers: int = 15, vocabulary: int = 8192) -> LlavaForConditionalGeneration:
    """A LLaVA of random weights; the default has more than 200 M parameters."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=112,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=int(hidden * 2.75),
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocabulary - 1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def replay(tokens: int, rounds: int, methods: tuple[str, ...], depth: int, acceptances: tuple[float, ...]) -> dict:
    model = random_llava()
    image = model.config.image_token_index
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat(
        [
            torch.randint(3, 8000, (6,), generator=generator),
            torch.full((64,), image),
            torch.randint(3, 8000, (24,), generator=generator),
        ]
    )[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 112, 112, generator=generator),
    }
    options = {"seed": 0, "eos_token_id": None, "suppress_tokens": [image]}
    arms = controls(model)
    for name in methods:
        method = parse(name)
        if name != "plain":
            arms[name] = Arm(method)
            arms[f"{name} sequential"] = Arm(method, execution="sequential")
        first = measure(model, None, [inputs], {name: Arm(method)}, max_new_tokens=tokens, rounds=0, options=options)
        for acceptance in acceptances:
            drafter = Replay(answers=first[name].answers[0], acceptance=acceptance, tokens=depth)
            arms[f"{name} | replay {acceptance}"] = Arm(method, drafter)
    results = measure(model, None, [inputs], arms, max_new_tokens=tokens, rounds=rounds, options=options)
    drafted = [name for name in results if "|" in name]
    return {
        "what": f"random LLaVA, {tokens} tokens, drafts of {depth} tokens replayed from the known answer with set acceptance",
        "mismatches": {
            name: mismatches(
                results[name], results["hf plain" if name[:5] == "plain" or name[:3] == "hf " else name.split(" |")[0]]
            )
            for name in [*drafted, *(arm for arm in results if arm == "plain" or arm[:3] == "hf ")]
        },
        "speedup_over_sequential": {
            name: round(1 / ratio(results[name], results[f"{name.split(' |')[0]} sequential"], True), 3)
            for name in drafted
            if not name.startswith("plain")
        },
        "arms": summary(results, "hf plain"),
        "raw": raw(results),
        "circumstances": circumstances(model),
    }


def table(report: dict) -> str:
    """A report as Markdown."""
    about, lines = report["circumstances"], [report["what"] + ".", ""]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines += [
        f"{about['processor']}, {about['threads']} threads, {about['dtype']}, {about['parameters'] / 1e6:.1f} M parameters, "
        f"{versions}, load average at the end {about['load_average'][0]}.",
        "",
        "| arm | ms per token | relative to hf plain | decoding alone | tau | acceptance per level | split ms: target, draft, "
        "other | formula | mismatches |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in report["arms"].items():
        told, differ = arm.get("speculation"), report["mismatches"].get(name)
        cells = [
            name.replace("|", r"\|"),
            f"{arm['ms_per_token']:.2f}",
            f"{arm['vs_plain']:.2f}x",
            f"{arm['vs_plain_decode']:.2f}x",
        ]
        if told:
            cells += [f"{told['tau']:.2f}", " ".join(f"{level:.2f}" for level in told["acceptance_per_level"])]
            cells += [", ".join(f"{ms:.2f}" for ms in told["ms_per_token_split"].values())]
            cells += [f"{told['formula']['time_per_token']:.2f}x"]
        else:
            cells += ["", "", "", ""]
        lines.append(f"| {' | '.join(cells)} | {'' if differ is None else differ} |")
    for name, value in report.get("targets", {}).items():
        lines += ["", f"{name.replace('_', ' ')}: `{json.dumps(value)}`"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("captions", "replay"))
    parser.add_argument("--model", default="tiny-llava", help="of captions")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--drafters", nargs="+", default=list(DRAFTERS))
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.6, 0.8, 0.9])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    methods = tuple(options.methods)
    if options.what == "captions":
        drafting = tuple(options.drafters)
        report = captions(options.model, options.samples, options.tokens or 96, options.rounds, methods, drafting)
    else:
        report = replay(options.tokens or 32, options.rounds, methods, options.depth, tuple(options.acceptance))
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(table(report), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()

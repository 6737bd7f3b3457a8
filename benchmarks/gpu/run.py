"""Everything that waits for a GPU, in one command of under ten minutes that writes one JSON.

    python benchmarks/gpu/run.py --output benchmarks/gpu/record.json
    python benchmarks/gpu/run.py --tiny --output /tmp/tiny.json        # the same on a CPU with small shapes, in a minute

Four parts, each with its seconds and, if it failed, its error, so that one failure costs no other part:

    device     tokens of tiny models with every drafter and with a compiled static cache, on the device and on the CPU
    shapes     single forwards at the shapes of LLaVA-1.5-7B (``llava_shapes.py``)
    generate   a whole LLaVA of those shapes with random weights: time to first token, time per token and peak memory of plain
               generate(), VCD stacked, VCD as two forwards, VCD with a ViSpec head of random weights and with replayed drafts
    profile    where the time of one VCD token goes: the ten operators that take most
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import traceback
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import llava_shapes
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import lvlm_decode
from lvlm_decode.bench.paired import circumstances
from lvlm_decode.speculative import drafters
from lvlm_decode.speculative.heads import KINDS, DraftHead, HeadConfig
from lvlm_decode.testing import models
from lvlm_decode.testing.replay import Replay

#: The vision tower of LLaVA-1.5, and a small one.
VISION = {
    "llava-1.5-7b": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
}


def build(shapes: str, device: str, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """A LLaVA of random weights, made on the device."""
    torch.manual_seed(0)
    text = LlamaConfig(**llava_shapes.SHAPES[shapes], max_position_embeddings=4096)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION[shapes]),
        text_config=text,
        image_token_index=text.vocab_size - 1,
        vision_feature_select_strategy="default",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.pad_token_id = 0
    return model


def prompt(model: LlavaForConditionalGeneration, shapes: str) -> dict[str, torch.Tensor]:
    """One image and sixty tokens of text."""
    size, patch = VISION[shapes]["image_size"], VISION[shapes]["patch_size"]
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, model.config.text_config.vocab_size - 100, (60,), generator=generator)
    image = torch.full(((size // patch) ** 2,), model.config.image_token_index)
    ids = torch.cat([words[:20], image, words[20:]])[None]
    pixels = torch.randn(1, 3, size, size, generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: value.to(model.device) for name, value in given.items()}


def device_part(device: str) -> dict[str, Any]:
    """Whether tiny models say on the device what they say on the CPU, in float32."""
    tiny = models.tiny("llava")
    other = copy.deepcopy(tiny.model).to(device)
    found = {}
    heads = {kind: HeadConfig.for_target(tiny.model, kind, rows=7, depth=3, top_k=2) for kind in KINDS}
    for name in ("none", "lookup", "recycling", "automaton", "auto", *heads, "static"):
        outs = []
        for model in (tiny.model, other):
            torch.manual_seed(0)
            drafter: Any = None if name in ("none", "static") else name
            if name in heads:
                drafter = drafters.get(name)(head=DraftHead(heads[name]))
            how = {"cache_implementation": "static"} if name == "static" else {}
            inputs = {key: value.to(model.device) for key, value in tiny.inputs(["is it", "no"], seed=2).items()}
            with lvlm_decode.attached(model, "vcd", processor=tiny.processor, drafter=drafter):
                outs.append(model.generate(**inputs, max_new_tokens=12, do_sample=False, seed=0, **how).tolist())
        found[name] = outs[0] == outs[1]
    return {"same_tokens": found}


def timed(model: Any, inputs: dict[str, Any], tokens: int) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    begin = perf_counter()
    out = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    assert out.shape[1] >= tokens
    return perf_counter() - begin


def generate_part(model: Any, shapes: str, tokens: int, rounds: int) -> dict[str, Any]:
    inputs = prompt(model, shapes)
    on_gpu = model.device.type == "cuda"
    with lvlm_decode.attached(model, "vcd"):
        out = model.generate(**inputs, do_sample=False, seed=0, max_new_tokens=tokens, min_new_tokens=tokens)
    answer = out[:, inputs["input_ids"].shape[1] :].tolist()
    torch.manual_seed(0)
    head = DraftHead(HeadConfig.for_target(model, "vispec"))
    arms: dict[str, dict[str, Any] | None] = {
        "plain generate()": None,
        "vcd stacked": {},
        "vcd two forwards": {"execution": "sequential"},
        "vcd, random vispec head": {"drafter": drafters.get("vispec")(head=head)},
        "vcd, replayed 0.8": {"drafter": Replay(answers=answer, acceptance=0.8, tokens=5)},
    }
    rows: dict[str, Any] = {name: {"first_s": [], "token_s": [], "peak_bytes": 0} for name in arms}
    names = list(arms)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            options = arms[name]
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            if options is None:
                first, whole = timed(model, inputs, 1), timed(model, inputs, tokens)
            else:
                with lvlm_decode.attached(model, "vcd", **options):
                    first, whole = timed(model, inputs, 1), timed(model, inputs, tokens)
            if turn:
                rows[name]["first_s"].append(first)
                rows[name]["token_s"].append((whole - first) / (tokens - 1))
            if on_gpu:
                rows[name]["peak_bytes"] = max(rows[name]["peak_bytes"], torch.cuda.max_memory_allocated())
    base = rows["plain generate()"]["token_s"]
    for row in rows.values():
        row["times_plain_per_token"] = round(statistics.median(a / b for a, b in zip(row["token_s"], base)), 4)
    return {"tokens": tokens, "prompt": inputs["input_ids"].shape[1], "arms": rows}


def profile_part(model: Any, shapes: str) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    inputs, activities = prompt(model, shapes), [ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with lvlm_decode.attached(model, "vcd"):
        timed(model, inputs, 4)
        with profile(activities=activities) as found:
            timed(model, inputs, 8)
    own = "self_device_time_total" if model.device.type == "cuda" else "self_cpu_time_total"
    most = sorted(found.key_averages(), key=lambda entry: -getattr(entry, own))[:10]
    return {"microseconds": {entry.key: round(getattr(entry, own), 1) for entry in most}}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes in float32 on the CPU")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no GPU is here; use --tiny for small shapes on the CPU.")
    shapes, device = ("tiny", "cpu") if options.tiny else ("llava-1.5-7b", "cuda")
    dtype = torch.float32 if options.tiny else torch.bfloat16
    tokens, rounds = (8, 1) if options.tiny else (128, 5)
    report: dict[str, Any] = {"what": f"{shapes} shapes on {device}, random weights", "parts": {}}

    def part(name: str, run: Callable[[], dict[str, Any]]) -> None:
        begin = perf_counter()
        try:
            found = run()
        except Exception:
            found = {"error": traceback.format_exc()}
        report["parts"][name] = {"seconds": round(perf_counter() - begin, 2), **found}
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    part("device", lambda: device_part(device))
    forwards = options.output.with_suffix(".shapes.json")
    flags = ["--tiny", "--repeats", "1", "--context", "40"] if options.tiny else []
    part("shapes", lambda: llava_shapes.main([*flags, "--output", str(forwards)]))
    forwards.unlink(missing_ok=True)
    model = build(shapes, device, dtype)
    report["circumstances"] = circumstances(model)
    part("generate", lambda: generate_part(model, shapes, tokens, rounds))
    part("profile", lambda: profile_part(model, shapes))
    return report


if __name__ == "__main__":
    for name, found in main()["parts"].items():
        print(f"{name:10s} {found['seconds']:8.1f} s  {'failed' if 'error' in found else 'done'}")

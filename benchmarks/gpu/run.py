"""Everything that waits for a GPU, in one command of under ten minutes that writes one JSON.

    python benchmarks/gpu/run.py --output benchmarks/gpu/record.json
    python benchmarks/gpu/run.py --tiny --output /tmp/tiny.json        # the same on a CPU with small shapes, in a minute

Six parts, each with its seconds and, if it failed, its error, so that one failure costs no other part:

    device     tokens of tiny models with every drafter and with a compiled static cache, on the device and on the CPU
    waits      how often a token, or a cycle of a drafter, waits for the device (what torch's debug mode of synchronisations says)
    shapes     single forwards at the shapes of LLaVA-1.5-7B (``llava_shapes.py``)
    generate   a whole LLaVA of those shapes with random weights: time to first token, time per token and peak memory of plain
               generate(), VCD stacked, VCD as two forwards, three views, VCD with a ViSpec head of random weights and with
               replayed drafts
    profile    where the time of a token goes, plain and VCD: its kernels, the ten operators that take most, and the clock
    compiled   plain and VCD with a static cache, which transformers compiles into CUDA graphs
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import llava_shapes
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
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
    # Every token is followed by the next one of the vocabulary, by a wide margin: weights that are drawn alone have no
    # clear winner, and what two kernels round differently would end a draft.
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
        words = model.get_input_embeddings().weight
        model.get_output_embeddings().weight.copy_(words.roll(1, 0))
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


def waits_part(device: str) -> dict[str, Any]:
    """Waits per token, or per cycle of a drafter, that calls of 8 tokens have more than calls of 3."""
    built = models.tiny("llava")
    model = copy.deepcopy(built.model).to(device)
    head = DraftHead(HeadConfig.for_target(built.model, "vispec", rows=7, depth=3, top_k=2)).to(device)
    arms: dict[str, tuple[Any, Any]] = {
        name: (name, None) for name in ("plain", "vcd", "icd", "vcd+ritual", "pai", "dola")
    }
    arms |= {"vcd, recycling": ("vcd", "recycling"), "vcd, vispec": ("vcd", drafters.get("vispec")(head=head))}
    found = {"transformers": _waits(model, built, None, None)}
    return found | {name: _waits(model, built, method, drafter) for name, (method, drafter) in arms.items()}


def _waits(model: Any, built: Any, method: Any, drafter: Any) -> dict[str, float]:
    inputs = {key: value.to(model.device) for key, value in built.inputs(["is it a dog"], seed=2).items()}
    counts, steps = [], []
    for tokens in (3, 8):
        how = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
        block = contextlib.nullcontext() if method is None else lvlm_decode.attached(
            model, method, processor=built.processor, drafter=drafter)  # fmt: skip
        with block, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if model.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                model.generate(**inputs, eos_token_id=None, **how)
            finally:
                if model.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            steps.append(tokens if drafter is None else lvlm_decode.last_run(model).trace.speculation.cycles)
        counts.append(sum("synchroniz" in str(warning.message) for warning in said))
    return {"more_waits": counts[1] - counts[0], "more_steps": steps[1] - steps[0]}


def timed(model: Any, inputs: dict[str, Any], tokens: int) -> float:
    """Seconds of a call."""
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
        "plain attached": {"method": "plain"},
        "vcd stacked": {"method": "vcd"},
        "vcd two forwards": {"method": "vcd", "execution": "sequential"},
        "vcd+ritual stacked": {"method": "vcd+ritual"},
        "vcd, random vispec head": {"method": "vcd", "drafter": drafters.get("vispec")(head=head)},
        "vcd, replayed 0.8": {"method": "vcd", "drafter": Replay(answers=answer, acceptance=0.8, tokens=5)},
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
                with lvlm_decode.attached(model, **options):
                    first, whole = timed(model, inputs, 1), timed(model, inputs, tokens)
                    drafted = lvlm_decode.last_run(model).trace.speculation
                    rows[name] |= {} if drafted is None else {"tau": round(drafted.tau, 3)}
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
    return {name: _profiled(model, prompt(model, shapes), name) for name in ("plain generate()", "vcd")}


def _profiled(model: Any, inputs: dict[str, Any], name: str) -> dict[str, Any]:
    """Of a call of 17 tokens less one of a single token: kernels and operators per token, in milliseconds."""
    on_gpu = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with contextlib.nullcontext() if name == "plain generate()" else lvlm_decode.attached(model, name):
        timed(model, inputs, 4)
        clock = (timed(model, inputs, 17) - timed(model, inputs, 1)) / 16
        found = []
        for tokens in (1, 17):
            with profile(activities=activities) as seen:
                timed(model, inputs, tokens)
            found.append({entry.key: entry for entry in seen.key_averages()})
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"

    def more(key: str, what: str) -> float:
        before = getattr(found[0][key], what) if key in found[0] else 0
        return (getattr(found[1][key], what) - before) / 16

    # On a GPU the kernels alone: an operator's entry counts the same time once more.
    kept = [key for key, entry in found[1].items() if not on_gpu or entry.device_type == DeviceType.CUDA]
    each = {key: more(key, own) / 1000 for key in kept}
    most = sorted(each, key=lambda key: -each[key])[:12]
    return {
        "clock_ms": round(1000 * clock, 3),
        "device_ms": round(sum(each.values()), 3),
        "launches": round(sum(more(key, "count") for key in found[1] if "LaunchKernel" in key), 1),
        "most_ms": {key[:90]: [round(each[key], 4), round(more(key, "count"), 2)] for key in most},
    }


def compiled_part(model: Any, shapes: str, tokens: int, rounds: int) -> dict[str, Any]:
    inputs = {**prompt(model, shapes), "cache_implementation": "static"}
    found: dict[str, Any] = {}
    for name in ("plain", "vcd"):
        with lvlm_decode.attached(model, name):
            begin = perf_counter()
            timed(model, inputs, tokens)
            taken = perf_counter() - begin
            each = [(timed(model, inputs, tokens) - timed(model, inputs, 2)) / (tokens - 2) for _ in range(rounds)]
            eager = {**inputs, "disable_compile": True}
            timed(model, eager, 2)
            without = [(timed(model, eager, tokens) - timed(model, eager, 2)) / (tokens - 2) for _ in range(rounds)]
        found[name] = {"compile_s": round(taken, 1), "token_s": each, "not_compiled_token_s": without}
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes in float32 on the CPU")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no GPU is here; use --tiny for small shapes on the CPU.")
    shapes, device = ("tiny", "cpu") if options.tiny else ("llava-1.5-7b", "cuda")
    dtype = torch.float32 if options.tiny else torch.bfloat16
    tokens, rounds = (8, 1) if options.tiny else (64, 3)
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
    part("waits", lambda: waits_part(device))
    forwards = options.output.with_suffix(".shapes.json")
    flags = ["--tiny", "--repeats", "1", "--context", "40"] if options.tiny else []
    part("shapes", lambda: llava_shapes.main([*flags, "--output", str(forwards)]))
    forwards.unlink(missing_ok=True)
    model = build(shapes, device, dtype)
    report["circumstances"] = circumstances(model)
    part("generate", lambda: generate_part(model, shapes, tokens, rounds))
    part("profile", lambda: profile_part(model, shapes))
    part("compiled", lambda: compiled_part(model, shapes, tokens, rounds))
    return report


if __name__ == "__main__":
    for name, found in main()["parts"].items():
        print(f"{name:10s} {found['seconds']:8.1f} s  {'failed' if 'error' in found else 'done'}")

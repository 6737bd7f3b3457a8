"""What verification costs on a GPU, at the shapes of LLaVA-1.5-7B: milliseconds, achieved bandwidth, distance to the floor.

    python benchmarks/gpu/llava_shapes.py --output benchmarks/gpu/llava-1.5-7b.json
    python benchmarks/gpu/llava_shapes.py --tiny --output /tmp/tiny.json        # the same script on a CPU, in seconds

Random weights: only shapes and dtypes matter here. Measured, one forward at a time, after a prompt of ``--context`` slots:

    plain             one row, one view, dynamic cache, as transformers runs it
    plain graphed     the same with a static cache inside a CUDA graph (on CUDA only)
    stacked V         one row in V views, and verification of 31 and 61 rows in V views, tree mask included
    draft             one step of a ViSpec and of an MSD head, 1 row and 8 rows

The floor is the larger of the time to read weights and keys at ``--bandwidth`` and the time of the products at ``--flops``. The
first is by default the data sheet's of the GPU, the second the bfloat16 rate that was measured on an H100 and an H200.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from lvlm_decode.bench.paired import circumstances
from lvlm_decode.engine import hf
from lvlm_decode.speculative.heads import DraftHead, HeadConfig
from lvlm_decode.speculative.heads.runner import HeadRunner
from lvlm_decode.speculative.tree import ranked_shape

#: The language model of LLaVA-1.5-7B, and one with the same ratios that a CPU runs in milliseconds.
SHAPES = {
    "llava-1.5-7b": {
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}
VERIFIED_ROWS = (1, 31, 61)
#: Bytes per second, by what the GPU's name holds; of an H200 for others.
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}
VIEWS = (1, 2, 3)


def build(name: str, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=4096)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device=device).to(dtype)
    # Rotary tables are buffers without a checkpoint: make them anew where they are needed.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model.eval()


def timed(run: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Seconds of each call, after three that do not count."""
    out = []
    for number in range(repeats + 3):
        if device == "cuda":
            torch.cuda.synchronize()
        start = perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            out.append(perf_counter() - start)
    return out


def filled(model: LlamaForCausalLM, cache: DynamicCache | StaticCache, rows: int, context: int) -> None:
    """Write ``context`` slots of noise into every layer."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    shape = (rows, config.num_key_value_heads, context, size)
    for layer in range(config.num_hidden_layers):
        states = torch.randn(shape, device=model.device, dtype=model.dtype)
        cache.update(states, states, layer)


def floor_of(model: LlamaForCausalLM, views: int, rows: int, context: int, bandwidth: float, flops: float) -> dict:
    config = model.config
    width = model.dtype.itemsize
    read = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    size = config.hidden_size // config.num_attention_heads
    keys = 2 * config.num_hidden_layers * config.num_key_value_heads * size * context * views
    moved = (read + keys) * width
    return {"bytes": moved, "floor_ms": 1e3 * max(moved / bandwidth, 2 * read * views * rows / flops)}


def verification(model: LlamaForCausalLM, views: int, rows: int, context: int) -> Callable[[], object]:
    """One verification of ``rows`` tree rows in ``views`` views; its cache is as before afterwards."""
    cache = DynamicCache(config=model.config)
    filled(model, cache, views, context)
    shape, _ = ranked_shape(rows, (0.6, 0.2, 0.1), 8) if rows > 1 else (None, None)
    ids = torch.randint(3, 100, (views, rows), device=model.device)
    arguments: dict[str, Tensor] = {}
    if shape is not None:
        seen = torch.cat([torch.ones(rows, context, dtype=torch.bool), shape.ancestors], 1).to(model.device)
        mask = torch.zeros(seen.shape, dtype=model.dtype, device=model.device)
        arguments["attention_mask"] = mask.masked_fill_(~seen, torch.finfo(model.dtype).min)[None, None]
        arguments["position_ids"] = (context + shape.depths).to(model.device)[None].expand(views, -1)

    def run() -> None:
        model(input_ids=ids, **hf.with_cache(cache), use_cache=True, **arguments)
        cache.crop(-rows)

    return run


def graphed(model: LlamaForCausalLM, context: int) -> Callable[[], object]:
    """A plain step with a static cache, captured once as a CUDA graph and replayed."""
    cache = StaticCache(config=model.config, max_cache_len=context + 64)
    filled(model, cache, 1, context)
    ids = torch.full((1, 1), 5, device=model.device)
    position = torch.full((1, 1), context, device=model.device)

    def step() -> None:
        model(input_ids=ids, position_ids=position, **hf.with_cache(cache), use_cache=True)
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def draft_step(model: LlamaForCausalLM, kind: str, rows: int, context: int) -> tuple[Callable[[], object], int]:
    """One drafting step of a head, language head included; and the parameters it reads."""
    head = DraftHead(HeadConfig.for_target(model, kind))
    runner = HeadRunner(head, model)
    config = head.config
    slots = context if kind == "msd" else max(context // 3, 1)
    shape = (1, config.num_kv_heads, slots + rows, config.head_dim)
    keys, values = (torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2))
    tokens = torch.full((1, rows), 5, device=model.device)
    features = torch.randn(1, rows, config.hidden_size, device=model.device, dtype=model.dtype)
    cos, sin = (table[context : context + 1] for table in runner.rotary(context + 1))

    def run() -> None:
        z = runner.inputs(tokens, features, None)
        runner.logits(runner.step(z, cos, sin, keys, values, slots, None)).argmax(-1)

    read = sum(
        w.numel() for w in (runner.w_feature, runner.w_qkv, runner.w_o, runner.w_up, runner.w_down, runner.out_weight)
    )
    return run, read + (runner.w_embed.numel() if runner.table is None else 0)


@torch.no_grad()
def run(
    shapes: str, device: str, dtype: torch.dtype, context: int, repeats: int, bandwidth: float, flops: float
) -> dict:
    model = build(shapes, device, dtype)
    rows_of: dict[str, dict] = {}

    def note(name: str, seconds: list[float], floor: dict) -> None:
        ms = 1e3 * statistics.median(seconds)
        rows_of[name] = {
            "ms": round(ms, 4),
            "achieved_gb_s": round(floor["bytes"] / ms / 1e6, 1),
            "floor_ms": round(floor["floor_ms"], 4),
            "times_floor": round(ms / floor["floor_ms"], 3),
            "raw_ms": [round(1e3 * s, 4) for s in seconds],
        }

    def limit(views: int, rows: int) -> dict:
        return floor_of(model, views, rows, context, bandwidth, flops)

    note("plain", timed(verification(model, 1, 1, context), device, repeats), limit(1, 1))
    if device == "cuda":
        note("plain graphed", timed(graphed(model, context), device, repeats), limit(1, 1))
    for views in VIEWS:
        for rows in VERIFIED_ROWS:
            seconds = timed(verification(model, views, rows, context), device, repeats)
            note(f"stacked V={views} rows={rows}", seconds, limit(views, rows))
    for kind in ("vispec", "msd"):
        for rows in (1, 8):
            step, read = draft_step(model, kind, rows, context)
            moved = read * model.dtype.itemsize
            floor = {"bytes": moved, "floor_ms": 1e3 * max(moved / bandwidth, 2 * read * rows / flops)}
            note(f"draft {kind} rows={rows}", timed(step, device, repeats), floor)
    return {
        "what": f"{shapes} shapes, random weights, {context} slots in the cache",
        "bandwidth": bandwidth,
        "flops": flops,
        "rows": rows_of,
        "circumstances": circumstances(model),
    }


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes in float32 on the CPU")
    parser.add_argument("--context", type=int, default=900)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--bandwidth", type=float, help="bytes per second")
    parser.add_argument("--flops", type=float, default=790e12)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() and not options.tiny else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("no GPU is here; LLaVA-1.5-7B shapes need one. Use --tiny for small shapes on the CPU.")
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    known = next((rate for part, rate in BANDWIDTH.items() if part in name), BANDWIDTH["H200"])
    report = run(
        "tiny" if options.tiny else "llava-1.5-7b",
        device,
        torch.float32 if options.tiny else torch.bfloat16,
        options.context,
        options.repeats,
        options.bandwidth or known,
        options.flops,
    )
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    for name, row in main()["rows"].items():
        print(f"{name:24s} {row['ms']:9.3f} ms  {row['achieved_gb_s']:8.1f} GB/s  {row['times_floor']:6.2f} x floor")

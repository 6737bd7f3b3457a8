"""What the controllers cost: OPERA against plain beam search of the same width, CNTP, VDGD and MVP against greedy.

    python benchmarks/controllers/cost.py --out benchmarks/controllers/cost.json

The two of a pair take turns, so that a busy machine hits both, and ratios are taken pair by pair. Time is wall clock and
this process's CPU time, one thread. OPERA and beam search write the same number of tokens, without an end token; the others
answer until they are done. A call is the prompt's forward and then steps, and OPERA runs one prompt per sample where beam
search runs one per beam; so for this pair calls for one token are timed as well, and the steps' ratio is that of what longer
calls take more (``--tokens`` says how long they are). Peak memory is that of the process while it writes, in a process of its
own per measurement with small allocations returned to the system, above what it held before (model and inputs), and whole.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from PIL import Image

import lvlm_decode
import lvlm_decode_data
from lvlm_decode.attachment import last_run
from lvlm_decode.bench.paired import circumstances
from lvlm_decode.bench.workloads import loaded

ROOT = Path(__file__).resolve().parents[2]
CAPTION, QUESTION = "Please describe this image in detail.", "Is there a dog in the image?"
# (model, method, what it is paired with, what is asked)
PAIRS = [
    ("tiny", "opera", dict(num_beams=5), CAPTION),
    ("random", "opera", dict(num_beams=5), CAPTION),
    ("tiny", "cntp", {}, CAPTION),
    ("tiny", "vdgd", {}, CAPTION),
    ("tiny", "vdgd", {}, QUESTION),
    ("tiny", "mvp", {}, QUESTION),
]


def prepare(name: str, asked: str, batch: int):
    """Model, processor (None for drawn weights) and inputs."""
    if name == "random":
        model, generator = loaded("random").model, torch.Generator().manual_seed(1)
        ids = torch.randint(5, 31000, (batch, 94), generator=generator)
        ids[:, 8:72] = model.config.image_token_id
        side = model.config.vision_config.image_size
        pixels = torch.randn(batch, 3, side, side, generator=generator)
        return model, None, dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
    path = lvlm_decode_data.tiny_path("tiny-llava")
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(path)
    processor.tokenizer.padding_side = "left"
    content = [{"type": "image"}, {"type": "text", "text": asked}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    scenes = lvlm_decode_data.load_scenes()[:batch]
    images = [Image.open(ROOT / "data" / "heldout" / f"{scene.image_id}.jpg") for scene in scenes]
    return model, processor, dict(processor(text=[prompt] * batch, images=images, return_tensors="pt"))


class Measured:
    """One side of a pair."""

    def __init__(self, model, processor, inputs, method, control, tokens):
        self.model, self.processor, self.inputs, self.method = model, processor, inputs, method
        self.how = {"max_new_tokens": tokens, "do_sample": False, "num_beams": 1}
        if "num_beams" in control:
            # The same number of tokens on both sides, whatever they are.
            self.how |= {"eos_token_id": None}
            self.how |= control if method is None else {}

    def __call__(self, tokens: int | None = None) -> dict:
        how = self.how if tokens is None else {**self.how, "max_new_tokens": tokens}
        calls = []
        hook = self.model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
        if self.method is not None:
            # Attached anew each time, so that nothing is remembered from one pass to the next.
            lvlm_decode.attach(self.model, self.method, processor=self.processor)
        more = {} if self.method is None else {"seed": 0}
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            out = self.model.generate(**self.inputs, **how, **more)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        rollbacks = last_run(self.model).trace.rollbacks or None if self.method is not None else None
        lvlm_decode.detach(self.model)
        hook.remove()
        written = out[:, self.inputs["input_ids"].shape[1] :]
        pad = self.model.generation_config.pad_token_id
        return {
            "wall_s": wall,
            "cpu_s": cpu,
            "forwards": len(calls),
            "tokens": int((written != pad).sum(1).max()) if "eos_token_id" not in self.how else written.shape[1],
            "rollbacks": rollbacks,
        }


def resident(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS now, VmHWM at most so far."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(field)).split()[1]) * 1024


def peak(index: int, side: str, tokens: int, batch: int) -> None:
    """Measure one side's memory in this process and print it."""
    # Above this size glibc hands memory back when it is freed; otherwise it keeps what it once had.
    ctypes.CDLL(None).mallopt(-3, 65536)
    name, method, control, asked = PAIRS[index]
    model, processor, inputs = prepare(name, asked, batch)
    measured = Measured(model, processor, inputs, method if side == "method" else None, control, tokens)
    measured.how["max_new_tokens"] = 4
    measured()
    measured.how["max_new_tokens"] = tokens
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    measured()
    print(json.dumps({"before": before, "peak": resident("VmHWM")}))


def child(index: int, side: str, tokens: int, batch: int) -> dict:
    command = [sys.executable, __file__, "--peak", str(index), side, "--tokens", str(tokens), "--batch", str(batch)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def pair(index: int, tokens: int, batch: int, repeats: int, memory_too: bool) -> dict:
    name, method, control, asked = PAIRS[index]
    model, processor, inputs = prepare(name, asked, batch)
    sides = {
        "control": Measured(model, processor, inputs, None, control, tokens),
        "method": Measured(model, processor, inputs, method, control, tokens),
    }
    for side in sides.values():
        side(4)
    raw = {key: [] for key in sides}
    first: dict[str, list[dict]] = {key: [] for key in sides}
    for _ in range(repeats):
        for key, side in sides.items():
            raw[key].append(side())
        for key, side in sides.items() if control else ():
            first[key].append(side(1))
    memory = None
    if memory_too and Path("/proc/self/clear_refs").exists():
        memory = {key: child(index, key, tokens, batch) for key in sides}

    def ratio(field: str) -> float:
        return statistics.median(m[field] / c[field] for m, c in zip(raw["method"], raw["control"]))

    found = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "circumstances": circumstances(model),
        "batch": batch,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "method": method,
        "control": "beam5" if control else "greedy",
        "asked": asked,
        "wall_ratio": ratio("wall_s"),
        "cpu_ratio": ratio("cpu_s"),
        "forwards_per_token": {key: runs[0]["forwards"] / runs[0]["tokens"] for key, runs in raw.items()},
        "raw": raw,
    }
    if control:
        found |= apart(raw, first)
    if memory:
        found["memory_bytes"] = memory
        found["peak_ratio"] = memory["method"]["peak"] / memory["control"]["peak"]
        above = {key: value["peak"] - value["before"] for key, value in memory.items()}
        found["peak_above_model_ratio"] = above["method"] / above["control"]
    return found


def apart(raw: dict[str, list[dict]], first: dict[str, list[dict]]) -> dict:
    """The prompt and the steps after it, each on its own: ratios pair by pair, seconds of CPU time, and raw samples."""

    def per_step(key: str, field: str) -> list[float]:
        return [(whole[field] - one[field]) / (whole["tokens"] - 1) for whole, one in zip(raw[key], first[key])]

    def ratio(field: str) -> float:
        return statistics.median(m / c for m, c in zip(per_step("method", field), per_step("control", field)))

    return {
        "step_wall_ratio": ratio("wall_s"),
        "step_cpu_ratio": ratio("cpu_s"),
        "step_cpu_s": {key: statistics.median(per_step(key, "cpu_s")) for key in raw},
        "one_token_cpu_s": {key: statistics.median(run["cpu_s"] for run in runs) for key, runs in first.items()},
        "one_token": {key: [{f: run[f] for f in ("wall_s", "cpu_s")} for run in runs] for key, runs in first.items()},
    }


def table(pairs: list[dict]) -> str:
    """The pairs as Markdown: medians of paired ratios."""
    lines = [
        "| model | method | beside | asked | time | step alone | peak memory | above the model | forwards per token |"
    ]
    lines.append("|" + "---|" * 9)
    for pair in pairs:
        size, step = f"{pair['model']}, {pair['parameters'] / 1e6:.0f} M", pair.get("step_wall_ratio")
        forwards = " against ".join(f"{pair['forwards_per_token'][side]:.2f}" for side in ("method", "control"))
        cells = [size, pair["method"], pair["control"], pair["asked"], f"{pair['wall_ratio']:.2f}x"]
        cells += [f"{step:.2f}x" if step else ""]
        cells += [f"{pair[name]:.2f}x" if name in pair else "" for name in ("peak_ratio", "peak_above_model_ratio")]
        lines.append(f"| {' | '.join([*cells, forwards])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cost.json"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="measure times alone")
    parser.add_argument("--pairs", type=int, nargs="*", default=list(range(len(PAIRS))))
    parser.add_argument("--peak", nargs=2, metavar=("PAIR", "SIDE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if given.peak:
        peak(int(given.peak[0]), given.peak[1], given.tokens, given.batch)
        return
    pairs = []
    for index in given.pairs:
        pairs.append(pair(index, given.tokens, given.batch, given.repeats, not given.no_memory))
        long = ("raw", "one_token", "memory_bytes", "circumstances")
        shown = {key: value for key, value in pairs[-1].items() if key not in long}
        print(json.dumps(shown), flush=True)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "pairs": pairs,
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(table(pairs))


if __name__ == "__main__":
    main()

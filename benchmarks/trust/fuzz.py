"""Wrong files through the real commands: every reader, mutated inputs, fixed seeds; counts what was scored, refused in one
sentence, and ended in a traceback.

    python benchmarks/trust/fuzz.py --seconds 600 --out benchmarks/trust/fuzz.json            all readers, side by side
    python benchmarks/trust/fuzz.py --seconds 60 --reader mme --seed 1                        one, counts on stdout

An input that ends in a traceback is kept in the folder named by --keep.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import io
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer

from lvlm_decode.errors import LvlmDecodeError
from lvlm_decode_evals.commands import add_to

Files = dict[str, bytes]


@dataclass(frozen=True)
class Reader:
    """files: name -> content of a valid input. run: what is done with their folder. mutate: which names are changed."""

    files: Files
    run: Callable[[Path], None]
    mutate: tuple[str, ...] = ()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
add_to(app)
cli = typer.main.get_command(app)


def command(*arguments: str) -> Callable[[Path], None]:
    """The command line in this process; {} in an argument is the folder."""

    def run(folder: Path) -> None:
        given = [argument.replace("{}", str(folder)) for argument in arguments]
        if cli.main(given, prog_name="lvlm-decode", standalone_mode=False) not in (None, 0, 3):
            raise Refused

    return run


class Refused(Exception):
    """The command ended with its one sentence."""


def lines(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def value(record: object, indent: int | None = None) -> bytes:
    return json.dumps(record, indent=indent).encode()


# Valid inputs ------------------------------------------------------------------------------------------------------

TEXTS = [f"Is there a {name} in the image?" for name in ("dog", "cat", "car")]
POPE = [
    {"question_id": i, "image": f"COCO_val2014_00000000000{i}.jpg", "text": text, "label": label}
    for i, (text, label) in enumerate(zip(TEXTS, ("yes", "no", "no")), 1)
]
SAID = ("Yes", "No", "Yes, there is.")
MME = [
    {
        "question_id": "existence/1.jpg",
        "image": "existence/1.jpg",
        "text": f"{text} Please answer yes or no.",
        "category": "existence",
    }
    for text in TEXTS[:2]
]
HALLUSION = [
    {
        "category": "VD",
        "subcategory": "chart",
        "set_id": "0",
        "figure_id": str(f),
        "question_id": "0",
        "visual_input": "1",
    }
    | {"question": "Is it?", "gt_answer": str(f), "filename": "./a.png", "model_prediction": "Yes"}
    for f in (0, 1)
]
COCO = {
    "images": [{"id": 1}, {"id": 2}],
    "categories": [{"id": 18, "name": "dog"}],
    "annotations": [{"id": 5, "image_id": 1, "category_id": 18, "segmentation": [[1.0, 2.0]]}],
}
CAPTIONS = {"images": [{"id": 1}], "annotations": [{"id": 7, "image_id": 1, "caption": "A dog on a sofa."}]}
VOCABULARY = {"synonyms": {"dog": ["dog", "puppy"], "couch": ["couch", "sofa"]}, "double_words": {"hot dog": "hot dog"}}
SETTINGS = {
    "evaluator": "pope",
    "split": "random",
    "method": {"name": "plain", "parameters": {}},
    "decoding": {"do_sample": False, "temperature": 1.0, "top_p": None, "top_k": None, "num_beams": 1},
    "seed": 0,
    "max_new_tokens": 16,
    "suffix": "",
    "template": None,
    "drafter": None,
    "model": {"name": "m", "dtype": "float32", "weights": None},
    "data": {"questions": "q", "split_hash": "0"},
    "scoring": {"rule": "vcd"},
    "environment": {"versions": {}},
    "asked": {"questions": 3, "hash": "0123456789abcdef"},
}
CELL = "run/pope/random/plain/greedy/seed-0"
RUN = {
    f"{CELL}/settings.json": value(SETTINGS, 1),
    f"{CELL}/answers.jsonl": lines(
        *(
            {
                "question_id": q["question_id"],
                "image": q["image"],
                "text": q["text"],
                "label": q["label"],
                "answer": a,
                "tokens": 2,
                "checksum": "0123456789abcdef",
            }
            for q, a in zip(POPE, SAID)
        )
    ),
    f"{CELL}/times.jsonl": lines(*({"answers": 1, "tokens": 2, "seconds": 0.5} for _ in range(3))),
    "run/pope/random/questions.jsonl": lines(
        *(
            {
                "id": q["question_id"],
                "text": q["text"],
                "image": q["image"],
                "label": q["label"],
                "cluster": None,
                "meta": {},
            }
            for q in POPE
        )
    ),
}
CONFIG = b"""title: A table
paper: A paper
source: Table 1
benchmark: pope
options: {rule: vcd}
model: some/model
template: "USER: <image> {question}"
suffix: " One word."
decoding: {do_sample: false, temperature: 1.0}
seeds: [0, 1]
splits: [random]
images: 500 images
baseline: Plain
rows:
  - name: Plain
    method: plain
    published:
      random: {accuracy: 83.29, f1: 81.0}
  - name: Other
    method: null
    why: not here
    unverified: true
notes: [one]
"""
PROTOCOL = b"""paper: A paper
benchmark: chair
images: opera-a
images_status: shipped
options: {parser: pattern, unfinished: drop}
prompt: Describe.
templates: {some/model: "USER: {question}"}
max_new_tokens: 64
seeds: [42]
source: a repository
notes: [one]
"""
AMBER = {
    "data/annotations.json": value(
        [
            {"id": 1, "type": "generative", "truth": ["dog", "sofa"], "hallu": ["cat"]},
            {"id": 1005, "type": "discriminative-hallucination", "truth": "no"},
        ]
    ),
    "data/relation.json": value({"dog": ["puppy"], "sofa": [], "cat": ["kitten"]}),
    "data/safe_words.txt": b"view\nimage\n",
    "a.json": value([{"id": 1, "response": "A dog and a cat."}, {"id": 1005, "response": "No"}]),
}
MMHAL = [
    {
        "question": "What is it?",
        "gt_answer": "A dog.",
        "image_src": "a.jpg",
        "image_content": ["dog"],
        "model_answer": "A cat.",
    }
]
RATED = {name: {"reason": "r", "score": 3} for name in ("helpfulness", "clarity", "correctness", "depth", "engagement")}


def picture(folder: Path) -> None:
    from lvlm_decode_evals.pictures import open_picture

    open_picture(folder / "a.bin", turn=True).load()


def protocol(folder: Path) -> None:
    from lvlm_decode_evals.protocols import read_protocol

    read_protocol(folder / "p.yaml")


def image_list(folder: Path) -> None:
    from lvlm_decode_evals.protocols import read_ids

    read_ids(folder / "ids.json")


def head(folder: Path) -> None:
    from lvlm_decode.speculative.heads import DraftHead

    DraftHead.from_pretrained(folder)


def checkpoint(folder: Path) -> None:
    from lvlm_decode.weights import read_checkpoint, read_safetensors

    read_safetensors(folder / "w.safetensors")
    read_checkpoint(folder / "c.pt", needs=("model", "step"))


def archive(folder: Path) -> None:
    from lvlm_decode_evals.download import unpack

    unpack(folder / "a.zip")


def pictures() -> Files:
    import numpy as np
    from PIL import Image

    made: Files = {}
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "DDS", "ICO", "PPM", "TGA", "JPEG2000"):
        file = io.BytesIO()
        with contextlib.suppress(KeyError, OSError):
            Image.fromarray(colours).save(file, kind)
            made[kind] = file.getvalue()
    file = io.BytesIO()
    Image.fromarray(colours[..., 0].astype(np.uint16) * 257).save(file, "PNG")
    return made | {"PNG16": file.getvalue()}


def zipped() -> Files:
    import zipfile

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as content:
        content.writestr("x/a.txt", "a" * 200)
        content.writestr("b.txt", "b")
    return {"a.zip": file.getvalue()}


def weights(kind: str) -> Files:
    import torch
    from safetensors.torch import save

    if kind == "checkpoint":
        file = io.BytesIO()
        torch.save({"model": {"w": torch.ones(2, 2)}, "step": 3}, file)
        return {"c.pt": file.getvalue(), "w.safetensors": save({"w": torch.ones(2, 2)})}
    from lvlm_decode.speculative.heads import DraftHead, HeadConfig

    sizes = {
        "hidden_size": 8,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 4,
        "intermediate_size": 8,
        "vocab_size": 12,
    }
    with tempfile.TemporaryDirectory() as folder:
        DraftHead(HeadConfig(**sizes, image="compress", use_global=True)).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def readers() -> dict[str, Callable[[], Reader]]:
    """name -> its valid input and what reads it."""
    pope, q = ("score", "pope", "{}/a.jsonl"), {"q.json": lines(*POPE)}
    asked = ("--questions", "{}/q.json")
    chair = ("score", "chair", "{}/a.json", "--objects", "{}/o.json", "--vocabulary", "{}/v.json")
    truth = {"o.json": value({"1": ["dog"], "42": ["couch"]}), "v.json": value(VOCABULARY)}
    own = [
        {"question_id": i, "answer": a, "label": "yes", "text": "Is it?", "image": "a.jpg"} for i, a in enumerate(SAID)
    ]
    choices = {
        "index": 1,
        "question": "Q? A: x, B: y",
        "answer": "A",
        "category": "math",
        "l2_category": "x",
        "prediction": "A",
    }
    beaf = [
        {"id": i, "image": name, "question": "Is there a dog in the image?", "gt": gt, "orig_img": o, "removed_q": True}
        for i, (name, gt, o) in enumerate(
            (("COCO_val2014_000000000042.jpg", "yes", True), ("COCO_val2014_000000000042_01.png", "no", False))
        )
    ]
    natural = {"Index": 0, "Question_0": "Is it?", "Question_1": "Is that?", "Question_Type": "yes_no"}
    sheet = b"Index,Question,Options,Correct Answer\n1,What is it?,(a) x (b) y,(a)\n2,What is it?,(a) x (b) y,(b)\n"
    made: dict[str, Callable[[], Reader]] = {
        "answers": lambda: Reader({"a.jsonl": lines(*own)}, command(*pope, "--rows", "{}/rows.jsonl", "--json")),
        "pope-llava": lambda: Reader(
            {
                "a.jsonl": lines(
                    *(
                        {"question_id": p["question_id"], "prompt": p["text"], "text": a, "metadata": {}}
                        for p, a in zip(POPE, SAID)
                    )
                )
            }
            | q,
            command(*pope, *asked),
        ),
        "pope-by-order": lambda: Reader(
            {"a.jsonl": lines(*({"question": t, "answer": a} for t, a in zip(TEXTS, SAID)))} | q, command(*pope, *asked)
        ),
        "pope-pai": lambda: Reader(
            {"a.jsonl": lines(*({"query": t, "label": 1, "ans": a, "question": t} for t, a in zip(TEXTS, SAID)))},
            command(*pope),
        ),
        "pope-repope": lambda: Reader(
            {
                "a.jsonl": value(
                    {
                        "random": {
                            str(i): {"question_id": i, "text": t, "label": "yes", "response": "Yes"}
                            for i, t in enumerate(TEXTS)
                        }
                    }
                )
            },
            command(*pope),
        ),
        "pope-questions": lambda: Reader(
            {
                "a.jsonl": lines(*({"question_id": i, "answer": "Yes"} for i in (1, 2))),
                "q.json": lines({"image": "a.jpg", "text": TEXTS[:2], "label": ["yes", "no"]}),
            },
            command(*pope, *asked),
        ),
        "mme": lambda: Reader(
            {
                "a.jsonl": lines(*({"question_id": m["question_id"], "prompt": m["text"], "text": "Yes"} for m in MME)),
                "q.json": lines(*MME),
            },
            command("score", "mme", "{}/a.jsonl", *asked),
        ),
        "mme-tasks": lambda: Reader(
            {"t/existence.txt": b"1.jpg\tIs it?\tYes\tYes\n1.jpg\tIs that?\tNo\tYes\n"}, command("score", "mme", "{}/t")
        ),
        "chair": lambda: Reader(
            {"a.json": lines({"image_id": 1, "caption": "A dog."}, {"image_id": 42, "caption": "A sofa."})} | truth,
            command(*chair),
        ),
        "chair-forms": lambda: Reader(
            {
                "a.json": value({"overall": {}, "imgToEval": {"1": {"image_id": 1, "caption": "A dog."}}}),
                "m.json": value({"1": "A dog."}, 1),
            }
            | truth,
            lambda folder: (
                (command(*chair)(folder), command(*(a.replace("a.json", "m.json") for a in chair))(folder)) and None
            ),
        ),
        "vocabulary": lambda: Reader(
            {
                "a.json": lines({"image_id": 1, "caption": "A dog.", "label": ["dog"]}),
                "v.txt": b"dog, puppy\ncouch, sofa\n",
            },
            command("score", "chair", "{}/a.json", "--vocabulary", "{}/v.txt"),
        ),
        "coco": lambda: Reader(
            {"i.json": value(COCO), "c.json": value(CAPTIONS), "v.json": value(VOCABULARY)},
            command(
                "data",
                "objects",
                "{}/out.json",
                "--vocabulary",
                "{}/v.json",
                "--instances",
                "{}/i.json",
                "--captions",
                "{}/c.json",
            ),
        ),
        "amber": lambda: Reader(AMBER, command("score", "amber", "{}/a.json", "-o", "data={}/data")),
        "hallusionbench": lambda: Reader(
            {"a.json": value(HALLUSION)}, command("score", "hallusionbench", "{}/a.json", "--questions", "{}/a.json")
        ),
        "judges": lambda: Reader(
            {
                "a.json": value(MMHAL),
                "r.jsonl": lines({"id": "0", "reply": "Rating: 3"}),
                "t.txt": b"{contents} {question} {gold} {answer}",
            },
            command("score", "mmhal", "{}/a.json", "-o", "judge={}/r.jsonl", "-o", "template={}/t.txt"),
        ),
        "vallu": lambda: Reader(
            {
                "a.json": lines({"question_id": 1, "prompt": "<image> What?", "image": "a.jpg", "text": "A dog."}),
                "r.jsonl": lines({"id": "1", "reply": json.dumps(RATED)}),
            },
            command("score", "vallu", "{}/a.json", "-o", "judge={}/r.jsonl"),
        ),
        "run": lambda: Reader(RUN, command("score", "{}/run")),
        "run-table": lambda: Reader(RUN, command("table", "{}/run", "--replicates", "100")),
        "config": lambda: Reader(
            RUN | {"c.yaml": CONFIG},
            command("table", "{}/c.yaml", "--no-run", "--out", "{}/run", "--replicates", "100"),
            ("c.yaml",),
        ),
        "protocol": lambda: Reader({"p.yaml": PROTOCOL}, protocol),
        "image-list": lambda: Reader(
            {"ids.json": lines({"image_id": 1}, {"image": "COCO_val2014_000000000002.jpg"})}, image_list
        ),
        "beaf": lambda: Reader(
            {"a.json": value([{"id": 0, "answer": "Yes."}, {"id": 1, "answer": "No."}]), "q.json": value(beaf)},
            command("score", "beaf", "{}/a.json", *asked),
        ),
        "dash-b": lambda: Reader(
            {
                "a.json": value(
                    [{"img_id": "a.jpg", "object_name": "bed", "gt": "no", "response": "No.", "answer": "no"}]
                ),
                "dash_benchmark_neg.json": value({"coco": {"bed": ["a.jpg"]}}),
                "b.json": lines({"question_id": "no/coco/bed/a.jpg", "answer": "No"}),
            },
            lambda folder: (
                (
                    command("score", "dash-b", "{}/a.json")(folder),
                    command("score", "dash-b", "{}/b.json", "--questions", "{}/dash_benchmark_neg.json")(folder),
                )
                and None
            ),
        ),
        "r-bench": lambda: Reader(
            {
                "a.jsonl": lines({"question_id": 1, "prompt": "Is it?", "text": "Yes"}),
                "q_all.json": value([{"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "yes"}]),
            }
            | {f"q_ids_{n}.json": value([1]) for n in range(1, 6)},
            command("score", "r-bench", "{}/a.jsonl", "--questions", "{}/q_all.json"),
        ),
        "mmvp": lambda: Reader(
            {
                "a.jsonl": lines(
                    *(
                        {"question_id": i, "prompt": "What is it? (a) x (b) y", "answer": "(a)", "response": "(a)"}
                        for i in (1, 2)
                    )
                ),
                "q.csv": sheet,
            },
            command("score", "mmvp", "{}/a.jsonl", "--questions", "{}/q.csv"),
        ),
        "mmstar": lambda: Reader(
            {"a.json": value([choices])}, command("score", "mmstar", "{}/a.json", "--questions", "{}/a.json")
        ),
        "naturalbench": lambda: Reader(
            {"a.json": value(["Yes", "No", "No", "Yes"]), "q.json": value([natural])},
            command("score", "naturalbench", "{}/a.json", *asked),
        ),
        "sycophancy": lambda: Reader(
            {
                "a.jsonl": lines(
                    *(
                        {"question_id": n, "answer": "Yes", "label": "yes", "pair": "1", "hint": h}
                        for n, h in (("1", None), ("1/leading", "no"))
                    )
                )
            },
            command("score", "sycophancy", "{}/a.jsonl"),
        ),
        "archive": lambda: Reader(zipped(), archive),
        "head": lambda: Reader(weights("head"), head),
        "checkpoint": lambda: Reader(weights("checkpoint"), checkpoint),
    }
    return made | {"picture": lambda: Reader(pictures(), picture)}


# Mutations ---------------------------------------------------------------------------------------------------------

ODD: tuple[object, ...] = (
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, 10**18, 10**30),
    *(
        "",
        " ",
        "yes",
        "No",
        "a",
        "dog",
        "\u2028",
        "\x00",
        "é" * 40,
        "../../x",
        "1" * 5000,
        "COCO_val2014_000000000042.jpg",
    ),
    *([], {}, [[]], [None], ["dog"], [1], {"a": 1}, {"a": {"a": []}}, [{}]),
)
RAW = (
    *(b"\xff", b"\x00", b"\\ud83d", b"1e999", b"NaN", b"Infinity", b"9" * 6000, b"0x" + b"f" * 5000, b"2001-99-99"),
    *(b"[" * 400, b'{"a":' * 300, b"\xef\xbb\xbf", b"\n", b"\t", b"*a", b"&a ", b"!!int ''", b"!!timestamp x"),
)


def places(found: object, place: tuple = ()) -> list[tuple]:
    """Every place in a JSON value."""
    inner = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    return [place] + [deeper for key, part in inner for deeper in places(part, (*place, key))]


def change(found: object, rng: random.Random) -> object:
    """A JSON value with one part replaced, removed, renamed or doubled."""
    place = rng.choice(places(found))
    if not place:
        return copy.deepcopy(rng.choice(ODD)) if rng.random() < 0.3 else found
    holder = found
    for key in place[:-1]:
        holder = holder[key]
    key, kind = place[-1], rng.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice((str(key).upper(), f"{key}x", str(key)[1:], "answer", "text", "id"))] = holder.pop(key)
    elif kind == 2 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif kind == 3:
        holder[key] = [holder[key]]
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    return found


def structured(content: bytes, rng: random.Random) -> bytes | None:
    """The JSON of a file, changed; None for files of another kind."""
    try:
        text = content.decode()
        whole = text.lstrip().startswith("[") or text.count("\n") < 2
        parts = [json.loads(text)] if whole else [json.loads(line) for line in text.splitlines()]
    except ValueError:
        try:
            parts, whole = [json.loads(content)], True
        except ValueError:
            return None
    number = rng.randrange(len(parts))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        parts[number] = change(parts[number], rng)
    return "\n".join(json.dumps(part) for part in parts).encode() + b"\n"


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A file that is wrong in one or a few ways."""
    if rng.random() < 0.5 and (made := structured(content, rng)) is not None:
        return made
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(8)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.choice((1, 2, 10, len(data)))]
        elif kind == 2:
            data[at:at] = rng.choice(RAW)
        elif kind == 3:
            other = rng.randrange(len(data) + 1)
            data[at:at] = data[other : other + 20]
        elif kind == 4 and (words := [m.span() for m in re.finditer(rb'"[^"]*"|[\w.]+', data)]):
            start, end = rng.choice(words)
            data[start:end] = json.dumps(rng.choice(ODD)).encode() if rng.random() < 0.7 else rng.choice(RAW)
        elif kind == 5:
            cut = data.split(b"\n")
            rng.shuffle(cut)
            data = bytearray(b"\n".join(cut[: rng.randrange(len(cut) + 1)]))
        elif kind == 6 and rng.random() < 0.2:
            with contextlib.suppress(UnicodeDecodeError):
                data = bytearray(bytes(data).decode().encode(rng.choice(("utf-16", "utf-32", "utf-8-sig"))))
        elif kind == 7 and rng.random() < 0.2:
            packed = bytearray(gzip.compress(bytes(data)))
            if rng.random() < 0.7:
                packed[rng.randrange(len(packed))] ^= 1 << rng.randrange(8)
            data = packed
    return bytes(data)


# Running -----------------------------------------------------------------------------------------------------------


def fuzz(name: str, seconds: float, seed: int, keep: Path | None, most: int | None = None) -> dict:
    """Counts of one reader: cases, scored, refused, tracebacks by the project's line; after ``most`` cases it ends."""
    reader, rng = readers()[name](), random.Random(f"{name} {seed}")
    counts: Counter[str] = Counter(cases=0, accepted=0, refused=0, tracebacks=0)
    found: Counter[str] = Counter()
    began, used = time.monotonic(), time.process_time()
    single = name == "picture"
    counts["longer_than_a_sentence"] = 0
    with tempfile.TemporaryDirectory() as root:
        while time.monotonic() - began < seconds and counts["cases"] != most:
            folder = Path(root) / str(counts["cases"])
            files = dict(reader.files)
            chosen = rng.choice(reader.mutate or sorted(files))
            # The first case is the valid input, which must be accepted.
            if counts["cases"]:
                files[chosen] = mutated(files[chosen], rng)
            if single:
                files = {"a.bin": files[chosen]}
            for path, content in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
            counts["cases"] += 1
            said = io.StringIO()
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                    reader.run(folder)
                counts["accepted"] += 1
            except (Refused, LvlmDecodeError) as error:
                if counts["cases"] == 1:
                    raise SystemExit(f"{name}: the valid input is refused: {error} {said.getvalue()}") from None
                counts["refused"] += 1
                counts["longer_than_a_sentence"] += said.getvalue().strip().count("\n") > 0
            except Exception as error:
                counts["tracebacks"] += 1
                frames = [f for f in traceback.extract_tb(error.__traceback__) if "fuzz" not in f.filename]
                own = [f for f in frames if "lvlm_decode" in f.filename] or frames
                place = f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno} ({str(error)[:80]})"
                found[place] += 1
                if keep is not None and found[place] == 1:
                    shutil.copytree(folder, keep / f"{name}-{seed}-{counts['cases']}", dirs_exist_ok=True)
            shutil.rmtree(folder)
    return {
        **counts,
        "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(time.process_time() - used, 1),
        "seed": seed,
        "found": dict(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", help="only this one, in this process")
    parser.add_argument("--side-by-side", type=int, default=8, help="processes at a time")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for inputs that end in a traceback")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.reader:
        print(json.dumps(fuzz(given.reader, given.seconds, given.seed, given.keep)))
        return
    waiting, running, results = list(readers()), {}, {}
    while waiting or running:
        while waiting and len(running) < given.side_by_side:
            name = waiting.pop(0)
            again = [
                sys.executable,
                __file__,
                "--reader",
                name,
                "--seconds",
                str(given.seconds),
                "--seed",
                str(given.seed),
            ]
            again += ["--keep", str(given.keep)] if given.keep else []
            running[name] = subprocess.Popen(again, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for name, process in list(running.items()):
            if process.poll() is not None:
                said = process.stdout.read()
                results[name] = json.loads(said) if said else {"died": process.returncode}
                print(name, {k: v for k, v in results[name].items() if k != "found"}, flush=True)
                del running[name]
        time.sleep(0.5)
    totals = {
        key: sum(r.get(key, 0) for r in results.values()) for key in ("cases", "accepted", "refused", "tracebacks")
    }
    record = {"totals": totals, "readers": dict(sorted(results.items()))}
    record["machine"] = {
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
    }
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(totals)


if __name__ == "__main__":
    main()

"""Every method of the registry on POPE, CHAIR and NaturalBench over held-out scenes, several seeds, beside the controls.

    lvlm-decode train vector --kind vti --model tiny-llava --output parts/tiny-llava/vti.safetensors    (nullu, revis)
    lvlm-decode train negatives --model tiny-instructblip --output parts/tiny-instructblip --steps 100 --batch 12
    nohup nice python benchmarks/methods/run.py --model tiny-llava --parts parts/tiny-llava --images 142 > run.log &
    python benchmarks/methods/run.py --model tiny-llava --parts parts/tiny-llava --images 142 --record

Made to run in the background: every batch is on disk before the next is asked, the same command goes on where it was
stopped, and seed after seed is finished on all benchmarks; methods with a search of their own come last and with the first
seed alone. ``--record`` asks nothing and writes the tables of the seeds that are whole, of the first seed those of the methods
that have it, and says what is owed. Scenes beyond those that ship are rendered from their seeds.

Methods run with their defaults, but for what is in ``PARAMETERS``: set because these models know few phrasings of a request
for a description, or need learned parts (``--parts``). All sample at temperature 1 where they can.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lvlm_decode_data
from lvlm_decode.bench.paired import circumstances
from lvlm_decode.engine.modes import check_needs
from lvlm_decode.errors import ParameterError, UnsupportedError
from lvlm_decode.families import family_of
from lvlm_decode.methods import METHODS, parse
from lvlm_decode.reading import read_records
from lvlm_decode_evals import evaluator
from lvlm_decode_evals.base import Question
from lvlm_decode_evals.loaders import Source, scene_source
from lvlm_decode_evals.plan import TIMES, Cell, Result, read_cell
from lvlm_decode_evals.price import price_blocks
from lvlm_decode_evals.runner import EvaluationRun, Options, decoding_for, load
from lvlm_decode_evals.tables import blocks, render

HERE = Path(__file__).resolve().parent
PARAMETERS = {
    "code": "code(prompt=Please describe this image in detail.,max_description=96)",
    "mvp": "mvp(caption_tokens=64)",
}
#: Learned parts: method -> its parameters, which are files in the folder --parts. Where the folder lacks them the method
#: runs with what ships for the model, or says that nothing does.
LEARNED = {
    "dcd": {"negative": "negative.safetensors", "positive": "positive.safetensors"},
    "lol": {"amateur": "amateur.safetensors"},
    "vti": {"vectors": "vti.safetensors"},
    "nullu": {"vectors": "nullu.safetensors"},
    "revis": {"vectors": "revis.safetensors"},
}
#: What a method runs with besides: the strengths of VTI's example, which steers the vision encoder too.
BESIDE = {"vti": {"image": 0.9, "text": 0.9}}
SUMS = ("vcd+ritual", "vista+vcd", "vaf+m3id")
#: How many pictures CICD draws an unrelated one from: the held-out scenes after those asked about.
POOL = 50
# Controls are added to every run by the runner itself.
CONTROLS = ("plain", "mask")
# MVP answers questions that have one of a few words for an answer.
NOT_ON = {"chair": ("mvp",)}
BENCHMARKS = ("pope", "chair", "mme", "naturalbench")
BATCH = 50
TOKENS = {"chair": 96}
# As the shipped scenes are stored.
QUALITY = 70


class Stopped(Exception):
    """The time is spent."""


def scenes(number: int, folder: Path) -> list:
    """The first held-out scenes; those that do not ship are rendered once, into `folder`."""
    found = lvlm_decode_data.load_scenes("heldout")[:number]
    for index in range(len(found), number):
        path = folder / f"{lvlm_decode_data.scene_seed('heldout', index)}.jpg"
        image, scene, _ = lvlm_decode_data.render(lvlm_decode_data.scene_seed("heldout", index))
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=QUALITY, optimize=True)
        found.append(replace(scene, path=path))
    return found


def searches(method: str) -> bool:
    """Whether a method, or a part of a sum, has a search of its own."""
    return any(hasattr(type(part), "decode") for part in parse(method).parts())


def pool(number: int, folder: Path) -> Path:
    """A folder of scenes that are not among the first `number`."""
    folder.mkdir(parents=True, exist_ok=True)
    for scene in scenes(number + POOL, folder)[number:]:
        if not (folder / scene.path.name).exists():
            shutil.copy(scene.path, folder)
    return folder


def written(name: str, parameters: dict) -> str:
    return f"{name}({','.join(f'{key}={value}' for key, value in parameters.items())})"


def chosen(model, parts: Path | None, pictures: Path) -> list[str]:
    """The methods that this model can run, in the registry's order, then some sums. pictures: CICD's pool."""
    family, names = family_of(model), []
    for name in METHODS:
        if name in CONTROLS:
            continue
        text = written(name, {"images": pictures}) if name == "cicd" else PARAMETERS.get(name, name)
        files = {} if parts is None else {key: parts / file for key, file in LEARNED.get(name, {}).items()}
        if files and all(path.is_file() for path in files.values()):
            text = written(name, files)
        try:
            check_needs(parse(text), family)
        except (UnsupportedError, ParameterError) as error:
            print(f"left out: {error}")
            continue
        names.append(text)
        if name in BESIDE:
            names.append(written(name, files | BESIDE[name]))
    return [*names, *SUMS]


def per_image(questions: Sequence[Question], number: int | None) -> list[Question]:
    """So many questions about each image, all of them for None; as many to be answered with yes as with no.

    POPE asks in turns about what is there and what is not: an odd number begins with the other one at every second image.
    """
    groups = [list(group) for _, group in itertools.groupby(questions, key=lambda question: question.image)]
    if number is None or number % 2 == 0:
        return [question for group in groups for question in group[:number]]
    return [question for place, group in enumerate(groups) for question in group[place % 2 : place % 2 + number]]


def source_of(given: argparse.Namespace, name: str, drawn: Sequence) -> Source:
    """What a benchmark asks about the scenes."""
    source = scene_source(evaluator(name), drawn[: given.captions] if name == "chair" else drawn)
    if name != "pope":
        return source
    kept = {split: per_image(questions, given.questions) for split, questions in source.splits.items()}
    return replace(source, splits=kept).only(given.splits or list(kept))


def runs(given: argparse.Namespace, loaded, stop) -> list[EvaluationRun]:
    """The runs in the order they are made; each of a benchmark holds what the ones before it asked, or other methods."""
    drawn = scenes(given.images, given.out / "scenes")
    names = given.methods or chosen(loaded.model, given.parts, pool(given.images, given.out / "pool"))
    sampled = [name for name in names if not searches(name)]
    searched = [name for name in names if searches(name)]
    made = []
    for methods, seeds in [
        *((sampled, given.seed[:number]) for number in range(1, len(given.seed) + 1)),
        (searched, given.seed[:1]),
    ]:
        for name in given.benchmarks:
            pairs = [
                (method, decoding_for(method, None))
                for method in methods
                if method_name(method) not in NOT_ON.get(name, ())
            ]
            if pairs:
                options = Options(max_new_tokens=TOKENS.get(name), batch_size=BATCH, times=True)
                source, out = source_of(given, name, drawn), given.out / given.model
                made.append(EvaluationRun(evaluator(name), source, loaded, out, pairs, seeds, None, options, stop=stop))
    return made


def method_name(text: str) -> str:
    return text.partition("(")[0]


def finished(given: argparse.Namespace, loaded) -> tuple[dict[str, list[Result]], list[str]]:
    """Benchmark -> the results of the seeds that all its methods have, of the first seed those of the methods that have it
    whole; and what is owed, in words.
    """
    found: dict[str, dict[Path, Result]] = {}
    owed: dict[str, None] = {}
    for run in runs(given, loaded, None):
        there: dict[tuple[str, str, int], list[Result | None]] = {}
        for cell in run.cells():
            there.setdefault((cell.method, cell.decoding.name, cell.seed), []).append(whole(run, cell))
        missing = [line for line, results in there.items() if None in results]
        owed |= {f"{run.evaluator.name}: {method}, {decoding}, seed {seed}": None for method, decoding, seed in missing}
        if missing and len(run.seeds) > 1:
            continue
        kept = found.setdefault(run.evaluator.name, {})
        kept |= {result.folder: result for line, results in there.items() if line not in missing for result in results}
    if not any(found.values()):
        raise SystemExit("no method is finished yet; run without --record to go on")
    return {name: list(results.values()) for name, results in found.items()}, list(owed)


def whole(run: EvaluationRun, cell: Cell) -> Result | None:
    """The result of a cell, if every question of it has an answer."""
    folder = cell.folder(run.out, run.evaluator.name)
    if not (folder / "settings.json").exists():
        return None
    result = read_cell(folder)
    return result if len(result.rows) >= len(run.source.splits[cell.split]) else None


def cost(results: Sequence[Result]) -> dict:
    """What the answers cost: seconds in generation and around it, answers and tokens."""
    total = {"seconds": 0.0, "answers": 0, "tokens": 0}
    for result in results:
        for _, batch in read_records(result.folder / TIMES):
            for name in total:
                total[name] += batch[name]
    return total | {"hours": round(total["seconds"] / 3600, 3)}


def without_folders(given: argparse.Namespace, text: str) -> str:
    return text.replace(f"{given.parts}/", "").replace(f"{given.out}/", "")


def record(given: argparse.Namespace, loaded) -> None:
    """Tables, rates and raw answers of what is finished."""
    found, owed = finished(given, loaded)
    results = [result for name in given.benchmarks for result in found.get(name, ())]
    # A folder of this machine says nothing to a reader.
    results = [replace(r, method=without_folders(given, r.method)) for r in results]
    owed = [without_folders(given, line) for line in owed]
    seeds = {name: sorted({result.seed for result in found[name]}) for name in given.benchmarks if name in found}
    cells = [
        {
            "benchmark": r.evaluator.name,
            "split": r.split,
            "method": r.method,
            "decoding": r.decoding.name,
            "seed": r.seed,
        }
        | {"summary": r.evaluator.summary(r.rows)}
        for r in results
    ]
    asked = {"images": given.images, "captions": given.captions, "questions": given.questions}
    head = {"model": dict(loaded.settings), **asked, "seeds": seeds, "owed": owed, "cost": cost(results)}
    head |= circumstances(loaded.model)
    stem = given.record / given.model
    stem.with_suffix(".json").write_text(json.dumps({**head, "cells": cells}, indent=1) + "\n")
    priced = results
    if given.shared:
        # Of a machine with other work times compare nothing: the table does not find them here.
        priced = [replace(result, folder=given.record) for result in results]
    stem.with_suffix(".md").write_text(render([*blocks(results), *price_blocks(priced)]))
    answers = "".join(
        json.dumps([c["benchmark"], c["split"], c["method"], c["decoding"], c["seed"], [row.answer for row in r.rows]])
        + "\n"
        for c, r in zip(cells, results)
    )
    stem.with_suffix(".answers.jsonl.gz").write_bytes(gzip.compress(answers.encode(), 9, mtime=0))
    print(f"recorded {len(cells)} cells, seeds {seeds}, {head['cost']}; owed: {len(owed)} methods and seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--benchmarks", nargs="+", default=["pope", "chair"], choices=BENCHMARKS, help="only these")
    parser.add_argument("--splits", nargs="+", help="only these of POPE")
    parser.add_argument("--images", type=int, default=142, help="the first held-out scenes; 142 hold 100 for POPE")
    parser.add_argument("--captions", type=int, help="describe only so many of them")
    parser.add_argument("--questions", type=int, help="only so many of POPE's six questions about an image")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--parts", type=Path, help="folder of what lvlm-decode train made for this model")
    parser.add_argument("--hours", type=float, help="stop after so long")
    parser.add_argument("--out", type=Path, default=Path("runs") / "methods")
    parser.add_argument(
        "--record", type=Path, nargs="?", const=HERE, help="write the tables of what is finished here, ask nothing"
    )
    parser.add_argument("--shared", action="store_true", help="the machine had other work: no times in the tables")
    given = parser.parse_args()
    loaded = load(given.model)
    if given.record is not None:
        record(given, loaded)
        return
    until = None if given.hours is None else time.monotonic() + 3600 * given.hours

    def stop() -> None:
        if until is not None and time.monotonic() > until:
            raise Stopped

    try:
        for run in runs(given, loaded, stop):
            run.execute()
            print(f"{time.strftime('%H:%M:%S')} {run.evaluator.name}: seeds {list(run.seeds)} are there", flush=True)
    except Stopped:
        print("the time is spent; the same command goes on", flush=True)


if __name__ == "__main__":
    main()

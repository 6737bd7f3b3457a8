"""How long 5,000 captions take CHAIR, per parser: from captions in memory to counts.

    python benchmarks/chair-speed/run.py --out benchmarks/chair-speed/results.json

Without --captions it writes captions about the emoji scenes (seeded, so everybody measures the same text). `wordnet-pos`
is measured in the same run where NLTK's data is installed; where it is not, the result says so and has no number.
Parsers take turns, so a busy machine hits both; the ratio is taken pair by pair. Word caches start empty in each pass.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path

import lvlm_decode_data
from lvlm_decode.errors import DependencyError
from lvlm_decode.reading import read_records
from lvlm_decode_data.texts import caption
from lvlm_decode_evals import chair
from lvlm_decode_evals.base import Answer
from lvlm_decode_evals.words import singular

ROOT = Path(__file__).resolve().parents[2]


def scene_captions(number: int) -> list[Answer]:
    """Captions about the held-out scenes, several for each, 20 % of them with an absent object."""
    scenes = lvlm_decode_data.load_scenes()
    rng = random.Random(0)
    answers = []
    for index in range(number):
        scene = scenes[index % len(scenes)]
        absent = rng.choice(lvlm_decode_data.CATEGORIES) if rng.random() < 0.2 else None
        text = caption(rng, scene, absent if absent not in scene.categories else None)
        answers.append(Answer(index, text, image=str(scene.image_id), label=sorted(scene.categories)))
    return answers


def file_captions(path: Path, number: int) -> list[Answer]:
    """The captions of a file, from the start again until there are enough; every image is said to be empty."""
    texts = [record["caption"] for _, record in read_records(path)]
    return [Answer(index, texts[index % len(texts)], image=str(index), label=[]) for index in range(number)]


def seconds(parser: str, answers: list[Answer]) -> float:
    """Time of one pass over all captions."""
    singular.cache_clear()
    chair._lemmatizer.cache_clear()
    scorer = chair.Chair(parser=parser)
    scorer.table()
    start = time.perf_counter()
    scorer.summary(scorer.rows(answers))
    return time.perf_counter() - start


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--captions", type=Path, help="JSON lines with `caption`")
    options.add_argument("--number", type=int, default=5000)
    options.add_argument("--passes", type=int, default=7)
    options.add_argument("--out", type=Path, help="JSON file to write")
    given = options.parse_args()

    answers = file_captions(given.captions, given.number) if given.captions else scene_captions(given.number)
    parsers, note = ["pattern"], None
    try:
        chair.load_nltk()
        parsers.append("wordnet-pos")
    except DependencyError as error:
        note = f"wordnet-pos was not measured. {str(error).split('. Run')[0]}."
    samples: dict[str, list[float]] = {parser: [] for parser in parsers}
    for _ in range(given.passes):
        for parser in parsers:
            samples[parser].append(seconds(parser, answers))

    result = {
        "what": "seconds from captions in memory to CHAIR counts, one process, one thread",
        "captions": len(answers),
        "source": given.captions.name if given.captions else "emoji scenes, seed 0",
        "mean_words": statistics.mean(len(answer.answer.split()) for answer in answers),
        "median_seconds": {parser: statistics.median(values) for parser, values in samples.items()},
        "samples_seconds": samples,
        "note": note,
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg(),
            "system": platform.platform(),
        },
        "python": platform.python_version(),
        "commit": commit(),
    }
    if len(parsers) == 2:
        ratios = [slow / fast for fast, slow in zip(samples["pattern"], samples["wordnet-pos"])]
        result["wordnet_over_pattern"] = {"median": statistics.median(ratios), "pairs": ratios}
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str | None:
    """The commit that was measured, None outside a checkout."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


if __name__ == "__main__":
    main()

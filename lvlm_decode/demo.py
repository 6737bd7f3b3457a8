"""``lvlm-decode demo``: a LLaVA hallucinates, VCD and RITUAL change that; measured on this machine, in two minutes."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lvlm_decode_evals import evaluator
from lvlm_decode_evals.base import Answer
from lvlm_decode_evals.loaders import scene_source
from lvlm_decode_evals.metrics import compare
from lvlm_decode_evals.plan import CONTROLS, Decoding, Result
from lvlm_decode_evals.runner import EvaluationRun, Options, load, prompt_of
from lvlm_decode_evals.tables import Value, gather, matched, rate_values

from .attachment import attach, detach
from .errors import InputError
from .marks import STYLES, bracketed, pieces
from .methods import parse

#: What is shown, in this order; POPE samples at temperature 1, as the papers' tables do, captions are greedy.
METHODS = ("vcd", "ritual", "vcd+ritual")
CAPTION_SCENES = 32
TIMED_TOKENS = 32
TIMED_ROUNDS = 9
SPLITS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Line:
    """A line of the POPE table: split -> accuracy with its interval, and the share of yes."""

    method: str
    decoding: str
    accuracy: dict[str, Value]
    yes: dict[str, Value]


@dataclass(frozen=True)
class Difference:
    """A method minus one of its matched controls, over the same questions: split -> accuracy difference."""

    method: str
    control: str
    accuracy: dict[str, Value]


@dataclass(frozen=True)
class Caption:
    """What one method said about one scene; ``pieces`` are (text, kind), see :mod:`lvlm_decode.marks`."""

    method: str
    text: str
    hallucinated: tuple[str, ...]
    pieces: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Picture:
    """A scene with its captions; ``title`` says what they are an example of, and of how many scenes that is so."""

    title: str
    path: Path
    truth: tuple[str, ...]
    captions: tuple[Caption, ...]


@dataclass(frozen=True)
class Shown:
    """Everything the demo measured."""

    model: str
    questions: dict[str, int]
    images: int
    table: list[Line]
    differences: list[Difference]
    pictures: list[Picture]
    captioned: int
    caption_rates: dict[str, dict[str, float]]
    times: dict[str, float]
    milliseconds: float
    seconds: float
    seed: int


def run(model: str, page: Path, images: int, seed: int) -> Shown:
    """Measure, print, and write ``page``.

    Raises:
        InputError: more scenes asked for than ship.
    """
    import lvlm_decode_data

    started = time.perf_counter()
    scenes = lvlm_decode_data.load_scenes()
    if images > len(scenes):
        raise InputError(f"--images is {images}, and {len(scenes)} scenes ship; ask for fewer.")
    loaded = load(model)
    _say(f"POPE on {images} scenes, {len(SPLITS)} splits ...")
    results = pope(loaded, scenes[:images], seed)
    _say(f"Captions of {CAPTION_SCENES} scenes ...")
    pictures, rates = captions(loaded, scenes[:CAPTION_SCENES], seed)
    _say("Time per token ...")
    milliseconds, times = time_per_token(loaded, scenes[0], seed)
    shown = Shown(
        model=str(loaded.settings["name"]),
        questions={result.split: len(result.rows) for result in results},
        images=images,
        table=table_lines(results),
        differences=difference_lines(results),
        pictures=pictures,
        captioned=min(CAPTION_SCENES, len(scenes)),
        caption_rates=rates,
        times=times,
        milliseconds=milliseconds,
        seconds=time.perf_counter() - started,
        seed=seed,
    )
    print_shown(shown)
    from .demo_page import write

    write(shown, page)
    _say(f"\nThe same with pictures: {page}   ({shown.seconds:.0f} s)")
    return shown


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- measuring -------------------------------------------------------------------------------------------------------


def pope(loaded: Any, scenes: Sequence, seed: int) -> list[Result]:
    """POPE with every method and its matched controls: the scored cells."""
    chosen = evaluator("pope")
    sampling = Decoding(do_sample=True)
    with tempfile.TemporaryDirectory() as folder:
        return EvaluationRun(
            evaluator=chosen,
            source=scene_source(chosen, scenes),
            loaded=loaded,
            out=Path(folder),
            methods=[(name, sampling) for name in METHODS],
            seeds=[seed],
            options=Options(batch_size=48),
        ).execute()


def table_lines(results: Sequence[Result]) -> list[Line]:
    """One line per method and decoding, from the scored cells of all splits."""
    lines: dict[tuple[str, str], Line] = {}
    for (_, split), methods in gather(results).items():
        for method in methods:
            line = lines.setdefault(
                (method.name, method.decoding.name), Line(method.name, method.decoding.name, {}, {})
            )
            values = rate_values(results[0].evaluator, method)
            line.accuracy[split], line.yes[split] = values["accuracy"], values["yes_ratio"]
    return list(lines.values())


def difference_lines(results: Sequence[Result]) -> list[Difference]:
    """Every method minus each of its sampled controls, paired by question."""
    lines: dict[tuple[str, str], Difference] = {}
    for (_, split), methods in gather(results).items():
        for method in methods:
            if method.name in CONTROLS:
                continue
            for control in matched(method, methods):
                if control.decoding.do_sample:
                    line = lines.setdefault((method.name, control.label), Difference(method.name, control.label, {}))
                    found = compare(results[0].evaluator, method.runs, control.runs).differences["accuracy"]
                    line.accuracy[split] = Value(found.value, "percent", found.low, found.high, signed=True)
    return list(lines.values())


def captions(loaded: Any, scenes: Sequence, seed: int) -> tuple[list[Picture], dict[str, dict[str, float]]]:
    """Greedy captions of ``scenes``: an example of each thing that the first method does to plain decoding's captions, with the
    number of scenes of which that is so, and CHAIR over all of them.
    """
    chair, first = evaluator("chair"), METHODS[0]
    questions = scene_source(chair, scenes).splits["captions"]
    texts = {
        name: generate(loaded, name, questions, [scene.path for scene in scenes], seed, 96)
        for name in ("plain", *METHODS)
    }
    rates, absent = {}, {}
    for name, said in texts.items():
        rows = [chair.row(Answer.to(question, text)) for question, text in zip(questions, said)]
        rates[name] = chair.summary(rows)
        absent[name] = [tuple(dict.fromkeys(row.evidence["hallucinated"])) for row in rows]
    pictures = []
    for before, after, words in (
        (True, False, f"plain names something absent, {first} does not"),
        (True, True, f"plain and {first} name something absent"),
        (False, True, f"only {first} names something absent"),
    ):
        alike = [i for i in range(len(scenes)) if (bool(absent["plain"][i]), bool(absent[first][i])) == (before, after)]
        if alike:
            i = alike[0]
            own = tuple(
                Caption(name, text[i], absent[name][i], pieces(text[i], scenes[i], absent[name][i]))
                for name, text in texts.items()
            )
            title = f"{len(alike)} of {len(scenes)} scenes: {words}"
            pictures.append(Picture(title, scenes[i].path, tuple(sorted(scenes[i].categories)), own))
    return pictures, rates


def generate(
    loaded: Any, method: str, questions: Sequence, paths: Sequence[Path], seed: int, new_tokens: int, **settings: Any
) -> list[str]:
    """Greedy answers to ``questions`` about the pictures at ``paths``, in batches of 16."""
    from PIL import Image

    answers: list[str] = []
    attach(loaded.model, parse(method), processor=loaded.processor)
    try:
        for at in range(0, len(questions), 16):
            part = questions[at : at + 16]
            pictures = [Image.open(path).convert("RGB") for path in paths[at : at + 16]]
            prompts = [prompt_of(loaded.processor, question, Options()) for question in part]
            inputs = loaded.processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
            inputs = inputs.to(loaded.model.device)
            out = loaded.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, seed=seed, **settings)
            new = out[:, inputs["input_ids"].shape[1] :]
            answers += [text.strip() for text in loaded.processor.batch_decode(new, skip_special_tokens=True)]
    finally:
        detach(loaded.model)
    return answers


def time_per_token(loaded: Any, scene: Any, seed: int) -> tuple[float, dict[str, float]]:
    """Milliseconds per token of plain decoding, and each method's time relative to it.

    One sample, a fixed number of tokens, the methods in turn within each round; the median over rounds of the paired
    ratio. The prompt's forward and the vision pass are taken off by timing one token too.
    """
    from PIL import Image

    question = scene_source(evaluator("chair"), [scene]).splits["captions"][0]
    prompt = prompt_of(loaded.processor, question, Options())
    inputs = loaded.processor(images=[Image.open(scene.path).convert("RGB")], text=[prompt], return_tensors="pt")
    inputs = inputs.to(loaded.model.device)

    def seconds(method: str, tokens: int) -> float:
        attach(loaded.model, parse(method), processor=loaded.processor)
        try:
            start = time.perf_counter()
            loaded.model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, seed=seed)
            if loaded.model.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start
        finally:
            detach(loaded.model)

    def per_token(method: str) -> float:
        return (seconds(method, TIMED_TOKENS + 1) - seconds(method, 1)) / TIMED_TOKENS

    names = ("plain", *METHODS)
    for name in names:
        per_token(name)
    rounds = paired(per_token, names, TIMED_ROUNDS)
    ratios = {name: statistics.median(r[name] / r["plain"] for r in rounds) for name in names}
    return 1000 * statistics.median(r["plain"] for r in rounds), ratios


def paired(measure: Callable[[str], float], names: Sequence[str], rounds: int) -> list[dict[str, float]]:
    """Each name measured once per round, so that a slow moment of the machine hits all of them."""
    return [{name: measure(name) for name in names} for _ in range(rounds)]


# --- printing --------------------------------------------------------------------------------------------------------


def print_shown(shown: Shown) -> None:
    """The table, the captions and the times, on the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    asked = ", ".join(f"{count} {split}" for split, count in shown.questions.items())
    table = Table(
        title=f"POPE on {shown.images} emoji scenes (questions: {asked}): accuracy % [95 % interval over images], yes %",
        title_justify="left",
    )
    table.add_column("method")
    table.add_column("decoding")
    for split in SPLITS:
        table.add_column(split)
        table.add_column("yes", justify="right")
    for line in shown.table:
        cells = [cell for s in SPLITS for cell in (line.accuracy[s].text(), f"{100 * line.yes[s].value:.0f}")]
        table.add_row(line.method, line.decoding, *cells)
    console.print(table)
    table = Table(
        title="Method minus matched control on the same questions, points of accuracy; * interval excludes zero",
        title_justify="left",
    )
    for title in ("method", "control", *SPLITS):
        table.add_column(title)
    for gain in shown.differences:
        table.add_row(gain.method, gain.control, *(gain.accuracy[s].text() for s in SPLITS))
    console.print(table)
    console.print()
    for picture in shown.pictures:
        console.print(picture.title, style="bold")
        console.print(f"{picture.path.name}: {', '.join(picture.truth)}", style="dim")
        for caption in picture.captions:
            text = Text(f"  {caption.method:<11}")
            for piece in caption.pieces:
                text.append(bracketed([piece]), style=STYLES[piece[1]])
            console.print(text)
        console.print()
    said = ", ".join(f"{name} {100 * r['chair_s']:.0f} %" for name, r in shown.caption_rates.items())
    console.print(f"Captions of {shown.captioned} scenes that name something absent (greedy): {said}")
    times = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in shown.times.items() if name != "plain")
    console.print(f"Time per token, plain {shown.milliseconds:.1f} ms: {times}")

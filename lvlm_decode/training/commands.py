"""``lvlm-decode train tiny-llava`` and ``lvlm-decode train tiny-instructblip``: the shipped small models, from scratch.

Each stage leaves a checkpoint in the working folder; the same command started again continues where it was killed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from ..speculative.commands import draft_head

app = typer.Typer(help="Train the small models that ship with the repository.", no_args_is_help=True)

Work = Annotated[Path, typer.Option(help="Folder of scenes, checkpoints and the log; about 1.2 GB.")]
Processes = Annotated[int, typer.Option(min=1, help="Single-threaded training processes.")]


def _commit() -> str:
    """Commit the sources came from, or ``unknown`` outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _circumstances() -> dict[str, object]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy", "pillow")},
    }


def _start(work: Path, command: str, **settings: object) -> None:
    """Make the working folder and write the circumstances of the run into its log."""
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    record = {"stage": "start", "command": command, "settings": settings} | _circumstances()
    with (work / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


@app.command("tiny-llava")
def tiny_llava(
    output: Annotated[Path, typer.Option(help="Folder the model is saved to.")] = Path("data/tiny-llava"),
    work: Work = Path("training-work"),
    scenes: Annotated[int, typer.Option(min=2000, help="Training scenes.")] = 40_000,
    vision_steps: Annotated[int, typer.Option(min=1, help="Steps of the vision stage.")] = 2_400,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the language stage.")] = 3_900,
    processes: Processes = 2,
) -> None:
    """Scenes, then a vision tower with dense labels, then projector and language model."""
    from . import llava, scene_cache, vision, workers

    began = time.perf_counter()
    _start(work, "tiny-llava", scenes=scenes, vision_steps=vision_steps, steps=steps, processes=processes)
    scene_cache.build(work / "scenes", "validation", 1000, processes)
    scene_cache.build(work / "scenes", "train", scenes, processes)
    workers.launch(vision.train_vision, processes, work, scenes, vision_steps, 64 // processes, 1.5e-3)
    report = vision.validate_tower(vision.VisionTrainer(), work / "vision.pt", work / "scenes")
    typer.echo(f"vision tower on validation scenes: {report}")
    settings = llava.LlavaSettings(scenes=scenes, steps=steps, batch=16 // processes)
    workers.launch(llava.train_llava, processes, work, output, settings)
    typer.echo(f"{output} saved after {(time.perf_counter() - began) / 60:.1f} minutes")


@app.command("tiny-instructblip")
def tiny_instructblip(
    output: Annotated[Path, typer.Option(help="Folder the model is saved to.")] = Path("data/tiny-instructblip"),
    llava: Annotated[Path, typer.Option(help="The small LLaVA it starts from.")] = Path("data/tiny-llava"),
    work: Work = Path("training-work"),
    scenes: Annotated[int, typer.Option(min=2000, help="Training scenes.")] = 40_000,
    vision_steps: Annotated[int, typer.Option(min=1, help="Steps of the vision tower's fine-tuning.")] = 160,
    warm_steps: Annotated[int, typer.Option(min=1, help="Steps of the Q-Former's warm-up.")] = 260,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the joint stage.")] = 320,
    processes: Processes = 2,
) -> None:
    """Vision tower from the LLaVA's, then the Q-Former, then everything but the tower; needs tiny-llava's run."""
    from . import instructblip, scene_cache, workers

    if not (work / "vision.pt").exists():
        raise typer.BadParameter(f"{work / 'vision.pt'} is missing; run train tiny-llava with the same --work first")
    began = time.perf_counter()
    names = {"scenes": scenes, "vision_steps": vision_steps, "warm_steps": warm_steps, "steps": steps}
    _start(work, "tiny-instructblip", **names, processes=processes)
    scene_cache.build(work / "scenes", "train", scenes, processes)
    workers.launch(instructblip.train_blip_vision, processes, work, scenes, vision_steps, 64 // processes, 6e-4)
    settings = instructblip.InstructBlipSettings(
        scenes=scenes, warm_steps=warm_steps, warm_batch=64 // processes, steps=steps, batch=16 // processes
    )
    workers.launch(instructblip.train_qformer, processes, work, llava, settings)
    workers.launch(instructblip.train_joint, processes, work, llava, output, settings)
    typer.echo(f"{output} saved after {(time.perf_counter() - began) / 60:.1f} minutes")


@app.command("check")
def check(
    models: Annotated[list[Path], typer.Argument(help="Folders of small models.")],
    record: Annotated[Path | None, typer.Option(help="Folder that gets one JSON file a model.")] = None,
) -> None:
    """Ask small models about the held-out scenes and print what they know as a table."""
    from . import facts

    measured = []
    for folder in models:
        began = time.perf_counter()
        result = facts.measure(facts.TinyModel.load(folder)) | _circumstances()
        result["seconds"] = round(time.perf_counter() - began, 1)
        measured.append(result)
        if record is not None:
            record.mkdir(parents=True, exist_ok=True)
            (record / f"{result['model']}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    typer.echo(facts.table(measured))


@app.command("negatives")
def negatives(
    model: Annotated[str, typer.Option(help="tiny, tiny-instructblip, a folder or a hub id.")] = "tiny",
    output: Annotated[Path, typer.Option(help="Folder for the projectors and the adapter.")] = Path("negatives"),
    triples: Annotated[int, typer.Option(min=3, help="Preference triples over rendered scenes.")] = 1200,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each of the three trainings.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Triples a step.")] = 16,
    rate: Annotated[float, typer.Option(min=0.0, help="Learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of triples and order.")] = 0,
) -> None:
    """DCD's two projectors and LOL's amateur adapter, from preferred and rejected answers."""
    from safetensors.torch import save_file

    from lvlm_decode_evals.runner import load

    from . import negatives as train

    began = time.perf_counter()
    _start(output, "negatives", model=model, triples=triples, steps=steps, batch=batch, rate=rate, seed=seed)
    loaded = load(model)
    drawn = list(train.scene_triples(triples, seed))
    settings = {"steps": steps, "batch": batch, "rate": rate, "seed": seed}
    for name, state in train.train_projectors(loaded.model, loaded.processor, drawn, **settings).items():
        save_file(state, output / f"{name}.safetensors")
    train.train_amateur(loaded.model, loaded.processor, drawn, **settings)
    loaded.model.save_pretrained(output / "amateur")
    typer.echo(f"{output} saved after {(time.perf_counter() - began) / 60:.1f} minutes")


app.command("draft-head")(draft_head)


if __name__ == "__main__":
    app()

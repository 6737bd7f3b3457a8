"""The small models that ship with the repository, from scratch, and what they know.

    python -m tools.small_models tiny-llava
    python -m tools.small_models tiny-instructblip
    python -m tools.small_models check data/tiny-llava data/tiny-instructblip

Each stage leaves a checkpoint in the working folder; the same command started again continues where it was killed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from lvlm_decode.training.commands import circumstances, start

app = typer.Typer(help="Train and measure the small models that ship with the repository.", no_args_is_help=True)

Work = Annotated[Path, typer.Option(help="Folder of scenes, checkpoints and the log; about 1.2 GB.")]
Processes = Annotated[int, typer.Option(min=1, help="Single-threaded training processes.")]


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
    start(work, "tiny-llava", scenes=scenes, vision_steps=vision_steps, steps=steps, processes=processes)
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
        raise typer.BadParameter(f"{work / 'vision.pt'} is missing; run tiny-llava with the same --work first")
    began = time.perf_counter()
    names = {"scenes": scenes, "vision_steps": vision_steps, "warm_steps": warm_steps, "steps": steps}
    start(work, "tiny-instructblip", **names, processes=processes)
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
        result = facts.measure(facts.TinyModel.load(folder)) | circumstances()
        result["seconds"] = round(time.perf_counter() - began, 1)
        measured.append(result)
        if record is not None:
            record.mkdir(parents=True, exist_ok=True)
            (record / f"{result['model']}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    typer.echo(facts.table(measured))


if __name__ == "__main__":
    app()

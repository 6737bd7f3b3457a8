"""``lvlm-decode train``: draft heads, what DCD and LOL contrast with, vectors of steering methods."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lvlm_decode_evals.commands import one_sentence

from ..speculative.commands import draft_head

app = typer.Typer(help="Train draft heads, and what DCD and LOL contrast with.", no_args_is_help=True)


def _commit() -> str:
    """Commit the sources came from, or ``unknown`` outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def circumstances() -> dict[str, object]:
    """Time, commit, machine and versions of a run."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy", "pillow")},
    }


def start(work: Path, command: str, **settings: object) -> None:
    """Make the working folder and write the circumstances of the run into its log."""
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    record = {"stage": "start", "command": command, "settings": settings} | circumstances()
    with (work / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


@app.command("negatives")
@one_sentence
def negatives(
    model: Annotated[str, typer.Option(help="tiny, tiny-instructblip, a folder or a hub id.")] = "tiny",
    output: Annotated[Path, typer.Option(help="Folder for the projectors and the amateur.")] = Path("negatives"),
    pairs: Annotated[
        Path | None, typer.Option(help="JSON lines: image, question, truthful, hallucinated; scenes without it.")
    ] = None,
    triples: Annotated[int, typer.Option(min=3, help="Preference triples over rendered scenes.")] = 1200,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each of the three trainings.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Triples a step.")] = 16,
    rate: Annotated[float, typer.Option(min=0.0, help="Learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of triples and order.")] = 0,
) -> None:
    """DCD's two projectors and LOL's amateur, from preferred and rejected answers. The same command goes on where it
    stopped.
    """
    import torch

    from lvlm_decode_evals.runner import load

    from ..engine import learned
    from ..families import family_of
    from . import negatives as train
    from .pairs import digest, file_pairs, scene_triples

    began = time.perf_counter()
    drawn = list(scene_triples(triples, seed)) if pairs is None else file_pairs(pairs)
    settings: dict[str, Any] = {"steps": steps, "batch": batch, "rate": rate, "seed": seed}
    start(output, "negatives", model=model, pairs=pairs and str(pairs), triples=len(drawn), **settings)
    loaded = load(model)
    module = family_of(loaded.model).decoding_module(loaded.model)
    source = f"scenes, seed {seed}" if pairs is None else pairs.name
    made = {
        "model": loaded.settings["name"],
        "triples": len(drawn),
        "source": source,
        "words": digest(drawn),
        **settings,
    }
    for part in train.PARTS:
        file, checkpoint = output / f"{part}.safetensors", output / f"{part}.checkpoint"
        if file.is_file():
            train.check_same(file, learned.about(file), made)
            typer.echo(f"{file} is there already")
            continue
        keeping = train.Checkpoint(checkpoint, {"part": part, **made})
        state = train.train_part(loaded.model, loaded.processor, drawn, part, **settings, checkpoint=keeping)
        halves = {name: weight.to(torch.float16) for name, weight in state.items()}
        learned.save(file, part, halves, module, made)
        checkpoint.unlink(missing_ok=True)
        typer.echo(f"{file} saved")
    typer.echo(f"{output} is whole after {(time.perf_counter() - began) / 60:.1f} minutes")


@app.command("vector")
@one_sentence
def vector(
    kind: Annotated[Literal["vti", "nullu", "revis"], typer.Option(help="The method the vectors are for.")],
    model: Annotated[str, typer.Option(help="tiny, tiny-instructblip, a folder or a hub id.")] = "tiny",
    pairs: Annotated[
        Path | None, typer.Option(help="JSON lines: image, question, truthful, hallucinated; scenes without it.")
    ] = None,
    scenes: Annotated[int, typer.Option(min=2, help="Pairs of captions of rendered scenes.")] = 50,
    rank: Annotated[int, typer.Option(min=1, help="Directions a layer, of nullu.")] = 8,
    output: Annotated[Path, typer.Option(help="The file of vectors, in safetensors form.")] = Path(
        "vectors.safetensors"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 0,
) -> None:
    """Vectors that VTI, Nullu or Revis steer with, from right and hallucinated captions of the same pictures."""
    from lvlm_decode_evals.runner import load

    from ..engine.vectors import save
    from ..families import family_of
    from . import vectors as train
    from .pairs import file_pairs, scene_pairs

    drawn = scene_pairs(scenes, seed) if pairs is None else file_pairs(pairs)
    loaded = load(model)
    found = train.directions(loaded.model, loaded.processor, drawn, kind, rank)
    source = f"scenes, seed {seed}" if pairs is None else pairs.name
    about = {"model": model, "pairs": len(drawn), "source": source}
    output.parent.mkdir(parents=True, exist_ok=True)
    save(output, kind, found, family_of(loaded.model).decoding_module(loaded.model), about)
    typer.echo(f"{output}: {kind} vectors {tuple(found.shape)} from {len(drawn)} pairs")


app.command("draft-head")(draft_head)


if __name__ == "__main__":
    app()

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

app = typer.Typer(
    help="Train draft heads, what DCD and LOL contrast with, and the vectors that VTI, Nullu and Revis steer with.",
    no_args_is_help=True,
)


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
    questions: Annotated[
        Literal["existence", "all"],
        typer.Option(help="What the scenes' yes/no questions are about: existence, or count, position and colour too."),
    ] = "existence",
    steps: Annotated[int, typer.Option(min=1, help="Steps of each of the three trainings.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Triples a step.")] = 16,
    rate: Annotated[
        float | None, typer.Option(min=0.0, help="Learning rate; 0.0003 for the projectors, 0.001 for the amateur.")
    ] = None,
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
    drawn = list(scene_triples(triples, seed, questions)) if pairs is None else file_pairs(pairs)
    settings: dict[str, Any] = {"steps": steps, "batch": batch, "seed": seed}
    start(
        output,
        "negatives",
        model=model,
        pairs=pairs and str(pairs),
        triples=len(drawn),
        questions=questions,
        rate=rate,
        **settings,
    )
    loaded = load(model)
    module = family_of(loaded.model).decoding_module(loaded.model)
    source = f"scenes, seed {seed}" if pairs is None else pairs.name
    for part in train.PARTS:
        settings["rate"] = train.RATES[part] if rate is None else rate
        made = {
            "model": loaded.settings["name"],
            "triples": len(drawn),
            "source": source,
            "content": digest(drawn),
            **settings,
        }
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
    mask_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of a picture's patches that vti masks.")
    ] = 0.99,
    trials: Annotated[int, typer.Option(min=1, help="Masks per picture, of vti.")] = 50,
    rows: Annotated[
        Literal["code", "token"],
        typer.Option(help="What vti's visual components are taken over: rows as the authors cut them, or tokens."),
    ] = "code",
    output: Annotated[
        Path | None, typer.Option(help="The file of vectors, in safetensors form; KIND.safetensors without it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the scenes and of the masks.")] = 0,
) -> None:
    """Vectors that VTI, Nullu or Revis steer with, from right and hallucinated captions of the same pictures. VTI's visual
    direction is made too where the vision encoder sees images as one grid. The same command goes on where it stopped.
    """
    from lvlm_decode_evals.runner import load

    from ..engine import learned
    from ..engine.hf.decoder import fingerprint
    from ..engine.vectors import layers_of, save
    from ..errors import InputError
    from ..families import family_of
    from . import vectors as train
    from .negatives import check_same
    from .pairs import digest, file_pairs, scene_pairs

    output = output or Path(f"{kind}.safetensors")
    if output.is_dir():
        raise InputError(f"{output} is a folder; give --output the name of a file.")
    drawn = scene_pairs(scenes, seed) if pairs is None else file_pairs(pairs)
    loaded = load(model)
    family = family_of(loaded.model)
    source = f"scenes, seed {seed}" if pairs is None else pairs.name
    about: dict[str, Any] = {"model": model, "pairs": len(drawn), "source": source, "content": digest(drawn)}
    about |= layers_of(family)
    masks: dict[str, Any] = {"share": mask_share, "trials": trials, "rows": rows, "seed": seed}
    sees = kind == "vti" and family.has_grid
    about |= {"masks": masks} if sees else {}
    module = family.decoding_module(loaded.model)
    known = {"kind": kind, "fingerprint": fingerprint(module), **about}
    about |= {"rank": rank} if kind == "nullu" else {}
    if output.is_file():
        check_same(output, learned.about(output), {**known, **about})
        typer.echo(f"{output} is there already")
        return
    # What is read of the pairs is the same for every rank.
    kept = train.Kept(output.with_name(f"{output.name}.parts"), known)
    found = train.directions(loaded.model, loaded.processor, drawn, kind, rank, kept)
    visual = train.visual(loaded.model, loaded.processor, drawn, **masks, kept=kept) if sees else None
    output.parent.mkdir(parents=True, exist_ok=True)
    save(output, kind, found, module, about, visual)
    kept.forget()
    typer.echo(f"{output}: {kind} vectors {tuple(found.shape)} from {len(drawn)} pairs")
    if visual is not None:
        typer.echo(f"{output}: visual direction {tuple(visual.shape)} (layers, tokens, width)")
    elif kind == "vti":
        typer.echo(f"no visual direction: {family.config.model_type} sees images in tiles or at their own resolution")


app.command("draft-head")(draft_head)


if __name__ == "__main__":
    app()

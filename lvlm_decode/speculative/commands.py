"""``lvlm-decode bench speculative`` and ``lvlm-decode train draft-head``; imports torch only when one of them runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lvlm_decode_evals.commands import one_sentence

bench = typer.Typer(help="Measure on this machine.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Measure on this machine."""


@bench.command("speculative")
@one_sentence
def bench_speculative(
    model: Annotated[str, typer.Option(help="tiny, tiny-instructblip, a folder, or a hub id.")] = "tiny",
    method: Annotated[str, typer.Option(help="plain, vcd, vcd+ritual, ...")] = "vcd",
    drafter: Annotated[str, typer.Option(help="recycling, automaton, vispec, vispec(depth=5), ...")] = "recycling",
    samples: Annotated[int, typer.Option(min=1, help="Captions.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds over all captions.")] = 3,
    do_sample: Annotated[bool, typer.Option(help="Draw, with keyed noise.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of sampling.")] = 1.0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole record, raw samples included.")] = False,
) -> None:
    """A method with a drafter: the same tokens as without one, and what they cost against plain generate()."""
    from lvlm_decode_evals.runner import load

    from ..errors import ParameterError
    from ..methods import parse
    from . import drafters
    from .bench import speculative

    loaded = load(model, dtype=dtype)
    drafting = drafters.parse(drafter, model=loaded.model)
    if drafting is None:
        raise ParameterError("drafter none drafts nothing; choose one of " + ", ".join(drafters.names()) + ".")
    options = {"do_sample": True, "temperature": temperature, "seed": 0, "top_k": 0} if do_sample else None
    report = speculative(
        loaded.model,
        loaded.processor,
        parse(method),
        drafting,
        samples=samples,
        max_new_tokens=max_new_tokens,
        rounds=rounds,
        options=options,
    )
    report = {"model": model, "method": method, "drafter": drafter, **report}
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    split = ", ".join(f"{name} {ms:.2f}" for name, ms in report["split"].items())
    typer.echo(f"{method} with {drafter} on {samples} captions of {model}")
    typer.echo(f"  mismatches against {method} alone: {report['mismatches']}")
    typer.echo(f"  time per token, of plain generate(): {report['time_per_token_vs_plain']:.3f}")
    typer.echo(f"  time per token, of {method} alone: {report['time_per_token_vs_method']:.3f}")
    typer.echo(f"  tau {report['tau']:.2f} accepted draft tokens per verification; ms per token: {split}")


@one_sentence
def draft_head(
    target: Annotated[str, typer.Option(help="tiny, tiny-instructblip, a folder, or a hub id.")],
    output: Annotated[Path, typer.Option(help="Folder the head is written to.")],
    kind: Annotated[str, typer.Option(help="vispec, msd or eagle.")] = "vispec",
    data: Annotated[
        Path | None, typer.Option(help="JSON lines: prompt, image (a path), optionally answer. Scenes when left out.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Scenes, without --data.")] = 2000,
    text_samples: Annotated[int, typer.Option(min=0, help="Texts without a picture, without --data.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step and process.")] = 16,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate; the authors' when left out, 2e-3 suits the small models.")
    ] = None,
    suffix: Annotated[
        str | None, typer.Option(help="Asked after every prompt; for vispec with --data, 1,000 words when left out.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the target's answers; 0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 96,
    unroll: Annotated[int, typer.Option(min=0, help="Passes on the head's own guesses (vispec).")] = 1,
    text_share: Annotated[float | None, typer.Option(help="Share of the steps before the first picture.")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Draft only this many tokens, the most frequent.")] = None,
    held_out: Annotated[int, typer.Option(min=1, help="Prompts whose acceptance is measured.")] = 24,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between measurements and checkpoints.")] = 250,
    rows: Annotated[int | None, typer.Option(help="Rows it drafts by default.")] = None,
    depth: Annotated[int | None, typer.Option(help="Levels it drafts by default.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Branching it drafts with by default; 1 is a chain.")] = None,
    seed: Annotated[int, typer.Option(help="Of data, noise and weights.")] = 0,
    answers: Annotated[Path | None, typer.Option(help="Generated answers, to share between kinds.")] = None,
    start: Annotated[Path | None, typer.Option(help="Folder of a head to start from.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --output.")] = False,
) -> None:
    """A draft head for --target: EAGLE, MSD or ViSpec. On several GPUs: accelerate launch -m lvlm_decode.cli train ..."""
    from ..training.draft_heads import Settings, train

    if target in ("tiny", "tiny-llava", "tiny-instructblip"):
        import lvlm_decode_data

        target = str(lvlm_decode_data.tiny_path("tiny-llava" if target == "tiny" else target))
    settings = Settings(
        target=target,
        output=output,
        kind=kind,
        data=data,
        samples=samples,
        text_samples=text_samples,
        steps=steps,
        batch=batch,
        lr=lr,
        suffix=suffix,
        text_share=text_share,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        unroll=unroll,
        vocabulary=vocabulary,
        evaluate_every=evaluate_every,
        checkpoint_every=evaluate_every,
        held_out=held_out,
        rows=rows,
        depth=depth,
        top_k=top_k,
        seed=seed,
        answers=answers,
        start=start,
        resume=resume,
    )
    train(settings, typer.echo)

"""``lvlm-decode bench speculative`` and ``lvlm-decode train draft-head``; imports torch only when one of them runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lvlm_decode_evals.commands import one_sentence

bench = typer.Typer(help="Measure times on this machine.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Measure times on this machine."""


@bench.command("speculative")
@one_sentence
def bench_speculative(
    model: Annotated[str, typer.Option(help="tiny, tiny-instructblip, a folder, or a hub id.")] = "tiny",
    method: Annotated[str, typer.Option(help="Method, for example plain, vcd or vcd+ritual.")] = "vcd",
    drafter: Annotated[
        str, typer.Option(help="Drafter, for example automaton, vispec or 'vispec(depth=5)'.")
    ] = "recycling",
    samples: Annotated[int, typer.Option(min=1, help="Number of captions.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Maximum length of an answer in tokens.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="Number of timed rounds over all captions.")] = 3,
    do_sample: Annotated[bool, typer.Option(help="Sample tokens, with noise keyed by a seed.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="Sampling temperature.")] = 1.0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole record, raw samples included.")] = False,
) -> None:
    """Time a method with a drafter against plain generate(), and check that its tokens are those without one."""
    from lvlm_decode_evals.runner import load

    from ..errors import ParameterError
    from ..methods import parse
    from . import drafters
    from .bench import speculative

    typer.echo(f"{samples} captions, {rounds} rounds, each with three ways of decoding ...", err=True)
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
    kind: Annotated[str, typer.Option(help="Kind of head: vispec, msd, eagle or eagle3.")] = "vispec",
    data: Annotated[
        Path | None,
        typer.Option(help="JSON lines with prompt, image (a path), and optionally answer. Default: emoji scenes."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of scenes, without --data.")] = 2000,
    text_samples: Annotated[int, typer.Option(min=0, help="Number of texts without a picture, without --data.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Number of optimiser steps.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Number of samples per step and process.")] = 16,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate. Default: the authors'; 2e-3 suits the small models.")
    ] = None,
    suffix: Annotated[
        str | None,
        typer.Option(help="Text after every prompt. Default: for vispec with --data, a request for 1,000 words."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature of the target's answers; 0 is greedy.")
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 96,
    unroll: Annotated[
        int | None,
        typer.Option(
            min=0, help="Number of training passes on the head's own guesses. Default: 1 for vispec, 6 for eagle3."
        ),
    ] = None,
    text_share: Annotated[float | None, typer.Option(help="Share of the steps before the first picture.")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Draft only this many tokens, the most frequent.")] = None,
    held_out: Annotated[int, typer.Option(min=1, help="Number of prompts whose acceptance is measured.")] = 24,
    evaluate_every: Annotated[
        int, typer.Option(min=1, help="Number of steps between measurements and checkpoints.")
    ] = 250,
    rows: Annotated[int | None, typer.Option(help="Number of rows that the head drafts by default.")] = None,
    depth: Annotated[int | None, typer.Option(help="Number of levels that the head drafts by default.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Branching of the draft by default; 1 is a chain.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of data, noise and weights.")] = 0,
    answers: Annotated[Path | None, typer.Option(help="Generated answers, to share between kinds.")] = None,
    start: Annotated[Path | None, typer.Option(help="Folder of a head to start from.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the checkpoint in --output.")] = False,
) -> None:
    """Train a draft head for --target. On several GPUs: accelerate launch -m lvlm_decode.cli train ..."""
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

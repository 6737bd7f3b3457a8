"""``lvlm-decode train draft-head``; imports torch only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lvlm_decode_evals.commands import one_sentence


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

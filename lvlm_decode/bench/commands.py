"""``lvlm-decode bench``; imports torch only when a command runs."""

from __future__ import annotations

import json
from collections.abc import Callable
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
    from ..speculative import drafters
    from .speculative import speculative

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


def clock_of(processor_seconds: bool) -> tuple[Callable[[], float], str]:
    """The clock of a record and what its seconds are, in words; seconds of the processor are those of one thread."""
    import time

    import torch

    if not processor_seconds:
        return time.perf_counter, "as they passed"
    torch.set_num_threads(1)
    return time.process_time, "of the processor, one thread"


ProcessorSeconds = Annotated[
    bool,
    typer.Option(help="Count the seconds that this process computes, in one thread: for a machine that others use."),
]


@bench.command("methods")
@one_sentence
def bench_methods(
    output: Annotated[
        Path, typer.Option(help="JSON of the record, a table beside it; rows that it holds are not measured again.")
    ],
    model: Annotated[
        str,
        typer.Option(help="tiny, tiny-instructblip, random (221 M drawn weights), random-7b, a folder, or a hub id."),
    ] = "tiny",
    method: Annotated[
        list[str] | None, typer.Option(help="Method, for example vcd or vcd+ritual; repeat for more. Default: all.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of samples; repeat for more. Default: 1, 4, 16.")
    ] = None,
    prompt: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Length of the prompt in tokens; repeat for more. Default: 100, 3000."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Length of the answers in tokens.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Number of timed rounds.")] = 5,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    processor_seconds: ProcessorSeconds = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
) -> None:
    """Time every method, and measure its peak memory, against plain generate() and one forward per view."""
    from .methods import every, measured, report, table
    from .workloads import loaded

    clock, seconds = clock_of(processor_seconds)
    given = loaded(model, dtype)
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"] if output.is_file() else []
    for row in measured(
        given,
        method or every(),
        batches=batch or (1, 4, 16),
        lengths=prompt or (100, 3000),
        tokens=tokens,
        rounds=rounds,
        memory=memory,
        clock=clock,
        known=tuple(rows),
    ):
        rows.append(row)
        # After each row, so that a run that is cut off leaves what it has measured.
        record = report(given, rows, seconds)
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(table(record), encoding="utf-8")
        typer.echo(table({**record, "rows": [row]}).splitlines()[-1])


@bench.command("questions")
@one_sentence
def bench_questions(
    model: Annotated[str, typer.Option(help="tiny, tiny-instructblip, a folder, or a hub id.")] = "tiny",
    method: Annotated[str, typer.Option(help="Method, for example vcd.")] = "vcd",
    batch: Annotated[int, typer.Option(min=1, help="Batch size of the runner.")] = 16,
    count: Annotated[int, typer.Option(min=1, help="Number of questions.")] = 96,
    rounds: Annotated[int, typer.Option(min=1, help="Number of timed rounds.")] = 3,
    processor_seconds: ProcessorSeconds = False,
    output: Annotated[Path | None, typer.Option(help="JSON of the record.")] = None,
) -> None:
    """Time the runner's questions per second against a loop over single questions."""
    from .questions import questions
    from .workloads import loaded

    clock, seconds = clock_of(processor_seconds)
    record = questions(loaded(model), method, batch=batch, count=count, rounds=rounds, clock=clock) | {
        "seconds": seconds
    }
    if output is not None:
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    rates = ", ".join(f"{name} {rate['median']:.1f}" for name, rate in record["questions_per_second"].items())
    typer.echo(f"{record['what']}, batches of {batch}")
    typer.echo(f"  questions per second: {rates}; the runner is {record['runner_to_loop']['median']:.2f} times as fast")
    typer.echo(f"  other answers: {record['other_answers']} of {count}")

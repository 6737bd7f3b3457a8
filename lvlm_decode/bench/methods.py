"""What every method costs: time per token, time to the first token and peak memory, beside plain ``generate()``.

Each method takes turns with

    plain                    ``generate()`` of the bare model
    one forward per view     the method as its authors run it: for every token one forward after the other (methods with views)
    as many rows             ``generate()`` of the bare model on as many rows as the method has with its views: what its forwards
                             cost without it (methods with views)
    its products too         the same, and in every step the products with weights that the method adds to it: the language head
                             for early layers, say (methods that add any)
    beam search              of the same width (OPERA)

Answers all have the same number of tokens, whatever they are. Times are medians, ratios medians of paired ratios, both with their
quartiles. The whole call of a search is its time per token, because it chooses no token before it is done.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

import torch

from lvlm_decode_evals.runner import Loaded

from ..attachment import last_run
from ..controllers.opera import OPERA
from ..engine.hf import decoder
from ..engine.hooks import hooked
from ..errors import LvlmDecodeError
from ..families import family_of
from ..method import Method
from ..methods import METHODS, parse
from .memory import peak_bytes
from .paired import Arm, Measured, Product, circumstances, measure, ratios, raw, ready, repeated, timed
from .workloads import prompts

PLAIN, APART, ROWS, BEAMS = "plain", "one forward per view", "as many rows", "beam search"
PRODUCTS = "its products too"


def method_for(name: str, model: torch.nn.Module) -> Method:
    """The method; what somebody must train for it first is drawn, because its cost does not depend on it."""
    family = family_of(model)
    module = family.decoding_module(model)
    layers, width = decoder.layer_count(module), decoder.width(module)
    generator = torch.Generator().manual_seed(0)
    if name == "dcd":
        return parse(name, negative=family.projector().state_dict())
    if name in ("vti", "revis"):
        return parse(name, vectors=torch.randn(layers, width, generator=generator))
    if name == "cicd":
        from lvlm_decode_data import load_scenes

        return parse(name, images=tuple(str(scene.path) for scene in load_scenes("heldout")[:2]))
    if name == "nullu":
        return parse(name, vectors=torch.linalg.qr(torch.randn(layers, width, 4, generator=generator)).Q)
    return parse(name)


def arms_of(method: Method, rows: int, products: Sequence[Product] = ()) -> dict[str, Arm]:
    """What a method with ``rows`` rows per sample is measured beside, and itself by the name "method".

    Args:
        products: what it adds to a step, see :func:`needed`.
    """
    arms = {PLAIN: Arm(), "method": Arm(method)}
    if rows > 1:
        arms |= {APART: Arm(method, execution="sequential"), ROWS: Arm(copies=rows)}
    if products:
        arms[PRODUCTS] = Arm(copies=rows, products=tuple(products))
    if isinstance(method, OPERA):
        arms[BEAMS] = Arm(options={"num_beams": method.num_beams})
    return arms


def measured(
    loaded: Loaded,
    names: Sequence[str],
    *,
    batches: Sequence[int],
    lengths: Sequence[int],
    tokens: int,
    rounds: int,
    memory: bool = True,
    clock: Callable[[], float] = perf_counter,
    known: Sequence[dict[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
    """One row per method, batch and length of prompt; a method that the model cannot run has its sentence instead.

    Args:
        names: methods, ``vcd`` or ``vcd(alpha=0.5)+ritual``.
        tokens: length of the answers.
        memory: measure peak memory too, which takes a call more for each way of decoding.
        clock: of the times; see :func:`~lvlm_decode.bench.paired.measure`.
        known: rows that need not be measured again.
    """
    about = circumstances(loaded.model)
    # The end token is held back, and sums of views are the same in all rounds.
    options = {"seed": 0, "eos_token_id": None}
    for length in lengths:
        for batch in batches:
            inputs, short = prompts(loaded, batch, length), prompts(loaded, batch, min(lengths))
            for name in names:
                row = {"method": name, "batch": batch, "prompt_tokens": inputs["input_ids"].shape[1], "tokens": tokens}
                if any(row.items() <= other.items() for other in known):
                    continue
                try:
                    method = method_for(name, loaded.model)
                    arms = arms_of(method, *needed(loaded, method, short))
                except LvlmDecodeError as error:
                    yield {**row, "refused": str(error)}
                    continue
                results = measure(
                    loaded.model,
                    loaded.processor,
                    [inputs],
                    arms,
                    max_new_tokens=tokens,
                    rounds=rounds,
                    options=options,
                    clock=clock,
                )
                peaks = (
                    {arm: _peak(loaded, how, inputs, tokens, options) for arm, how in arms.items()} if memory else {}
                )
                row |= {"arms": summary(results, peaks), "raw": raw(results)}
                yield row | {"load_average": list(os.getloadavg()), "commit": about["commit"]}


def needed(loaded: Loaded, method: Method, inputs: dict[str, Any]) -> tuple[int, list[Product]]:
    """How many rows of the forward each sample has (1 for a search), and the products with weights a step has beside them.

    Both are watched, in a short call: the decoder's innermost modules and the language head that a step of the method runs, less
    those that a step of the bare model runs on as many rows. What they are does not depend on the length of the prompt. Methods
    whose rows need several forwards have none: their share of the products is not known.
    """
    found, lanes = _step(loaded, Arm(method), inputs)
    rows = max(sum(lanes), 1)
    if len(lanes) != 1:
        return rows, []
    return rows, list((found - _step(loaded, Arm(copies=rows), inputs)[0]).elements())


def _step(loaded: Loaded, arm: Arm, inputs: dict[str, Any]) -> tuple[Counter[Product], list[int]]:
    """What innermost modules of the decoder, and its head, run for the third token; a sample's rows in each forward."""
    model = loaded.model
    module = family_of(model).decoding_module(model)
    watched = [part for part in decoder.decoder_of(module).modules() if not list(part.children())]
    calls: Counter[Product] = Counter()
    tokens: list[Counter[Product]] = []

    def count(part: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            calls[Product(part, tuple(args[0].shape))] += 1

    def criterion(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        tokens.append(calls.copy())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    given = {
        "do_sample": False,
        "max_new_tokens": 3,
        "eos_token_id": None,
        **({} if arm.method is None else {"seed": 0}),
    }
    with hooked(after={part: count for part in {*watched, decoder.head(module)}}), ready(model, loaded.processor, arm):
        model.generate(**repeated(inputs, arm.copies), stopping_criteria=[criterion], **given)
        run = last_run(model)
    return tokens[-1] - tokens[-2] if len(tokens) > 1 else Counter(), [] if run is None else list(map(len, run.lanes))


def _peak(loaded: Loaded, arm: Arm, inputs: dict[str, Any], tokens: int, options: dict[str, Any]) -> int:
    given = {**options, **arm.options, "do_sample": False, "max_new_tokens": tokens}
    if arm.method is None:
        del given["seed"]
    with ready(loaded.model, loaded.processor, arm):
        return peak_bytes(
            lambda: timed(loaded.model, repeated(inputs, arm.copies), **given), torch.device(loaded.model.device)
        )


def summary(results: dict[str, Measured], peaks: dict[str, int]) -> dict[str, Any]:
    """Per arm its times and peak memory, and the ratios of the method's to them."""
    own, found = results["method"], {}
    for name, result in results.items():
        stepwise = not any(
            value != value for value in own.firsts[0] + result.firsts[0]
        )  # NaN where no token came early
        entry: dict[str, Any] = {
            "ms_per_token": spread([1e3 * s for s in result.per_token(stepwise)]),
            "first_ms": spread([1e3 * s for row in result.firsts for s in row]) if stepwise else None,
        }
        if name in peaks:
            entry["peak_bytes"] = peaks[name]
        if name != "method":
            entry["method_to_this"] = {
                "per_token": spread(ratios(own, result, stepwise)),
                "first": spread([a / b for x, y in zip(own.firsts, result.firsts) for a, b in zip(x, y)])
                if stepwise
                else None,
            }
            if name in peaks:
                entry["method_to_this"]["peak"] = round(peaks["method"] / peaks[name], 4)
        found[name] = entry
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def report(loaded: Loaded, rows: Sequence[dict[str, Any]], seconds: str) -> dict[str, Any]:
    """The record: rows, and what they were measured on.

    Args:
        seconds: of which clock, in words.
    """
    model = loaded.model
    return {
        "what": f"{loaded.settings['name']}, greedy, answers of one length; ratios are paired, each with its quartiles",
        "seconds": seconds,
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "rows": list(rows),
        "circumstances": circumstances(model),
    }


def table(record: dict[str, Any]) -> str:
    """A record as Markdown: the method's times, and their ratios to what it took turns with."""
    about = record["circumstances"]
    columns = ["method", "batch", "prompt", "ms per token", "first token ms", "peak MiB"]
    columns += [f"to {PLAIN}", "first", "peak", f"to {APART}", f"to {ROWS}", f"to {PRODUCTS}", f"to {BEAMS}"]
    lines = [
        f"{record['what']}; seconds {record['seconds']}.",
        "",
        f"{about['processor']}, {about['device']}, {about['threads']} threads, {about['dtype']}, "
        f"{about['parameters'] / 1e6:.0f} M parameters, load at the end {about['load_average'][0]}.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for row in record["rows"]:
        start = f"| {row['method']} | {row['batch']} | {row['prompt_tokens']} |"
        if "refused" in row:
            lines.append(f"{start} {row['refused']} |" + " |" * 9)
            continue
        own, plain = row["arms"]["method"], row["arms"][PLAIN]["method_to_this"]
        cells = [
            f"{own['ms_per_token']['median']:.2f}",
            f"{own['first_ms']['median']:.1f}" if own["first_ms"] else "",
            f"{own['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in own else "",
            _ratio(plain["per_token"]),
            _ratio(plain["first"]) if plain["first"] else "",
            f"{plain['peak']:.2f}x" if "peak" in plain else "",
            *(
                _ratio(row["arms"][name]["method_to_this"]["per_token"]) if name in row["arms"] else ""
                for name in (APART, ROWS, PRODUCTS, BEAMS)
            ),
        ]
        lines.append(f"{start} {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ratio(found: dict[str, float]) -> str:
    return f"{found['median']:.3f}x ({found['low']:.2f} to {found['high']:.2f})"


def every() -> list[str]:
    """The names of all methods."""
    return list(METHODS)

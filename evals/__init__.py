"""Hallucination benchmarks: questions, scorers, statistics, tables. Imports no torch, except `runner` and `run`.

From Python: `evaluate(model, processor, "pope", methods=["vcd"])`, `score("pope", answers)`, `read_run(folder)`; see `api`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lvlm_decode.errors import EvalError, UnknownNameError
from lvlm_decode.plugins import Plugin, plugins

# name -> "module:Class"; loaded when asked for. A new benchmark is one file and one line here.
EVALUATORS: dict[str, str] = {
    "amber": ".amber:Amber",
    "beaf": ".beaf:BEAF",
    "chair": ".chair:Chair",
    "dash-b": ".dash_b:DashB",
    "hallusionbench": ".hallusionbench:HallusionBench",
    "mme": ".mme:MME",
    "mmhal": ".judges:MMHal",
    "mmstar": ".mmstar:MMStar",
    "mmvp": ".mmvp:MMVP",
    "naturalbench": ".naturalbench:NaturalBench",
    "pope": ".pope:Pope",
    "r-bench": ".r_bench:RBench",
    "sycophancy": ".sycophancy:Sycophancy",
    "vallu": ".judges:VaLLu",
}


def foreign() -> dict[str, Plugin]:
    """The evaluators that other packages bring, by name."""
    return plugins("lvlm_decode.evaluators", frozenset(EVALUATORS))


def evaluator_class(name: str) -> type:
    """The class of an evaluator by registry name."""
    if name not in EVALUATORS and name in (others := foreign()):
        return others[name].load("Evaluator")
    if name not in EVALUATORS:
        raise UnknownNameError.of("evaluator", name, [*EVALUATORS, *foreign()])
    module, _, cls = EVALUATORS[name].partition(":")
    return getattr(import_module(module, __name__), cls)


def evaluator(name: str, **options: Any):
    """An evaluator with its options, e.g. `evaluator("pope", rule="opera")`; unknown options are named."""
    from dataclasses import fields
    from typing import get_type_hints

    from pydantic import TypeAdapter

    from lvlm_decode.reading import checked

    cls = evaluator_class(name)
    known = [option.name for option in fields(cls)]
    types = get_type_hints(cls)
    for option, value in options.items():
        if option not in known:
            raise UnknownNameError.of(f"option of {name}", option, known)
        checked(TypeAdapter(types[option]), value, f"option {option} of {name}")
    return cls(**options)


_API = ("Evaluation", "Scores", "evaluate", "read_run", "score")


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(import_module(".api", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "EVALUATORS",
    "EvalError",
    "Evaluation",
    "Scores",
    "evaluate",
    "evaluator",
    "evaluator_class",
    "read_run",
    "score",
]

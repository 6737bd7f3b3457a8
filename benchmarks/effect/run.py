"""What every method does to the captions of the small LLaVA, beside plain greedy decoding of the same pictures.

    python benchmarks/effect/run.py --scenes 32 --out runs/effect

Every method that runs on the small model as it ships is asked greedily, with its defaults but for ``PARAMETERS``. Answers are
kept in ``--out`` and a run goes on where it stopped. The figures on the pages of methods are drawn from ``results.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvlm_decode.bench.paired import circumstances
from lvlm_decode.engine.modes import check_needs
from lvlm_decode.errors import ParameterError, UnsupportedError
from lvlm_decode.families import family_of
from lvlm_decode.methods import METHODS, parse
from lvlm_decode_evals import evaluator
from lvlm_decode_evals.base import Row
from lvlm_decode_evals.loaders import scene_source
from lvlm_decode_evals.metrics import compare
from lvlm_decode_evals.plan import GREEDY
from lvlm_decode_evals.runner import EvaluationRun, Options, load

HERE = Path(__file__).resolve().parent
#: What the small model needs set: it has 64 patches and knows few phrasings of a request for a description.
PARAMETERS = {"code": "code(prompt=Please describe this image in detail.,max_description=96)"}
RATES = ("chair_s", "chair_i", "recall", "length")


def cell(scorer: Any, rows: Sequence[Row], plain: Sequence[Row]) -> dict[str, Any]:
    """Rates of a method, and each minus plain decoding's with the bounds of its paired interval."""
    summary, found = scorer.summary(rows), compare(scorer, [rows], [plain]).differences
    before = {row.id: row.answer for row in plain}
    return {
        "rates": {name: summary[name] for name in RATES},
        "minus_plain": {name: [found[name].value, found[name].low, found[name].high] for name in RATES},
        "changed": sum(before[row.id] != row.answer for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scenes", type=int, default=32, help="Number of scenes.")
    parser.add_argument("--out", type=Path, default=Path("runs/effect"), help="Folder of the answers.")
    parser.add_argument("--methods", nargs="+", help="Only these methods.")
    given = parser.parse_args()
    loaded, scorer = load("tiny"), evaluator("chair")
    source, family = scene_source(scorer), family_of(load("tiny").model)
    rows: dict[str, Sequence[Row]] = {}
    left_out: dict[str, str] = {}
    for name in given.methods or METHODS:
        text = PARAMETERS.get(name, name)
        try:
            check_needs(parse(text), family)
            run = EvaluationRun(
                scorer, source, loaded, given.out, [(text, GREEDY)], limit=given.scenes, options=Options(), quiet=True
            )
            results = {result.method: result.rows for result in run.execute() if result.decoding == GREEDY}
        except (UnsupportedError, ParameterError) as error:
            left_out[name] = str(error)
            print(name, "left out:", error, flush=True)
            continue
        rows[name] = results[text]
        print(name, scorer.summary(rows[name])["chair_s"], flush=True)
    record = {
        "scenes": given.scenes,
        **circumstances(loaded.model),
        "model": dict(loaded.settings),
        "parameters_of_methods": PARAMETERS,
        "methods": {name: cell(scorer, found, rows["plain"]) for name, found in rows.items()},
        "left_out": left_out,
    }
    (HERE / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

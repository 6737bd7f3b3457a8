"""What the controllers do to captions and answers of the small models, beside greedy and beam controls.

    python benchmarks/controllers/quality.py --out benchmarks/controllers --captions 100 --questions 100

CHAIR on the held-out emoji scenes with recall and length beside it, POPE on their yes/no questions; through the evaluation
runner, so controls, intervals and paired tests are its own. CNTP answers twice: with the likeliest token where it is certain,
and sampling as its authors do. Writes per model and benchmark a table (.md), and settings,
summaries and every answer (.json).
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import transformers

from lvlm_decode.reading import read_json
from lvlm_decode_evals import evaluator
from lvlm_decode_evals.loaders import scene_source
from lvlm_decode_evals.plan import GREEDY, Decoding
from lvlm_decode_evals.runner import EvaluationRun, Options, load
from lvlm_decode_evals.tables import blocks, render

#: How the authors of CNTP sample; the runner adds plain sampling and the mask alone in the same way as controls.
SAMPLED = Decoding(do_sample=True, temperature=0.8, top_p=0.9)
#: VDGD without its re-ranking: what the description before the question does alone.
PROMPT_ALONE = "vdgd(mode=add,kappa=0)"
MODELS = ("tiny-llava", "tiny-instructblip")
METHODS = {
    "chair": ("opera", "opera(threshold=5)", "cntp", "vdgd", PROMPT_ALONE),
    "pope": ("opera", "cntp", "vdgd", PROMPT_ALONE, "mvp(caption_tokens=64)"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--captions", type=int, default=100, help="scenes per method")
    parser.add_argument("--questions", type=int, default=180, help="questions per split and method")
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--benchmarks", nargs="*", default=tuple(METHODS))
    parser.add_argument("--splits", nargs="*", default=["adversarial"], help="of POPE")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.models:
        loaded = load(name)
        for benchmark in given.benchmarks:
            scored = evaluator(benchmark)
            source = scene_source(scored)
            if benchmark == "pope":
                source = source.only(given.splits)
            limit = given.captions if benchmark == "chair" else given.questions
            options = Options(max_new_tokens={"chair": 96, "pope": 24}[benchmark], batch_size=16)
            pairs = [(method, GREEDY) for method in METHODS[benchmark]] + [("cntp", SAMPLED)]
            with tempfile.TemporaryDirectory() as work:
                out = Path(work)
                results = EvaluationRun(
                    scored, source, loaded, out, pairs, (given.seed,), limit, options, quiet=True
                ).execute()
                table = render(blocks(results))
                record = [
                    {
                        "split": result.split,
                        "method": result.method,
                        "decoding": result.decoding.name,
                        "settings": result.settings,
                        "summary": read_json(result.folder / "summary.json"),
                        "answers": {str(row.id): row.answer for row in result.rows},
                    }
                    for result in results
                ]
            print(f"## {name}, {benchmark}\n\n{table}", flush=True)
            (given.out / f"quality-{name}-{benchmark}.md").write_text(table + "\n")
            (given.out / f"quality-{name}-{benchmark}.json").write_text(json.dumps(record, indent=0) + "\n")


if __name__ == "__main__":
    main()

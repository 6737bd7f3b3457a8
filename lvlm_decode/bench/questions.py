"""The runner's questions per second against a loop that asks one question after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from lvlm_decode_evals import evaluator
from lvlm_decode_evals.loaders import scene_source
from lvlm_decode_evals.plan import Decoding
from lvlm_decode_evals.runner import EvaluationRun, Loaded, Options, prompt_of

from ..attachment import attached
from .methods import spread
from .paired import circumstances


def questions(
    loaded: Loaded,
    method: str,
    *,
    batch: int,
    count: int,
    rounds: int,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, Any]:
    """``count`` yes/no questions of POPE's emoji scenes, asked by the runner in batches and by a loop, in turns.

    The runner's time is that of the whole run: pictures, answers on disk, scores. The loop loads a picture, calls the processor
    and ``generate()``, and keeps the text.
    """
    pope = evaluator("pope")
    source = scene_source(pope).only(["adversarial"]).first(count)
    asked = list(source.splits["adversarial"])
    model, processor = loaded.model, loaded.processor

    def run() -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            results = EvaluationRun(
                evaluator=pope,
                source=source,
                loaded=loaded,
                out=Path(folder),
                methods=[(method, Decoding())],
                without=("plain", "mask"),
                options=Options(batch_size=batch),
                quiet=True,
            ).execute()
        return [row.answer for row in results[-1].rows]

    def loop() -> list[str]:
        texts = []
        with attached(model, method, processor=processor):
            for question in asked:
                picture = pope.shown(question, source.images.open(question.image))
                text = prompt_of(processor, question, Options())
                inputs = processor(text=[text], images=[picture], return_tensors="pt").to(model.device)
                out = model.generate(
                    **inputs,
                    do_sample=False,
                    max_new_tokens=pope.max_new_tokens,
                    seed=0,
                    sample_ids=[f"pope/adversarial/{question.id}"],
                )
                texts.append(
                    processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
                )
        return texts

    ways = {"runner": run, "loop": loop}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[str]] = {}
    for turn in range(rounds + 1):
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            start = clock()
            texts[name] = ways[name]()
            # The first turn warms up.
            seconds[name] += [clock() - start] if turn else []
    return {
        "what": f"{len(asked)} questions of POPE on emoji scenes, {method}, greedy, by {loaded.settings['name']}",
        "batch": batch,
        "questions_per_second": {name: spread([len(asked) / s for s in own]) for name, own in seconds.items()},
        "runner_to_loop": spread([b / a for a, b in zip(seconds["runner"], seconds["loop"])]),
        "other_answers": sum(a != b for a, b in zip(texts["runner"], texts["loop"])),
        "raw_seconds": seconds,
        "circumstances": circumstances(model),
    }

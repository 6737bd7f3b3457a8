"""The commands and scripts around speculation: bench, training of heads, the GPU script at small shapes."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import full_but
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import lvlm_decode_data
from lvlm_decode.bench.commands import bench
from lvlm_decode.bench.paired import Arm, Measured, measure, mismatches, ratio
from lvlm_decode.bench.speculative import summary
from lvlm_decode.errors import FileFormatError, InputError, LvlmDecodeError, ParameterError
from lvlm_decode.methods import parse
from lvlm_decode.speculative import drafters
from lvlm_decode.speculative.heads import KINDS, DraftHead, HeadConfig, shipped
from lvlm_decode.testing import models as zoo
from lvlm_decode.training.draft_heads import Item as TrainingItem
from lvlm_decode.training.draft_heads import (
    Objective,
    Settings,
    Target,
    acceptance,
    eagle_loss,
    file_items,
    frequent_tokens,
    train,
    vispec_loss,
)


def script(path):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / "benchmarks" / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny_llava():
    try:
        return str(lvlm_decode_data.tiny_path("tiny-llava"))
    except FileNotFoundError as error:
        pytest.skip(f"the small LLaVA is not here: {error}")


def test_the_gpu_script_runs_at_small_shapes(tmp_path):
    module = script("gpu/llava_shapes")
    report = module.main(["--tiny", "--repeats", "1", "--context", "40", "--output", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == report
    expected = {f"stacked V={v} rows={r}" for v in (1, 2, 3) for r in (1, 31, 61)}
    assert expected | {"plain", "draft vispec rows=1", "draft msd rows=8"} <= set(report["rows"])
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 for row in report["rows"].values())


def test_the_gpu_scripts_floors_are_those_of_the_specification():
    module = script("gpu/llava_shapes")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**module.SHAPES["llava-1.5-7b"])).to(torch.bfloat16)
    for views, rows, floor in [(1, 1, 2.851), (2, 1, 2.950), (3, 1, 3.048), (2, 31, 2.950)]:
        assert module.floor_of(model, views, rows, 900, 4.8e12, 790e12)["floor_ms"] == pytest.approx(floor, abs=2e-3)


def test_bench_command(tiny_llava):
    arguments = ["speculative", "--method", "vcd", "--drafter", "recycling(rows=6,depth=3)", "--samples", "1"]
    result = CliRunner().invoke(bench, [*arguments, "--max-new-tokens", "8", "--rounds", "1", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["mismatches"] == 0 and report["time_per_token_vs_plain"] > 0
    assert report["tau"] >= 0 and set(report["split"]) == {"target", "draft", "other"}
    assert report["circumstances"]["dtype"] == "torch.float32" and "load_average" in report["circumstances"]
    result = CliRunner().invoke(bench, ["speculative", "--drafter", "medusa"])
    assert result.exit_code == 1 and "unknown drafter 'medusa'" in result.output


def test_ratios_are_paired():
    slow = Measured([[[1] * 4], [[1] * 4]], [[4.0, 40.0], [8.0, 80.0]], [[1.0, 10.0], [2.0, 20.0]])
    fast = Measured([[[1] * 4], [[2] * 4]], [[2.0, 20.0], [4.0, 40.0]], [[1.0, 10.0], [2.0, 20.0]])
    assert ratio(fast, slow) == 0.5 and mismatches(fast, slow) == 1
    assert ratio(fast, slow, decode_only=True) == pytest.approx(1 / 3)
    rows = summary({"plain": slow, "fast": fast}, "plain")
    assert rows["fast"]["vs_plain"] == 0.5 and rows["plain"]["vs_plain_decode"] == 1.0
    assert slow.only(slice(1, None)).per_token() == [10.0, 20.0]


def test_a_drafter_is_never_measured_on_an_answer_it_has_seen(tiny_llava):
    from lvlm_decode.bench.workloads import caption_inputs
    from lvlm_decode_evals.runner import load

    loaded = load(tiny_llava)
    inputs = caption_inputs(loaded.processor, 2)
    drafter = drafters.parse("automaton")
    results = measure(
        loaded.model,
        loaded.processor,
        inputs[1:],
        {"a": Arm(parse("plain"), drafter)},
        max_new_tokens=12,
        warm=inputs[:1],
    )
    # What is remembered afterwards is the warm-up's answer alone.
    assert drafter.seen.text.count(-1) == 1 and len(results["a"].seconds) == 3


@torch.no_grad()
def test_losses():
    torch.manual_seed(0)
    target = F.softmax(torch.randn(5, 30), -1)
    perfect = target.log()
    assert vispec_loss(perfect, target) < vispec_loss(perfect + torch.randn(5, 30), target)
    # Nothing in common: ten times the largest L1 distance, beside ListMLE.
    one, other = torch.full((1, 30), -50.0), torch.zeros(1, 30)
    one[0, 3], other[0, 7] = 50.0, 1.0
    order = other.topk(10, -1).indices
    scores = one.gather(-1, order)[0]
    listmle = sum(scores[i:].logsumexp(0) - scores[i] for i in range(10))
    assert vispec_loss(one, other) == pytest.approx(20 + 0.1 * float(listmle), rel=1e-5)
    features = torch.randn(5, 8)
    entropy = -(target * target.log()).sum(-1).mean()
    assert eagle_loss(features, features, perfect, target) == pytest.approx(0.1 * float(entropy), rel=1e-5)


def toy_config(kind):
    sizes = dict(hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=4, intermediate_size=24, vocab_size=30)
    return HeadConfig(**sizes, **KINDS[kind], kind=kind, states=(1, 2, 3) if kind == "eagle3" else ())


def toy_batch():
    torch.manual_seed(1)
    image = torch.zeros(2, 9, dtype=torch.bool)
    image[:, 2:5] = True
    answer = torch.zeros(2, 9, dtype=torch.bool)
    answer[:, 6:] = True
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 8:] = answer[1, 8:] = False
    return {
        "embeds": torch.randn(2, 9, 16),
        "hidden": torch.randn(2, 9, 16),
        "image": image,
        "answer": answer,
        "mask": mask,
        "words": torch.randn(2, 9, 16),
        "layers": {layer: torch.randn(2, 9, 16) for layer in (1, 2, 3)},
        "positions": None,
    }


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_objectives_reach_every_parameter_and_ignore_what_is_not_the_answer(kind, tmp_path):
    torch.manual_seed(0)
    head = DraftHead(toy_config(kind))
    out = nn.Linear(16, 30, bias=False).requires_grad_(False)
    objective = Objective(head, out, Settings("", tmp_path, kind=kind, noise=0.0))
    batch = toy_batch()
    result = objective(batch, pictures=True)
    result["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters())
    assert 0 < result["overlap"] < 1
    # Beyond the row's end nothing counts.
    changed = copy.deepcopy(batch)
    changed["hidden"][1, 8], changed["embeds"][1, 8] = 9.0, 9.0
    torch.testing.assert_close(objective(changed, True)["loss"], result["loss"])
    # The last feature predicts what follows the answer; the one before it is a target.
    changed["hidden"][1, 7] = 9.0
    torch.testing.assert_close(objective(changed, True)["loss"], result["loss"])
    changed["hidden"][1, 6] = 9.0
    assert not torch.isclose(objective(changed, True)["loss"], result["loss"])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_objectives_run_under_bfloat16_autocast(kind, tmp_path):
    torch.manual_seed(0)
    head = DraftHead(toy_config(kind))
    objective = Objective(head, nn.Linear(16, 30, bias=False), Settings("", tmp_path, kind=kind, noise=0.0))
    batch = toy_batch()
    expected = objective(batch, True)["loss"]
    lower = lambda x: x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
    half = {name: lower(value) for name, value in batch.items()}
    half["layers"] = {layer: states.bfloat16() for layer, states in batch["layers"].items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(half, True)["loss"]
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=0.03, atol=0.03)


#: The command line's own training, with what each process trained and on which pictures written down beside it.
WATCHED = """
import os, sys, torch
from lvlm_decode import cli
from lvlm_decode.training import draft_heads
folder, heads, sources = sys.argv.pop(1), [], []
init, complete = draft_heads.Objective.__init__, draft_heads.Target.complete
def watched(self, head, *rest):
    init(self, head, *rest)
    heads.append(head)
def noted(self, items, *rest):
    sources.extend(item.source for item in items if item.load is not None)
    complete(self, items, *rest)
draft_heads.Objective.__init__, draft_heads.Target.complete = watched, noted
try:
    cli.main()
finally:
    torch.save((heads[0].state_dict(), sources), f"{folder}/{os.environ['RANK']}.pt")
"""


@pytest.mark.full
def test_two_processes_train_one_head(tiny_llava, tmp_path):
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    # accelerate's own launcher starts one process on a CPU; torch's starts what accelerate finds on several GPUs.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(script), str(tmp_path), "train", "draft-head"]
    command += ["--target", tiny_llava, "--output", str(tmp_path), "--kind", "vispec", "--samples", "4", "--steps", "2"]
    command += ["--text-samples", "4", "--batch", "2", "--max-new-tokens", "8", "--held-out", "1", "--lr", "1e-2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "process 0 of 2" in done.stdout and "process 1 of 2" in done.stdout
    assert json.loads((tmp_path / "training.json").read_text())["curve"][-1]["step"] == 2
    (one, first), (two, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(first) == len(second) == 2 and not set(first) & set(second)
    saved = DraftHead.from_pretrained(tmp_path).state_dict()
    for name, value in one.items():
        # Gradients of different pictures, averaged: the processes end in the same weights.
        assert torch.equal(two[name], value), name
        torch.testing.assert_close(saved[name], value.half().float(), atol=0, rtol=0)


@pytest.mark.parametrize("unroll", [0, 1, 2])
def test_the_unrolled_pass_reads_the_heads_own_guesses(unroll, tmp_path):
    """Loss and gradient equal passes written out position by position."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_heads=4, num_kv_heads=4, head_dim=4, intermediate_size=24, vocab_size=30)
    head = DraftHead(HeadConfig(**sizes, **{"kind": "vispec", **KINDS["vispec"]}))
    out = nn.Linear(16, 30, bias=False).requires_grad_(False)
    objective = Objective(head, out, Settings("", tmp_path, kind="vispec", noise=0.0, unroll=unroll))
    batch = toy_batch()
    objective(batch, True)["loss"].backward()
    found = {name: p.grad.clone() for name, p in head.named_parameters()}
    head.zero_grad()

    hidden, length = batch["hidden"], batch["hidden"].shape[1]
    features, losses = hidden[:, :-1], []
    for _ in range(1 + unroll):
        slots = head.slots(batch["embeds"][:, 1:], features, batch["image"][:, 1:], batch["mask"][:, 1:])
        guess, wanted, logits = head(slots), [], []
        rows = [[hidden[b, t] for t in range(length - 1)] for b in range(2)]
        for b in range(2):
            for t in range(length - 1):
                # Slot t holds token t + 1 and guesses the feature of token t + 1.
                if t + 2 < length and batch["answer"][b, t + 2]:
                    logits.append(out(guess[b, t]))
                    wanted.append(out(hidden[b, t + 1]))
                if t and slots.seen[b, t - 1] and not batch["image"][b, t]:
                    rows[b][t] = guess[b, t - 1]
        losses.append(vispec_loss(torch.stack(logits), F.softmax(torch.stack(wanted), -1)))
        features = torch.stack([torch.stack(row) for row in rows])
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(objective(batch, True)["loss"], expected)
    expected.backward()
    for name, p in head.named_parameters():
        torch.testing.assert_close(p.grad, found[name])


def test_a_batch_of_text_takes_the_feature_losses(tmp_path):
    torch.manual_seed(0)
    out = nn.Linear(16, 30, bias=False).requires_grad_(False)
    batch = toy_batch()
    batch["image"] = torch.zeros_like(batch["image"])
    supervised = F.pad(batch["answer"][:, 2:], (0, 1))
    for kind in ("eagle", "msd", "vispec"):
        head = DraftHead(toy_config(kind))
        loss = Objective(head, out, Settings("", tmp_path, kind=kind, noise=0.0))(batch, pictures=False)["loss"]
        slots = head.slots(batch["embeds"][:, 1:], batch["hidden"][:, :-1], batch["image"][:, 1:], batch["mask"][:, 1:])
        guess, wanted = head(slots)[supervised], batch["hidden"][:, 1:][supervised]
        logits, target = out(guess), F.softmax(out(wanted), -1)
        expected = F.smooth_l1_loss(guess, wanted) - 0.1 * (target * logits.log_softmax(-1)).sum(-1).mean()
        if kind == "vispec":
            best = target.topk(10, -1).indices
            scores = logits.gather(-1, best)
            expected = expected + 0.01 * sum(scores[:, i:].logsumexp(-1) - scores[:, i] for i in range(10)).mean()
        torch.testing.assert_close(loss, expected)


def test_what_the_authors_settings_are():
    kinds = ("eagle", "msd", "vispec", "eagle3")
    assert [Settings("", None, kind=kind).rate for kind in kinds] == [3e-5, 5e-5, 3e-5, 1e-4]
    assert [Settings("", None, kind=kind).passes for kind in kinds] == [1, 1, 2, 7]
    assert [Settings("", None, kind=kind, unroll=3).passes for kind in kinds] == [1, 1, 4, 4]
    assert Settings("", None, lr=1e-3).rate == 1e-3
    long = " Please answer with at least 1000 words."
    assert Settings("", None, kind="vispec", data=Path("d")).long_answers == long
    assert Settings("", None, kind="vispec", data=Path("d"), suffix="").long_answers == ""
    assert (
        Settings("", None, kind="vispec").long_answers
        == Settings("", None, kind="msd", data=Path("d")).long_answers
        == ""
    )


def test_stages():
    share = lambda kind, at: Settings("", None, kind=kind).picture_share(at)  # noqa: E731
    assert [share(kind, at) for kind in ("eagle", "eagle3") for at in (0, 0.5)] == [1, 1, 1, 1]
    assert [share("vispec", at) for at in (0, 0.24, 0.26, 1)] == [0, 0, 1, 1]
    assert [share("msd", at) for at in (0, 0.49, 0.5, 0.75, 1)] == [0, 0, 0, 0.5, 1]
    with pytest.raises(ParameterError, match="medusa"):
        Settings("", None, kind="medusa")


@pytest.mark.full
@pytest.mark.parametrize("kind, model", [("vispec", "tiny-llava"), ("msd", "tiny-llava"), ("msd", "tiny-instructblip")])
def test_training_and_resuming_end_in_the_same_head(kind, model, tmp_path):
    try:
        target = str(lvlm_decode_data.tiny_path(model))
    except FileNotFoundError as error:
        pytest.skip(f"{model} is not here: {error}")
    settings = dict(
        target=target,
        kind=kind,
        samples=6,
        text_samples=4,
        steps=4,
        batch=3,
        lr=1e-2,
        max_new_tokens=12,
        held_out=1,
        evaluate_every=2,
        checkpoint_every=2,
        rows=5,
        depth=3,
        top_k=1,
        vocabulary=300,
    )
    said = []
    report = train(Settings(output=tmp_path / "whole", **settings), said.append)
    assert [entry["step"] for entry in report["curve"]] == [2, 4] and all("tau" in entry for entry in report["curve"])
    assert report == json.loads((tmp_path / "whole" / "training.json").read_text())
    whole = DraftHead.from_pretrained(tmp_path / "whole")
    assert whole.config.kind == kind and len(whole.trim) == 300 and whole.config.depth == 3

    class Killed(Exception):
        pass

    def stop_after_two(text):
        if '"step": 4' in text:
            raise Killed

    with pytest.raises(Killed):
        train(Settings(output=tmp_path / "broken", **settings), stop_after_two)
    train(Settings(output=tmp_path / "broken", resume=True, **settings), said.append)
    assert "resumed at step 2" in said
    assert not list((tmp_path / "broken").glob("answers*")) and not (tmp_path / "broken" / "training.pt").exists()
    again = DraftHead.from_pretrained(tmp_path / "broken")
    for name, value in whole.state_dict().items():
        # At this rate a step without the optimizer's memory goes elsewhere.
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-5, rtol=1e-3)


def test_a_head_starts_from_another(tiny_llava, tmp_path):
    how = dict(target=tiny_llava, samples=2, text_samples=2, steps=1, batch=1, max_new_tokens=6, held_out=1, lr=1e-9)
    train(Settings(output=tmp_path / "one", kind="eagle", seed=1, **how), lambda text: None)
    train(Settings(output=tmp_path / "two", kind="vispec", start=tmp_path / "one", **how), lambda text: None)
    one, two = (DraftHead.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.allclose(two[name], value, atol=1e-3) for name, value in one.items()) and len(two) > len(one)


def test_files_of_pictures_and_texts(tmp_path):
    lines = [{"prompt": f"p{n}", "image": f"{n}.png"} for n in range(3)] + [{"prompt": "t", "answer": "a"}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    pictures, texts, held = file_items(path, 1)
    assert [i.prompt for i in pictures] == ["p0", "p1"] and [i.prompt for i in held] == ["p2"]
    assert texts[0].answer == "a" and texts[0].load is None
    with pytest.raises(InputError, match="3 records with an image"):
        file_items(path, 3)
    path.write_text('{"image": "x.png"}')
    with pytest.raises(FileFormatError, match=r"data\.jsonl, line 1: field 'prompt' is missing"):
        file_items(path, 1)
    assert frequent_tokens([Counted([5, 5, 5, 7, 7, 7, 2], 1)], 2, 10).tolist() == [5, 7]


class Counted:
    def __init__(self, ids, start):
        self.ids, self.start = ids, start


#: The kinds of heads that ship with both small models.
SHIPPED = ("eagle", "msd", "vispec")


@pytest.mark.parametrize("name", full_but(["tiny-llava", "tiny-instructblip"], ["tiny-llava"]))
def test_shipped_heads_draft_for_their_model(name):
    """The heads in data/heads belong to the weights in data/ and bring accepted tokens on captions."""
    from lvlm_decode.attachment import attach, detach, last_run
    from lvlm_decode.bench.workloads import caption_inputs
    from lvlm_decode_evals.runner import load

    try:
        loaded = load(str(lvlm_decode_data.tiny_path(name)))
    except FileNotFoundError as error:
        pytest.skip(f"{name} is not here: {error}")
    kinds = (*SHIPPED, "eagle3") if name == "tiny-llava" else SHIPPED
    for kind in kinds:
        try:
            shipped(loaded.model, kind)
        except LvlmDecodeError as error:
            pytest.skip(f"no {kind} head ships for these weights of {name}: {error}")
    inputs = caption_inputs(loaded.processor, 3)
    for kind in kinds:
        cycles = accepted = 0
        for x in inputs:
            expected = loaded.model.generate(**x, max_new_tokens=48, do_sample=False)
            attach(loaded.model, parse("plain"), drafter=kind)
            try:
                assert torch.equal(loaded.model.generate(**x, max_new_tokens=48, do_sample=False), expected)
                stats = last_run(loaded.model).trace.speculation
            finally:
                detach(loaded.model)
            cycles, accepted = cycles + stats.cycles, accepted + stats.accepted
        assert accepted / cycles > 1, kind


def test_the_package_holds_no_head_without_its_training_report():
    folders = [path.parent for path in (lvlm_decode_data.HERE / "heads").glob("*/head.json")]
    for folder in folders:
        report = json.loads((folder / "training.json").read_text())
        assert report["curve"][-1]["tau"] > 0
        assert (folder / "head.safetensors").stat().st_size < 4 << 20


def test_the_table_of_heads_says_what_their_training_reported():
    lines = ["| head | parameters | steps | tau | acceptance per level |", "|---|---|---|---|---|"]
    for path in sorted((lvlm_decode_data.HERE / "heads").glob("*/training.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        last = report["curve"][-1]
        levels = ", ".join(f"{value:.2f}" for value in last["acceptance_per_level"])
        millions = f"{report['parameters'] / 1e6:.2f} M"
        lines.append(f"| `{path.parent.name}` | {millions} | {last['step']} | {last['tau']:.2f} | {levels} |")
    text = (lvlm_decode_data.HERE / "heads" / "README.md").read_text(encoding="utf-8")
    written = text.split("<!-- heads -->\n")[1].split("<!-- /heads -->")[0]
    assert written == "\n".join(lines) + "\n", "\n".join(lines)


class StubProcessor:
    """The processor's call for the tiny random models."""

    chat_template = None

    def __init__(self, tiny):
        self.tiny, self.tokenizer = tiny, tiny.tokenizer

    def __call__(self, text, return_tensors, images=None):
        return self.tiny.inputs([text], images=0 if images is None else 1, seed=len(text))


@pytest.mark.parametrize("family", ["llava", "instructblip", "llava_next", "qwen2_5_vl"])
def test_features_of_a_batch_are_those_of_each_sample_alone(family, tmp_path, monkeypatch):
    tiny = zoo.tiny(family)
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", zoo.EOS)
    # A random model also says placeholders.
    monkeypatch.setattr(tiny.model.generation_config, "suppress_tokens", [156, 157, 158, 159])
    target = Target(tiny.model, StubProcessor(tiny))
    settings = Settings("", tmp_path, kind="vispec", max_new_tokens=6, temperature=0.0)
    items = [TrainingItem(prompt, load=lambda: "picture") for prompt in ("is it", "what is it")]
    items[1].answer = "a cat"
    target.complete(items, settings)
    assert all(len(item.ids) > item.start for item in items) and items[1].ids[-1] == zoo.EOS
    both = target.features(items)
    for row, item in enumerate(items):
        alone = target.features([item])
        seen = both["mask"][row]
        assert int(seen.sum()) == len(item.ids) and int(both["answer"][row].sum()) == len(item.ids) - item.start
        assert both["image"][row].any()
        for name in ("hidden", "embeds"):
            torch.testing.assert_close(both[name][row][seen], alone[name][0], atol=1e-4, rtol=1e-4)
    # Greedy answers are what plain generate() gives, and the head's objective takes the batch.
    inputs = target.inputs(items[0])
    out = tiny.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist()
    assert out[: len(items[0].ids)] == items[0].ids
    head = DraftHead(HeadConfig.for_target(tiny.model, "vispec", rows=4, depth=2, top_k=1))
    assert Objective(head, tiny.model.get_output_embeddings(), settings)(both, True)["loss"].isfinite()
    assert acceptance(target, head, items, settings).cycles > 0


@pytest.mark.full
def test_everything_that_waits_for_a_gpu_runs_at_small_shapes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    report = script("gpu/run").main(["--tiny", "--output", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == report
    parts = report["parts"]
    assert list(parts) == ["device", "waits", "shapes", "generate", "profile", "compiled"]
    assert not [part["error"] for part in parts.values() if "error" in part]
    assert all(parts["device"]["same_tokens"].values()) and set(KINDS) <= set(parts["device"]["same_tokens"])
    assert all(row["token_s"][0] > 0 for row in parts["generate"]["arms"].values())
    # Drafts that are right as often as was asked are accepted.
    assert parts["generate"]["arms"]["vcd, replayed 0.8"]["tau"] > 0.5
    assert all(found["device_ms"] > 0 for name, found in parts["profile"].items() if name != "seconds")
    assert parts["waits"]["vcd"]["more_steps"] == 5 and parts["compiled"]["vcd"]["token_s"]

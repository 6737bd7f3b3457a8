"""``lvlm-decode bench``: what it measures, how it pairs, and what it counts as memory."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

import lvlm_decode_data
from lvlm_decode.bench.commands import bench
from lvlm_decode.bench.memory import peak_bytes
from lvlm_decode.bench.methods import (
    APART,
    BEAMS,
    PLAIN,
    PRODUCTS,
    ROWS,
    arms_of,
    every,
    measured,
    method_for,
    needed,
    summary,
)
from lvlm_decode.bench.paired import Arm, Measured, measure, repeated
from lvlm_decode.bench.workloads import loaded, prompts, random_llava
from lvlm_decode.errors import InputError
from lvlm_decode.methods import METHODS, parse
from lvlm_decode_evals.runner import loaded_of


@pytest.fixture(scope="module")
def small():
    try:
        lvlm_decode_data.tiny_path("tiny-llava")
    except FileNotFoundError as error:
        pytest.skip(f"the small LLaVA is not here: {error}")
    return loaded("tiny")


def test_peak_memory_is_the_most_that_is_held_at_once():
    kib = 1 << 18  # float32 numbers of a mebibyte
    kept = torch.zeros(kib)

    def run():
        one, two = torch.zeros(kib), torch.zeros(2 * kib)
        del two
        three = torch.zeros(kib)
        return one, three, kept

    found = peak_bytes(run, torch.device("cpu")) / 2**20
    assert 3.0 <= found < 3.1, "what was held before does not count, and what was released does not add up"

    def inside():
        # 256 rows of scores for each of 4 heads exist inside of this operator alone.
        return (torch.rand(4, 256, 8) @ torch.rand(4, 8, 256)).softmax(-1).sum()

    assert peak_bytes(inside, torch.device("cpu")) >= 2 * 4 * 256 * 256 * 4


@pytest.mark.parametrize("asked", [100, 400])
def test_prompts_have_the_length_that_was_asked_for(small, asked):
    inputs = prompts(small, 3, asked)
    sentence = prompts(small, 1, asked + 20)["input_ids"].shape[1] - inputs["input_ids"].shape[1]
    assert abs(inputs["input_ids"].shape[1] - asked) <= sentence <= 20
    assert inputs["input_ids"].shape[0] == inputs["pixel_values"].shape[0] == 3 and bool(inputs["attention_mask"].all())
    with pytest.raises(
        InputError, match=r"prompts of 9 tokens were asked for, and one with its image has \d+; ask for more"
    ):
        prompts(small, 1, 9)


def test_drawn_weights_read_the_prompts_of_the_small_model(small):
    model = random_llava(small.model, hidden=64, layers=2, words=1500)
    other = loaded_of(model, small.processor, "drawn")
    (row,) = measured(other, ["icd"], batches=[1], lengths=[100], tokens=3, rounds=1, memory=False)
    assert row["arms"]["method"]["ms_per_token"]["median"] > 0 and model.get_output_embeddings().weight.shape == (
        1500,
        64,
    )


def test_arms_are_those_that_the_method_calls_for():
    assert set(arms_of(parse("dola"), 1)) == {PLAIN, "method"}
    arms = arms_of(parse("vcd+ritual"), 3)
    assert set(arms) == {PLAIN, "method", APART, ROWS} and arms[ROWS] == Arm(copies=3)
    assert arms[APART].execution == "sequential"
    assert arms_of(parse("opera", num_beams=4), 1)[BEAMS].options == {"num_beams": 4}


#: Per method the rows of a sample, and what a step runs beside their forward: head calls, and further modules.
NEEDED = {
    "plain": (1, 0, 0),
    "vcd": (2, 0, 0),
    "dola": (1, 1, 0),
    "deco": (1, 1, 1),
    "cai": (1, 1, 1),
    "only": (1, 1, 8),
}


@pytest.mark.parametrize("name", NEEDED)
def test_products_that_a_method_adds_to_a_step_are_found_and_run(small, name):
    rows, heads, others = NEEDED[name]
    inputs, head = prompts(small, 2, 100), small.model.get_output_embeddings()
    found, products = needed(small, method_for(name, small.model), inputs)
    assert found == rows and sum(product.module is head for product in products) == heads
    assert len(products) == heads + others
    assert all(product.shape[-3:-1] == (2, 1) for product in products), "one position of two samples, in each layer"
    if not products:
        return
    arm = arms_of(parse(name), rows, products)[PRODUCTS]
    calls = []
    forward = head.forward
    head.forward = lambda states: (calls.append(tuple(states.shape)), forward(states))[1]
    try:
        # The product's forward is looked up once, before the call.
        measure(small.model, small.processor, [inputs], {"arm": arm}, max_new_tokens=3, rounds=1)
    finally:
        del head.forward
    shapes = [product.shape for product in products if product.module is head]
    assert [shape for shape in calls if len(shape) == len(shapes[0])].count(shapes[0]) >= 6, "three tokens, two rounds"


def test_products_are_not_told_of_rows_that_need_several_forwards(small):
    assert needed(small, method_for("lol", small.model), prompts(small, 1, 100)) == (3, [])


def test_every_method_can_be_made_without_a_trained_part(small):
    assert every() == list(METHODS)
    for name in every():
        assert method_for(name, small.model).name == name


def test_copies_are_rows_of_the_same_call(small):
    inputs = prompts(small, 2, 100)
    four = repeated(inputs, 2)
    assert {key: len(value) for key, value in four.items()} == {key: 4 for key in inputs}
    arms = {"one": Arm(), "two": Arm(copies=2)}
    results = measure(small.model, small.processor, [inputs], arms, max_new_tokens=3, rounds=1)
    (one,), (two,) = results["one"].answers, results["two"].answers
    assert two == one + one, "the same answers twice"


def test_the_first_token_is_timed_inside_the_call(small):
    ticks = iter(range(1000))
    results = measure(
        small.model,
        small.processor,
        [prompts(small, 2, 100)],
        {"plain": Arm(), "vcd": Arm(parse("vcd"))},
        max_new_tokens=4,
        rounds=2,
        clock=lambda: float(next(ticks)),
    )
    # Beginning, first token, end: three readings of a call, whatever the method.
    for result in results.values():
        assert result.seconds == [[2.0], [2.0]] and result.firsts == [[1.0], [1.0]]
        assert result.per_token(decode_only=True) == [1 / 3] * 2


def test_ratios_are_paired_and_have_quartiles():
    def of(seconds, firsts):
        return Measured([[[1] * 5]], [[s] for s in seconds], [[f] for f in firsts])

    results = {PLAIN: of([5.0, 9.0, 14.0], [1.0, 1.0, 2.0]), "method": of([9.0, 17.0, 8.0], [1.0, 1.0, 2.0])}
    found = summary(results, {PLAIN: 100, "method": 150})
    # Decoding took 4, 8, 12 and 8, 16, 6 seconds for four tokens.
    assert found["method"]["ms_per_token"]["median"] == 2000 and found[PLAIN]["ms_per_token"]["median"] == 2000
    assert found[PLAIN]["method_to_this"]["per_token"] == {"median": 2.0, "low": 1.25, "high": 2.0}
    assert found[PLAIN]["method_to_this"]["first"]["median"] == 1.0 and found[PLAIN]["method_to_this"]["peak"] == 1.5
    search = {PLAIN: results[PLAIN], "method": of([10.0, 18.0, 28.0], [math.nan] * 3)}
    found = summary(search, {})
    assert found["method"]["first_ms"] is None and found[PLAIN]["method_to_this"]["first"] is None
    assert found[PLAIN]["method_to_this"]["per_token"]["median"] == 2.0, "the whole calls"


def test_the_command_writes_a_record_and_its_table(small, tmp_path):
    path = tmp_path / "out.json"
    given = [
        "methods",
        "--method",
        "vcd",
        "--method",
        "scmoe",
        "--method",
        "vcd(alpha=0)",
        "--batch",
        "1",
        "--prompt",
        "100",
    ]
    result = CliRunner().invoke(bench, [*given, "--tokens", "3", "--rounds", "1", "--output", str(path)])
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    one, refused, off = record["rows"]
    assert "scmoe needs a decoder with a mixture of experts" in refused["refused"]
    assert set(one["arms"]) == {PLAIN, "method", APART, ROWS} and set(off["arms"]) == {PLAIN, "method"}
    arms = one["arms"]
    assert arms["method"]["peak_bytes"] > arms[PLAIN]["peak_bytes"] > 0 and record["model_bytes"] > 0
    assert off["arms"]["method"]["peak_bytes"] == pytest.approx(off["arms"][PLAIN]["peak_bytes"], rel=0.02)
    assert len(one["raw"]["method"]["seconds"]) == 1 and record["circumstances"]["versions"]["torch"]
    lines = path.with_suffix(".md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| vcd")]) == 2
    # The same once more goes on: what is there is kept, and what is not is measured.
    more = [*given, "--method", "plain", "--tokens", "3", "--rounds", "1", "--no-memory", "--output", str(path)]
    assert CliRunner().invoke(bench, more).exit_code == 0
    again = json.loads(path.read_text())["rows"]
    assert again[:3] == record["rows"] and [row["method"] for row in again[3:]] == ["plain"]
    assert again[3]["commit"] and len(again[3]["load_average"]) == 3


def test_the_runner_and_the_loop_give_the_same_answers(small, tmp_path):
    path = tmp_path / "questions.json"
    given = ["questions", "--count", "6", "--batch", "3", "--rounds", "1", "--method", "plain", "--output", str(path)]
    result = CliRunner().invoke(bench, given)
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    assert record["other_answers"] == 0 and record["questions_per_second"]["runner"]["median"] > 0
    assert "6 questions of POPE" in result.output and "the runner is" in result.output

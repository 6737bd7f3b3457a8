"""The price of a method: figures of several benchmarks side by side, and a sentence where one is paid with another."""

import csv
import json
from dataclasses import replace

import pytest
from runs import IMAGES, SAMPLE, captions, cli, naturalbench, pope, result

from lvlm_decode_evals import evaluator
from lvlm_decode_evals.base import Answer
from lvlm_decode_evals.plan import TIMES
from lvlm_decode_evals.price import lines, price_blocks, trade
from lvlm_decode_evals.tables import blocks, equal_length_values, gather, render


def test_a_gain_paid_for_in_ability_is_said_in_one_line():
    results = [pope("plain", 10), pope("vcd", 30), naturalbench("plain", 30), naturalbench("vcd", 10)]
    (line,) = lines(results, 200)
    assert trade(line) == (
        "vcd, greedy against plain, greedy: better in pope random: Accuracy +50.0; worse in naturalbench: gAcc -50.0."
    )
    (block,) = price_blocks(results, 200)
    assert [title for title in block.columns if "Δ" in title] == [
        "Δ pope random: Accuracy ↑", "Δ naturalbench: gAcc ↑"]  # fmt: skip
    assert trade(line) in block.notes and "ability" not in " ".join(block.notes)


@pytest.mark.parametrize(("right", "groups"), [(30, 30), (30, 40), (10, 10), (11, 29)])
def test_no_line_without_a_gain_and_a_loss_beyond_their_intervals(right, groups):
    results = [pope("plain", 10), pope("vcd", right), naturalbench("plain", 30), naturalbench("vcd", groups)]
    assert trade(lines(results, 200)[0]) is None


def test_shorter_captions_are_named_with_the_gain_at_equal_length():
    long = "A dog and a cat in a room with many small things on the floor beside a car."
    results = [captions("plain", long), captions("pai", "A dog and a cat.")]
    (line,) = lines(results, 200)
    said = trade(line)
    assert (
        "better in chair: CHAIRs -100.0; captions are 13.0 tokens shorter, and at equal length CHAIRs is +0.0" in said
    )
    # Losing what is there is a loss as well.
    (line,) = lines([captions("plain", long), captions("pai", "A dog and so on, with many words to fill a line.")], 200)
    assert "Recall -50.0" in trade(line)
    assert "lvlm-decode eval naturalbench" in render(price_blocks(results, 200))


def half(even, odd):
    """Captions of every image, by turns."""
    return [Answer(i, odd if i % 2 else even, image=str(i), label=["dog", "cat"]) for i in range(IMAGES)]


def test_a_rate_beside_the_first_that_falls_is_a_loss_too():
    plain = captions("plain", "A dog, a dog, a dog, a dog, a dog, a cat, a cat and a car.")
    said = half("A car, a car, a car, a car, a car, a dog, a dog, a cat.", "A dog and a cat with nothing else at all.")
    (line,) = lines([plain, result("chair", "captions", "x", said)], 200)
    assert "better in chair: CHAIRs -50.0; worse in chair: CHAIRi +37.5" in trade(line)
    # Where the first says it, the others do not repeat it.
    (line,) = lines([captions("plain", "A dog."), captions("x", "A dog and a cat and a car.")], 200)
    assert trade(line).endswith("better in Recall +50.0; worse in chair: CHAIRs +100.0.")

    def asked(method, present, absent):
        given = [Answer(2 * i, "Yes" if i < present else "No", image=str(i), label="yes") for i in range(IMAGES)]
        given += [Answer(2 * i + 1, "No" if i < absent else "Yes", image=str(i), label="no") for i in range(IMAGES)]
        return result("pope", "random", method, given)

    (line,) = lines([asked("plain", IMAGES, 10), asked("x", IMAGES // 2, IMAGES)], 200)
    assert trade(line).endswith("Accuracy +12.5; worse in pope random: Recall -50.0.")
    assert [f.title for f in line.differences] == ["pope random: Accuracy"]


def test_a_gain_that_stays_at_equal_length_is_no_cost_and_one_that_goes_is():
    (line,) = lines(
        [captions("plain", "A car, a dog and a cat here now"), captions("x", "A dog, a dog and a cat here")], 200
    )
    assert trade(line) is None and any(f.kind == "equal" and v.starred for f, v in line.differences.items())
    long, short = "A dog and a cat on the floor in the room there with a {}.", "A dog and a cat."
    plain = result("chair", "captions", "plain", half(long.format("car"), short))
    (line,) = lines([plain, result("chair", "captions", "x", half(short, long.format("thing")))], 200)
    said = "better in chair: CHAIRs -50.0; at equal length CHAIRs is +0.0"
    assert said in trade(line) and "shorter" not in trade(line)


def test_a_split_of_another_kind_of_question_has_a_figure_of_its_own():
    def answers(right):
        meta = {"type": "discriminative-hallucination"}
        return [
            Answer(f"{i}/0", "No" if i < right else "Yes", image=str(i), label="no", meta=meta) for i in range(IMAGES)
        ]

    runs = [result("amber", "discriminative", method, answers(right)) for method, right in (("plain", 10), ("x", 35))]
    (line,) = lines(runs, 200)
    assert [figure.title for figure in line.differences] == ["amber discriminative: Accuracy"]


def test_captions_of_several_seeds_are_cut_seed_by_seed():
    """Each pair by itself: a run with short captions shortens no other seed's."""
    texts = {
        0: ("A dog and so on and so on and a car.", "A dog and so on and so on and a cat."),
        1: ("A dog.", "A dog."),
    }
    runs = {
        method: [replace(captions(method, texts[seed][place], decoding=SAMPLE), seed=seed) for seed in texts]
        for place, method in enumerate(("plain", "x"))
    }
    methods = next(iter(gather([*runs["plain"], *runs["x"]]).values()))
    plain, other = sorted(methods, key=lambda entry: entry.name != "plain")
    value, *_ = equal_length_values(other.results[0].evaluator, other, plain, 200)
    assert value.value == -0.5


def test_a_method_without_any_control_is_told(tmp_path):
    (block,) = blocks([pope("vcd", 30)], 200)
    assert any("vcd, greedy lacks its matched controls" in note for note in block.notes)


def test_a_run_of_a_protocol_that_is_scored_otherwise_says_so():
    def run(**options):
        made = captions("plain", "A dog.", protocol="opera-64", scoring={"unfinished": "drop"})
        return replace(made, evaluator=evaluator("chair", **options))

    (drop,), (keep,) = blocks([run(unfinished="drop")], 200), blocks([run(unfinished="keep")], 200)
    assert (drop.protocol, keep.protocol) == ("opera-64", "opera-64, scored with unfinished keep")


def test_captions_of_two_protocols_share_no_figure():
    long = "A dog and a cat in a room with many small things on the floor beside a car."

    def runs(short, **options):
        return [captions("plain", long, **options), captions("pai", short, **options)]

    results = [*runs("A dog and a cat."), *runs("A dog, a car.", data={"questions": "of the other"})]
    (line,) = lines(results, 200)
    for kind, key in (("hallucination", "chair_s"), ("equal", "chair_s"), ("caption", "recall"), ("caption", "length")):
        assert len({f.title for f in line.differences if (f.kind, f.column.key) == (kind, key)}) == 2, (kind, key)
    recall = {figure.of: value.value for figure, value in line.differences.items() if figure.column.key == "recall"}
    assert sorted(recall.values()) == [-0.5, 0]
    # Only where captions hallucinate less is it said that they are shorter.
    assert trade(line).count("tokens shorter") == 1


def test_columns_name_their_protocols_where_two_meet(tmp_path):
    long = "A dog and a cat in a room with many small things on the floor beside a car."
    results = []
    for protocol, tokens in (("opera-64", 20), ("opera-512", 60)):
        for method, milliseconds in (("plain", 4), ("pai", 6)):
            folder = times(tmp_path / f"{protocol}-{method}", milliseconds, tokens)
            results.append(captions(method, long, protocol=protocol, folder=folder))
    results += [pope("plain", 10), pope("pai", 30)]
    (block,) = price_blocks(results, 200)
    assert len(block.lines) == 1
    for protocol in ("opera-64", "opera-512"):
        for title in ("CHAIRs ↓", "Recall ↑", "Length"):
            assert f"Δ chair captions, protocol {protocol}: {title}" in block.columns
    times_of = "Times are of the benchmark with the longest answers: "
    assert f"{times_of}chair captions, protocol opera-512." in block.notes
    assert not any(note.startswith("Protocol: ") for note in block.notes)
    # In CSV every number says it itself.
    lines_of = [line for line in csv.DictReader(render([block], "csv").splitlines())]
    by_column = {line["column"]: line["protocol"] for line in lines_of}
    assert by_column["Δ chair captions, protocol opera-64: Recall ↑"] == "opera-64"
    assert by_column["Δ pope random: Accuracy ↑"] == "none" and by_column["Ratio"] == "opera-512"
    # One protocol needs no name in a title.
    (block,) = price_blocks([r for r in results if r.settings.get("protocol") != "opera-64"], 200)
    assert "Δ Recall ↑" in block.columns and "Protocol: chair by opera-512." in block.notes
    # Lines of different lengths are timed on different benchmarks, and say so.
    other = [run for run in results if run.settings.get("protocol") == "opera-64"]
    other += [
        pope("vcd", 30, folder=times(tmp_path / "vcd", 9, 1)),
        pope("plain", 10, folder=times(tmp_path / "p", 8, 1)),
    ]
    (block,) = price_blocks(other, 200)
    assert f"{times_of}pai, greedy: chair; vcd, greedy: pope random." in block.notes


def test_runs_of_two_protocols_are_two_tables():
    caption = "A dog and a cat."
    results = [captions(m, caption, protocol=p) for p in ("opera-64", "opera-512") for m in ("plain", "pai")]
    made = blocks([*results, captions("plain", caption)], 200)
    assert [block.title for block in made if "minus" not in block.title] == [
        f"chair, captions, protocol {name}" for name in ("opera-64", "opera-512")] + ["chair, captions, no protocol"]  # fmt: skip
    assert {line["protocol"] for line in csv.DictReader(render(made, "csv").splitlines())} == {
        "opera-64", "opera-512", "none"}  # fmt: skip


def test_a_method_is_compared_with_the_plain_model_under_its_own_decoding():
    results = [pope("plain", 10), pope("plain", 30, decoding=SAMPLE), pope("vcd", 20, decoding=SAMPLE)]
    (line,) = lines(results, 200)
    assert line.control == "plain, sample"
    (value,) = line.differences.values()
    assert value.value == -0.25
    (line,) = lines([pope("plain", 10), pope("vcd", 20, decoding=SAMPLE)], 200)
    assert line.control == "plain, greedy"
    assert price_blocks([pope("plain", 10)], 200) == [] == price_blocks([pope("vcd", 10)], 200)


def test_mme_is_both():
    def answer(task, number, said):
        return [
            Answer(f"{task}/{number}/{k}", said, image=str(number), label=("yes", "no")[k], meta={"task": task})
            for k in (0, 1)
        ]

    def run(method, existence, colour):
        return result("mme", "all", method, [a for i in range(IMAGES) for task, said in
                      (("existence", existence), ("color", colour)) for a in answer(task, i, said)])  # fmt: skip

    mixed = run("plain", "Yes", "Yes")
    assert trade(lines([mixed, run("vcd", "Yes", "Yes")], 200)[0]) is None
    (line,) = lines([mixed, run("vcd", "Yes", "other")], 200)
    assert {figure.kind: figure.title for figure in line.differences} == {
        "ability": "mme: Color", "hallucination": "mme: Existence"}  # fmt: skip


def times(folder, milliseconds, tokens):
    folder.mkdir()
    batches = [{"answers": 2, "tokens": 2 * tokens, "seconds": 99.0}]
    batches += [{"answers": 2, "tokens": 2 * tokens, "seconds": milliseconds * 2 * tokens / 1000} for _ in range(3)]
    (folder / TIMES).write_text("".join(json.dumps(batch) + "\n" for batch in batches))
    return folder


def test_time_is_that_of_the_longest_answers_without_warming_up(tmp_path):
    results = [
        pope("plain", 10, folder=times(tmp_path / "a", 50, 1)),
        pope("vcd", 30, folder=times(tmp_path / "b", 100, 1)),
        captions("plain", "A dog.", folder=times(tmp_path / "c", 4, 60)),
        captions("vcd", "A dog.", folder=times(tmp_path / "d", 6, 60)),
    ]
    (block,) = price_blocks(results, 200)
    assert block.columns[-3:] == ("ms a token", "ms a token, control", "Ratio")
    assert [value.value for value in block.lines[0][-3:]] == pytest.approx([6, 4, 1.5])
    (block,) = price_blocks([pope("plain", 10), pope("vcd", 30)], 200)
    assert "Ratio" not in block.columns and "lvlm-decode eval --times" in block.notes[-1]
    # One batch that was timed is not enough, and that is another sentence.
    (tmp_path / "a" / TIMES).write_text('{"answers": 2, "tokens": 2, "seconds": 1.0}\n')
    (block,) = price_blocks([pope("plain", 10, folder=tmp_path / "a"), pope("vcd", 30)], 200)
    assert "Ratio" not in block.columns and block.notes[-1].startswith("Too few batches are timed")


def test_eval_records_times_only_when_told_to(tmp_path):
    arguments = ["eval", "chair", "--limit", "6", "--batch-size", "2", "--max-new-tokens", "4", "--method", "vcd"]
    arguments += ["--no-do-sample", "--out"]
    for name, more in (("without", []), ("with", ["--times"])):
        done = cli(*arguments, tmp_path / name, *more)
        assert done.exit_code == 0, done.output
    assert not list((tmp_path / "without").rglob(TIMES)) and "Ratio" in done.output
    (first, *_) = sorted((tmp_path / "with").rglob(TIMES))
    batches = [json.loads(line) for line in first.read_text().splitlines()]
    assert len(batches) == 3 and all(b["answers"] == 2 and b["tokens"] == 8 and b["seconds"] > 0 for b in batches)
    same = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("answers.jsonl")}
            for n in ("without", "with")]  # fmt: skip
    assert same[0] == same[1]

"""MMHal-Bench and VaLLu: prompts out, ratings in, from a recorded file or an endpoint (a local server here)."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lvlm_decode.errors import EvalError, FileFormatError, MissingFileError
from lvlm_decode_evals.base import Answer
from lvlm_decode_evals.commands import add_to
from lvlm_decode_evals.judges import (
    ASPECTS,
    MMHAL_TYPES,
    Endpoint,
    MMHal,
    Prompt,
    VaLLu,
    ask,
    mmhal_rating,
    read_replies,
    vallu_ratings,
    write_prompts,
)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Explanation.\nRating: 4", 4),
        ("rating: 0", 0),
        ("RATING: 6, no more", 6),
        ("Rating: 3. I repeat, rating: 3", 3),
        ("Rating: 3 or rating: 4", None),
        ("Rating: 7", None),
        ("I would say 4", None),
        ("Rating:4", None),
        ("", None),
    ],
)
def test_mmhal_rating(reply, expected):
    assert mmhal_rating(reply) == expected


def test_vallu_ratings_in_every_form():
    bare = {aspect: 4 for aspect in ASPECTS}
    nested = {aspect: {"reason": "it's fine", "score": "4"} for aspect in ASPECTS}
    capital = {aspect.capitalize(): "4/5" for aspect in ASPECTS} | {"hallucinated_phrases": []}
    for reply in (
        json.dumps(bare),
        f"```json\n{json.dumps(nested, indent=2)}\n```",
        repr(nested),
        f"Here: {json.dumps(capital)} Done.",
        "{0x" + "f" * 4000 + ": 1, " + repr(bare)[1:],
    ):
        assert vallu_ratings(reply) == bare
    for reply in (
        "",
        "no json",
        "{",
        "}{",
        "{broken}",
        json.dumps(bare | {"depth": 6}),
        json.dumps(bare | {"depth": "[score from 1 to 5]"}),
        json.dumps({aspect: 4 for aspect in ASPECTS[1:]}),
        "{[]: 1}",
        # An integer that Python reads and does not write.
        repr(bare | {"depth": "HUGE"}).replace("'HUGE'", "0x" + "f" * 4000),
        repr(bare | {"depth": "HUGE"}).replace("'HUGE'", f"[0x{'f' * 4000}]"),
    ):
        assert vallu_ratings(reply) is None


@given(st.text(max_size=80))
def test_any_reply_can_be_read(reply):
    assert mmhal_rating(reply) in (None, *range(7))
    assert vallu_ratings("{" + reply + "}") is None


@pytest.fixture
def mmhal_file(tmp_path):
    records = [
        {
            "question_type": kind,
            "image_id": f"image{i}",
            "image_content": ["Cup", "Dog"],
            "question": f"What {{is}} it, {i}?",
            "gt_answer": "A dog.",
            "model_answer": f"Answer {i}",
        }
        for i, kind in enumerate(MMHAL_TYPES)
    ]
    path = tmp_path / "response.json"
    path.write_text(json.dumps(records))
    return path


def write_replies(path, replies):
    path.write_text("".join(json.dumps({"id": str(i), "reply": reply}) + "\n" for i, reply in enumerate(replies)))
    return path


def test_mmhal_from_recorded_replies(mmhal_file, tmp_path):
    replies = write_replies(tmp_path / "replies.jsonl", [f"Rating: {i}" for i in range(7)] + ["cannot say"])
    scorer = MMHal(judge=str(replies))
    answers = scorer.read_answers(mmhal_file)
    rows = scorer.rows(answers)
    summary = scorer.summary(rows)
    assert summary["score"] == 21 / 8 and summary["hallucination"] == 4 / 8 and summary["unrated"] == 1
    assert summary["attribute"] == 0 and summary["holistic"] == 6 and summary["other"] == 0
    assert [row.correct for row in rows] == [False] * 3 + [True] * 4 + [False]
    assert rows[3].evidence["reply"] == "Rating: 3"
    prompt = scorer.prompt(answers[2]).text
    for part in ("Cup, Dog", "What {is} it, 2?", "A dog.", "Answer 2", "Rating: N"):
        assert part in prompt


def test_mmhal_types_by_position_where_the_file_has_none(mmhal_file):
    records = json.loads(mmhal_file.read_text())
    for record in records:
        del record["question_type"]
    records += [dict(record) for record in records]
    mmhal_file.write_text(json.dumps(records))
    answers = MMHal().read_answers(mmhal_file)
    assert [answer.meta["type"] for answer in answers] == [*MMHAL_TYPES, *MMHAL_TYPES]
    del records[1]["gt_answer"]
    mmhal_file.write_text(json.dumps(records))
    with pytest.raises(FileFormatError, match="entry 2: field 'gt_answer' is missing"):
        MMHal().read_answers(mmhal_file)


def test_without_a_judge_and_with_missing_replies(mmhal_file, tmp_path):
    answers = MMHal().read_answers(mmhal_file)
    with pytest.raises(EvalError, match="graded by a judge: `lvlm-decode data prompts mmhal"):
        MMHal().rows(answers)
    replies = write_replies(tmp_path / "replies.jsonl", ["Rating: 1"] * 7)
    with pytest.raises(EvalError, match="no reply for 1 answers \\(the first is 7\\)"):
        MMHal(judge=str(replies)).rows(answers)
    with open(replies, "a") as file:
        file.write('{"id": "0", "reply": "Rating: 2"}\n')
    with pytest.raises(FileFormatError, match="line 8: a second reply for id 0"):
        read_replies(replies)
    with pytest.raises(EvalError, match="must be kept"):
        MMHal(judge="http://127.0.0.1:1").rows(answers)


def test_questions_of_a_run_and_its_answers(mmhal_file, tmp_path):
    (questions,) = MMHal().file_questions(mmhal_file).values()
    assert questions[3].image == "image3" and questions[3].meta["type"] == "counting"
    own = tmp_path / "answers.jsonl"
    own.write_text("".join(json.dumps(Answer.to(q, f"Answer {q.id}").record()) + "\n" for q in questions))
    assert MMHal().prompts(MMHal().read_answers(own)) == MMHal().prompts(MMHal().read_answers(mmhal_file))
    vallu = tmp_path / "vallu.jsonl"
    vallu.write_text('{"question_id": 1, "prompt": "<image>\\nWhat?", "image": "a.png"}')
    (questions,) = VaLLu().file_questions(vallu).values()
    assert (questions[0].id, questions[0].text, questions[0].image) == (1, "What?", "a.png")


def test_the_authors_templates(mmhal_file, tmp_path):
    answer = MMHal().read_answers(mmhal_file)[0]
    template = tmp_path / "template.txt"
    template.write_text("A {} B {} C {} D {}")
    assert MMHal(template=str(template)).prompt(answer).text == "A Cup, Dog B What {is} it, 0? C A dog. D Answer 0"
    template.write_text("{answer}: {gold}")
    assert MMHal(template=str(template)).prompt(answer).text == "Answer 0: A dog."
    for wrong in ("{nothing}", "{} {} {} {} {}", "{"):
        template.write_text(wrong)
        with pytest.raises(FileFormatError, match="fields must be"):
            MMHal(template=str(template)).prompt(answer)


def test_vallu_means_leave_unreadable_replies_out(tmp_path):
    path = tmp_path / "answers.jsonl"
    records = [{"question_id": i, "prompt": "<image>\nWhat?", "image": "a.png", "text": "A dog."} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, records)))
    good = dict(zip(ASPECTS, (5, 4, 3, 2, 1)))
    replies = [json.dumps(good), json.dumps(good | {"correctness": 5}), "sorry"]
    scorer = VaLLu(judge=str(write_replies(tmp_path / "replies.jsonl", replies)))
    answers = scorer.read_answers(path)
    rows = scorer.rows(answers)
    summary = scorer.summary(rows)
    assert summary["correctness"] == 4 and summary["helpfulness"] == 5 and summary["engagement"] == 1
    assert (summary["rated"], summary["unrated"], summary["n"]) == (2, 1, 3)
    assert [row.correct for row in rows] == [False, True, None]
    assert "Question: What?" in scorer.prompt(answers[0]).text and scorer.prompt(answers[0]).image is None
    with pytest.raises(MissingFileError, match=r"a\.png of answer 0"):
        VaLLu(images=str(tmp_path)).prompt(answers[0])


def test_commands_write_prompts_and_score_replies(mmhal_file, tmp_path):
    app = typer.Typer()
    add_to(app)

    def command(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    result = command("data", "prompts", "mmhal", mmhal_file, tmp_path / "prompts.jsonl")
    assert result.exit_code == 0, result.output
    prompts = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [prompt["id"] for prompt in prompts] == [str(i) for i in range(8)]
    replies = write_replies(tmp_path / "replies.jsonl", ["Rating: 5"] * 8)
    result = command("score", "mmhal", mmhal_file, "-o", f"judge={replies}", "--json")
    assert json.loads(result.stdout)["score"] == 5
    result = command("data", "prompts", "pope", mmhal_file, tmp_path / "prompts.jsonl")
    assert result.exit_code == 1 and "needs no judge" in result.stderr


# The endpoint ------------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """A chat endpoint that answers what it is told to, and remembers what it was asked."""
    asked, answers = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, dict(self.headers), body))
            status, content = answers.pop(0) if answers else (200, "Rating: 4")
            if status == 200 and isinstance(content, str):
                content = {"choices": [{"message": {"content": content}}]}
            payload = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *arguments):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_address[1]}/v1", asked, answers
    served.shutdown()
    served.server_close()


def test_endpoint_is_asked_once_for_each_prompt(server, mmhal_file, tmp_path, monkeypatch):
    url, asked, _ = server
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    kept = tmp_path / "kept.jsonl"
    scorer = MMHal(judge=url, judge_model="judge-1", replies=str(kept))
    answers = scorer.read_answers(mmhal_file)
    assert scorer.summary(scorer.rows(answers))["score"] == 4
    path, headers, body = asked[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer key"
    assert body["model"] == "judge-1" and body["temperature"] == 0
    assert body["messages"] == [{"role": "user", "content": scorer.prompt(answers[0]).text}]
    assert len(asked) == 8
    scorer.rows(answers)
    assert len(asked) == 8, "kept replies are not asked for again"
    changed = [Answer(answers[0].question_id, "Another answer", label="x"), *answers[1:]]
    scorer.rows(changed)
    assert len(asked) == 9, "another answer under the same id is judged anew"


def test_endpoint_shows_images(server, tmp_path):
    url, asked, _ = server
    image = tmp_path / "a.png"
    image.write_bytes(b"not really")
    Endpoint(url, "m")(Prompt("1", "Look", image))
    text, shown = asked[0][2]["messages"][0]["content"]
    assert text == {"type": "text", "text": "Look"}
    assert shown["image_url"]["url"] == "data:image/png;base64,bm90IHJlYWxseQ=="


def test_endpoint_tries_again_and_then_says_what_happened(server, tmp_path):
    url, asked, answers = server
    judge = Endpoint(url, "m", pause=0)
    answers += [(503, "busy"), (429, "slow down"), (200, "fine")]
    assert judge(Prompt("1", "x")) == "fine" and len(asked) == 3
    answers += [(500, "broken")] * 3
    with pytest.raises(EvalError, match=r"did not answer prompt 2 \(500"):
        judge(Prompt("2", "x"))
    asked.clear()
    answers.append((401, "bad key"))
    with pytest.raises(EvalError, match=r"401.*bad key"):
        judge(Prompt("3", "x"))
    assert len(asked) == 1, "a refusal is not repeated"
    answers.append((200, {"error": "none"}))
    with pytest.raises(EvalError, match="no form of chat completion"):
        judge(Prompt("4", "x"))
    with pytest.raises(EvalError, match="did not answer prompt 5"):
        Endpoint("http://127.0.0.1:1/v1", "m", pause=0, timeout=2)(Prompt("5", "x"))


def test_replies_fetched_before_a_failure_are_kept(server, tmp_path):
    url, asked, answers = server
    record = tmp_path / "kept.jsonl"
    answers += [(200, "one"), (401, "stop")]
    prompts = [Prompt("1", "a"), Prompt("2", "b")]
    with pytest.raises(EvalError, match="prompt 2"):
        ask(prompts, Endpoint(url, "m"), record)
    assert ask(prompts, Endpoint(url, "m"), record) == {"1": "one", "2": "Rating: 4"}
    assert len(asked) == 3


def test_prompts_name_their_image(tmp_path):
    write_prompts(tmp_path / "p.jsonl", [Prompt("1", "a", tmp_path / "a.jpg"), Prompt("2", "b")])
    first, second = map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())
    assert first == {"id": "1", "prompt": "a", "image": str(tmp_path / "a.jpg")} and second == {
        "id": "2",
        "prompt": "b",
    }

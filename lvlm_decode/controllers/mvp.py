"""MVP: multi-view multi-path certainty, "Look, Compare, Decide" (Qu et al., COLING 2025; arXiv 2408.17150).

For questions with a closed set of answers. The image is captioned from three points of view; the question is asked under each
caption; from each, the likeliest first tokens start paths. An answer collects the certainty of all paths that reach it:

    S(y) = sum over views v, paths i that say y:   weight_v * p(first token_i) * (p_top1 - p_top2 where the path says y)

A path whose first token is the answer counts with p(first token) alone in the authors' code (``form="code"``), with its
margin like any other in the paper's formula (``form="paper"``). The released code does not run; this follows the description
and the settings in it. In the code a path that says none of the answers counts for "Yes" and a tie is "No"; here such a path
counts for nothing and a tie is the first answer. The code takes margins after the temperature that paths are drawn with; here
they are those of the model's own distribution.
Captions belong to the image: questions about the same image share them, within a batch and from call to call.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.generation import GenerateDecoderOnlyOutput

from ..engine import sampling
from ..engine.prompts import asking, question_of
from .base import Controller, Limits, pad_answers, seed_of
from .rows import Rows, write

if TYPE_CHECKING:
    from ..engine.hf import Call
    from ..engine.run import Run
    from ..engine.samples import Sample

#: Captions kept from call to call, in images.
REMEMBERED = 4096


@dataclass(frozen=True)
class MVP(Controller):
    """Takes the answer that several captions and several paths are most certain of.

    What ``generate()`` returns is the path that contributed most to the answer, up to the answer's word. Where no path says
    one, it is the likeliest path of the heaviest view.

    Args:
        answers: Words that an answer can be, in lower case.
        bottom_up: Request for the caption that goes from details to the whole; the wording is this library's own.
        top_down: Request for the caption that goes from the whole to details; the wording is this library's own.
        regular: Request for a plain caption, as the authors ask.
        weights: Weights of the three views, at least 0.
        caption_temperature: Sampling temperature of the captions, above 0.
        caption_top_p: Nucleus of the captions, in (0, 1].
        caption_tokens: Maximum length of a caption in tokens, at least 1.
        prompt: The question under a caption, with ``{caption}`` and ``{question}``.
        lower: Whether the question is put in lower case, as in the authors' code.
        paths: Number of first tokens tried per view, at least 1; 3 in the authors' POPE setting.
        min_probability: First tokens that are less probable than this start no path.
        path_temperature: Sampling temperature of the paths, above 0.
        path_tokens: Maximum length of a path after its first token, at least 1.
        form: How a path that begins with the answer counts: as in the authors' ``code`` or as in the ``paper``.
    """

    name: ClassVar[str] = "mvp"
    paper: ClassVar[str] = "Look, Compare, Decide: Multi-View Multi-Path Reasoning (Qu et al., COLING 2025)"
    arxiv: ClassVar[str] = "2408.17150"
    aliases: ClassVar[dict[str, str]] = {"topk": "paths"}
    costs: ClassVar[tuple[str, ...]] = ("captions", "search")
    refuses: ClassVar[dict[str, str]] = {
        "sample": "it draws captions and paths by its own temperatures; pass do_sample=False.",
        "beam": "its paths take the place of beams; leave out num_beams.",
        "stream": "the answer is known when all paths have ended; leave the streamer out.",
        "static": "its paths branch in a cache that grows and shrinks; leave out cache_implementation.",
        "speculation": "it compares distributions under several prompts; leave the drafter out.",
        "returns": "it answers once, with what is most certain; leave out num_return_sequences.",
        "sum": "it answers other prompts, which the views of a method do not follow.",
        "processor": "a processor cannot change the prompt; use attach(model, MVP()).",
    }

    answers: tuple[str, ...] = ("yes", "no")
    bottom_up: str = (
        "Go through the image systematically, region by region and down to small details, and describe everything that "
        "you see in detail."
    )
    top_down: str = (
        "Look at the overall scene first: the place, the theme, what is going on. Then describe what it contains."
    )
    regular: str = "Describe this image in details."
    weights: tuple[float, ...] = (0.4, 0.4, 0.2)
    caption_temperature: float = 0.7
    caption_top_p: float = 0.95
    caption_tokens: int = 512
    prompt: str = "Here is the caption of the image:\n{caption}\nQuestion: {question}"
    lower: bool = True
    paths: int = 3
    min_probability: float = 0.001
    path_temperature: float = 0.7
    path_tokens: int = 50
    form: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        self.check(len(self.answers) >= 2, "answers", "two words or more")
        self.check(
            len(self.weights) == 3 and min(self.weights) >= 0 < max(self.weights), "weights", "three, at least 0"
        )
        for name in ("caption_temperature", "path_temperature"):
            self.check(getattr(self, name) > 0, name, "greater than 0")
        for name in ("caption_tokens", "path_tokens", "paths"):
            self.check(getattr(self, name) >= 1, name, "at least 1")
        self.check(0 < self.caption_top_p <= 1, "caption_top_p", "in (0, 1]")
        self.check(
            "{caption}" in self.prompt and "{question}" in self.prompt, "prompt", "a text with {caption} and {question}"
        )
        self.check(self.form in ("code", "paper"), "form", "'code' or 'paper'")

    def decode(self, run: Run, call: Call) -> Any:
        self.check_search(call, "an answer is put together from many paths")
        input_ids, limits, trace = call.input_ids, Limits.of(run, call), run.trace
        samples, seed = run.samples[0], seed_of(run, call)
        with torch.no_grad():
            trace.captions = captions_of(self, run, samples, seed, limits.eos)
            compared = compare(self, run, input_ids, list(call.processors), limits, seed)
        trace.certainties = [certainty for certainty, _ in compared]
        answers = []
        for _, tokens in compared:
            tokens = tokens[: limits.new_tokens]
            if limits.eos and len(tokens) < limits.new_tokens and tokens[-1] not in limits.eos:
                tokens = [*tokens, limits.eos[0]]
            answers.append(torch.tensor(tokens, dtype=torch.long, device=input_ids.device))
        sequences = pad_answers(input_ids, answers, limits.pad)
        if call.config.return_dict_in_generate:
            # Hugging Face's annotation asks for a LongTensor, which no tensor is to a checker.
            found: Any = sequences
            return GenerateDecoderOnlyOutput(sequences=found)
        return sequences


def captions_of(method: MVP, run: Run, samples: Sequence[Sample], seed: int, ends: Sequence[int]) -> list[list[str]]:
    """The three captions of every sample's image; drawn once per image."""
    memory = run.memory
    prompts = (method.bottom_up, method.top_down, method.regular)
    # Without a seed of the caller's any draw of the captions is as good as another, so those that are there serve.
    how = (prompts, method.caption_temperature, method.caption_top_p, method.caption_tokens, run.seed, tuple(ends))
    keys = [sample.image_key for sample in samples]
    new = {key: sample for key, sample in zip(keys, samples) if ("mvp", key, how) not in memory}
    if new:
        asked = [asking(sample, prompt) for sample in new.values() for prompt in prompts]
        ids = [(key, "mvp caption", view) for key in new for view in range(len(prompts))]
        drawn = _draw_captions(method, run, asked, ids, seed, ends)
        for number, key in enumerate(new):
            memory[("mvp", key, how)] = drawn[number * len(prompts) : (number + 1) * len(prompts)]
    found = [memory[("mvp", key, how)] for key in keys]
    while len(memory) > REMEMBERED:
        memory.pop(next(iter(memory)))
    return found


def _draw_captions(
    method: MVP, run: Run, asked: list[Sample], ids: list[Any], seed: int, ends: Sequence[int]
) -> list[str]:
    rows = Rows(run.batch.prepare(run.batch.resolve(asked)), run.family.pad_token_id)
    warpers = [TemperatureLogitsWarper(method.caption_temperature), TopPLogitsWarper(method.caption_top_p)]

    def choose(logits: Tensor, live: list[int], position: int) -> list[int]:
        # An image placeholder in the caption would need image features, so it is dropped.
        logits = logits.clone()
        logits[:, list(run.family.placeholder_ids.values())] = float("-inf")
        for warper in warpers:
            logits = warper(None, logits)
        return _draw(logits, [ids[row] for row in live], position, seed)

    texts = write(rows, method.caption_tokens, ends, choose)
    run.trace.forwards += rows.forwards
    tokenizer = asked[0].tokenizer
    return [tokenizer.decode(text, skip_special_tokens=True).strip() for text in texts]


def _draw(scores: Tensor, ids: Sequence[Any], position: int, seed: int) -> list[int]:
    """A token per row of ``scores`` (n, N), keyed by (seed, id, position)."""
    said = scores.log_softmax(-1)
    noise = torch.stack([sampling.gumbel(seed, own, position, said.shape[-1]) for own in ids])
    return (said + noise.to(said.device)).argmax(-1).tolist()


@dataclass
class _Path:
    sample: int
    view: int
    number: int
    tokens: list[int]
    first: float
    margins: list[float] = field(default_factory=list)
    answer: str | None = None
    said_at: int = 0  # where the answer's word begins
    said_by: int = 0  # where it is complete

    def search(self, words: re.Pattern, tokenizer: Any, ended: bool) -> bool:
        """Look for the answer's word; it counts once something that is no letter follows, or the path has ended."""
        text = self._text(tokenizer, len(self.tokens))
        match = words.search(text)
        if match is None or (match.end() == len(text) and not ended):
            return False
        self.answer = match.group().lower()
        lengths = [len(self._text(tokenizer, n + 1)) for n in range(len(self.tokens))]
        self.said_at = next(i for i, length in enumerate(lengths) if length > match.start())
        self.said_by = next(i for i, length in enumerate(lengths) if length >= match.end())
        return True

    def _text(self, tokenizer: Any, count: int) -> str:
        return tokenizer.decode(self.tokens[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def compare(
    method: MVP, run: Run, input_ids: Tensor, process: list[Any], limits: Limits, seed: int
) -> list[tuple[dict[str, float], list[int]]]:
    """Ask under every caption, follow the paths, and add up; per sample the certainty of each answer, and the tokens."""
    samples, views = run.samples[0], len(method.weights)
    asked = []
    for sample, captions in zip(samples, run.trace.captions):
        question = question_of(sample).text
        question = question.lower() if method.lower else question
        asked += [
            asking(sample, method.prompt.format(caption=caption, question=question), qformer=False)
            for caption in captions
        ]
    rows = Rows(run.batch.prepare(run.batch.resolve(asked)), run.family.pad_token_id)
    tokenizer = samples[0].tokenizer
    said = _said(rows.first, input_ids.repeat_interleave(views, 0), process)
    tops = said.exp().topk(max(2, min(method.paths, said.shape[-1])), -1)
    words = re.compile(rf"\b(?:{'|'.join(map(re.escape, method.answers))})\b", re.IGNORECASE)
    done, live, parents = [], [], []
    for row, (probabilities, tokens) in enumerate(zip(tops.values.tolist(), tops.indices.tolist())):
        margin = probabilities[0] - probabilities[1]
        for number in range(min(method.paths, len(tokens))):
            path = _Path(row // views, row % views, number, [tokens[number]], probabilities[number], [margin])
            whole = tokenizer.decode([tokens[number]], skip_special_tokens=True).strip().lower()
            if whole in method.answers:
                path.answer = whole
                path.margins = [1.0 if method.form == "code" else margin]
                done.append(path)
            elif path.first >= method.min_probability and path.tokens[0] not in limits.eos:
                live.append(path)
                parents.append(row)
            else:
                done.append(path)
    longest = min(method.path_tokens + 1, limits.new_tokens)
    if live:
        rows.select(parents)
    while live:
        if len(live[0].tokens) >= longest:
            for path in live:
                path.search(words, tokenizer, ended=True)
            done += live
            break
        logits = rows.extend(torch.tensor([[path.tokens[-1]] for path in live], device=input_ids.device))
        ids = torch.stack([torch.cat([input_ids[p.sample], input_ids.new_tensor(p.tokens)]) for p in live])
        said = _said(logits, ids, process)
        best = said.exp().topk(2, -1).values
        keys = [(run.row_ids[p.sample], "mvp path", p.view, p.number) for p in live]
        drawn = _draw(said / method.path_temperature, keys, len(live[0].tokens), seed)
        staying = []
        for i, (path, token, (first, second)) in enumerate(zip(live, drawn, best.tolist())):
            path.tokens.append(token)
            path.margins.append(first - second)
            ended = token in limits.eos
            if limits.other and not ended:
                whole = torch.cat([input_ids[path.sample], input_ids.new_tensor(path.tokens)])
                ended = limits.stopped(whole[None])[0]
            if path.search(words, tokenizer, ended) or ended:
                done.append(path)
            else:
                staying.append(i)
        if len(staying) < len(live):
            live = [live[i] for i in staying]
            if live:
                rows.select(staying)
    run.trace.forwards += rows.forwards
    return [_decide(method, [path for path in done if path.sample == number]) for number in range(len(samples))]


def _said(logits: Tensor, ids: Tensor, process: list[Any]) -> Tensor:
    """(n, N) log-probabilities of the model, after the caller's processors."""
    for processor in process:
        logits = processor(ids, logits)
    sampling.check_left(logits, "in a path of an answer")
    return logits.log_softmax(-1)


def _decide(method: MVP, paths: list[_Path]) -> tuple[dict[str, float], list[int]]:
    certainty = dict.fromkeys(method.answers, 0.0)
    most: dict[str, tuple[float, _Path]] = {}
    for path in paths:
        if path.answer is None:
            continue
        share = method.weights[path.view] * path.first * path.margins[path.said_at]
        certainty[path.answer] += share
        if path.answer not in most or share > most[path.answer][0]:
            most[path.answer] = (share, path)
    if not most:
        heaviest = max(range(len(method.weights)), key=lambda view: method.weights[view])
        path = max((p for p in paths if p.view == heaviest), key=lambda p: p.first)
        return certainty, path.tokens
    path = most[max(most, key=lambda answer: certainty[answer])][1]
    return certainty, path.tokens[: path.said_by + 1]

"""Visual Description Grounded Decoding (Ghosh et al., ICLR 2025; arXiv 2405.15683).

The model first describes the image, and what it would have said at every token of the description is kept:
``q_1 .. q_L``. Then the description goes before the question, and each step chooses among the plausible tokens of the answer
the one that the description grounds best:

    score(w) = - min_j KL(onehot(w) || q_j) = max_j log q_j(w)        for w in C; all others come after these

``max_j`` is taken while the description is written, so that a step costs one gather. Candidates C: the plausibility mask
(default), the ``knee`` (everything before the steepest drop of the sorted probabilities, the paper's other form), or the
``nucleus`` of the authors' code. That code divides the scores by the size of the vocabulary, which makes the grounding a
coin flip among candidates; here they are not divided.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..engine import hf, sampling
from ..engine.prompts import asking, question_of
from ..method import masked, plausible_tokens
from .base import AsCaller, Controller, Limits
from .rows import Rows, write

if TYPE_CHECKING:
    from ..engine.hf import Call
    from ..engine.run import Run


@dataclass(frozen=True)
class VDGD(Controller):
    """Re-ranks the candidates by how well the model's own description of the image supports them.

    Args:
        candidates: How the tokens that are re-ranked are chosen: ``mask``, ``knee`` or ``nucleus``.
        beta: Threshold of the plausibility mask in (0, 1].
        top_p: Probability of the nucleus in (0, 1], as in the authors' code.
        temperature: Temperature of the nucleus, above 0, as in the authors' code.
        reduction: ``min`` takes the description token that supports a candidate best, ``avg`` the mean over all of
            them.
        mode: ``replace`` the scores of the answer by the grounding (paper), or ``add`` a multiple of it to them.
        kappa: Multiple of the grounding that ``add`` adds.
        describe: Request for the description; ``{question}`` is the question. The authors' request continues for
            several sentences about photographs and charts.
        prompt: The grounded question, with ``{description}`` and ``{question}``.
        description_tokens: Maximum length of the description in tokens, at least 1.
    """

    name: ClassVar[str] = "vdgd"
    paper: ClassVar[str] = "Visual Description Grounded Decoding (Ghosh et al., ICLR 2025)"
    arxiv: ClassVar[str] = "2405.15683"
    aliases: ClassVar[dict[str, str]] = {"kl_reduction": "reduction"}
    costs: ClassVar[tuple[str, ...]] = ("captions",)
    refuses: ClassVar[dict[str, str]] = {
        "static": "the grounded prompt is longer than the one the cache was sized for; leave out cache_implementation.",
        "speculation": "a draft would be checked against a prompt it was not made for; leave the drafter out.",
        "sum": "it answers another prompt, which the views of a method do not follow.",
        "processor": "a processor cannot change the prompt; use attach(model, VDGD()).",
    }

    candidates: Literal["mask", "knee", "nucleus"] = "mask"
    beta: float = 0.1
    top_p: float = 0.5
    temperature: float = 0.5
    reduction: Literal["min", "avg"] = "min"
    mode: Literal["replace", "add"] = "replace"
    kappa: float = 1.0
    describe: str = (
        "I have been given an image to complete the task described as: {question}. To help me complete the task, "
        "describe the given image in detail."
    )
    prompt: str = "The input image is described as follows: {description} {question}"
    description_tokens: int = 256

    def __post_init__(self) -> None:
        self.check(self.candidates in ("mask", "knee", "nucleus"), "candidates", "'mask', 'knee' or 'nucleus'")
        self.check(0 < self.beta <= 1, "beta", "in (0, 1]")
        self.check(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        self.check(self.temperature > 0, "temperature", "greater than 0")
        self.check(self.reduction in ("min", "avg"), "reduction", "'min' or 'avg'")
        self.check(self.mode in ("replace", "add"), "mode", "'replace' or 'add'")
        self.check(self.description_tokens >= 1, "description_tokens", "at least 1")
        named = "{description}" in self.prompt and "{question}" in self.prompt
        self.check(named, "prompt", "a text with {description} and {question} in it")

    def decode(self, run: Run, call: Call) -> Any:
        hf.check_plain(call.cache, self.name)
        samples, input_ids, config = run.samples[0], call.input_ids, copy.deepcopy(call.config)
        limits = Limits.of(run, call)
        questions = [question_of(sample).text for sample in samples]
        asked = [asking(s, self.describe.format(question=q)) for s, q in zip(samples, questions)]
        descriptions, grounds, run.trace.forwards = describe(run, asked, self, limits.eos)
        texts = [samples[0].tokenizer.decode(d, skip_special_tokens=True).strip() for d in descriptions]
        run.trace.descriptions = texts
        grounded = [
            asking(sample, self.prompt.format(description=description, question=question), qformer=False)
            for sample, description, question in zip(samples, texts, questions)
        ]
        text, vision, images = run.batch.rows(run.batch.resolve(grounded))
        prompts = input_ids[:: len(input_ids) // len(samples)]
        width = text["input_ids"].shape[1]
        config.max_length = width + limits.new_tokens

        def loop(prepared: Call) -> Any:
            # What generate() prepared from the grounded prompt alone; the caller's settings take the place of the rest.
            process = sampling.guarded(call.processors, sampling.SomethingLeft(call.prompt_length, limits.eos))
            grounding = [Grounding(self, grounds), AsCaller(process, prompts, width)]
            return hf.run_loop(
                run.module,
                dataclasses.replace(
                    prepared,
                    processors=LogitsProcessorList(grounding),
                    criteria=StoppingCriteriaList([AsCaller(call.criteria, prompts, width)]),
                    config=config,
                    streamer=call.streamer,
                ),
            )

        out = run.family.generate(
            text,
            vision,
            images,
            loop,
            do_sample=config.do_sample,
            num_beams=config.num_beams or 1,
            num_return_sequences=config.num_return_sequences or 1,
            max_new_tokens=limits.new_tokens,
            cache_implementation="dynamic",
        )
        answered = out if isinstance(out, Tensor) else out.sequences
        rows = prompts.repeat_interleave(len(answered) // len(prompts), 0)
        sequences = torch.cat([rows, answered[:, width:]], 1)
        if isinstance(out, Tensor):
            return sequences
        out.sequences = sequences
        # It belongs to the grounded prompt; a caller who continued from it would continue that one.
        hf.give_cache(out, None)
        return out


class Grounding:
    """Re-ranks the candidates of every row by how well the description of its sample grounds them.

    All other tokens come far below, in the order that the answer's own distribution gives them: a draw never takes one, and
    where the processors after this one ban every candidate (an end token that ``min_new_tokens`` forbids, a repeated word)
    the likeliest token that is left is said.

    Args:
        method: which candidates, and how the grounding enters.
        grounds: (B, N) log-probability that the description gives each token.
    """

    supports_continuous_batching = False

    def __init__(self, method: VDGD, grounds: Tensor):
        self.method, self.grounds = method, grounds

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = sampling.numbers(scores)
        keep = candidates_of(self.method, scores)
        grounds = self.grounds.repeat_interleave(len(scores) // len(self.grounds), 0)
        if self.method.mode == "add":
            grounds = scores.log_softmax(-1) + self.method.kappa * grounds
        ranked = grounds.masked_fill(~keep, float("-inf")).log_softmax(-1)
        return masked(ranked, keep, scores)


def candidates_of(method: VDGD, scores: Tensor) -> Tensor:
    """(R, N) bool: which tokens of the answer's distribution, logits or log-probabilities (R, N), are re-ranked."""
    if method.candidates == "mask":
        return plausible_tokens(scores, method.beta)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    sharp = method.temperature if method.candidates == "nucleus" else 1.0
    sorted_p = (scores / sharp).softmax(-1).gather(-1, order)
    if method.candidates == "nucleus":
        before = sorted_p.cumsum(-1) - sorted_p
        kept = before < method.top_p
    else:
        knee = (sorted_p[:, :-1] - sorted_p[:, 1:]).argmax(-1, keepdim=True)
        kept = torch.arange(scores.shape[-1], device=scores.device) <= knee
    return torch.zeros_like(kept).scatter(-1, order, kept)


def describe(run: Run, samples: list[Any], method: VDGD, ends: Sequence[int]) -> tuple[list[Tensor], Tensor, int]:
    """Greedy descriptions, and what their distributions give every token.

    The step that ends a description belongs to it, as in the scores that ``generate()`` returns.

    Returns:
        per sample its description's ids (without the end token); (B, N) maximum or mean over its steps of the
        log-probabilities; forwards run.
    """
    rows = Rows(run.batch.prepare(run.batch.resolve(samples)), run.family.pad_token_id)
    grounds = torch.full_like(rows.first, float("-inf") if method.reduction == "min" else 0.0)
    steps = grounds.new_zeros(len(samples), 1)

    def choose(logits: Tensor, live: list[int], position: int) -> list[int]:
        said, before = logits.log_softmax(-1), grounds[live]
        grounds[live] = torch.maximum(before, said) if method.reduction == "min" else before + said
        steps[live] += 1
        # An image placeholder in the description would need image features, so it is dropped.
        words = logits.clone()
        words[:, list(run.family.placeholder_ids.values())] = float("-inf")
        return words.argmax(-1).tolist()

    texts = write(rows, method.description_tokens, ends, choose)
    if method.reduction == "avg":
        grounds /= steps
    return [torch.tensor(text, dtype=torch.long) for text in texts], grounds, rows.forwards

"""The question inside a prompt, and the same image under another one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from .samples import Sample

_MARK = "\x1a"


@dataclass(frozen=True)
class Asked:
    """What follows the image of a prompt, taken apart: ``lead + text + cue``.

    Args:
        lead: what stands between the image and the question: line breaks, end-of-image tokens.
        text: the question.
        cue: what asks the assistant to speak, from the processor's chat template, and the space before it.
    """

    lead: str
    text: str
    cue: str


def question_of(sample: Sample) -> Asked:
    """The question of a sample.

    Raises:
        InputError: a prompt without an image, or without text after its last image.
    """
    if not sample.has_image:
        raise InputError(f"sample {sample.id!r} has no image, and this method describes the image; give it one.")
    ids, tokenizer = sample.input_ids, sample.tokenizer
    at = int((~sample.family.drop_image(ids)).nonzero()[-1]) + 1
    tail = tokenizer.decode(ids[at:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    cue = cue_of(sample.batch.processor, tail)
    body = tail[: len(tail) - len(cue)]
    special = "|".join(map(re.escape, sorted(tokenizer.all_special_tokens, key=len, reverse=True)))
    pattern = rf"(?:\s|{special})*" if special else r"\s*"
    text = re.sub(f"^{pattern}", "", body)
    lead, text = body[: len(body) - len(text)], text.rstrip()
    # A line break that ends the question (PaliGemma) belongs to what asks for the answer.
    cue = body[len(lead) + len(text) :] + cue
    if not text:
        raise InputError(
            f"sample {sample.id!r} has no question after its image; put the image first: apply_chat_template with the "
            "image part before the text part."
        )
    return Asked(lead, text, cue)


def cue_of(processor: Any, tail: str) -> str:
    """The end of ``tail`` that the chat template, or LLaVA's habit, puts after a question."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "text", "text": _MARK}]
        rendered = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        cue = rendered.rpartition(_MARK)[2]
        if tail.endswith(cue):
            return cue
    found = re.search(r"\s*ASSISTANT:\s*$", tail)
    return found.group() if found else ""


def asking(sample: Sample, text: str, qformer: bool = True) -> Sample:
    """The sample with another question about the same image.

    Args:
        text: the new question.
        qformer: a Q-Former is asked it too, which costs a pass of it; otherwise it keeps its own prompt.
    """
    question = question_of(sample)
    if qformer and sample.family.has_qformer:
        sample = sample.with_query(lambda _: text).sample
    return sample.with_text(lambda _: question.lead + text + question.cue).sample

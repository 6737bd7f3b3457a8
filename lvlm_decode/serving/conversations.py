"""The prompt of a conversation."""

from __future__ import annotations

from typing import Any

from .engines import Job
from .refusals import Refused


def prompt_of(processor: Any, job: Job) -> str:
    """What a model reads for a conversation, image tokens included.

    Raises:
        Refused: a conversation that the model's chat template, or a model without one, does not take.
    """
    token = getattr(processor, "image_token", None)
    texts = [part["text"] for turn in job.turns for part in turn["content"] if part["type"] == "text"]
    if token and any(token in text for text in texts):
        raise Refused(400, f"a text holds {token}, which stands for pictures; write it another way.", "messages")
    if getattr(processor, "chat_template", None):
        try:
            return processor.apply_chat_template(list(job.turns), add_generation_prompt=True)
        except Exception as error:
            # Templates raise whatever they like about a conversation that they do not take.
            raise Refused(
                400, f"the model's chat template does not take this conversation ({error}).", "messages"
            ) from error
    if len(job.turns) != 1 or job.turns[0]["role"] != "user":
        raise Refused(400, "the model has no chat template; send one message, of the user.", "messages")
    return "\n".join(texts)

"""The model that lmms-eval asks: a Hugging Face model with a method, and optionally a drafter, attached.

Answers are those of ``attach(model, method)`` and ``generate(seed=..., sample_ids=...)``: they do not depend on the batch size.

Nothing is answered with an empty text because something went wrong. The command line of lmms-eval catches every ``Exception``
of a model and ends with status 0, so an error here is raised as ``SystemExit`` with its sentence: the command ends with status 1.
"""

from __future__ import annotations

import json
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm
from transformers.image_utils import load_image

from lvlm_decode_evals.runner import load, new_tokens, token_counts

from ..attachment import attach
from ..errors import InputError, LvlmDecodeError, ParameterError, UnsupportedError
from ..methods import parse

#: Settings of a task that are about other models' prompts, not about generation.
OTHERS = {"image_aspect_ratio", "until"}
#: The longest answer of a task that names no limit; lmms-eval's own LLaVA model has the same.
MAX_NEW_TOKENS = 1024


class LvlmDecode(lmms):
    """One model of lmms-eval, named ``lvlm_decode``.

    Args:
        pretrained: a hub id or folder, or "tiny" for the small model that ships.
        method: as on the command line of lvlm-decode, "vcd" or "vcd+icd". Parameters are given beside it (``alpha=1.0``) or in
            brackets within quotes: ``method="vcd(alpha=1.0)"``; lmms-eval cuts at commas outside quotes.
        drafter: a drafter's name, for speculative decoding.
        seed: keys the views, and the draws of tasks that sample, together with task, split and number of the document.
        dtype, device, device_map: as for ``lvlm_decode_evals.runner.load``.
        batch_size: documents in one ``generate()`` call.
        parameters: those of the method.

    Raises:
        SystemExit: a setting that is not understood, or an error while an answer is made; the message says which document.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        method: str = "plain",
        drafter: str | None = None,
        seed: int = 0,
        dtype: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        **parameters: Any,
    ) -> None:
        super().__init__()
        with _ended("the model arguments"):
            if not pretrained:
                raise ParameterError(
                    "pretrained is missing; write --model_args pretrained=HUB-ID-OR-FOLDER,method=vcd."
                )
            if not str(batch_size).isdecimal() or int(batch_size) < 1:
                raise ParameterError(f"batch_size = {batch_size!r} is not valid; it must be a positive number.")
            asked = parse(_unquoted("method", method), **parameters)
            alone = any("batch" in part.refuses for part in asked.parts())
            self.batch_size = 1 if alone else int(batch_size)
            self._processes(device)
            name = _unquoted("pretrained", pretrained)
            loaded = load(name, dtype=dtype, device=None if device_map else self.device, device_map=device_map)
            self.processor, self.seed = loaded.processor, seed
            self.model = attach(
                loaded.model, asked, processor=loaded.processor, drafter=drafter and _unquoted("drafter", drafter)
            )

    def _processes(self, device: str | None) -> None:
        """Which process of how many this is, and its device, under ``accelerate launch`` or alone."""
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device if device and self._world_size == 1 else self.accelerator.device)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answers to ``requests``, in their order.

        Raises:
            SystemExit: a document that cannot be asked, or an error of the model; the message names task and documents.
        """
        answers: dict[int, GenerationResult] = {}
        seconds = 0.0
        keys = keys_of(requests)
        with tqdm(total=len(requests), disable=None if self.rank == 0 else True, desc="lvlm_decode") as bar:
            for batch in self._batches(requests):
                begun = time.perf_counter()
                asked = [requests[place].args for place in batch]
                answers.update(zip(batch, self._answers(asked, [keys[place] for place in batch])))
                seconds += time.perf_counter() - begun
                bar.update(len(batch))
        tokens = sum(answer.token_counts.output_tokens for answer in answers.values())
        log_metrics(
            total_gen_tokens=tokens, total_elapsed_time=seconds, avg_speed=tokens / seconds if seconds > 0 else 0.0
        )
        return [answers[place] for place in range(len(requests))]

    def _batches(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Places of requests that share their settings and are alike in having images, at most ``batch_size`` together."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            _, _, settings, _, task, split = request.args
            groups.setdefault(json.dumps([task, split, settings], sort_keys=True, default=str), []).append(place)
        for places in groups.values():
            for at in range(0, len(places), self.batch_size):
                yield places[at : at + self.batch_size]

    def _answers(self, batch: Sequence[Any], keys: Sequence[str]) -> list[GenerationResult]:
        """The answers to requests of one task with the same settings.

        Args:
            batch: the arguments of each request, as lmms-eval makes them.
            keys: what keys the randomness of each.
        """
        _, _, settings, _, task, split = batch[0]
        numbers = [number for _, _, _, number, _, _ in batch]
        with _ended(f"task {task}, split {split}, document {', '.join(map(str, numbers))}"):
            messages = [to_messages(self.task_dict[task][split][number]) for _, to_messages, _, number, _, _ in batch]
            prompts, images = zip(*(self._prompt(message) for message in messages))
            inputs = self._inputs(prompts, images).to(self.model.device)
            with torch.inference_mode():
                out = self.model.generate(**inputs, seed=self.seed, sample_ids=keys, **arguments_of(settings))
            new = new_tokens(out, inputs["input_ids"])
            texts = self.processor.batch_decode(new, skip_special_tokens=True)
            counts = token_counts(new, self.model.generation_config.eos_token_id)
            answers = [cut(text.strip(), settings.get("until")) for text in texts]
        for prompt, answer in zip(prompts, answers):
            self.cache_hook.add_partial("generate_until", (prompt, settings), answer)
        return [GenerationResult(text, TokenCounts(output_tokens=count)) for text, count in zip(answers, counts)]

    def _prompt(self, messages: Sequence[dict[str, Any]]) -> tuple[str, list[Any]]:
        """The text of a conversation with its image placeholders, and its images."""
        images, turns = [], []
        for message in messages:
            parts = []
            for part in message["content"]:
                if part["type"] == "text":
                    parts.append({"type": "text", "text": part["text"]})
                elif part["type"] == "image":
                    images.append(load_image(part["url"]))
                    parts.append({"type": "image"})
                else:
                    raise UnsupportedError(f"the document has a part of type {part['type']}; only images are taken.")
            turns.append({"role": message["role"], "content": parts})
        if getattr(self.processor, "chat_template", None) is None:
            words = [part["text"] for turn in turns for part in turn["content"] if part["type"] == "text"]
            return "\n".join(words), images
        return self.processor.apply_chat_template(turns, add_generation_prompt=True), images

    def _inputs(self, prompts: Sequence[str], images: Sequence[list[Any]]) -> Any:
        given: list[Any] = [one for of_prompt in images for one in of_prompt]
        if any(len(of_prompt) != 1 for of_prompt in images):
            given = list(images)
        pictures = {"images": given} if any(images) else {}
        try:
            return self.processor(text=list(prompts), padding=True, return_tensors="pt", **pictures)
        except (ValueError, TypeError, OSError) as error:
            raise InputError(f"the processor cannot take this sample ({error})") from error

    def loglikelihood(self, requests: list[Instance]) -> Any:
        with _ended("a task of output_type loglikelihood"):
            raise UnsupportedError(
                "answers are generated here, not ranked; choose tasks of output_type generate_until."
            )

    def generate_until_multi_round(self, requests: list[Instance]) -> Any:
        with _ended("a task of output_type generate_until_multi_round"):
            raise UnsupportedError("questions of one round are answered; choose tasks of output_type generate_until.")


def keys_of(requests: Sequence[Instance]) -> list[str]:
    """What keys the randomness of each request: task, split and number of the document.

    lmms-eval repeats a request that it wants answered several times; each time has a key, so draws, of its own.
    """
    times: Counter[str] = Counter()
    keys = []
    for request in requests:
        _, _, _, number, task, split = request.args
        key = f"{task}/{split}/{number}"
        keys.append(f"{key}#{times[key]}" if times[key] else key)
        times[key] += 1
    return keys


def arguments_of(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's ``generation_kwargs`` as arguments of ``generate()``.

    A temperature of 0 means greedy decoding; what only sampling uses is dropped then. Without ``do_sample`` a positive
    temperature means sampling. Any other setting is passed on, and generate() honours or refuses it.

    Raises:
        UnsupportedError: several answers to one request.
    """
    if int(settings.get("num_return_sequences") or 1) != 1:
        raise UnsupportedError("lmms-eval takes one answer to a request; use repeats of the task for several.")
    given = {name: value for name, value in settings.items() if name not in OTHERS and value is not None}
    temperature = given.get("temperature", 0)
    sample = bool(given.pop("do_sample", temperature > 0)) and temperature > 0
    if not sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            given.pop(name, None)
    return {"max_new_tokens": MAX_NEW_TOKENS, **given, "do_sample": sample}


def cut(answer: str, until: str | Sequence[str] | None) -> str:
    """``answer`` up to the first stop text of the task.

    A blank line is none: lmms-eval writes it into every task that names no stop text, and its own models ignore it.
    """
    for end in [until] if isinstance(until, str) else until or ():
        if end and end != "\n\n":
            answer = answer.split(end)[0]
    return answer


def _unquoted(name: str, value: Any) -> str:
    """A model argument without the quotes that lmms-eval leaves in place.

    Raises:
        ParameterError: brackets that lmms-eval cut in two at a comma.
    """
    text = str(value)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if text.count("(") != text.count(")"):
        raise ParameterError(
            f"{name} = {text!r} ends within its brackets, because lmms-eval cuts at commas; write "
            f"""--model_args 'pretrained=...,{name}="vcd(alpha=1.0,beta=0.1)"', with quotes around the value."""
        )
    return text


@contextmanager
def _ended(where: str) -> Iterator[None]:
    """An error inside ends the command with status 1 and a sentence that begins with ``where``."""
    try:
        yield
    except LvlmDecodeError as error:
        raise SystemExit(f"lvlm_decode, {where}: {error}") from error
    except Exception as error:
        # SystemExit prints only its sentence, and of an unforeseen error the way there is wanted too.
        traceback.print_exc()
        raise SystemExit(f"lvlm_decode, {where}: {type(error).__name__}: {error}") from error

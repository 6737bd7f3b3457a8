"""The views of a sample as requests, made without the model: from its configuration and processor, and for views of image
features from the weights of its vision side.
"""

from __future__ import annotations

import functools
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine import hf, sampling
from ..engine.batch import Batch, views_of
from ..engine.modes import check_needs
from ..engine.run import observing
from ..engine.samples import Sample
from ..errors import InputError, UnsupportedError
from ..families import family_of
from ..method import Method, Sum
from ..methods import parse
from . import wire
from .pictures import Pictures, pictures_of
from .served import check_served, reads_encoder, refused_setting

#: What asks the engine for greedy answers: prompts and their length in tokens -> ids of each answer.
Ask = Callable[[Sequence[Mapping[str, Any]], int], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Group:
    """The requests of one sample, view 0 first; entries of the three lists belong together.

    Args:
        name: of the group, a random one.
        prompts: as vLLM takes them.
        params: sampling parameters, which say what the group is.
        ids: of the requests.
        lengths: of the prompts in tokens.
    """

    name: str
    prompts: list[dict[str, Any]]
    params: list[Any]
    ids: list[str]
    lengths: list[int]


class _Batch(Batch):
    """A batch of one sample, whose model writes in the engine.

    Args:
        given: the sample's pictures, RGB.
        write: asks the engine.
    """

    def __init__(self, given: list[Any], write: Callable[[Sequence[Sample], int], list[Tensor]], *args: Any):
        self.given, self._write = given, write
        super().__init__(*args)

    def answers(self, samples: Sequence[Sample], max_new_tokens: int) -> list[Tensor]:
        return self._write(samples, max_new_tokens)


class Views:
    """Makes the requests of samples; its methods may be called from several threads.

    Args:
        model: folder or hub id, the one that vLLM serves.
        processor: the model's; loaded from there when left out.
        ask: asks the engine, for methods whose views hold what the model writes (CODE).
        revision: of the hub's repository, the one that vLLM serves.

    Raises:
        InputError: no such model.
        UnsupportedError: a family that is not served.
    """

    def __init__(self, model: str, processor: Any = None, ask: Ask | None = None, revision: str | None = None):
        self.path, self._ask, self._revision = str(model), ask, revision
        self._family = family_of(hf.blueprint(self.path, revision=revision))
        self._encoding: Any = None
        self.pictures: Pictures = pictures_of(self._family)
        self._processor = processor
        # Fast tokenizers cannot be used by two threads at once.
        self._lock = threading.Lock()

    @functools.cached_property
    def processor(self) -> Any:
        """The model's processor."""
        if self._processor is None:
            from transformers import AutoProcessor

            self._processor = AutoProcessor.from_pretrained(self.path, revision=self._revision)
        return self._processor

    def group(
        self,
        method: Method | str,
        sample: Mapping[str, Any],
        params: Any,
        *,
        max_model_len: int | None = None,
    ) -> Group:
        """The requests of one sample.

        Args:
            method: for instance ``VCD(alpha=1.0)``, ``"vcd+icd"``.
            sample: ``prompt``, the text with the family's image tokens; ``multi_modal_data``, ``{"image": picture}`` or a list of
                pictures, PIL each; ``id``, what its randomness is keyed by, a hash of prompt and pixels when left out.
            params: the caller's ``vllm.SamplingParams``. ``seed`` keys views and draws as in ``generate(seed=)``.
            max_model_len: the engine's; the longest view and the answer must fit into it.

        Raises:
            UnsupportedError: a method, a family or a setting that cannot be served.
            InputError: a sample that cannot be read, or one that is too long.
        """
        method = parse(method) if isinstance(method, str) else method
        check_served(method)
        if (setting := refused_setting(params)) is not None:
            raise UnsupportedError(
                f"{method.name} in vLLM cannot honour {setting}, which would act on each view before they are combined; leave "
                "it out."
            )
        with self._lock:
            batch = self._batch(method.needed(), sample)
            seed = sampling.DEFAULT_SEED if params.seed is None else params.seed
            needed, columns = views_of(method.needed(), batch, seed)
            views = [column[0] for column in columns]
            if any(view.patch is not None or view.module is not None for view in views):
                raise UnsupportedError(f"{method.name} runs a view on another model, and vLLM serves one model.")
            samples = [*batch.samples, *(view.sample for view in views)]
            prompts = [self._prompt(batch, one) for one in samples]
        lengths = [len(one.input_ids) for one in samples]
        weights = tuple(float(view.weight) for view in views)
        counts = needed.counts if isinstance(needed, Sum) else ()
        return self._requests(method, weights, counts, samples[0].id, prompts, lengths, params, max_model_len)

    # --- from samples to prompts --------------------------------------------------------------------------------------

    def _batch(self, method: Method, sample: Mapping[str, Any]) -> _Batch:
        family = self._family_for(method)
        check_needs(method, family)
        images = _images(sample)
        try:
            inputs = self.processor(text=[sample["prompt"]], images=images or None, return_tensors="pt")
        except (ValueError, TypeError) as error:
            raise InputError(f"the model's processor does not take this sample: {str(error)[:300]}") from error
        tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
        watching = [part for part in method.parts() if type(part).observe is not Method.observe]
        observe = functools.partial(observing, watching) if watching else None
        ids = None if sample.get("id") is None else [sample["id"]]
        return _Batch(
            images, functools.partial(self._write, method.name), family, tensors, ids, self.processor, observe
        )

    def _family_for(self, method: Method) -> Any:
        """The family's adapter, over the vision side's weights where the method reads them."""
        if not reads_encoder(method):
            return self._family
        if not self.pictures.embeds:
            raise UnsupportedError(
                f"{method.name} changes image features, and vLLM ties the positions of {self._family.config.model_type}'s image "
                "tokens to a picture; use lvlm_decode.attach on the model in transformers."
            )
        if self._encoding is None:
            self._encoding = family_of(hf.blueprint(self.path, encoder=True, revision=self._revision))
        return self._encoding

    def _prompt(self, batch: _Batch, sample: Sample) -> dict[str, Any]:
        """One view of a batch as a prompt of vLLM."""
        if sample.own_images:
            return {"prompt_embeds": self._embedded(sample)}
        prompt: dict[str, Any] = {"prompt_token_ids": self.pictures.ids(sample)}
        if not sample.has_image:
            return prompt
        if sample.vision["pixel_values"] is batch.samples[0].vision["pixel_values"]:
            # As they came, so that vLLM processes and encodes them once for all views that show them.
            prompt["multi_modal_data"] = {"image": list(batch.given)}
        else:
            prompt["multi_modal_data"] = {"image": self.pictures.pixels(sample)}
            prompt["mm_processor_kwargs"] = dict(self.pictures.untouched)
        return prompt

    def _embedded(self, sample: Sample) -> Tensor:
        """(T, D) what the language model is shown, features in the place of placeholders."""
        table = sample.family.model.get_input_embeddings()
        with torch.no_grad():
            rows = table(sample.input_ids).clone()
        features = torch.cat([image.features for image in sample.images])
        rows[sample.input_ids == sample.family.image_token_id] = features.to(rows)
        return rows

    def _write(self, name: str, samples: Sequence[Sample], max_new_tokens: int) -> list[Tensor]:
        if self._ask is None:
            raise UnsupportedError(
                f"{name} lets the model write before its views can be made; make Views with ask=, which asks the engine."
            )
        prompts = [self._prompt(one.batch, one) for one in samples]  # type: ignore[arg-type]
        return [torch.tensor(list(ids), dtype=torch.long) for ids in self._ask(prompts, max_new_tokens)]

    # --- from prompts to requests -------------------------------------------------------------------------------------

    def _requests(
        self,
        method: Method,
        weights: tuple[float, ...],
        counts: tuple[int, ...],
        id: Any,
        prompts: list[dict[str, Any]],
        lengths: list[int],
        params: Any,
        max_model_len: int | None,
    ) -> Group:
        longest = max(lengths)
        limit = params.max_tokens
        if max_model_len is not None:
            if longest + (limit or 1) > max_model_len:
                raise InputError(
                    f"the longest view of sample {id!r} has {longest} tokens, and with max_tokens={limit} it exceeds the model's "
                    f"{max_model_len}; shorten the prompt, or give at most max_tokens={max(max_model_len - longest, 0)}."
                )
            # Without a limit each view would get one of its own.
            limit = limit or max_model_len - longest
        if limit is None:
            raise InputError("max_tokens is None, so the views of a sample would end apart; give a number.")
        name = uuid.uuid4().hex
        member = wire.Member(
            group=name,
            view=0,
            views=len(prompts),
            method=wire.described(method),
            weights=weights,
            counts=counts,
            seed=uuid.uuid4().int >> 65 if params.seed is None else params.seed,
            id=wire.printed(id),
            temperature=float(params.temperature),
            top_k=max(params.top_k, 0),
            top_p=float(params.top_p),
            min_p=float(params.min_p),
        )
        own = [wire.as_request(params, member, view, limit) for view in range(len(prompts))]
        return Group(name, prompts, own, [f"{name}-{view}" for view in range(len(prompts))], lengths)


def _images(sample: Mapping[str, Any]) -> list[Any]:
    """The pictures of a sample as it was given, RGB.

    Raises:
        InputError: no such sample.
        UnsupportedError: other media.
    """
    known = {"prompt", "multi_modal_data", "id"}
    if not isinstance(sample, Mapping) or not isinstance(sample.get("prompt"), str) or set(sample) - known:
        raise InputError(
            "a sample is {'prompt': text, 'multi_modal_data': {'image': picture}, 'id': key}; the last two may be left out."
        )
    media = sample.get("multi_modal_data") or {}
    if other := sorted(set(media) - {"image"}):
        raise UnsupportedError(f"views are made of images; {', '.join(other)} cannot be served, so leave it out.")
    images = media.get("image")
    images = list(images) if isinstance(images, list | tuple) else [] if images is None else [images]
    for image in images:
        if not hasattr(image, "convert"):
            raise InputError(f"an image is {type(image).__name__}; give a PIL image.")
    return [image.convert("RGB") for image in images]

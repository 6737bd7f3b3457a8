"""From what the user passes to ``generate()`` to the rows of every view, ready for one stacked forward.

Images are encoded once: the samples' own and those of all pixel-side views in one vision pass; text-side and feature-side
views re-use the features. Rows are prepared by the model's own ``generate()``, so positions, token types and masks are its
own for every family.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..families.base import Family
from ..method import Method, Sum, View
from . import hf, sampling
from .attention import Edit, image_slots, probabilities, routed, rows_of, visible
from .hf import Encoded, Prepared, left_pad
from .hf.vision import PIXELS
from .media import Media
from .samples import Sample, content
from .stack import Lane

if TYPE_CHECKING:
    from transformers import ProcessorMixin


def _on(value: Any, device: torch.device) -> Any:
    """An input of an encoder on the batch's device; a list of numbers (the time between frames) as a tensor."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value):
        value = torch.tensor(value)
    return value.to(device) if isinstance(value, Tensor) else value


class Batch:
    """The user's batch: its samples, their images encoded once, the model they go to.

    Args:
        family: the model's adapter.
        inputs: what the user passed, tensors by name; left-padded.
        ids: a randomness key per row; content hashes when ``None``.
        processor: for views that tokenize text; loaded from the model's own path when ``None``.
        observe: watches the vision encoder, see :meth:`Method.observe`.

    Raises:
        InputError: rows that contradict each other, images that do not match their placeholders.
    """

    def __init__(
        self,
        family: Family,
        inputs: dict[str, Any],
        ids: Sequence[Hashable] | None = None,
        processor: ProcessorMixin | None = None,
        observe: Callable[[Family], AbstractContextManager[Any]] | None = None,
        features: Sequence[Encoded] | None = None,
    ):
        if isinstance(inputs.get("input_ids"), Tensor) and not inputs["input_ids"].numel():
            raise InputError("the batch is empty: input_ids holds no token; pass at least one prompt.")
        hf.check_inputs(inputs, family.input_keys, family.config.model_type)
        family.check_text(inputs)
        self.family, self._processor, self._observe = family, processor, observe
        #: What each method watched while the batch was encoded, by its name.
        self.observed: dict[str, Any] = {}
        self._once: dict[Hashable, Any] = {}
        device = hf.device_for(family.model, inputs["input_ids"])
        tokens = {
            key: inputs[key].to(device)
            for key in ("input_ids", *family.token_keys)
            if isinstance(inputs.get(key), Tensor)
        }
        ids_tensor = tokens["input_ids"]
        ids = None if ids is None else sampling.checked_ids(ids, len(ids_tensor))
        mask = inputs.get("attention_mask")
        mask = family.infer_mask(ids_tensor, {}) if mask is None else mask
        if not isinstance(mask, Tensor):
            raise InputError(f"attention_mask is a {type(mask).__name__}; pass the processor's tensor, (B, T).")
        mask = mask.to(device)
        if mask.shape != ids_tensor.shape:
            raise InputError(
                f"attention_mask is {tuple(mask.shape)} and input_ids {tuple(ids_tensor.shape)}; they must be equal."
            )
        if bool(family.is_placeholder(ids_tensor)[mask == 0].any()):
            raise InputError("attention_mask hides image placeholders; pass the processor's mask as it is.")
        if bool((mask[:, -1] == 0).any()):
            raise InputError(
                "the prompts are right-padded; decoding needs left padding: processor.tokenizer.padding_side = 'left'."
            )
        self._positions = self._given_positions(inputs.get("position_ids"), tokens, mask, inputs)
        #: The encoders' inputs of the whole batch.
        self.vision = {key: _on(value, device) for key in family.vision_keys if (value := inputs.get(key)) is not None}
        for pixels in PIXELS.values():
            if not isinstance(self.vision.get(pixels, ids_tensor), Tensor):
                raise InputError(
                    f"{pixels} is a {type(self.vision[pixels]).__name__} and no tensor; ask the processor for tensors: "
                    "processor(..., return_tensors='pt')."
                )
        #: Of the caller's prompts, padding included.
        self.width = ids_tensor.shape[1]
        self._media: list[Media] = []
        for kind, token in family.placeholder_ids.items():
            given = [item for item in features or () if item.kind == kind]
            own = {key: self.vision[key] for key in family.keys_of(kind) if key in self.vision}
            places = (ids_tensor == token).sum(1).tolist()
            self._media.append(Media(family, kind, own, places, given or None))
        parts = [media.rows(lambda: self._encode([])) for media in self._media]
        rows = [{key: value for own in row for key, value in own.items()} for row in zip(*parts)]
        self._rows: list[tuple[Hashable, dict[str, Tensor], dict[str, Tensor]]] = []
        for row in range(len(ids_tensor)):
            keep = mask[row].bool()
            text = {key: value[row][keep][None] for key, value in tokens.items()}
            sample_id = ids[row] if ids is not None else self._content_key(text["input_ids"], rows[row])
            self._rows.append((sample_id, text, rows[row]))

    @property
    def samples(self) -> list[Sample]:
        """The caller's own rows."""
        # Made anew: samples know their batch, and a batch that held them would outlive its call until a collection.
        return [Sample(key, text, vision, self, row) for row, (key, text, vision) in enumerate(self._rows)]

    @staticmethod
    def _content_key(input_ids: Tensor, vision: dict[str, Tensor]) -> str:
        digest = hashlib.blake2b(input_ids.cpu().numpy().tobytes(), digest_size=8)
        for pixels in PIXELS.values():
            if pixels in vision:
                digest.update(content(vision[pixels]))
        return digest.hexdigest()

    def _given_positions(
        self, given: Any, tokens: dict[str, Tensor], mask: Tensor, inputs: dict[str, Any]
    ) -> list[Tensor] | None:
        """Per row the positions (T,) or (axes, T) that the caller gave; ``None`` where the model makes the same ones itself.

        Raises:
            InputError: something else than a position for each token.
        """
        if given is None:
            return None
        ids = tokens["input_ids"]
        beside = {key: inputs[key] for key in (*self.family.token_keys, *self.family.position_keys) if key in inputs}
        module = self.family.decoding_module(self.family.model)
        made = hf.positions_of(module, ids, mask, beside)
        # Of several axes the first is that of the text, which a caller may leave out.
        axes = [()] if made.dim() == 2 else [(), (len(made) - 1,), (len(made),)]
        shapes = [(*own, rows, ids.shape[1]) for own in axes for rows in {len(ids), 1}]
        if not isinstance(given, Tensor) or given.is_floating_point() or given.shape not in shapes:
            what = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise InputError(
                f"position_ids is {what}, and the prompts are {tuple(ids.shape)}; pass a whole number for each token, "
                + " or ".join(str((*own, *ids.shape)) for own in axes)
                + "."
            )
        whole = given.to(ids.device).expand(*given.shape[:-2], *ids.shape)
        same = whole == (made[-len(whole) :] if whole.dim() == 3 else made)
        if bool((same | (mask == 0)).all()):
            return None
        return [whole[..., row, mask[row].bool()] for row in range(len(ids))]

    def _positions_of(self, sample: Sample) -> Tensor:
        """(..., T) the caller's positions of a sample or of a view whose prompt stands in the same places.

        Raises:
            UnsupportedError: a view with a longer or shorter prompt.
        """
        assert self._positions is not None
        ids, own = sample.input_ids, self._rows[sample.index][1]["input_ids"][0]
        if len(ids) != len(own) or not torch.equal(*(self.family.is_placeholder(prompt) for prompt in (ids, own))):
            raise UnsupportedError(
                f"position_ids are those of a prompt of {len(own)} tokens, and nothing says those of this method's view, whose "
                f"prompt has {len(ids)}; leave them out, or choose a method whose views keep the prompt, such as vcd."
            )
        return self._positions[sample.index]

    @property
    def processor(self) -> Any:
        if self._processor is None:
            from transformers import AutoProcessor

            path = getattr(self.family.model, "name_or_path", "")
            try:
                self._processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
            except (OSError, ValueError, TypeError) as error:
                raise InputError(
                    f"this method tokenizes text and no processor could be loaded from {path!r}; pass it: "
                    "attach(model, method, processor=processor)."
                ) from error
        return self._processor

    def images_of(self, sample: Sample) -> tuple[Encoded, ...]:
        """The images and videos of a sample's row, in the order of its prompt."""
        if self._pending:
            self._encode([])
        return sample.in_order([item for media in self._media for item in media.items[sample.index]])

    def image_slice(self, sample: Sample) -> slice:
        if self._pending:
            self._encode([])
        return self._media[0].slice(sample.index)

    @property
    def _pending(self) -> bool:
        return any(media.pending for media in self._media)

    def encode_again(self, during: Callable[[int], AbstractContextManager[Any]]) -> list[tuple[Encoded, ...]]:
        """Per row what the encoders say now, in the order of its prompt; nothing is kept.

        Args:
            during: what the pass of this number runs in; there is one of all images, and one of all videos.
        """
        shared: list[list[tuple[Encoded, ...]]] = []
        for media in self._media:
            if media.pixels in media.inputs:
                with during(len(shared)):
                    shared.append(media.shared(media.encode([media.inputs])))
        return [sample.in_order([item for rows in shared for item in rows[sample.index]]) for sample in self.samples]

    def _encode(self, others: list[Sample]) -> list[tuple[Encoded, ...]]:
        """Encode the batch, if it was not yet, together with ``others`` in one pass per kind; the images of ``others``.

        Raises:
            UnsupportedError: the model has no weights.
        """
        if hf.is_blueprint(self.family.model):
            raise UnsupportedError(
                "this method reads image features, and only the model's configuration is loaded here; a method that does so "
                "names them: costs = ('feature',)."
            )
        found: list[list[Encoded]] = [[] for _ in others]
        watched = self._pending and self._observe is not None
        with self._observe(self.family) if watched and self._observe else nullcontext() as observed:
            for media in self._media:
                for number, own in enumerate(self._encode_kind(media, others)):
                    found[number] += own
        if watched:
            self.observed = observed or {}
        return [sample.in_order(own) for sample, own in zip(others, found)]

    def _encode_kind(self, media: Media, others: list[Sample]) -> list[tuple[Encoded, ...]]:
        """The images, or the videos, of ``others``; those that the batch has already are not encoded again."""
        whole = media.pending
        parts: dict[int, dict[str, Any]] = {}
        for number, sample in enumerate(others):
            own, before = media.part(sample.vision), media.part(self._rows[sample.index][2])
            if any(value is not before[key] for key, value in own.items()):
                parts[number] = own
        given = [media.inputs, *parts.values()] if whole else list(parts.values())
        encoded = media.encode(given) if given else []
        at = 0
        if whole:
            media.assign(encoded)
            at = media.starts[-1]
        out = []
        for number, sample in enumerate(others):
            known = media.items[sample.index]
            if number in parts:
                known, at = tuple(encoded[at : at + len(known)]), at + len(known)
            out.append(known)
        if at != len(encoded):
            # Views have the images of their samples, so those without a place are among the caller's.
            places = media.starts[-1]
            media.check_used(places, places + len(encoded) - at)
        return out

    def once(self, key: Hashable, compute: Callable[[Batch], Any]) -> Any:
        """``compute(self)``, the first time that ``key`` is asked for."""
        if key not in self._once:
            self._once[key] = compute(self)
        return self._once[key]

    def answers(self, samples: Sequence[Sample], max_new_tokens: int) -> list[Tensor]:
        """The plain model's greedy answers to ``samples``, one per row of the batch: ids without end and padding."""
        text, vision, images = self.rows(self.resolve(samples))
        out = self.family.generate(
            text, vision, images, do_sample=False, num_beams=1, num_return_sequences=1, max_new_tokens=max_new_tokens
        )
        end = self.family.decoding_module(self.family.model).generation_config.eos_token_id
        ends = {end} if isinstance(end, int) else set(end or ())
        answers = []
        for ids in out[:, text["input_ids"].shape[1] :]:
            stop = next((i for i, token in enumerate(ids.tolist()) if token in ends), len(ids))
            ids = ids[:stop]
            # An image placeholder among the words would need image features, so it is dropped.
            answers.append(ids[~self.family.is_placeholder(ids)])
        return answers

    def resolve(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with their images encoded; what is not encoded yet is encoded in one vision pass."""
        pending = [s for s in samples if s.own_images is None and s.vision is not self._rows[s.index][2]]
        pending = [s for s in pending if s.has_image]
        fresh = self._encode(pending) if pending or self._pending else []
        encoded = {id(sample): images for sample, images in zip(pending, fresh)}
        out = []
        for sample in samples:
            if sample.own_images is not None:
                out.append(sample)
            elif id(sample) in encoded:
                out.append(dataclasses.replace(sample, own_images=encoded[id(sample)]))
            else:
                out.append(dataclasses.replace(sample, own_images=self.images_of(sample) if sample.has_image else ()))
        return out

    def prepare(self, samples: Sequence[Sample], width: int = 0) -> Prepared:
        """The rows of ``samples`` as the model's own ``generate()`` prepares them; see :meth:`rows`."""
        return self.family.prepare(*self.rows(samples, width))

    def rows(
        self, samples: Sequence[Sample], width: int = 0
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Encoded]]:
        """Text, what positions are made from, and images of ``samples`` as one batch, left-padded to the longest or ``width``."""
        width = max(width, *(sample.text["input_ids"].shape[1] for sample in samples))
        text: dict[str, Tensor] = {}
        for name in samples[0].text:
            fill = self.family.pad_token_id if name == "input_ids" else 0
            text[name] = torch.cat([left_pad(s.text[name], width, fill) for s in samples])
        text["attention_mask"] = torch.cat([left_pad(torch.ones_like(s.text["input_ids"]), width, 0) for s in samples])
        if self._positions is not None:
            text["position_ids"] = torch.stack([left_pad(self._positions_of(s), width, 0) for s in samples], -2)
        vision = {
            key: torch.cat(own)
            for key in self.family.position_keys
            if (own := [sample.vision[key] for sample in samples if key in sample.vision])
        }
        return text, vision, [image for sample in samples for image in sample.images]


def views_of(method: Method, batch: Batch, seed: int) -> tuple[Method, list[list[View]]]:
    """The extra views of every sample, and the method that knows how many each of its parts has.

    Each method draws from the sample's own generator, keyed by (seed, sample id, method), so that a sum draws what its
    parts would have drawn alone.

    Returns:
        the method, and per view number the views of all B samples.

    Raises:
        InputError: samples whose views differ in number.
    """
    per_sample = []
    for sample in batch.samples:

        def rng_of(name: str, sample: Sample = sample) -> torch.Generator:
            return sampling.generator(seed, sample.id, "views", name)

        if isinstance(method, Sum):
            groups = method.views_by_method(sample, rng_of)
            method = method.with_counts(tuple(len(group) for group in groups))
            per_sample.append([view for group in groups for view in group])
        else:
            per_sample.append(method.views(sample, rng_of(method.name)))
    if len({len(views) for views in per_sample}) != 1:
        raise InputError(
            f"{method.name} made views for the samples of one batch that differ in number; this is a bug in it."
        )
    return method, [list(column) for column in zip(*per_sample)]


class _LastRow(Edit):
    """Records how the last token of every row attends to the ``length`` slots in use, mean over heads."""

    def __init__(self, length: int) -> None:
        self.length, self.layers = length, dict[int, Tensor]()

    def output(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, out: Tensor
    ) -> Tensor:
        seen = rows_of(visible(query.shape[2], key.shape[2], mask, key.device), slice(None), slice(-1, None))
        attention = probabilities(query[:, :, -1:], key, seen, scaling).mean(1)[:, 0]
        self.layers[layer] = left_pad(attention[:, : self.length], self.length, 0.0)
        return out


def attention_to_prompt(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """How the last prompt token of every sample attends, from one prefill of the batch.

    Returns:
        (L, B, T) attention, mean over heads; (B, T) bool, which of the T slots hold image tokens; and (B, N) float32 logits.
    """
    edits: list[Edit] = []
    lane = Lane([batch.prepare(batch.samples)], (0,), pad_token_id=batch.family.pad_token_id, edits=edits)
    recorder = _LastRow(lane.length)
    edits.append(recorder)
    with torch.no_grad(), routed(lane.module):
        logits = lane.prefill(1).logits[:, -1].float()
    # Layers may live on devices of their own.
    rows = torch.stack([recorder.layers[layer].to(logits.device) for layer in sorted(recorder.layers)])
    return rows, image_slots(lane, batch.family), logits

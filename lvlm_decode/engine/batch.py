"""From what the user passes to ``generate()`` to the rows of every view, ready for one stacked forward.

Images are encoded once: the samples' own and those of all pixel-side views in one vision pass; text-side and feature-side
views re-use the features. Rows are prepared by the model's own ``generate()``, so positions, token types and masks are its
own for every family.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from ..families.base import Family
from ..method import Method, Sum, View
from . import hf, sampling
from .attention import Edit, image_slots, probabilities, routed, rows_of, visible
from .hf import Encoded, Prepared, left_pad
from .samples import Sample, content
from .stack import Lane

if TYPE_CHECKING:
    from transformers import ProcessorMixin


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
        mask = inputs.get("attention_mask")
        mask = family.infer_mask(ids_tensor, {}) if mask is None else mask
        if not isinstance(mask, Tensor):
            raise InputError(f"attention_mask is a {type(mask).__name__}; pass the processor's tensor, (B, T).")
        mask = mask.to(device)
        if mask.shape != ids_tensor.shape:
            raise InputError(
                f"attention_mask is {tuple(mask.shape)} and input_ids {tuple(ids_tensor.shape)}; they must be equal."
            )
        if bool((ids_tensor == family.image_token_id)[mask == 0].any()):
            raise InputError("attention_mask hides image placeholders; pass the processor's mask as it is.")
        if bool((mask[:, -1] == 0).any()):
            raise InputError(
                "the prompts are right-padded; decoding needs left padding: processor.tokenizer.padding_side = 'left'."
            )
        self.vision = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key in family.vision_keys
            if (value := inputs.get(key)) is not None
        }
        #: Of the caller's prompts, padding included.
        self.width = ids_tensor.shape[1]
        self._placeholders = (ids_tensor == family.image_token_id).sum(1).tolist()
        self._images: list[tuple[Encoded, ...]] = []
        self._encoded = False
        self._images_at: list[int] = []
        if features is not None:
            self._assign(list(features))
            self._check_used(self._images_at[-1], len(features))
        elif "pixel_values" not in self.vision:
            if any(self._placeholders):
                row = next(i for i, n in enumerate(self._placeholders) if n)
                raise InputError(
                    f"row {row} has {self._placeholders[row]} image placeholders and no pixel_values were given; pass "
                    "the image to the processor together with the text."
                )
            self._images, self._encoded = [()] * len(self._placeholders), True
            self._images_at = [0] * (len(self._placeholders) + 1)
        elif not any(self._placeholders):
            raise InputError(
                "pixel_values were given and no prompt has an image token; write the image into the prompt "
                "(apply_chat_template with an image part, or the processor's image token)."
            )
        rows = self._vision_rows(len(ids_tensor))
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
        if "pixel_values" in vision:
            digest.update(content(vision["pixel_values"]))
        return digest.hexdigest()

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

    def _vision_rows(self, rows: int) -> list[dict[str, Tensor]]:
        """The vision inputs of each row."""
        pixels = self.vision.get("pixel_values")
        if pixels is None:
            return [{}] * rows
        one_each = len(pixels) == rows and all(self._placeholders)
        if self.family.pixels_per_row or (one_each and self.family.pixel_rows(self.vision) is None):
            if len(pixels) != rows:
                raise InputError(
                    f"the batch has {rows} prompts and pixel_values of {len(pixels)}; pass one image entry per prompt."
                )
            return [
                {k: v[row : row + 1] if isinstance(v, Tensor) else v for k, v in self.vision.items()}
                if self._placeholders[row]
                else {}
                for row in range(rows)
            ]
        per_image = self.family.tokens_per_image(self.vision)
        if per_image is None:
            self._encode([])
            counts = [len(images) for images in self._images]
        else:
            counts = self._count(per_image)
            self._check_used(sum(counts), len(per_image))
        patches = self.family.pixel_rows(self.vision)
        out, image, pixel = [], 0, 0
        for count in counts:
            take = sum(patches[image : image + count]) if patches else count
            row = {}
            for key, value in self.vision.items():
                if not isinstance(value, Tensor):
                    row[key] = value
                elif key == "pixel_values":
                    row[key] = value[pixel : pixel + take]
                elif key in self.family.count_keys:
                    row[key] = value.new_tensor([count])
                else:
                    row[key] = value[image : image + count]
            out.append(row if count else {})
            image, pixel = image + count, pixel + take
        return out

    def _count(self, per_image: Sequence[int]) -> list[int]:
        """How many images each row takes, so that its placeholders are filled exactly; images may be left over."""
        counts, image = [], 0
        for row, need in enumerate(self._placeholders):
            have = taken = 0
            while have < need and image + taken < len(per_image):
                have += per_image[image + taken]
                taken += 1
            if have != need:
                raise InputError(
                    f"row {row} has {need} image placeholders and its images give {have} features; the images and the "
                    "image tokens of the batch do not belong together."
                )
            counts.append(taken)
            image += taken
        return counts

    def _check_used(self, used: int, have: int) -> None:
        if used != have:
            raise InputError(
                f"the batch has {have} images and its prompts have places for {used}; every image needs one image token "
                "in a prompt."
            )

    def _assign(self, encoded: list[Encoded]) -> None:
        counts = self._count([len(image.features) for image in encoded])
        self._images_at = [0]
        self._images, self._encoded = [], True
        for count in counts:
            at = self._images_at[-1]
            self._images.append(tuple(encoded[at : at + count]))
            self._images_at.append(at + count)

    def images_of(self, sample: Sample) -> tuple[Encoded, ...]:
        if not self._encoded:
            self._encode([])
        return self._images[sample.index]

    def image_slice(self, sample: Sample) -> slice:
        if not self._encoded:
            self._encode([])
        return slice(self._images_at[sample.index], self._images_at[sample.index + 1])

    def _encode(self, others: list[Sample]) -> list[tuple[Encoded, ...]]:
        """Encode the batch, if it was not yet, together with ``others`` in one vision pass; the images of ``others``."""
        parts = [sample.vision for sample in others]
        whole = not self._encoded
        if whole:
            parts.insert(0, self.vision)
        if not parts:
            return []
        vision = self.family.cat_vision(parts)
        if self._observe is None:
            encoded = self.family.encode(vision)
        else:
            with self._observe(self.family) as observed:
                encoded = self.family.encode(vision)
            self.observed = observed if whole else self.observed
        at = 0
        if whole:
            self._assign(encoded)
            at = self._images_at[-1]
        out = []
        for sample in others:
            count = len(self._images[sample.index])
            out.append(tuple(encoded[at : at + count]))
            at += count
        if at != len(encoded):
            # Views have the images of their samples, so those without a place are among the caller's.
            places = self._images_at[-1]
            self._check_used(places, places + len(encoded) - at)
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
            answers.append(ids[self.family.drop_image(ids)])
        return answers

    def resolve(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with their images encoded; what is not encoded yet is encoded in one vision pass."""
        pending = [s for s in samples if s.own_images is None and s.vision is not self._rows[s.index][2]]
        pending = [s for s in pending if s.has_image]
        fresh = self._encode(pending) if pending or not self._encoded else []
        encoded = {id(sample): images for sample, images in zip(pending, fresh)}
        out = []
        for sample in samples:
            if sample.own_images is not None:
                out.append(sample)
            elif id(sample) in encoded:
                out.append(dataclasses.replace(sample, own_images=encoded[id(sample)]))
            else:
                out.append(
                    dataclasses.replace(sample, own_images=self._images[sample.index] if sample.has_image else ())
                )
        return out

    def prepare(self, samples: Sequence[Sample], width: int = 0) -> Prepared:
        """The rows of ``samples`` as the model's own ``generate()`` prepares them; see :meth:`rows`."""
        return self.family.prepare(*self.rows(samples, width))

    def rows(
        self, samples: Sequence[Sample], width: int = 0
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Encoded]]:
        """Text, vision inputs and images of ``samples`` as one batch, left-padded to the longest, or to ``width``."""
        width = max(width, *(sample.text["input_ids"].shape[1] for sample in samples))
        text: dict[str, Tensor] = {}
        for name in samples[0].text:
            fill = self.family.pad_token_id if name == "input_ids" else 0
            text[name] = torch.cat([left_pad(s.text[name], width, fill) for s in samples])
        text["attention_mask"] = torch.cat([left_pad(torch.ones_like(s.text["input_ids"]), width, 0) for s in samples])
        parts = [sample.vision for sample in samples if sample.vision]
        vision = self.family.cat_vision(parts) if parts else {}
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
    rows = torch.stack([recorder.layers[layer] for layer in sorted(recorder.layers)])
    return rows, image_slots(lane, batch.family.image_token_id), logits

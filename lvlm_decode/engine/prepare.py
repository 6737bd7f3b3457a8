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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..families.base import Captured, Encoded, Family
from ..method import Method, Sum, View
from . import sampling

if TYPE_CHECKING:
    from transformers import ProcessorMixin


@dataclass(frozen=True)
class Sample:
    """One row of the user's batch, without padding, and the views that can be made of it.

    Args:
        id: what its randomness is keyed by.
        text: ``input_ids`` (1, T) and token types (1, T).
        vision: the encoder's inputs for this row's images; empty for a text-only row.
        batch: the batch it came with; encodes images, loads the processor.
        index: its row in that batch.
        own_images: the images as encoded features, or ``None`` when the pixels are still to be encoded.
    """

    id: Hashable
    text: dict[str, Tensor]
    vision: dict[str, Tensor]
    batch: Batch
    index: int
    own_images: tuple[Encoded, ...] | None = None

    @property
    def family(self) -> Family:
        return self.batch.family

    @property
    def input_ids(self) -> Tensor:
        """(T,) the prompt, placeholders included."""
        return self.text["input_ids"][0]

    @property
    def has_image(self) -> bool:
        return bool((self.input_ids == self.family.image_token_id).any())

    @property
    def images(self) -> tuple[Encoded, ...]:
        """The images as the language model receives them; encodes the whole batch on first use."""
        if self.own_images is not None:
            return self.own_images
        return self.batch.images_of(self)

    def observed_by(self, name: str) -> Any:
        """What :meth:`Method.observe` of method ``name`` yielded while this batch was encoded.

        Index it by image with ``image_slice``.

        Raises:
            InputError: the images came as features, so the encoder did not run.
        """
        self.batch.images_of(self)
        if name not in self.batch.observed:
            raise InputError(
                f"{name} reads the vision encoder while it encodes, and the images were given as features; pass "
                "pixel_values to generate()."
            )
        return self.batch.observed[name]

    @property
    def image_key(self) -> str:
        """A hash of the sample's images: of their pixels, or of their features if they came as such."""
        digest = hashlib.blake2b(digest_size=16)
        own = self.family.prompt_keys
        parts = [v for k, v in sorted(self.vision.items()) if isinstance(v, Tensor) and k not in own]
        for part in parts or [image.features for image in self.images]:
            digest.update(part.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def image_slice(self) -> slice:
        """Where this sample's images stand among the images of its batch."""
        return self.batch.image_slice(self)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that belongs to the model.

        Raises:
            InputError: no processor was given and none can be loaded from where the model came from.
        """
        processor = self.batch.processor
        return getattr(processor, "tokenizer", processor)

    def as_view(self, weight: float = 0.0, **how: Any) -> View:
        """This sample unchanged, as a view; ``how`` is :class:`View`'s ``patch`` or ``module``."""
        return View(self, weight=weight, **how)

    def with_pixels(self, edit: Callable[[Tensor], Tensor], weight: float = 0.0) -> View:
        """The sample with edited pixels; ``edit`` maps ``pixel_values`` of this row's images, normalised, to the same shape.

        Raises:
            InputError: the images came as features, without pixels.
        """
        if not self.has_image:
            return self.as_view(weight)
        if "pixel_values" not in self.vision:
            raise InputError(
                "this method edits pixels, and the images were given as features; pass pixel_values to generate()."
            )
        vision = dict(self.vision, pixel_values=edit(self.vision["pixel_values"]))
        return View(dataclasses.replace(self, vision=vision, own_images=None), weight)

    def with_features(self, edit: Callable[[Tensor, int], Tensor], weight: float = 0.0, deep: bool = False) -> View:
        """The sample with edited image features; ``edit(features (n, D), image number)`` may change n.

        Placeholders in the prompt follow the new number of features.

        Args:
            deep: edit also what goes into deeper layers, for families that have such features.
        """
        images = []
        for number, image in enumerate(self.images):
            features = edit(image.features, number)
            if len(features) != len(image.features) and (image.deep or self.family.pixel_rows(self.vision)):
                raise UnsupportedError(
                    f"{self.family.config.model_type} ties the positions of its image tokens to a grid, and this view "
                    "drops some of them; choose a method that keeps their number."
                )
            layers = tuple(edit(layer, number) for layer in image.deep) if deep else image.deep
            images.append(dataclasses.replace(image, features=features, deep=layers))
        return View(self._with_images(tuple(images)), weight)

    def _with_images(self, images: tuple[Encoded, ...]) -> Sample:
        ids, at = self.input_ids, 0
        pieces: dict[str, list[Tensor]] = {key: [] for key in self.text}
        spans = self.image_spans()
        for (start, stop), image in zip(spans, images):
            want = len(image.features)
            for key, value in self.text.items():
                pieces[key].append(value[:, at:start])
                pieces[key].append(value[:, start : start + 1].expand(-1, want))
            at = stop
        text = {key: torch.cat([*pieces[key], value[:, at:]], 1) for key, value in self.text.items()}
        if all(stop - start == len(image.features) for (start, stop), image in zip(spans, images)):
            text = self.text
        assert len(spans) == len(images), (len(spans), len(images), ids.shape)
        return dataclasses.replace(self, text=text, own_images=images)

    def image_spans(self) -> list[tuple[int, int]]:
        """Per image [start, stop) of its placeholders; separators inside an image's grid belong to its span."""
        places = (self.input_ids == self.family.image_token_id).nonzero().flatten().tolist()
        spans, at = [], 0
        for image in self.images:
            own = places[at : at + len(image.features)]
            spans.append((own[0], own[-1] + 1))
            at += len(image.features)
        return spans

    def without_image(self, weight: float = 0.0, instead: int | Tensor | None = None) -> View:
        """The sample with its images and their placeholders taken out of the prompt.

        Args:
            instead: a token id that takes the place of each image, or ids (n,) that take the place of the first one.
        """
        keep = self.family.drop_image(self.input_ids)
        first = ~keep & torch.cat([keep.new_ones(1), keep[:-1]])
        text = {}
        for key, value in self.text.items():
            if isinstance(instead, int):
                value = value.masked_fill(first, instead if key == "input_ids" else 0)[:, keep | first]
            elif instead is not None and bool(first.any()):
                at = int(first.nonzero()[0])
                words = instead.to(value) if key == "input_ids" else torch.zeros_like(instead).to(value)
                value = torch.cat([value[:, :at][:, keep[:at]], words[None], value[:, at:][:, keep[at:]]], 1)
            else:
                value = value[:, keep]
            text[key] = value
        return View(dataclasses.replace(self, text=text, vision={}, own_images=()), weight)

    def with_ids(self, input_ids: Tensor, weight: float = 0.0, fill: dict[str, int] | None = None) -> View:
        """The sample under another prompt: ``input_ids`` (T',), which keeps all placeholders.

        Token types are those of the placeholders for placeholders, ``fill`` (0) elsewhere.
        """
        image = self.family.image_token_id
        if int((input_ids == image).sum()) != int((self.input_ids == image).sum()):
            raise InputError("a view's prompt must keep the image placeholders of the sample; their number changed.")
        text = {}
        for key, value in self.text.items():
            if key == "input_ids":
                text[key] = input_ids[None]
                continue
            types = torch.full_like(input_ids, (fill or {}).get(key, 0))
            types[input_ids == image] = value[0][self.input_ids == image]
            text[key] = types[None]
        return View(dataclasses.replace(self, text=text, own_images=self.own_images), weight)

    def with_prefix(self, prefix: str, weight: float = 0.0, instead_of: str = "") -> View:
        """The sample with ``prefix`` put before its prompt, after the begin token.

        Args:
            instead_of: text that is taken away first, if the prompt begins with it.
        """
        base = self.input_ids
        if instead_of:
            _, at = self.family.insert_prefix(base, base[:0])
            begins = self._tokens(instead_of)
            if torch.equal(base[at : at + len(begins)], begins):
                base = torch.cat([base[:at], base[at + len(begins) :]])
        return self.with_ids(self.family.insert_prefix(base, self._tokens(prefix))[0], weight)

    def with_text(self, edit: Callable[[str], str], weight: float = 0.0) -> View:
        """The sample with edited words: ``edit`` sees what follows the last image, or the whole prompt if there is none.

        Only the tokens of what it changes are replaced.
        """
        ids = self.input_ids
        images = (~self.family.drop_image(ids)).nonzero().flatten()
        start = int(images[-1]) + 1 if len(images) else self.family.insert_prefix(ids, ids[:0])[1]
        return self.with_ids(torch.cat([ids[:start], self._edited(ids[start:], edit)]), weight)

    def _edited(self, ids: Tensor, edit: Callable[[str], str]) -> Tensor:
        """``ids`` after ``edit`` of their text; tokens before and after the change stay."""

        def read(part: Tensor) -> str:
            return self.tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)

        old = read(ids)
        new = edit(old)
        if new == old:
            return ids
        head = next(n for n in range(len(ids), -1, -1) if new.startswith(read(ids[:n])))
        rest = new[len(read(ids[:head])) :]
        tail = next(n for n in range(head, len(ids) + 1) if n == len(ids) or rest.endswith(read(ids[n:])))
        if tail < len(ids):
            rest = rest[: len(rest) - len(read(ids[tail:]))]
        # Some tokenizers put a space before any text they are given.
        candidates = [torch.cat([ids[:head], self._tokens(words), ids[tail:]]) for words in (rest, rest.lstrip(" "))]
        return next((found for found in candidates if read(found) == new), candidates[0])

    def _tokens(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=self.input_ids.dtype, device=self.input_ids.device)

    def with_query(self, edit: Callable[[str], str], weight: float = 0.0) -> View:
        """The sample with another prompt for its Q-Former; ``edit`` sees the text it has. The picture is shared."""
        name, mask = self.family.prompt_keys
        if not self.has_image:
            return self.as_view(weight)
        tokenizer = self.batch.processor.qformer_tokenizer
        ids = self.vision[name][0][self.vision[mask][0].bool()]
        ids = torch.tensor(tokenizer(edit(tokenizer.decode(ids, skip_special_tokens=True)))["input_ids"])[None]
        vision = {**self.vision, name: ids.to(self.vision[name]), mask: torch.ones_like(ids).to(self.vision[mask])}
        return View(dataclasses.replace(self, vision=vision, own_images=None), weight)


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
        observe: Callable[[torch.nn.Module], AbstractContextManager[Any]] | None = None,
        features: Sequence[Encoded] | None = None,
    ):
        family.check_text(inputs)
        self.family, self._processor, self._observe = family, processor, observe
        #: What each method watched while the batch was encoded, by its name.
        self.observed: dict[str, Any] = {}
        self._once: dict[Hashable, Any] = {}
        device = family.model.device
        tokens = {
            key: inputs[key].to(device)
            for key in ("input_ids", *family.token_keys)
            if isinstance(inputs.get(key), Tensor)
        }
        ids_tensor = tokens["input_ids"]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids_tensor) if mask is None else mask.to(device)
        if mask.shape != ids_tensor.shape:
            raise InputError(
                f"attention_mask is {tuple(mask.shape)} and input_ids {tuple(ids_tensor.shape)}; they must be equal."
            )
        if bool((mask[:, -1] == 0).any()):
            raise InputError(
                "the prompts are right-padded; decoding needs left padding: processor.tokenizer.padding_side = 'left'."
            )
        self.vision = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key in family.vision_keys
            if (value := inputs.get(key)) is not None
        }
        self._placeholders = (ids_tensor == family.image_token_id).sum(1).tolist()
        self._images: list[tuple[Encoded, ...]] | None = None
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
            self._images = [()] * len(self._placeholders)
            self._images_at = [0] * (len(self._placeholders) + 1)
        elif not any(self._placeholders):
            raise InputError(
                "pixel_values were given and no prompt has an image token; write the image into the prompt "
                "(apply_chat_template with an image part, or the processor's image token)."
            )
        rows = self._vision_rows(len(ids_tensor))
        self.samples = []
        for row in range(len(ids_tensor)):
            keep = mask[row].bool()
            text = {key: value[row][keep][None] for key, value in tokens.items()}
            sample_id = ids[row] if ids is not None else self._content_key(text["input_ids"], rows[row])
            self.samples.append(Sample(sample_id, text, rows[row], self, row))

    @staticmethod
    def _content_key(input_ids: Tensor, vision: dict[str, Tensor]) -> str:
        digest = hashlib.blake2b(input_ids.cpu().numpy().tobytes(), digest_size=8)
        if "pixel_values" in vision:
            digest.update(vision["pixel_values"].float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def processor(self) -> Any:
        if self._processor is None:
            from transformers import AutoProcessor

            path = getattr(self.family.model, "name_or_path", "")
            try:
                self._processor = AutoProcessor.from_pretrained(path)
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
        self._images = []
        for count in counts:
            at = self._images_at[-1]
            self._images.append(tuple(encoded[at : at + count]))
            self._images_at.append(at + count)

    def images_of(self, sample: Sample) -> tuple[Encoded, ...]:
        if self._images is None:
            self._encode([])
        return self._images[sample.index]

    def image_slice(self, sample: Sample) -> slice:
        if self._images is None:
            self._encode([])
        return slice(self._images_at[sample.index], self._images_at[sample.index + 1])

    def _encode(self, others: list[Sample]) -> list[tuple[Encoded, ...]]:
        """Encode the batch, if it was not yet, together with ``others`` in one vision pass; the images of ``others``."""
        parts = [sample.vision for sample in others]
        whole = self._images is None
        if whole:
            parts.insert(0, self.vision)
        if not parts:
            return []
        vision = self.family.cat_vision(parts)
        if self._observe is None:
            encoded = self.family.encode(vision)
        else:
            with self._observe(self.family.model) as observed:
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
            # Words only: a placeholder among them would want features.
            answers.append(ids[self.family.drop_image(ids)])
        return answers

    def resolve(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with their images encoded; what is not encoded yet is encoded in one vision pass."""
        pending = [s for s in samples if s.own_images is None and s.vision is not self.samples[s.index].vision]
        pending = [s for s in pending if s.has_image]
        fresh = self._encode(pending) if pending or self._images is None else []
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

    def capture(self, samples: Sequence[Sample]) -> Captured:
        """The rows of ``samples`` as the model's own ``generate()`` prepares them, left-padded to the longest."""
        return self.family.capture(*self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Encoded]]:
        """Text, vision inputs and images of ``samples`` as one batch, left-padded to the longest."""
        width = max(sample.text["input_ids"].shape[1] for sample in samples)
        text: dict[str, Tensor] = {}
        for name in samples[0].text:
            fill = self.family.pad_token_id if name == "input_ids" else 0
            text[name] = torch.cat([left_pad(s.text[name], width, fill) for s in samples])
        text["attention_mask"] = torch.cat([left_pad(torch.ones_like(s.text["input_ids"]), width, 0) for s in samples])
        parts = [sample.vision for sample in samples if sample.vision]
        vision = self.family.cat_vision(parts) if parts else {}
        return text, vision, [image for sample in samples for image in sample.images]


def left_pad(rows: Tensor, width: int, value: float, dim: int = -1) -> Tensor:
    """``rows`` with ``value`` put before them along ``dim`` until it is ``width`` long."""
    missing = width - rows.shape[dim]
    if missing == 0:
        return rows
    shape = list(rows.shape)
    shape[dim] = missing
    return torch.cat([rows.new_full(shape, value), rows], dim=dim)


def views_of(method: Method, batch: Batch, seed: int) -> tuple[Method, list[list[View]]]:
    """The extra views of every sample, and the method that knows how many each of its parts has.

    Each method draws from the sample's own generator, keyed by (seed, sample id, method), so that a sum draws what its
    parts would have drawn alone.

    Returns:
        the method, and per view number the views of all B samples.

    Raises:
        InputError: samples whose views differ in number or in weight.
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
    if len({tuple(view.weight for view in views) for views in per_sample}) != 1:
        raise InputError(
            f"{method.name} made views for the samples of one batch that differ in number or in weight; this is a bug in it."
        )
    return method, [list(column) for column in zip(*per_sample)]

"""One sample of the user's batch, and the views that can be made of it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..families.base import Family
from ..method import View
from .hf import Encoded
from .hf.vision import IMAGE, PIXELS, VIDEO

if TYPE_CHECKING:
    from .batch import Batch


def content(values: Tensor) -> bytes:
    """What ``values`` say, without the zeros that fill up an image beside larger ones in its batch."""
    flat = values.float().flatten()
    return flat[flat != 0].cpu().numpy().tobytes()


@dataclass(frozen=True)
class Sample:
    """One row of the user's batch, without padding, and the views that can be made of it.

    Args:
        id: what its randomness is keyed by.
        text: ``input_ids`` (1, T) and token types (1, T).
        vision: the encoders' inputs for this row's images and videos; empty for a text-only row.
        batch: the batch it came with; encodes images, loads the processor.
        index: its row in that batch.
        own_images: the images and videos as encoded features, in the order of the prompt, or ``None`` when the pixels are
            still to be encoded.
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
        """The prompt has an image or a video."""
        return bool(self.family.is_placeholder(self.input_ids).any())

    @property
    def images(self) -> tuple[Encoded, ...]:
        """The images and videos as the language model receives them, in the order of the prompt.

        Encodes the whole batch on first use.
        """
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
        """A hash of the sample's images and videos: of their pixels, or of their features if they came as such."""
        digest = hashlib.blake2b(digest_size=16)
        own = self.family.prompt_keys
        parts = [v for k, v in sorted(self.vision.items()) if isinstance(v, Tensor) and k not in own]
        parts = parts if any(pixels in self.vision for pixels in PIXELS.values()) else []
        for part in parts or [image.features for image in self.images]:
            digest.update(content(part))
        return digest.hexdigest()

    @property
    def image_slice(self) -> slice:
        """Where this sample's images, without its videos, stand among the images of its batch."""
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
        """The sample with edited pixels; ``edit`` maps normalised pixels to others of the same shape.

        It is given ``pixel_values`` of this row's images, and then the frames (F, 3, H, W) of each of its videos. Methods
        that add noise or change pictures use :meth:`with_noise` and :meth:`with_pictures`, which know what families do with
        pixels.

        Raises:
            InputError: the images came as features, without pixels.
        """
        return self._edited_pixels(edit, edit, weight)

    def with_noise(self, noise: Callable[[Tensor], Tensor], weight: float = 0.0) -> View:
        """The sample with noise on its pixels; ``noise`` maps normalised pixels to noised ones of the same shape.

        Copies of one picture get the same noise. Each frame of a video gets noise of its own, as when noise is drawn for the
        whole tensor of a video.

        Raises:
            InputError: the images came as features, without pixels.
        """
        return self._edited_pixels(lambda pixels: self.family.tie_noise(noise, pixels), noise, weight)

    def with_pictures(self, edit: Callable[[Tensor], Tensor], weight: float = 0.0) -> View:
        """The sample with other pictures; ``edit`` maps pictures (..., 3, H, W) with values in [0, 1] to others.

        All frames of a video come at once, (F, 3, H, W), so that what ``edit`` draws is the same for all of them.

        Raises:
            InputError: the images came as features, without pixels.
        """

        def pictures(pixels: Tensor) -> Tensor:
            return self.family.edit_pictures(edit, pixels, self.vision)

        def frames(pixels: Tensor) -> Tensor:
            return self.family.edit_normalised(edit, pixels)

        return self._edited_pixels(pictures, frames, weight)

    def with_frames(self, edit: Callable[[Tensor, int], Tensor], weight: float = 0.0) -> View:
        """The sample with other frames in its videos: in another order, or fewer of them.

        Temporal contrastive decoding (arXiv 2409.16597) contrasts with a video of which frames were dropped. The prompt
        follows the number of frames; the time that stands beside a frame, in words or in its position, stays that of its
        place. A sample without a video is unchanged.

        Args:
            edit: ``edit(frames (F, 3, H, W) normalised, number of the video)`` gives at least one and at most F frames of
                the same size; for example ``frames[torch.randperm(len(frames), generator=rng)]`` or ``frames[::2]``.

        Raises:
            InputError: the videos came as features, without pixels, or ``edit`` gave no frame or more than there were.
        """
        if not self.has_video:
            return self.as_view(weight)
        self._check_pixels()
        own = self.family.frames_of(self.vision)
        frames = [edit(before, number) for number, before in enumerate(own)]
        for number, (before, after) in enumerate(zip(own, frames)):
            if not 1 <= len(after) <= len(before) or after.shape[1:] != before.shape[1:]:
                raise InputError(
                    f"a view's video {number} is {tuple(after.shape)} and the sample's {tuple(before.shape)}; an edit of "
                    "frames keeps their size, and gives at least one and no more than there were."
                )
        vision = self.family.with_frames(self.vision, frames)
        ids = self.input_ids
        places = (ids == self.family.placeholder_ids[VIDEO]).nonzero().flatten().tolist()
        keep = torch.ones_like(ids, dtype=torch.bool)
        at = 0
        for had, want in zip(self.family.tokens_per_video(self.vision), self.family.tokens_per_video(vision)):
            # With the last placeholders goes what stands between them: the words beside later frames.
            keep[places[at + want - 1] + 1 : places[at + had - 1] + 1] = False
            at += had
        text = {key: value[:, keep] for key, value in self.text.items()}
        return View(dataclasses.replace(self, text=text, vision=vision, own_images=None), weight)

    @property
    def has_video(self) -> bool:
        token = self.family.placeholder_ids.get(VIDEO)
        return token is not None and bool((self.input_ids == token).any())

    def _check_pixels(self) -> None:
        for kind, pixels in PIXELS.items():
            token = self.family.placeholder_ids.get(kind)
            if token is not None and pixels not in self.vision and bool((self.input_ids == token).any()):
                raise InputError(
                    f"this method edits pixels, and the {kind}s were given as features; pass {pixels} to generate()."
                )

    def _edited_pixels(
        self, images: Callable[[Tensor], Tensor], frames: Callable[[Tensor], Tensor], weight: float
    ) -> View:
        """The sample with images, and frames (F, 3, H, W) of videos, under an edit each."""
        if not self.has_image:
            return self.as_view(weight)
        self._check_pixels()
        vision = dict(self.vision)
        if PIXELS[IMAGE] in vision:
            vision[PIXELS[IMAGE]] = images(vision[PIXELS[IMAGE]])
        if PIXELS[VIDEO] in vision:
            vision = self.family.with_frames(vision, [frames(own) for own in self.family.frames_of(vision)])
        return View(dataclasses.replace(self, vision=vision, own_images=None), weight)

    def in_order(self, images: Sequence[Encoded]) -> tuple[Encoded, ...]:
        """``images``, those of each kind in order, as they stand in the prompt."""
        starts = [places[0] for places in self._places(images)]
        return tuple(images[i] for i in sorted(range(len(images)), key=starts.__getitem__))

    def _places(self, images: Sequence[Encoded]) -> list[list[int]]:
        """Per image or video its placeholders."""
        left = {
            kind: (self.input_ids == token).nonzero().flatten().tolist()
            for kind, token in self.family.placeholder_ids.items()
        }
        out = []
        for image in images:
            count = len(image.features)
            out.append(left[image.kind][:count])
            left[image.kind] = left[image.kind][count:]
        return out

    def with_features(self, edit: Callable[[Tensor, int], Tensor], weight: float = 0.0, deep: bool = False) -> View:
        """The sample with edited features; ``edit(features (n, D), number)`` may change n.

        ``number`` counts the images and videos of the prompt. Placeholders in the prompt follow the new number of features.

        Args:
            deep: edit also what goes into deeper layers, for families that have such features.
        """
        images = []
        for number, image in enumerate(self.images):
            features = edit(image.features, number)
            if len(features) != len(image.features) and (image.deep or self.family.position_keys):
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
        # What stands between the placeholders of a video, the times of its frames, stays with them.
        if all(len(own.features) == len(image.features) for own, image in zip(self.images, images)):
            text = self.text
        assert len(spans) == len(images), (len(spans), len(images), ids.shape)
        return dataclasses.replace(self, text=text, own_images=images)

    def image_spans(self) -> list[tuple[int, int]]:
        """Per image or video [start, stop) of its placeholders; separators inside its grid belong to its span."""
        return [(own[0], own[-1] + 1) for own in self._places(self.images)]

    def without_image(self, weight: float = 0.0, instead: int | Tensor | None = None) -> View:
        """The sample with its images and videos and their placeholders taken out of the prompt.

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
        image, before = self.family.is_placeholder(input_ids), self.family.is_placeholder(self.input_ids)
        if not torch.equal(input_ids[image], self.input_ids[before]):
            raise InputError("a view's prompt must keep the image placeholders of the sample; their number changed.")
        text = {}
        for key, value in self.text.items():
            if key == "input_ids":
                text[key] = input_ids[None]
                continue
            types = torch.full_like(input_ids, (fill or {}).get(key, 0))
            types[image] = value[0][before]
            text[key] = types[None]
        return View(dataclasses.replace(self, text=text, own_images=self.own_images), weight)

    def with_prefix(self, prefix: str, weight: float = 0.0, instead_of: str = "") -> View:
        """The sample with ``prefix`` put before its prompt, after the begin token.

        Args:
            instead_of: text at the prompt's beginning that ``prefix`` takes the place of.

        Raises:
            InputError: the prompt does not begin with ``instead_of``.
        """
        base = self.input_ids
        if instead_of:
            _, at = self.family.insert_prefix(base, base[:0])
            images = (~self.family.drop_image(base)).nonzero().flatten()
            end = int(images[0]) if len(images) else len(base)

            def exchange(text: str) -> str:
                if not text.startswith(instead_of):
                    raise InputError(
                        f"the prompt does not begin with {instead_of!r}, which is to be taken away; it begins with "
                        f"{text[:40]!r}. Give the text as it stands in the prompt."
                    )
                rest = text.removeprefix(instead_of)
                return prefix + (rest.removeprefix(" ") if prefix.endswith(" ") else rest)

            # As text: some tokenizers join a word with the space before it, so that the words' own tokens are not there.
            return self.with_ids(self._edited(base, at, end, exchange), weight)
        return self.with_ids(self.family.insert_prefix(base, self._tokens(prefix))[0], weight)

    def with_text(self, edit: Callable[[str], str], weight: float = 0.0) -> View:
        """The sample with edited words: ``edit`` sees what follows the last image, or the whole prompt if there is none.

        Only the tokens of what it changes are replaced.
        """
        ids = self.input_ids
        images = (~self.family.drop_image(ids)).nonzero().flatten()
        start = int(images[-1]) + 1 if len(images) else self.family.insert_prefix(ids, ids[:0])[1]
        return self.with_ids(self._edited(ids, start, len(ids), edit), weight)

    def _edited(self, whole: Tensor, start: int, stop: int, edit: Callable[[str], str]) -> Tensor:
        """``whole`` after ``edit`` of the text of its tokens from ``start`` to ``stop``.

        Where the tokenizer makes of the old text the tokens that stand there, it makes those of the new text. Otherwise tokens
        before and after the change stay.
        """
        ids = whole[start:stop]

        def read(part: Tensor) -> str:
            return self.tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)

        old = read(ids)
        new = edit(old)
        if new == old:
            return whole

        def put(words: Tensor) -> Tensor:
            return torch.cat([whole[:start], words, whole[stop:]])

        # Some tokenizers put a space before a text that does not follow a special token.
        for before in ("", read(whole[start - 1 : start]) if start else ""):
            lead = self._tokens(before) if before else ids[:0]
            if torch.equal(self._tokens(before + old), torch.cat([lead, ids])):
                return put(self._tokens(before + new)[len(lead) :])
        head = next(n for n in range(len(ids), -1, -1) if new.startswith(read(ids[:n])))
        rest = new[len(read(ids[:head])) :]
        tail = next(n for n in range(head, len(ids) + 1) if n == len(ids) or rest.endswith(read(ids[n:])))
        if tail < len(ids):
            rest = rest[: len(rest) - len(read(ids[tail:]))]
        # Some tokenizers put a space before any text they are given, and their tokens begin with the space before a word.
        candidates = [
            torch.cat([ids[:head], self._tokens(words), ids[tail:]])
            for words in (rest, rest.lstrip(" "), rest.rstrip(" "), rest.strip(" "))
        ]
        return put(next((found for found in candidates if read(found) == new), candidates[0]))

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

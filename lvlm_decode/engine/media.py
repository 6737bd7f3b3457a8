"""The images, or the videos, of a batch: which row each belongs to, and what the encoder says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..families.base import Family
from .hf import Encoded
from .hf.vision import IMAGE, PIXELS, VIDEO

#: Kind -> its article.
_A = {IMAGE: "an", VIDEO: "a"}


class Media:
    """All images, or all videos, of a batch.

    Args:
        family: the model's adapter.
        kind: which of them.
        inputs: the encoder's inputs of the whole batch; empty without any.
        places: per row its number of placeholders.
        features: what the caller encoded, or ``None``.

    Raises:
        InputError: placeholders without anything to fill them, or the other way round.
    """

    def __init__(
        self,
        family: Family,
        kind: str,
        inputs: dict[str, Any],
        places: list[int],
        features: Sequence[Encoded] | None = None,
    ):
        self.family, self.kind, self.inputs, self.places = family, kind, inputs, places
        self.pixels = PIXELS[kind]
        #: Per row what the encoder said; empty before it was asked.
        self.items: list[tuple[Encoded, ...]] = []
        #: Per row, and one more, the number of the first of its items.
        self.starts: list[int] = []
        if features is not None:
            self.assign(features)
            self.check_used(self.starts[-1], len(features))
        elif self.pixels not in inputs:
            if any(places):
                row = next(i for i, n in enumerate(places) if n)
                raise InputError(
                    f"row {row} has {places[row]} {kind} placeholders and no {self.pixels} were given; pass the {kind} to "
                    "the processor together with the text."
                )
            self.items, self.starts = [()] * len(places), [0] * (len(places) + 1)
        elif not any(places):
            a = _A[kind]
            raise InputError(
                f"{self.pixels} were given and no prompt has {a} {kind} token; write the {kind} into the prompt "
                f"(apply_chat_template with {a} {kind} part, or the processor's {kind} token)."
            )

    @property
    def pending(self) -> bool:
        """The encoder has not been asked."""
        return not self.starts

    def rows(self, encode: Callable[[], Any]) -> list[dict[str, Tensor]]:
        """The encoder's inputs of each row.

        Args:
            encode: encodes the batch, where only that tells how many items a row has.
        """
        pixels = self.inputs.get(self.pixels)
        count, image = len(self.places), self.kind == IMAGE
        if pixels is None:
            # What the caller encoded may come with the grids that its positions are made from.
            return self._share([len(items) for items in self.items], None)
        taken = self.family.pixel_rows(self.inputs) if image else self.family.video_rows(self.inputs)
        one_each = len(pixels) == count and all(self.places) and taken is None
        if one_each or (image and self.family.pixels_per_row):
            if len(pixels) != count:
                raise InputError(
                    f"the batch has {count} prompts and {self.pixels} of {len(pixels)}; pass one {self.kind} entry per prompt."
                )
            return [
                {k: v[row : row + 1] if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
                if self.places[row]
                else {}
                for row in range(count)
            ]
        sizes = self.family.tokens_per_image(self.inputs) if image else self.family.tokens_per_video(self.inputs)
        if sizes is None and count == 1:
            # All are its own. Whether they fill its places shows when they are encoded, which a model without weights cannot.
            counts = [len(pixels)]
        elif sizes is None:
            encode()
            counts = [len(items) for items in self.items]
        else:
            counts = self.count(sizes)
            self.check_used(sum(counts), len(sizes))
        return self._share(counts, taken)

    def _share(self, counts: Sequence[int], taken: Sequence[int] | None) -> list[dict[str, Any]]:
        """The inputs of each row, which has ``counts`` items; an item takes ``taken`` rows of the pixels."""
        out, item, pixel = [], 0, 0
        for number in counts:
            take = sum(taken[item : item + number]) if taken else number
            row: dict[str, Any] = {}
            for key, value in self.inputs.items():
                if not isinstance(value, Tensor):
                    row[key] = value
                elif key == self.pixels:
                    row[key] = value[pixel : pixel + take]
                elif key in self.family.count_keys:
                    row[key] = value.new_tensor([number])
                else:
                    row[key] = value[item : item + number]
            out.append(row if number else {})
            item, pixel = item + number, pixel + take
        return out

    def count(self, sizes: Sequence[int]) -> list[int]:
        """How many items each row takes, so that its placeholders are filled exactly; items may be left over.

        Args:
            sizes: placeholders that each item takes.
        """
        counts, item = [], 0
        for row, need in enumerate(self.places):
            have = taken = 0
            while have < need and item + taken < len(sizes):
                have += sizes[item + taken]
                taken += 1
            if have != need:
                raise InputError(
                    f"row {row} has {need} {self.kind} placeholders and its {self.kind}s give {have} features; the "
                    f"{self.kind}s and the {self.kind} tokens of the batch do not belong together."
                )
            counts.append(taken)
            item += taken
        return counts

    def check_used(self, used: int, have: int) -> None:
        """Raise unless every one of ``have`` items has a place."""
        if used != have:
            raise InputError(
                f"the batch has {have} {self.kind}s and its prompts have places for {used}; every {self.kind} needs one "
                f"{self.kind} token in a prompt."
            )

    def shared(self, encoded: Sequence[Encoded]) -> list[tuple[Encoded, ...]]:
        """Per row its items among ``encoded``, those of the whole batch in order."""
        counts = self.count([len(item.features) for item in encoded])
        out, at = [], 0
        for number in counts:
            out.append(tuple(encoded[at : at + number]))
            at += number
        return out

    def assign(self, encoded: Sequence[Encoded]) -> None:
        """Keep what the encoder said."""
        self.items, self.starts = self.shared(encoded), [0]
        for own in self.items:
            self.starts.append(self.starts[-1] + len(own))

    def slice(self, row: int) -> slice:
        """Where the items of a row stand among those of the batch."""
        return slice(self.starts[row], self.starts[row + 1])

    def part(self, vision: dict[str, Any]) -> dict[str, Any]:
        """Of a row's inputs those of this kind; empty where it has none."""
        return (
            {key: vision[key] for key in self.family.keys_of(self.kind) if key in vision}
            if self.pixels in vision
            else {}
        )

    def encode(self, parts: Sequence[dict[str, Tensor]]) -> list[Encoded]:
        """What the encoder says of ``parts``, in order, in one pass."""
        if self.kind == IMAGE:
            return self.family.encode(self.family.cat_vision(parts))
        return self.family.encode_videos(parts)

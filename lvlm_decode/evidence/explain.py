"""Decode one answer and keep its evidence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvlm_decode_evals.base import Question
from lvlm_decode_evals.loaders import folder_images
from lvlm_decode_evals.runner import Options, prompt_of

from ..attachment import attached
from ..engine.run import Run
from ..engine.samples import Sample
from ..errors import InputError
from ..families.base import Family
from ..method import Method, Places, View
from ..methods import parse
from ..methods.plain import Plain
from ..pages import data_uri
from ..speculative.drafters.base import Drafter
from .explanation import Candidate, Draft, Explanation, Mask, Overlay, Returned, Row, Shown, Token
from .record import Evidence, Record

#: Of the longer side of a picture on the page, in pixels.
PICTURE_SIZE = 800


def explain(
    model: Any,
    processor: Any,
    image: Any,
    prompt: str,
    method: Method | str,
    *,
    drafter: Drafter | str | None = None,
    seed: int = 0,
    max_new_tokens: int = 64,
    top: int = 8,
) -> Explanation:
    """Decode one answer greedily (a search searches), and return why each of its tokens came.

    Candidates are shown as the method leaves them, before the processors of ``generate()``, such as a repetition penalty in
    the model's generation configuration. For a method that changes view 0 or searches, plain decoding's probabilities come
    from one more forward over the answer.

    Args:
        image: a PIL image, or the path of one.
        prompt: the question; the model's chat template is put around it unless it holds the image token already.
        method: for instance ``VCD(alpha=1.0)``, or ``"vcd+ritual"``.
        drafter: as in :func:`lvlm_decode.attach`; shows which tokens it proposed.
        seed: of the views.
        max_new_tokens: length of the answer.
        top: candidates that are kept of the method and of plain decoding, each.

    Raises:
        InputError: a number below 1, or an image that cannot be read.
        UnsupportedError: what :func:`lvlm_decode.attach` refuses.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("top", top)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1.")
    method = parse(method) if isinstance(method, str) else method
    picture = opened(image)
    text = worded(processor, prompt)
    inputs = processor(images=[picture], text=[text], return_tensors="pt").to(model.device)
    searches = hasattr(method, "decode")
    # A patch may change view 0, and then its logits are not plain decoding's.
    later = searches or any(type(part).patch is not Method.patch for part in method.parts())
    record = Record(top, later)
    with attached(model, method, processor=processor, drafter=drafter, recorder=record), torch.no_grad():
        out = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, seed=seed)
    run = record.run
    assert run is not None
    answer = out[0, inputs["input_ids"].shape[1] :].tolist()
    record.finish(answer)
    if later:
        record.settle(plain_logits(run, inputs, processor, answer), answer)
    return told(run, record, method, prompt, answer, picture, drafter)


def opened(image: Any) -> Any:
    """The PIL image, in RGB."""
    if isinstance(image, str | Path):
        path = Path(image)
        return folder_images(path.parent, allow_outside=True).open(path.name)
    if not hasattr(image, "convert"):
        raise InputError(f"image is {type(image).__name__}; pass a PIL image or the path of one.")
    return image.convert("RGB")


def worded(processor: Any, prompt: str) -> str:
    """The prompt with the image's token in it."""
    token = getattr(processor, "image_token", None)
    if isinstance(token, str) and token in prompt:
        return prompt
    return prompt_of(processor, Question("", prompt, "image"), Options())


def plain_logits(run: Run, inputs: Any, processor: Any, answer: Sequence[int]) -> Tensor:
    """(T, N) logits of plain decoding after each prefix of the answer, from one forward over it."""
    plain = Run(run.model, Plain(), dict(inputs), processor=processor, family=run.family)
    tail = torch.tensor([answer[:-1]], dtype=torch.long, device=run.prepared[0].input_ids.device)
    with torch.no_grad():
        scores, _ = plain.open().prefill(tail if len(answer) > 1 else None, keep=len(answer))
    return scores[0]


# --- from ids and tensors to what is shown ------------------------------------------------------------------------------


class Words:
    """Texts of tokens.

    Args:
        answer: ids; a token's text is what it adds to the text before it.
    """

    def __init__(self, tokenizer: Any, answer: Sequence[int]):
        self.tokenizer, self.answer = tokenizer, list(answer)
        self.special = set(tokenizer.all_special_ids)

    def pieces(self) -> list[str]:
        """What each token of the answer adds; a letter made of several tokens comes with its last one."""
        out, before = [], ""
        for end, token in enumerate(self.answer, 1):
            text = self._decode(self.answer[:end])
            if token in self.special or text.endswith("\ufffd"):
                out.append(self.name(token) if token in self.special else "")
                continue
            out.append(text[len(before) :])
            before = text
        return out

    def text(self, token: int, at: int) -> str:
        """What ``token`` would add in place of token ``at`` of the answer."""
        if token in self.special:
            return self.name(token)
        # The token before it decides about the space.
        before = [i for i in self.answer[max(0, at - 1) : at] if i not in self.special]
        return self._decode([*before, token])[len(self._decode(before)) :] or self.name(token)

    def name(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def _decode(self, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def told(
    run: Run,
    record: Record,
    method: Method,
    prompt: str,
    answer: Sequence[int],
    picture: Any,
    drafter: Drafter | str | None,
) -> Explanation:
    """The explanation of a finished run."""
    tokenizer = getattr(run.processor, "tokenizer", run.processor)
    words, sample = Words(tokenizer, answer), run.samples[0][0]
    pieces = words.pieces()
    searches = [search for search in record.searches[:1] if hasattr(search, "summaries")]
    leans = searches[0].summaries if searches else []
    tokens = tuple(
        _token(at, token, record.found[at], words, pieces[at], record, leans[at] if at < len(leans) else None)
        for at, token in enumerate(answer)
    )
    returns = [
        Returned(r.length, r.summary, words.text(r.token, 0).strip(), r.kept, words._decode(r.taken_back))
        for search in searches
        for r in search.returns
    ]
    seen = seen_picture(run.family, sample) or picture
    count = sum(len(image.features) for image in sample.images)
    return Explanation(
        model=Path(str(getattr(run.model, "name_or_path", "") or type(run.model).__name__)).name,
        method=" + ".join(part.name for part in method.parts()),
        parameters={
            (f"{part.name}.{f.name}" if len(method.parts()) > 1 else f.name): getattr(part, f.name)
            for part in method.parts()
            for f in dataclasses.fields(part)
        },
        prompt=prompt,
        answer=words._decode(list(answer)).strip(),
        seed=0 if run.seed is None else run.seed,
        tokens=tokens,
        views=tuple(
            shown_view(run.family, sample, view, column[0]) for view, column in zip(run.views, run.samples[1:])
        ),
        overlays=tuple(overlay(run.family, sample, places) for places in run.method.places(sample)),
        grid=grid_of(run.family, sample, 0, count, encoder=False) if len(sample.images) == 1 else None,
        returns=tuple(returns),
        drafts=tuple(Draft(*draft) for draft in record.drafts),
        drafter=drafter if drafter is None or isinstance(drafter, str) else drafter.name,
        facts={
            name: value[0]
            for name in ("trials", "descriptions", "captions", "certainties")
            if (value := getattr(run.trace, name))
        },
        picture=data_uri(seen, PICTURE_SIZE),
    )


def _token(
    at: int, token: int, found: Evidence, words: Words, text: str, record: Record, leans_on: int | None
) -> Token:
    mask = None
    if found.kept is not None:
        barred = None if found.barred is None else (found.barred, words.text(found.barred, at))
        size = len(words.tokenizer)
        mask = Mask(found.kept, max(size - found.kept, 0), found.removed_mass, barred)
    return Token(
        index=at,
        id=token,
        text=text,
        special=token in words.special,
        plain_id=found.plain,
        plain_text=words.text(found.plain, at),
        changed=found.plain != token,
        shift=found.shift,
        distance=found.distance,
        candidates=tuple(Candidate(i, words.text(i, at), *rest) for i, rest in found.probabilities.items()),
        mask=mask,
        choices=found.choices,
        attention=tuple(
            Row(title, tuple(weights.tolist()), None if chosen is None else tuple(chosen.tolist()))
            for title, (weights, chosen) in found.attention.items()
        ),
        drafted=at in record.drafted if record.drafts else None,
        leans_on=leans_on,
    )


def shown_view(family: Family, sample: Sample, view: View, own: Sample) -> Shown:
    """What a view changes about the sample, in a clause."""
    picture = None
    pixels, base = own.vision.get("pixel_values"), sample.vision.get("pixel_values")
    if view.module is not None:
        title = "another model"
    elif view.patch is not None:
        title = "the model changed for this view"
    elif sample.images and not own.images:
        bare = sample.input_ids[family.drop_image(sample.input_ids)]
        title = "no image" if torch.equal(own.input_ids, bare) else "other tokens in the image's place"
    elif pixels is not None and base is not None and (pixels.shape != base.shape or not torch.equal(pixels, base)):
        title = "edited pixels"
        image = seen_picture(family, own)
        picture = None if image is None else data_uri(image, PICTURE_SIZE // 2)
    elif not torch.equal(own.input_ids, sample.input_ids) and len(own.images) == len(sample.images):
        same = all(len(a.features) == len(b.features) for a, b in zip(own.images, sample.images))
        title = "another prompt" if same else "fewer image tokens"
    elif any(not torch.equal(a.features, b.features) for a, b in zip(own.images, sample.images)):
        title = "edited image features"
    elif view.mark:
        title = "the same input, other attention"
    else:
        title = "the same input"
    return Shown(title, view.weight, picture)


def seen_picture(family: Family, sample: Sample) -> Any:
    """The first image as the model sees it; ``None`` where its pixels are no picture (cut into patches)."""
    from PIL import Image

    pixels = sample.vision.get("pixel_values")
    if pixels is None or pixels.dim() not in (4, 5):
        return None
    # Of an image in tiles the first one is the whole.
    first = pixels[0, 0] if pixels.dim() == 5 else pixels[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in family.pixel_statistics)
    values = ((first.float().cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def grid_of(family: Family, sample: Sample, number: int, count: int, encoder: bool) -> tuple[int, int] | None:
    """Rows and columns in which ``count`` places lie on the picture; ``None`` where they do not."""
    grids, pixels = sample.vision.get("image_grid_thw"), sample.vision.get("pixel_values")
    if grids is not None:
        _, rows, columns = grids[number].tolist()
        merge = 1 if encoder else getattr(family.config.vision_config, "spatial_merge_size", 1)
        rows, columns = rows // merge, columns // merge
        return (rows, columns) if rows * columns == count else None
    if not encoder and (family.has_qformer or pixels is None or pixels.dim() != 4 or len(pixels) != len(sample.images)):
        # The tokens of a Q-Former have no place; those of tiles and separators stand in no one grid.
        return None
    side = math.isqrt(count)
    return (side, side) if side * side == count else None


def overlay(family: Family, sample: Sample, places: Places) -> Overlay:
    """Places as values."""
    count = len(places.chosen)
    return Overlay(
        places.title,
        count,
        tuple(places.chosen.nonzero().flatten().tolist()),
        None if places.weights is None else tuple(places.weights.float().tolist()),
        grid_of(family, sample, places.image, count, places.encoder),
    )

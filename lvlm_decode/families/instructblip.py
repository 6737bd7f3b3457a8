"""InstructBLIP: a Q-Former reads the prompt too, and the language model decodes from embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine import hf
from ..engine.hf import Encoded
from ..engine.hf import vision as encoded
from ..engine.hooks import hooked
from ..errors import UnsupportedError
from .base import Family


class InstructBlip(Family):
    """Two prompt slots: ``input_ids`` for the language model, ``qformer_input_ids`` for the Q-Former.

    The visual tokens depend on the Q-Former's prompt, so a view with another one has its own. The vision encoder runs
    once per picture all the same: only the Q-Former runs again.

    Every row has one picture and its placeholders; a row of text alone is refused. So is an encoder-decoder as the language
    model (Flan-T5): only a decoder alone is supported.
    """

    encoder_inputs = ("pixel_values", "qformer_input_ids", "qformer_attention_mask", "interpolate_pos_encoding")
    prompt_keys = ("qformer_input_ids", "qformer_attention_mask")
    pixels_per_row = True
    has_qformer = True

    def __init__(self, model: Any):
        super().__init__(model)
        if self.config.get_text_config().is_encoder_decoder:
            raise UnsupportedError(
                f"this {self.config.model_type} has an encoder-decoder language model "
                f"({self.config.get_text_config().model_type}), which reads its prompt apart from its answer; use one with "
                "a decoder alone, such as Vicuna."
            )

    def cat_vision(self, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """As the base, with each picture once; ``picture`` (rows,) says which one each row looks at."""
        known: dict[tuple[int, torch.Size], int] = {}
        pictures: list[Tensor] = []
        index: list[int] = []
        for part in parts:
            for picture in part["pixel_values"]:
                # Views without edits hold the very memory of the batch's pixels.
                key = (picture.data_ptr(), picture.shape)
                if key not in known or part is parts[0]:
                    known[key] = len(pictures)
                    pictures.append(picture)
                index.append(known[key])
        rest = super().cat_vision([{k: v for k, v in part.items() if k in self.prompt_keys} for part in parts])
        return {
            **rest,
            "pixel_values": torch.stack(pictures),
            "picture": torch.tensor(index, device=pictures[0].device),
        }

    def encode(self, vision: dict[str, Tensor]) -> list[Encoded]:
        index = vision["picture"]

        def share(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return encoded.repeated(output, index)

        with hooked(after={self.model.get_encoder(modality="image"): share}):
            return super().encode(vision)

    def generate(
        self,
        text: dict[str, Tensor],
        vision: dict[str, Tensor],
        images: Sequence[Encoded],
        loop: Any = None,
        **kwargs: Any,
    ) -> Any:
        rows = len(text["input_ids"])
        inputs: dict[str, Any] = dict(text, pixel_values=torch.empty(rows, 0, device=text["input_ids"].device))

        def given(*args: Any, **ignored: Any) -> Any:
            if images:
                return self.pack(images)[encoded.IMAGE]
            return encoded.no_images(self.config.get_text_config().hidden_size, text["input_ids"].device)

        # Its own generate() insists on pixels and encodes them; what follows from the features is kept.
        return hf.generate(self.model, loop, own={"get_image_features": given}, **inputs, **kwargs)

    def infer_mask(self, input_ids: Tensor, options: dict[str, Any]) -> Tensor:
        # Its own generate() takes every token for one to read.
        return torch.ones_like(input_ids)

    def decoding_module(self, model: Any) -> Any:
        return model.language_model

    def projector(self) -> torch.nn.Module:
        return self._whole.language_projection

    def before_projector(self) -> list[torch.nn.Module]:
        return [self.model.get_encoder(modality="image"), self._whole.qformer]

    @property
    def _whole(self) -> Any:
        """The module that owns the Q-Former."""
        return self.model if hasattr(self.model, "qformer") else self.model.model

    def cls_layer(self) -> Any:
        return self.model.get_encoder(modality="image").encoder.layers[-2].self_attn

    def cls_query_and_keys(self, attention: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        query, key, _ = attention.qkv(states).chunk(3, -1)
        return query[:, 0], key

    def only_patches(self, sample: Any, number: int, index: Tensor, states: Tensor, fix_offset: bool) -> Tensor:
        whole, (name, mask) = self._whole, self.prompt_keys
        patches = states[index + fix_offset][None]
        queries = whole.query_tokens
        seen = torch.cat([torch.ones_like(queries[..., 0], dtype=torch.long), sample.vision[mask]], 1)
        with torch.no_grad():
            read = whole.qformer(
                input_ids=sample.vision[name],
                attention_mask=seen,
                query_embeds=queries,
                encoder_hidden_states=patches,
                encoder_attention_mask=torch.ones_like(patches[..., 0], dtype=torch.long),
                return_dict=True,
            )
            return whole.language_projection(read.last_hidden_state[:, : queries.shape[1]])[0]

    def insert_prefix(self, input_ids: Tensor, prefix: Tensor) -> tuple[Tensor, int]:
        # The image comes first, then the begin token and the text.
        at = int((input_ids == self.image_token_id).sum())
        bos = self.config.get_text_config().bos_token_id
        if at < len(input_ids) and bos is not None and int(input_ids[at]) == bos:
            at += 1
        return torch.cat([input_ids[:at], prefix, input_ids[at:]]), at

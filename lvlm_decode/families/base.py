"""What the engine asks of a model family; the defaults serve LLaVA and most families that follow its conventions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..engine import hf
from ..engine.hf import Encoded, Prepared, decoder
from ..engine.hf import vision as encoded
from ..engine.hf.vision import IMAGE, PIXELS, VIDEO
from ..engine.hooks import replaced
from ..errors import InputError, UnsupportedError


class Family:
    """How one model family is given its text, its images and its videos.

    What is said of images here is said of still pictures; videos have functions of their own. Families whose processor hands
    over a video as images (InternVL, SmolVLM) have no videos for this library.
    """

    #: Inputs of the encoders of images and videos that models of this family know, pixels first.
    encoder_inputs: tuple[str, ...] = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy")
    #: Text-side inputs, (B, T) each, beside ``input_ids`` and ``attention_mask``.
    token_keys: tuple[str, ...] = ("token_type_ids", "mm_token_type_ids")
    #: Inputs that hold a number of images per row, not something per image.
    count_keys: tuple[str, ...] = ()
    #: Inputs, one entry per image or video, that positions are made from.
    position_keys: tuple[str, ...] = ()
    #: Of those the ones that only positions are made from, one entry per video; models without them lack the time of frames.
    clock_keys: tuple[str, ...] = ()
    #: Text that the vision side reads (a Q-Former's prompt) and its mask: inputs of the encoder, (B, T) each.
    prompt_keys: tuple[str, ...] = ()
    #: ``pixel_values`` has one row per sample even when a sample has several images or none.
    pixels_per_row: bool = False
    #: The vision encoder has a CLS token whose attention can be read.
    has_cls: bool = True
    #: The vision encoder sees every image as one grid of one size, not as tiles or at a resolution of its own.
    has_grid: bool = True
    #: A Q-Former reads the prompt, so there is a second slot for it.
    has_qformer: bool = False

    def __init__(self, model: Any):
        self.model: Any = model
        self.config: Any = model.config
        forward = inspect.signature(type(model).forward).parameters
        #: Kind of what an encoder reads -> its inputs.
        self._keys = {
            kind: tuple(
                name
                for name, parameter in inspect.signature(
                    getattr(type(model), f"get_{kind}_features")
                ).parameters.items()
                if name not in ("self", "return_dict") and parameter.kind is not inspect.Parameter.VAR_KEYWORD
            )
            for kind in hf.vision.KINDS
            if kind == IMAGE or (PIXELS[kind] in self.encoder_inputs and PIXELS[kind] in forward)
        }
        self._clock = tuple(name for name in self.clock_keys if name in forward)
        #: Kind -> what its encoder returned last, which :meth:`pack` follows.
        self._templates: dict[str, Any] = {}

    @property
    def image_token_id(self) -> int:
        return self.config.image_token_id

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """Kind of what the model sees -> the token that stands for a part of it."""
        ids = {IMAGE: self.image_token_id}
        return {**ids, VIDEO: self.config.video_token_id} if VIDEO in self._keys else ids

    def is_placeholder(self, input_ids: Tensor) -> Tensor:
        """(...) bool: which tokens of (...) stand for a part of an image or of a video."""
        first, *rest = self.placeholder_ids.values()
        found = input_ids == first
        for token in rest:
            found = found | (input_ids == token)
        return found

    @property
    def pad_token_id(self) -> int:
        for config in (self.model.generation_config, self.config, self.config.get_text_config()):
            value = getattr(config, "pad_token_id", None)
            if value is not None:
                return value if isinstance(value, int) else value[0]
        return 0

    @property
    def vision_keys(self) -> tuple[str, ...]:
        """Inputs of the encoders: pixels of images and videos and whatever is needed to read them and place them."""
        return tuple(dict.fromkeys(name for kind in self._keys for name in self.keys_of(kind)))

    def keys_of(self, kind: str) -> tuple[str, ...]:
        """Of :attr:`vision_keys` those of images, or those of videos; options of the encoder are both's."""
        return (*self._keys[kind], *(self._clock if kind == VIDEO else ()))

    @property
    def input_keys(self) -> tuple[str, ...]:
        """Inputs that samples of this family are made of, beside the prompt and its mask."""
        return (*self.token_keys, *self.vision_keys)

    def infer_mask(self, input_ids: Tensor, options: dict[str, Any]) -> Tensor:
        """(B, T) the mask that the model's own ``generate()`` infers where none is given.

        Args:
            options: further arguments of ``generate()``, which may name the padding.
        """
        return hf.mask_of(self.model, input_ids, options)

    def tokens_per_image(self, vision: dict[str, Tensor]) -> list[int] | None:
        """How many placeholders each image takes, where the inputs alone tell; ``None`` means: encode to know."""
        return None

    def tokens_per_video(self, vision: dict[str, Tensor]) -> list[int]:
        """How many placeholders each video takes.

        Raises:
            UnsupportedError: this family's adapter reads no videos.
        """
        raise self._reads_no_videos("tokens_per_video")

    def video_rows(self, vision: dict[str, Tensor]) -> list[int] | None:
        """Rows of ``pixel_values_videos`` that each video takes; ``None`` means one."""
        return None

    def frames_of(self, vision: dict[str, Tensor]) -> list[Tensor]:
        """Per video its frames (F, 3, H, W), normalised.

        Raises:
            UnsupportedError: this family's adapter reads no videos.
        """
        raise self._reads_no_videos("frames_of")

    def with_frames(self, vision: dict[str, Tensor], frames: Sequence[Tensor]) -> dict[str, Tensor]:
        """``vision`` with other frames, (F, 3, H, W) per video, of the same sizes; their number may be smaller.

        Raises:
            UnsupportedError: this family's adapter reads no videos.
        """
        raise self._reads_no_videos("with_frames")

    def _reads_no_videos(self, missing: str) -> UnsupportedError:
        return UnsupportedError(f"{type(self).__name__} reads no videos; give its adapter {missing}.")

    def pixel_rows(self, vision: dict[str, Tensor]) -> list[int] | None:
        """Rows of ``pixel_values`` that each image takes; ``None`` means one."""
        return None

    def cat_vision(self, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Vision inputs of several samples as one batch; prompts of the vision side are right-padded."""
        out = {}
        for key in parts[0]:
            rows = [part[key] for part in parts]
            if not isinstance(rows[0], Tensor):
                # An option of the encoder, the same for the whole call.
                out[key] = rows[0]
                continue
            if key in self.prompt_keys:
                width = max(row.shape[1] for row in rows)
                rows = [torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in rows]
            out[key] = torch.cat(rows)
        return out

    def encode(self, vision: dict[str, Tensor]) -> list[Encoded]:
        """One vision pass: every image of ``vision``, in order.

        Args:
            vision: ``pixel_values`` and what goes with them, and a Q-Former's prompt where there is one.
        """
        return self._split(self._encoded(IMAGE, vision))

    def encode_videos(self, parts: Sequence[dict[str, Tensor]]) -> list[Encoded]:
        """The videos of several samples, in order.

        Args:
            parts: per sample the inputs of its videos.
        """
        own = {
            key: torch.cat([part[key] for part in parts]) if isinstance(value, Tensor) else value
            for key, value in parts[0].items()
        }
        return encoded.unpack(self._encoded(VIDEO, own), VIDEO)

    def _encoded(self, kind: str, vision: dict[str, Tensor]) -> Any:
        kwargs: dict[str, Any] = {key: value for key, value in vision.items() if key in self._keys[kind]}
        kwargs[PIXELS[kind]] = kwargs[PIXELS[kind]].to(self.model.dtype)
        hf.check_gathered(self.model, f"get_{kind}_features")
        with torch.no_grad():
            out = getattr(self.model, f"get_{kind}_features")(**kwargs, return_dict=True)
        self._templates[kind] = out
        return out

    def _split(self, out: Any) -> list[Encoded]:
        return encoded.unpack(out)

    def pack(self, images: Sequence[Encoded]) -> dict[str, Any]:
        """Images and videos by kind as the model's own encoders would have returned them; fresh objects."""
        kinds = {kind: [image for image in images if image.kind == kind] for kind in self._keys}
        return {kind: encoded.pack(own, self._templates[kind]) for kind, own in kinds.items() if own}

    def generate(
        self,
        text: dict[str, Tensor],
        vision: dict[str, Tensor],
        images: Sequence[Encoded],
        loop: Any = None,
        **kwargs: Any,
    ) -> Any:
        """``generate()`` of the model's own class on prepared features: no pixels, no second vision pass.

        Args:
            text: ``input_ids``, ``attention_mask`` and token types of the rows.
            vision: the inputs of ``position_keys`` of all images and videos of the rows.
            images: the images and videos of the rows, in order.
            loop: see :func:`lvlm_decode.engine.hf.generate`.
        """
        inputs: dict[str, Any] = {**text, **vision}
        return hf.generate(self.model, loop, **inputs, **hf.with_images(self.pack(images)), **kwargs)

    def prepare(self, text: dict[str, Tensor], vision: dict[str, Tensor], images: Sequence[Encoded]) -> Prepared:
        """Let the model's own ``generate()`` prepare a batch, and stop before its first forward."""
        return hf.prepare(
            lambda **more: self.generate(text, vision, images, **more),
            text["attention_mask"],
            self.token_keys,
            self.vision_keys,
        )

    def drop_image(self, input_ids: Tensor) -> Tensor:
        """(T,) bool: which tokens of a prompt stay when its images and videos are taken away."""
        return ~self.is_placeholder(input_ids)

    def runs(self, input_ids: Tensor) -> list[tuple[int, int]]:
        """[start, stop) of the placeholders that stand side by side in (T,) ids."""
        places = self.is_placeholder(input_ids).nonzero().flatten().tolist()
        starts = [at for at, before in zip(places, [-1, *places]) if at != before + 1 or at == places[0]]
        stops = [at + 1 for at, after in zip(places, [*places[1:], -1]) if after != at + 1]
        return list(zip(starts, stops))

    def insert_prefix(self, input_ids: Tensor, prefix: Tensor) -> tuple[Tensor, int]:
        """(T + P,) the prompt with ``prefix`` (P,) after its begin token, and where it was put."""
        bos = getattr(self.config.get_text_config(), "bos_token_id", None)
        at = 1 if len(input_ids) and bos is not None and int(input_ids[0]) == bos else 0
        return torch.cat([input_ids[:at], prefix, input_ids[at:]]), at

    def unpack(self, packed: Mapping[str, Any]) -> list[Encoded]:
        """The images and videos that the user passed in encoded, by kind, as the model's own encoders return them.

        Raises:
            UnsupportedError: videos, where the model takes none.
        """
        out: list[Encoded] = []
        for kind, own in packed.items():
            if kind not in self._keys:
                raise UnsupportedError(
                    f"an encoded {kind} cannot be honoured: {self.config.model_type} takes none; leave it out."
                )
            self._templates[kind] = own
            out += self._split(own) if kind == IMAGE else encoded.unpack(own, kind)
        return out

    def tie_noise(self, noise: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        """``noise(pixels)``; a hook for families that hold copies of a picture, which must get the same noise."""
        return noise(pixels)

    @property
    def pixel_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation per channel that the processor normalised by."""
        if self.config.vision_config.model_type.startswith("siglip"):
            return (0.5,) * 3, (0.5,) * 3
        return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    def edit_pictures(self, edit: Callable[[Tensor], Tensor], pixels: Tensor, vision: dict[str, Tensor]) -> Tensor:
        """``edit`` the pictures behind normalised ``pixels`` (..., 3, H, W): it sees and returns values in [0, 1].

        Args:
            vision: the inputs ``pixels`` came with, for families that need them to see the pictures.
        """
        return self.edit_normalised(edit, pixels)

    def edit_normalised(self, edit: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        """``edit`` of normalised pictures (..., 3, H, W): it sees and returns values in [0, 1]."""
        mean, std = (torch.tensor(v).view(3, 1, 1).to(pixels) for v in self.pixel_statistics)
        return (edit((pixels * std + mean).float().clamp(0, 1)).to(pixels) - mean) / std

    def routers(self) -> list[torch.nn.Module]:
        """The decoder's top-k routers, each of which says (logits, weights, experts) per token."""
        return decoder.routers(self.model)

    @property
    def has_experts(self) -> bool:
        return bool(self.routers())

    @property
    def has_patches(self) -> bool:
        """Every image token is one patch of an encoder with a CLS token."""
        return self.has_cls and not self.has_qformer

    @property
    def has_plain_layers(self) -> bool:
        """Every decoder layer is two norms, attention and an MLP, and nothing else."""
        return decoder.plain_layers(self.decoding_module(self.model))

    def decoding_module(self, model: Any) -> Any:
        """The part of ``model``, one of this family, whose loop decodes."""
        return model

    def projector(self) -> torch.nn.Module:
        """The vision-language projector."""
        return self.model.model.multi_modal_projector

    def before_projector(self) -> list[torch.nn.Module]:
        """The modules whose outputs, kept, let the images be projected again without encoding them again."""
        return [self.model.get_encoder(modality="image")]

    def vision_layers(self) -> list[torch.nn.Module]:
        """The layers of the vision encoder, the first one first."""
        return list(self.model.get_encoder(modality="image").encoder.layers)

    def putting_out(self, states: Any) -> AbstractContextManager[None]:
        """In the block every layer of the vision encoder puts out ``states``; none runs.

        Args:
            states: what one of :meth:`vision_layers` puts out.
        """
        return replaced(dict.fromkeys(self.vision_layers(), lambda *args, **kwargs: states))

    def cls_layer(self) -> Any:
        """The self-attention of the encoder layer that produces the features."""
        layer = self.config.vision_feature_layer
        layer = layer if isinstance(layer, int) else layer[-1]
        # hidden_states[0] are the embeddings.
        return self.model.get_encoder(modality="image").encoder.layers[layer - (layer > 0)].self_attn

    def cls_query_and_keys(self, attention: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        """(M, D) query of the CLS token and (M, 1 + P, D) keys, heads side by side, from states (M, 1 + P, D)."""
        return attention.q_proj(states[:, 0]), attention.k_proj(states)

    def encoder_rows(self, vision: dict[str, Tensor]) -> list[int]:
        """Per image the row of the encoder's batch that holds it whole."""
        return list(range(len(vision["pixel_values"])))

    def only_patches(self, sample: Any, number: int, index: Tensor, states: Tensor, fix_offset: bool) -> Tensor:
        """(n, D) features of an image of which only some patches are left.

        Args:
            sample: the sample, whose image ``number`` is meant.
            index: (k,) patches, in the order wanted.
            states: (1 + P, D_vision) last states of the encoder, CLS first.
            fix_offset: see :class:`lvlm_decode.methods.damro.DAMRO`.
        """
        features = sample.images[number].features
        return features[index.to(features.device) + (self.config.vision_feature_select_strategy == "full")]

    def check_text(self, text: dict[str, Tensor]) -> None:
        if text.get("input_ids") is None:
            raise InputError(
                "no input_ids were given; this library reads the image placeholders from them, so pass the processor's "
                "whole output: model.generate(**processor(...))."
            )
        ids = text["input_ids"]
        if not isinstance(ids, Tensor):
            raise InputError(
                f"input_ids is a {type(ids).__name__} and no tensor; ask the processor for tensors: "
                "processor(..., return_tensors='pt')."
            )
        if ids.dim() != 2 or ids.is_floating_point():
            raise InputError(
                f"input_ids is {ids.dtype} {tuple(ids.shape)}; pass the processor's whole numbers, (B, T)."
            )

"""Tiny random models of every family, with inputs shaped as the real processors shape them.

A random model whose projector starts at zero, or whose image features drown, reacts to nothing and would let every
contrast pass. So all weights are drawn with unit gain; ``test_families.py`` shows that each model reacts to its image.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import transformers as tf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from ..families import FAMILIES

VOCABULARY = 160
IMAGE, VIDEO, VISION_START, VISION_END = 159, 158, 157, 156
PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3
LAYERS = 4
QUERIES = 4
QFORMER_VOCABULARY = 120

TEXT: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    bos_token_id=BOS,
    eos_token_id=EOS,
    pad_token_id=PAD,
)
VISION: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


def tokenizer(special: dict[str, int]) -> tf.PreTrainedTokenizerFast:
    """One token per printable ASCII character, plus the family's special tokens; pads on the left."""
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN}
    vocabulary |= {chr(32 + i): 4 + i for i in range(95)} | special
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    outer = tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    outer.add_special_tokens({"additional_special_tokens": list(special)})
    outer.padding_side = "left"
    return outer


@dataclass
class Row:
    """One sample before batching: its ids, and what its images and videos add."""

    ids: Tensor
    images: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class Tiny:
    """A tiny model of one family.

    Args:
        image_ids: n -> the placeholder ids (with markers) of the n images of one row, in order.
        pixels: (n, generator) -> what n images add to the inputs, each a list over images (or tiles).
        finish: adds the inputs that depend on the whole batch, such as token types.
        special: the tokens that stand for an image or around it; ``image_token`` is the placeholder itself.
        max_images: the most images of one row. text_only: whether a row may have none.
        video_ids, video_pixels: the same of videos, for families that take them.
    """

    family: str
    model: Any
    image_ids: Callable[[int], list[list[int]]]
    pixels: Callable[[int, torch.Generator], dict[str, list[Any]]]
    finish: Callable[[dict[str, Any], list[Row]], dict[str, Any]] = lambda inputs, rows: inputs
    special: dict[str, int] = field(default_factory=lambda: {"<image>": IMAGE})
    max_images: int = 2
    text_only: bool = True
    image_token: int = IMAGE
    video_ids: Callable[[int], list[list[int]]] | None = None
    video_pixels: Callable[[int, torch.Generator], dict[str, list[Any]]] | None = None

    @functools.cached_property
    def processor(self) -> SimpleNamespace:
        """What methods use of a processor: its tokenizers."""
        return SimpleNamespace(tokenizer=self.tokenizer, qformer_tokenizer=tokenizer({}))

    @functools.cached_property
    def tokenizer(self) -> tf.PreTrainedTokenizerFast:
        return tokenizer(self.special)

    def row(self, text: str = "is it", images: int = 1, seed: int = 0, videos: int = 0) -> Row:
        generator = torch.Generator().manual_seed(seed)
        letters = self.tokenizer(text, add_special_tokens=False).input_ids
        blocks, pixels = self.image_ids(images), self.pixels(images, generator) if images else {}
        if videos:
            assert self.video_ids is not None and self.video_pixels is not None
            blocks, pixels = [*blocks, *self.video_ids(videos)], pixels | self.video_pixels(videos, generator)
        ids = [BOS, *(token for block in blocks for token in [*block, letters[0]]), *letters]
        return Row(torch.tensor(ids), pixels)

    def batch(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The rows as one left-padded batch, ready for ``model.generate``."""
        length = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), length), PAD)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, length - len(row.ids) :] = row.ids
            mask[index, length - len(row.ids) :] = 1
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        for key in dict.fromkeys(key for row in rows for key in row.images):
            values = [value for row in rows for value in row.images.get(key, [])]
            inputs[key] = torch.stack(values) if values[0].dim() != 2 else torch.cat(values)
        return self.finish(inputs, list(rows))

    def inputs(
        self,
        texts: Sequence[str] = ("is it",),
        images: Sequence[int] | int = 1,
        seed: int = 0,
        videos: Sequence[int] | int = 0,
    ) -> dict[str, Any]:
        counts, films = ([n] * len(texts) if isinstance(n, int) else n for n in (images, videos))
        asked = enumerate(zip(texts, counts, films))
        return self.batch([self.row(text, own, seed + i, shown) for i, (text, own, shown) in asked])


#: Last weight between the vision encoder and the language model: what scales an image's share of the logits.
PROJECTORS = ("multi_modal_projector", "language_projection", "connector", "merger")


def react(model: Any, projector_gain: float = 1.0, embedding_gain: float = 1.0, seed: int = 0) -> Any:
    """Weights of unit gain, so that signals neither vanish nor explode and the image reaches the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            embedding = "embed" in name and "patch" not in name
            fan_in = 1 if embedding or "query_tokens" in name else parameter[0].numel()
            parameter.normal_(0, fan_in**-0.5, generator=generator)
            if any(part in name for part in PROJECTORS):
                parameter.mul_(projector_gain)
            if "embed_tokens" in name:
                parameter.mul_(embedding_gain)
            if "position_embedding" in name or "pos_embed" in name:
                parameter.mul_(0.2)
        head = model.get_output_embeddings().weight
        head.mul_(2.0 * (head.shape[1] ** -0.5) / head.std())
    configs = [model.generation_config]
    if hasattr(model, "language_model"):
        configs.append(model.language_model.generation_config)
    for config in configs:
        config.eos_token_id, config.pad_token_id, config.bos_token_id = EOS, PAD, BOS
    return model.eval()


def _image(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _text(kind: type, **more: Any) -> Any:
    return kind(**TEXT, **more)


def llava() -> Tiny:
    vision = tf.CLIPVisionConfig(**VISION, image_size=28, patch_size=7)
    config = tf.LlavaConfig(
        vision_config=vision, text_config=_text(tf.LlamaConfig), image_token_index=IMAGE, vision_feature_layer=-2
    )
    model = react(tf.LlavaForConditionalGeneration(config))
    return Tiny(
        "llava",
        model,
        lambda n: [[IMAGE] * 16] * n,
        lambda n, g: {"pixel_values": [_image(g, 3, 28, 28) for _ in range(n)]},
    )


#: Heights and widths that give different numbers of tiles, as real photographs do.
SIZES = [(56, 56), (28, 56)]
PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def _tiles(n: int, generator: torch.Generator) -> dict[str, list[Any]]:
    tiles = [1 + (height // 28) * (width // 28) for height, width in SIZES[:n]]
    pixels = []
    for count in tiles:
        stack = torch.zeros(5, 3, 28, 28)
        stack[:count] = _image(generator, count, 3, 28, 28)
        pixels.append(stack)
    return {"pixel_values": pixels, "image_sizes": [torch.tensor(size) for size in SIZES[:n]]}


def _packed(model: Any, **more: Any) -> Callable[[int], list[list[int]]]:
    """Placeholders per image of a tiling family: what the model itself makes of such an image."""

    @functools.lru_cache
    def count(n: int) -> list[int]:
        images = _tiles(n, torch.Generator().manual_seed(0))
        extra = {key: torch.tensor([n]) for key in more}
        with torch.no_grad():
            features = model.get_image_features(
                torch.stack(images["pixel_values"]), image_sizes=torch.stack(images["image_sizes"]), **extra
            )
        return [len(feature) for feature in features.pooler_output]

    return lambda n: [[IMAGE] * length for length in count(n)] if n else []


def llava_next() -> Tiny:
    vision = tf.CLIPVisionConfig(**VISION, image_size=28, patch_size=14)
    config = tf.LlavaNextConfig(
        vision_config=vision,
        text_config=_text(tf.LlamaConfig),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
    )
    model = react(tf.LlavaNextForConditionalGeneration(config), projector_gain=2.0)
    return Tiny("llava_next", model, _packed(model), _tiles)


#: Of a video of LLaVA-OneVision.
FRAMES = 4


def llava_onevision() -> Tiny:
    vision = tf.SiglipVisionConfig(**VISION, image_size=28, patch_size=14, vision_use_head=False)
    config = tf.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=_text(tf.Qwen2Config),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    model = react(tf.LlavaOnevisionForConditionalGeneration(config))

    def finish(inputs: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
        counts = [len(row.images.get("pixel_values", [])) for row in rows]
        if any(counts):
            inputs["batch_num_images"] = torch.tensor([count for count in counts if count])
        return inputs

    return Tiny(
        "llava_onevision",
        model,
        _packed(model, batch_num_images=True),
        _tiles,
        finish,
        special={"<image>": IMAGE, "<video>": VIDEO},
        # 2 x 2 patches of a frame are pooled into one token, and one more closes the video.
        video_ids=lambda n: [[VIDEO] * (FRAMES + 1)] * n,
        video_pixels=lambda n, g: {"pixel_values_videos": [_image(g, FRAMES, 3, 28, 28) for _ in range(n)]},
    )


def instructblip() -> Tiny:
    config = tf.InstructBlipConfig(
        vision_config=dict(**VISION, image_size=28, patch_size=7),
        qformer_config=dict(
            **VISION,
            vocab_size=QFORMER_VOCABULARY,
            encoder_hidden_size=32,
            cross_attention_frequency=1,
        ),
        text_config=TEXT | {"model_type": "llama"},
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    model = react(tf.InstructBlipForConditionalGeneration(config))

    def finish(inputs: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
        texts = [row.ids[row.ids < QFORMER_VOCABULARY] for row in rows]
        length = max(map(len, texts))
        # The Q-Former's own tokenizer is BERT's, which pads on the right.
        ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
        for index, text in enumerate(texts):
            ids[index, : len(text)], mask[index, : len(text)] = text, 1
        return inputs | {"qformer_input_ids": ids, "qformer_attention_mask": mask}

    return Tiny(
        "instructblip",
        model,
        lambda n: [[IMAGE] * QUERIES] * n,
        lambda n, g: {"pixel_values": [_image(g, 3, 28, 28) for _ in range(n)]},
        finish,
        max_images=1,
        text_only=False,
    )


#: Patches per image (height, width) of the Qwen models; merged 2 x 2.
GRIDS = [(4, 6), (4, 4)]
#: Pairs of frames and patches (height, width) per video.
VIDEO_GRIDS = [(3, 4, 4), (2, 4, 6)]
QWEN_TOKENS = {
    "<|image_pad|>": IMAGE,
    "<|video_pad|>": VIDEO,
    "<|vision_start|>": VISION_START,
    "<|vision_end|>": VISION_END,
}


def _qwen(
    family: str, make: Callable[..., tf.PreTrainedModel], config: type, vision: dict[str, Any], **text: Any
) -> Tiny:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    ids = dict(
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END
    )
    vision = dict(num_heads=4, patch_size=4, spatial_merge_size=2, temporal_patch_size=2) | vision
    model = react(make(config(text_config=TEXT | {"rope_parameters": rope} | text, vision_config=vision, **ids)))

    def pixels(n: int, generator: torch.Generator) -> dict[str, list[Any]]:
        patches = []
        for height, width in GRIDS[:n]:
            still = _image(generator, height * width, 3, 1, 4 * 4)
            # A still image fills both frames of the temporal patch.
            patches.append(still.expand(-1, -1, 2, -1).reshape(height * width, -1))
        return {"pixel_values": patches, "image_grid_thw": [torch.tensor([[1, h, w]]) for h, w in GRIDS[:n]]}

    def videos(n: int, generator: torch.Generator) -> dict[str, list[Any]]:
        grids = VIDEO_GRIDS[:n]
        out: dict[str, list[Any]] = {
            "pixel_values_videos": [_image(generator, t * h * w, 3 * 2 * 4 * 4) for t, h, w in grids],
            "video_grid_thw": [torch.tensor([grid]) for grid in grids],
        }
        if family == "qwen2_5_vl":
            out["second_per_grid_ts"] = [torch.tensor(0.5 * (number + 1)) for number in range(n)]
        return out

    def finish(inputs: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
        ids = inputs["input_ids"]
        return inputs | {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}

    letters = tokenizer(QWEN_TOKENS)
    blocks = [[VISION_START, *[IMAGE] * (h * w // 4), VISION_END] for h, w in GRIDS]
    films = []
    for steps, height, width in VIDEO_GRIDS:
        pair = [VIDEO] * (height * width // 4)
        inside = pair * steps
        if family.startswith("qwen3"):
            # Every pair of frames has markers of its own, and the time before them.
            times = [
                letters(f"<{0.5 + step:.1f} seconds>", add_special_tokens=False).input_ids for step in range(steps)
            ]
            inside = [token for time in times for token in [*time, VISION_START, *pair, VISION_END]]
        films.append([VISION_START, *inside, VISION_END])
    return Tiny(
        family,
        model,
        lambda n: blocks[:n],
        pixels,
        finish,
        special=QWEN_TOKENS,
        video_ids=lambda n: films[:n],
        video_pixels=videos,
    )


def qwen2_vl() -> Tiny:
    vision = dict(depth=2, embed_dim=32, hidden_size=32, mlp_ratio=2)
    return _qwen("qwen2_vl", tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLConfig, vision)


def qwen2_5_vl() -> Tiny:
    vision = dict(
        depth=2, hidden_size=32, out_hidden_size=32, intermediate_size=48, window_size=16, fullatt_block_indexes=[1]
    )
    return _qwen("qwen2_5_vl", tf.Qwen2_5_VLForConditionalGeneration, tf.Qwen2_5_VLConfig, vision)


def qwen3_vl() -> Tiny:
    vision = dict(
        depth=3,
        hidden_size=32,
        out_hidden_size=32,
        intermediate_size=48,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    )
    return _qwen("qwen3_vl", tf.Qwen3VLForConditionalGeneration, tf.Qwen3VLConfig, vision, head_dim=8)


def qwen3_vl_moe() -> Tiny:
    vision = dict(
        depth=2,
        hidden_size=32,
        out_hidden_size=32,
        intermediate_size=48,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    )
    experts = dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, decoder_sparse_step=1)
    return _qwen("qwen3_vl_moe", tf.Qwen3VLMoeForConditionalGeneration, tf.Qwen3VLMoeConfig, vision, **experts)


def _idefics(family: str, make: Callable[..., tf.PreTrainedModel], config: type) -> Tiny:
    vision = dict(**VISION, image_size=32, patch_size=8)
    model = react(
        make(
            config(
                text_config=_text(tf.LlamaConfig),
                vision_config=vision,
                image_token_id=IMAGE,
                scale_factor=2,
                pad_token_id=PAD,
            )
        )
    )

    def finish(inputs: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
        most = max((len(row.images.get("pixel_values", [])) for row in rows), default=0)
        if not most:
            return inputs
        # (rows, images, ...): rows with fewer images are filled with all-zero images, which the model drops.
        pixels, mask = torch.zeros(len(rows), most, 3, 32, 32), torch.zeros(len(rows), most, 32, 32, dtype=torch.long)
        for index, row in enumerate(rows):
            for image, value in enumerate(row.images.get("pixel_values", [])):
                pixels[index, image], mask[index, image] = value, 1
        return inputs | {"pixel_values": pixels, "pixel_attention_mask": mask}

    return Tiny(
        family,
        model,
        # As the processor writes an image without tiles: a mark, what it is, its tokens, the mark again.
        lambda n: [[VISION_START, VISION_END, *[IMAGE] * 4, VISION_START]] * n,
        lambda n, g: {"pixel_values": [_image(g, 3, 32, 32) for _ in range(n)]},
        finish,
        special={"<image>": IMAGE, "<fake>": VISION_START, "<global>": VISION_END},
    )


def smolvlm() -> Tiny:
    return _idefics("smolvlm", tf.SmolVLMForConditionalGeneration, tf.SmolVLMConfig)


def idefics3() -> Tiny:
    return _idefics("idefics3", tf.Idefics3ForConditionalGeneration, tf.Idefics3Config)


def internvl() -> Tiny:
    config = tf.InternVLConfig(
        text_config=_text(tf.Qwen2Config),
        vision_config=dict(**VISION, image_size=[32, 32], patch_size=[8, 8]),
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return Tiny(
        "internvl",
        react(tf.InternVLForConditionalGeneration(config)),
        lambda n: [[VISION_START, *[IMAGE] * 4, VISION_END]] * n,
        lambda n, g: {"pixel_values": [_image(g, 3, 32, 32) for _ in range(n)]},
        special={"<image>": IMAGE, "<img>": VISION_START, "</img>": VISION_END},
    )


#: Gemma multiplies its embeddings by the root of their width; this takes it back.
GEMMA_GAIN = TEXT["hidden_size"] ** -0.5


def gemma3() -> Tiny:
    text = TEXT | dict(
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
        query_pre_attn_scalar=8,
        final_logit_softcapping=None,
        tie_word_embeddings=False,
    )
    config = tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**text),
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=32, patch_size=8, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        # A random model whose head is its embedding only repeats its last token.
        tie_word_embeddings=False,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )

    def finish(inputs: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
        return inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}

    return Tiny(
        "gemma3",
        react(tf.Gemma3ForConditionalGeneration(config), embedding_gain=GEMMA_GAIN),
        lambda n: [[VISION_START, *[IMAGE] * 4, VISION_END]] * n,
        lambda n, g: {"pixel_values": [_image(g, 3, 32, 32) for _ in range(n)]},
        finish,
        special={"<image>": IMAGE, "<boi>": VISION_START, "<eoi>": VISION_END},
    )


def paligemma() -> Tiny:
    config = tf.PaliGemmaConfig(
        text_config=_text(tf.GemmaConfig, head_dim=8, tie_word_embeddings=False),
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=28, patch_size=14, vision_use_head=False),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )

    def finish(inputs: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
        return inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}

    return Tiny(
        "paligemma",
        react(tf.PaliGemmaForConditionalGeneration(config), projector_gain=3.0, embedding_gain=GEMMA_GAIN),
        lambda n: [[IMAGE] * 4] * n,
        lambda n, g: {"pixel_values": [_image(g, 3, 28, 28) for _ in range(n)]},
        finish,
    )


BUILDERS: dict[str, Callable[[], Tiny]] = {name: globals()[name] for name in FAMILIES}


class Filming(Tiny):
    """A tiny model in whose rows a video takes the place of one image."""

    def row(self, text: str = "is it", images: int = 1, seed: int = 0, videos: int = 0) -> Row:
        return super().row(text, max(images - 1, 0), seed, videos + min(images, 1))


#: What is put behind a family's name for rows with videos.
WITH_VIDEO = ":video"


@functools.cache
def tiny(family: str) -> Tiny:
    """The tiny model of a family, built once per process; tests must leave it as they found it."""
    if family.endswith(WITH_VIDEO):
        own = tiny(family.removesuffix(WITH_VIDEO))
        return Filming(**{field.name: getattr(own, field.name) for field in dataclasses.fields(own)})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BUILDERS[family]()

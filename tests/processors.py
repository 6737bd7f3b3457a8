"""Real processors: image processors with their published settings, the published form of the chat template, and a small model of
random weights whose encoder cuts a picture as the published one does.

Numbers are those of the published configurations. The tokenizer of LLaVA-NeXT with Mistral is Mistral's own, from the package
``mistral-common``; the other families that use sentencepiece borrow it, and those that use byte-level BPE get one that is trained
here on this repository's own words, with the rule by which Qwen cuts text into words.
"""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import ROOT
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lvlm_decode.families import FAMILIES
from lvlm_decode.testing.models import react

WIDTH, HEADS = 64, 4
#: How Qwen cuts text into words before it merges bytes.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sentencepiece(image: str = "<image>", *more: str, **names: str) -> tf.PreTrainedTokenizerBase:
    """Mistral's tokenizer of 32,000 pieces, with the family's special tokens after them."""
    package = pytest.importorskip(
        "mistral_common", reason="the tokenizer of Mistral lies in mistral-common (extra: test)"
    )
    pytest.importorskip("sentencepiece", reason="reads the tokenizer of Mistral (extra: test)")
    pytest.importorskip("google.protobuf", reason="reads the tokenizer of Mistral (extra: test)")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(Path(package.__file__).parent / "data" / "tokenizer.model.v1", Path(folder) / "tokenizer.model")
        made = tf.LlamaTokenizer.from_pretrained(folder, add_bos_token=True, extra_special_tokens=names)
    made.add_tokens([image, "<pad>", *more], special_tokens=True)
    made.pad_token, made.padding_side = "<pad>", "left"
    return made


@functools.cache
def _trained() -> str:
    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    inner.train([str(ROOT / "README.md"), str(ROOT / "CONTRIBUTING.md")], trainer)
    return inner.to_str()


def byte_level(*special: str, begin: str | None = None, **names: str) -> tf.PreTrainedTokenizerBase:
    """A byte-level BPE of 1,500 tokens, with special tokens after them."""
    inner = Tokenizer.from_str(_trained())
    made = tf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|endoftext|>", extra_special_tokens=names)
    made.add_tokens(["<|im_start|>", "<|im_end|>", *special], special_tokens=True)
    made.eos_token, made.padding_side = "<|im_end|>", "left"
    return made


def template(head: str, image: str, tail: str, cue: str, video: str = "", system: str = "") -> str:
    """A chat template that writes one turn of a user as the published one does."""
    part = "{% if part['type'] == 'image' %}" + image + "{% elif part['type'] == 'video' %}" + video
    part += "{% else %}{{ part['text'] }}{% endif %}"
    turn = head + "{% for part in message['content'] %}" + part + "{% endfor %}" + tail
    return (
        system
        + "{% for message in messages %}"
        + turn
        + "{% endfor %}{% if add_generation_prompt %}"
        + cue
        + "{% endif %}"
    )


@dataclass
class Real:
    """A processor as it is published and a small model that takes what it makes.

    Args:
        prompt: the question and whether there is an image -> the text that the template writes.
        tokens: picture (width, height) -> placeholders that the published processor gives it.
    """

    family: str
    processor: Any
    model: Any
    prompt: Callable[[str, bool], str]
    tokens: dict[tuple[int, int], int]

    def text(self, question: str, kind: str | None = "image") -> str:
        """The prompt that the template makes of a question, or the question where there is none."""
        if getattr(self.processor, "chat_template", None) is None:
            return question
        content = [{"type": "text", "text": question}]
        content = content if kind is None else [{"type": kind}, *content]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def inputs(self, texts: list[str], pictures: list[Any], **more: Any) -> dict[str, Any]:
        # These processors want the pictures of every text apart.
        pictures = [[one] for one in pictures] if self.family in ("smolvlm", "idefics3", "gemma3") else pictures
        made = self.processor(text=texts, images=pictures, padding=True, return_tensors="pt", **more)
        return dict(made)

    def ids(self, text: str, picture: Any = None) -> list[int]:
        """What the processor makes of a text, alone, with or without a picture."""
        given = {} if picture is None else {"images": [picture]}
        return self.processor(text=[text], return_tensors="pt", **given)["input_ids"][0].tolist()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse random colours, so that a picture keeps its content when it is resized."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8).numpy()
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        **more,
    )


def _vision(image_size: int, patch_size: int, **more: Any) -> dict[str, Any]:
    size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return dict(**size, image_size=image_size, patch_size=patch_size, **more)


def _made(
    family: str, processor: Any, model: Any, prompt: Callable[[str, bool], str], tokens: dict[Any, int], **gain: Any
) -> Real:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = react(model(), **gain)
    for config in [
        model.generation_config,
        *([model.language_model.generation_config] if family == "instructblip" else []),
    ]:
        # An end that no random model meets by chance.
        config.eos_token_id, config.pad_token_id = len(processor.tokenizer) - 1, processor.tokenizer.pad_token_id
    return Real(family, processor, model, prompt, tokens)


def llava() -> Real:
    words = sentencepiece()
    form = template("USER: ", "<image>\n", " ", "ASSISTANT:")
    images = tf.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    settings = dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    processor = tf.LlavaProcessor(images, words, chat_template=form, **settings)
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**_vision(336, 14)),
        text_config=tf.LlamaConfig(**_text(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    return _made(
        "llava",
        processor,
        lambda: tf.LlavaForConditionalGeneration(config),
        lambda q, image: f"USER: {'<image>' * image}\n{q} ASSISTANT:",
        {(640, 480): 576, (300, 500): 576},
    )


#: Heights and widths that LLaVA-NeXT's tiles may fill.
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def llava_next() -> Real:
    words = sentencepiece()
    form = template("[INST] ", "<image>\n", " ", "[/INST]")
    images = tf.LlavaNextImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=PINPOINTS
    )
    settings = dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    processor = tf.LlavaNextProcessor(images, words, chat_template=form, **settings)
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**_vision(336, 14)),
        text_config=tf.MistralConfig(**_text(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
    )
    return _made(
        "llava_next",
        processor,
        lambda: tf.LlavaNextForConditionalGeneration(config),
        lambda q, image: f"[INST] {'<image>' * image}\n{q} [/INST]",
        # The small whole, and rows of patches with a newline token each: 36 of 48, and 40 of 24 in two tiles.
        {(640, 480): 576 + 36 * 49, (300, 500): 576 + 40 * 25},
        projector_gain=2.0,
    )


def llava_onevision() -> Real:
    words = byte_level("<image>", "<video>")
    form = template("<|im_start|>user ", "<image>\n", "<|im_end|>", "<|im_start|>assistant\n", video="<video>\n")
    settings = dict(num_image_tokens=729, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9")
    images, videos = tf.LlavaOnevisionImageProcessor(), tf.LlavaOnevisionVideoProcessor()
    processor = tf.LlavaOnevisionProcessor(images, words, videos, chat_template=form, **settings)
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**_vision(384, 14, vision_use_head=False)),
        text_config=tf.Qwen2Config(**_text(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        video_token_id=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=images.image_grid_pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    return _made(
        "llava_onevision",
        processor,
        lambda: tf.LlavaOnevisionForConditionalGeneration(config),
        lambda q, image: f"<|im_start|>user {'<image>' * image}\n{q}<|im_end|><|im_start|>assistant\n",
        # 27 x 27 patches of the whole; two tiles each way hold 54 x 54, of which a picture of 4:3 leaves 40 rows.
        {(640, 480): 729 + 40 * 55},
    )


def instructblip() -> Real:
    words, queries = sentencepiece(), _wordpiece()
    images = tf.BlipImageProcessor(size={"height": 224, "width": 224})
    processor = tf.InstructBlipProcessor(images, words, queries, num_query_tokens=32)
    qformer = dict(_vision(224, 14), vocab_size=len(queries), encoder_hidden_size=32, cross_attention_frequency=2)
    config = tf.InstructBlipConfig(
        vision_config=_vision(224, 14),
        qformer_config={key: value for key, value in qformer.items() if key not in ("image_size", "patch_size")},
        text_config=_text(words) | {"model_type": "llama"},
        num_query_tokens=32,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    return _made(
        "instructblip",
        processor,
        lambda: tf.InstructBlipForConditionalGeneration(config),
        lambda q, image: q,
        {(640, 480): 32, (300, 500): 32},
    )


def _wordpiece() -> tf.PreTrainedTokenizerBase:
    """BERT's kind of tokenizer, for the Q-Former: lower case, pieces of words, [CLS] and [SEP]; pads on the right."""
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = (
        normalizers.BertNormalizer(lowercase=True),
        pre_tokenizers.BertPreTokenizer(),
    )
    trainer = trainers.WordPieceTrainer(
        initial_alphabet=[chr(code) for code in range(33, 127)],
        vocab_size=800,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        show_progress=False,
    )
    inner.train([str(ROOT / "README.md")], trainer)
    ids = {token: inner.token_to_id(token) for token in ("[CLS]", "[SEP]")}
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=list(ids.items()))
    inner.decoder = decoders.WordPiece()
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def _qwen(
    family: str, make: type, config: type, images: Any, kind: Any, vision: dict[str, Any], system: str, **text: Any
) -> Real:
    words = byte_level(*QWEN_TOKENS)
    start, end, image, video = QWEN_TOKENS
    turn = ("<|im_start|>user\n", f"{start}{image}{end}", "<|im_end|>\n", "<|im_start|>assistant\n")
    form = template(*turn, video=f"{start}{video}{end}", system=system)
    videos = (tf.Qwen3VLVideoProcessor if "qwen3" in family else tf.Qwen2VLVideoProcessor)()
    processor = kind(images, words, videos, chat_template=form)
    ids = dict(
        zip(
            ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
            words.convert_tokens_to_ids(list(QWEN_TOKENS)),
        )
    )
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1000000.0}
    made = config(
        text_config=_text(words, rope_parameters=rope) | text,
        vision_config=dict(num_heads=2, spatial_merge_size=2, temporal_patch_size=2, patch_size=images.patch_size)
        | vision,
        **ids,
    )
    # A side is rounded to two patches: 640 x 480 gives 46 x 34 patches of 14, or 40 x 30 of 16.
    tokens = {14: {(640, 480): 23 * 17, (300, 500): 11 * 18}, 16: {(640, 480): 20 * 15, (300, 500): 9 * 16}}
    return _made(
        family,
        processor,
        lambda: make(made),
        lambda q, image_: (
            f"{system}<|im_start|>user\n{f'{start}{image}{end}' * image_}{q}<|im_end|>\n<|im_start|>assistant\n"
        ),
        tokens[images.patch_size],
    )


def qwen2_vl() -> Real:
    vision = dict(depth=2, embed_dim=32, hidden_size=WIDTH, mlp_ratio=2)
    images = tf.Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 14 * 14 * 4 * 1280})
    return _qwen(
        "qwen2_vl", tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLConfig, images, tf.Qwen2VLProcessor, vision, SYSTEM
    )


def qwen2_5_vl() -> Real:
    vision = dict(
        depth=2, hidden_size=32, out_hidden_size=WIDTH, intermediate_size=32, window_size=112, fullatt_block_indexes=[1]
    )
    images = tf.Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 14 * 14 * 4 * 16384})
    return _qwen(
        "qwen2_5_vl",
        tf.Qwen2_5_VLForConditionalGeneration,
        tf.Qwen2_5_VLConfig,
        images,
        tf.Qwen2_5_VLProcessor,
        vision,
        SYSTEM,
    )


#: Of Qwen3-VL's processor: patches of 16, and statistics of one half.
_QWEN3 = dict(
    patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"shortest_edge": 65536, "longest_edge": 16777216}
)
_QWEN3_VISION = dict(
    depth=3,
    hidden_size=32,
    out_hidden_size=WIDTH,
    intermediate_size=32,
    num_position_embeddings=2304,
    deepstack_visual_indexes=[0, 1],
)


def qwen3_vl() -> Real:
    images, kinds = tf.Qwen2VLImageProcessor(**_QWEN3), (tf.Qwen3VLForConditionalGeneration, tf.Qwen3VLConfig)
    return _qwen("qwen3_vl", *kinds, images, tf.Qwen3VLProcessor, _QWEN3_VISION, "", head_dim=16)


def qwen3_vl_moe() -> Real:
    images, kinds = tf.Qwen2VLImageProcessor(**_QWEN3), (tf.Qwen3VLMoeForConditionalGeneration, tf.Qwen3VLMoeConfig)
    experts = dict(
        head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=WIDTH, decoder_sparse_step=1
    )
    return _qwen("qwen3_vl_moe", *kinds, images, tf.Qwen3VLProcessor, _QWEN3_VISION, "", **experts)


def _idefics(
    family: str, make: type, config: type, processor: Any, words: Any, side: int, scale: int, begin: str
) -> Real:
    made = config(
        vision_config=_vision(side, 14),
        text_config=tf.LlamaConfig(**_text(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=scale,
        pad_token_id=words.pad_token_id,
    )
    each = (side // 14 // scale) ** 2
    return _made(
        family,
        processor,
        lambda: make(made),
        lambda q, image: f"{begin}User:{'<image>' * image}{q}<end_of_utterance>\nAssistant:",
        # The longer side fills four tiles and the shorter one of 4:3 three; the whole is one more.
        {(640, 480): (4 * 3 + 1) * each},
    )


def _tile_words(*begin: str) -> Any:
    places = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    marks = ("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>")
    return byte_level(*begin, *marks, *places)


def smolvlm() -> Real:
    from transformers.models.smolvlm import processing_smolvlm

    # Its words for the length of a video; no video is made here.
    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    words = _tile_words()
    form = template("User:", "<image>", "<end_of_utterance>\n", "Assistant:", system="<|im_start|>")
    images = tf.SmolVLMImageProcessor(size={"longest_edge": 1536}, max_image_size={"longest_edge": 384})
    processor = tf.SmolVLMProcessor(images, words, tf.SmolVLMVideoProcessor(), image_seq_len=81, chat_template=form)
    kinds = (tf.SmolVLMForConditionalGeneration, tf.SmolVLMConfig)
    return _idefics("smolvlm", *kinds, processor, words, 384, 3, "<|im_start|>")


def idefics3() -> Real:
    words = _tile_words("<|begin_of_text|>")
    form = template("User:", "<image>", "<end_of_utterance>\n", "Assistant:", system="<|begin_of_text|>")
    images = tf.Idefics3ImageProcessor(size={"longest_edge": 1456}, max_image_size={"longest_edge": 364})
    processor = tf.Idefics3Processor(images, words, image_seq_len=169, chat_template=form)
    kinds = (tf.Idefics3ForConditionalGeneration, tf.Idefics3Config)
    return _idefics("idefics3", *kinds, processor, words, 364, 2, "<|begin_of_text|>")


def internvl() -> Real:
    marks = dict(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    words = byte_level(*marks.values(), **marks)
    form = template("<|im_start|>user\n", "<IMG_CONTEXT>\n", "<|im_end|>\n", "<|im_start|>assistant\n")
    images = tf.GotOcr2ImageProcessor(
        size={"height": 448, "width": 448},
        crop_to_patches=True,
        min_patches=1,
        max_patches=12,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor = tf.InternVLProcessor(
        images, words, tf.InternVLVideoProcessor(), image_seq_length=256, chat_template=form
    )
    config = tf.InternVLConfig(
        text_config=tf.Qwen2Config(**_text(words)),
        vision_config=_vision(448, 14) | dict(image_size=[448, 448], patch_size=[14, 14]),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=256,
        downsample_ratio=0.5,
    )
    return _made(
        "internvl",
        processor,
        lambda: tf.InternVLForConditionalGeneration(config),
        lambda q, image: f"<|im_start|>user\n{'<IMG_CONTEXT>' * image}\n{q}<|im_end|>\n<|im_start|>assistant\n",
        # A picture of 4:3 fills four tiles by three, and the whole is one more.
        {(640, 480): 13 * 256},
    )


def gemma3() -> Real:
    marks = dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    words = sentencepiece(
        marks["image_token"], marks["boi_token"], marks["eoi_token"], "<start_of_turn>", "<end_of_turn>", **marks
    )
    form = template("<start_of_turn>user\n", "<start_of_image>", "<end_of_turn>\n", "<start_of_turn>model\n")
    images = tf.Gemma3ImageProcessor(size={"height": 896, "width": 896})
    processor = tf.Gemma3Processor(images, words, chat_template=form, image_seq_length=256)
    ids = {name: words.convert_tokens_to_ids(token) for name, token in marks.items()}
    config = tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(
            **_text(words, head_dim=16, query_pre_attn_scalar=16, sliding_window=1024, tie_word_embeddings=False),
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        vision_config=tf.SiglipVisionConfig(**_vision(896, 14, vision_use_head=False)),
        mm_tokens_per_image=256,
        image_token_id=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        tie_word_embeddings=False,
    )
    block = "\n\n<start_of_image><end_of_image>\n\n"
    return _made(
        "gemma3",
        processor,
        lambda: tf.Gemma3ForConditionalGeneration(config),
        # The empty lines around an image are the processor's, and stay.
        lambda q, image: (
            f"<start_of_turn>user\n{block if image else chr(10) * 4}{q}<end_of_turn>\n<start_of_turn>model\n"
        ),
        {(640, 480): 256},
        embedding_gain=WIDTH**-0.5,
    )


def paligemma() -> Real:
    words = sentencepiece()
    images = tf.SiglipImageProcessor(size={"height": 448, "width": 448}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    images.image_seq_length = 1024
    processor = tf.PaliGemmaProcessor(images, words)
    config = tf.PaliGemmaConfig(
        text_config=tf.GemmaConfig(**_text(words, head_dim=16, tie_word_embeddings=False)),
        vision_config=tf.SiglipVisionConfig(**_vision(448, 14, projection_dim=WIDTH, vision_use_head=False)),
        image_token_id=processor.image_token_id,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        tie_word_embeddings=False,
    )
    return _made(
        "paligemma",
        processor,
        lambda: tf.PaliGemmaForConditionalGeneration(config),
        lambda q, image: f"{'<image>' * image}{q}\n",
        {(640, 480): 1024},
        projector_gain=3.0,
        embedding_gain=WIDTH**-0.5,
    )


BUILDERS: dict[str, Callable[[], Real]] = {name: globals()[name] for name in FAMILIES}


@functools.cache
def real(family: str) -> Real:
    """The published processor of a family and its small model, built once per process."""
    return BUILDERS[family]()


def shown(processor: Any, ids: Any) -> str:
    """The text of ids, special tokens included."""
    return re.sub(
        r"^<s> ?", "", processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )

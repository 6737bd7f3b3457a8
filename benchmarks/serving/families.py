"""Tiny random models of the families that are served, saved with a processor: large enough for vLLM's kernels, small enough to
make on the spot. Their heads are 32 wide, the smallest that vLLM's attention takes on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf

import lvlm_decode_data
from lvlm_decode.testing.models import react

TEXT: dict[str, Any] = dict(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VISION: dict[str, Any] = dict(num_heads=2, patch_size=8, spatial_merge_size=2, temporal_patch_size=2)
SIZES = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}


def tokenizer(marks: tuple[str, ...]) -> Any:
    """The small LLaVA's words, with a family's special tokens."""
    path = lvlm_decode_data.tiny_path("tiny-llava") / "tokenizer.json"
    found = tf.PreTrainedTokenizerFast(
        tokenizer_file=str(path), pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    found.add_special_tokens({"additional_special_tokens": list(marks)})
    return found


def _qwen(
    folder: Path, make: Any, config: Any, processor: Any, pictures: Any, vision: dict[str, Any], **text: Any
) -> str:
    words = tokenizer(MARKS)
    start, end, image, video = (words.convert_tokens_to_ids(mark) for mark in MARKS)
    own = config(
        text_config={**TEXT, "vocab_size": len(words), "rope_parameters": ROPE, **text},
        vision_config={**VISION, **vision},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        architectures=[make.__name__],
    )
    model = react(make(own), seed=1)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    sizes = dict(patch_size=8, merge_size=2, temporal_patch_size=2, size=SIZES)
    processor(
        image_processor=pictures[0](**sizes), tokenizer=words, video_processor=pictures[1](**sizes)
    ).save_pretrained(folder)
    return "USER: <|vision_start|><|image_pad|><|vision_end|>\nPlease describe this image in detail. ASSISTANT:"


def qwen2_vl(folder: Path) -> str:
    vision = dict(depth=2, embed_dim=64, hidden_size=128, mlp_ratio=2)
    pictures = (tf.Qwen2VLImageProcessor, tf.Qwen2VLVideoProcessor)
    return _qwen(folder, tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLConfig, tf.Qwen2VLProcessor, pictures, vision)


def qwen2_5_vl(folder: Path) -> str:
    vision = dict(
        depth=2, hidden_size=64, out_hidden_size=128, intermediate_size=96, window_size=32, fullatt_block_indexes=[1]
    )
    pictures = (tf.Qwen2VLImageProcessor, tf.Qwen2VLVideoProcessor)
    return _qwen(
        folder, tf.Qwen2_5_VLForConditionalGeneration, tf.Qwen2_5_VLConfig, tf.Qwen2_5_VLProcessor, pictures, vision
    )


def qwen3_vl(folder: Path) -> str:
    vision = dict(
        depth=3,
        hidden_size=64,
        out_hidden_size=128,
        intermediate_size=96,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
    )
    pictures = (tf.Qwen2VLImageProcessor, tf.Qwen3VLVideoProcessor)
    return _qwen(
        folder,
        tf.Qwen3VLForConditionalGeneration,
        tf.Qwen3VLConfig,
        tf.Qwen3VLProcessor,
        pictures,
        vision,
        head_dim=32,
        rope_parameters={**ROPE, "mrope_interleaved": True},
    )


#: What each family is compared with.
METHODS = ("plain", "vcd", "ritual", "icd", "m3id", "vdd(absent=both)", "lqcd", "vcd+icd+ritual")
#: ``config.model_type`` -> saves a model into a folder, and says its prompt.
BUILDERS = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}


def build(family: str, folder: Path) -> str:
    """Save the tiny model of ``family`` into ``folder``; its prompt for one picture."""
    torch.manual_seed(0)
    return BUILDERS[family](folder)

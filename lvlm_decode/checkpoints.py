"""Public checkpoints of every model family, for the command line, the README and the documentation; imports no torch."""

from __future__ import annotations

#: ``config.model_type`` -> hub ids of that type. Tests run each family on a tiny model of random weights, built from the
#: classes of transformers; these checkpoints themselves are too large for the tests.
CHECKPOINTS: dict[str, tuple[str, ...]] = {
    "llava": ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"),
    "llava_next": ("llava-hf/llava-v1.6-vicuna-7b-hf", "llava-hf/llava-v1.6-mistral-7b-hf"),
    "llava_onevision": ("llava-hf/llava-onevision-qwen2-7b-ov-hf",),
    "instructblip": ("Salesforce/instructblip-vicuna-7b", "Salesforce/instructblip-vicuna-13b"),
    "qwen2_vl": ("Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2-VL-2B-Instruct"),
    "qwen2_5_vl": ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
    "qwen3_vl": ("Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-4B-Instruct"),
    "qwen3_vl_moe": ("Qwen/Qwen3-VL-30B-A3B-Instruct",),
    "smolvlm": ("HuggingFaceTB/SmolVLM2-2.2B-Instruct",),
    "idefics3": ("HuggingFaceM4/Idefics3-8B-Llama3", "HuggingFaceTB/SmolVLM-Instruct"),
    "internvl": ("OpenGVLab/InternVL3-8B-hf", "OpenGVLab/InternVL3-2B-hf"),
    "gemma3": ("google/gemma-3-4b-it", "google/gemma-3-12b-it"),
    "paligemma": ("google/paligemma2-3b-mix-448", "google/paligemma-3b-mix-448"),
}


def markdown() -> str:
    """The list of model families in the README: one checkpoint of each."""
    return "\n".join(f"`{ids[0]}`," for ids in CHECKPOINTS.values()).removesuffix(",") + "."

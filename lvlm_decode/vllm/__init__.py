"""The same methods inside an unpatched vLLM, with the same tokens: extra ``[vllm]``.

Offline:

    import vllm
    import lvlm_decode.vllm

    llm = vllm.LLM(path, **lvlm_decode.vllm.engine_args())
    samples = [{"prompt": "USER: <image>\\nWhat is here? ASSISTANT:", "multi_modal_data": {"image": picture}, "id": "1.jpg"}]
    outputs = lvlm_decode.vllm.generate(llm, "vcd", samples, vllm.SamplingParams(temperature=0, max_tokens=64))

Every view of a sample is a request of its own. The scheduler of :func:`engine_args` lets the requests of a sample, its group,
sample in the same step or not at all; the logits processor combines their logits with the method's own ``scores`` and gives
all of them the same token.

An asynchronous server makes the requests of one sample as a group and owns them:

    views = lvlm_decode.vllm.Views(path)                              # reads configuration and processor, no weights
    group = views.group("vcd", sample, sampling, max_model_len=...)   # in a thread: it makes pixels
    streams = [engine.generate(p, s, i) for p, s, i in zip(group.prompts, group.params, group.ids)]

The first stream is the answer; the others must be read to their end and hold the same tokens. To stop a sample, or when its
client goes, ``await engine.abort(group.ids)``. Requests that do not share a group, and requests of other clients, are served as
vLLM serves them. What cannot be served raises :class:`~lvlm_decode.errors.UnsupportedError` with one sentence before a request
is made: :func:`check_served` for a method, :meth:`Views.group` for a sample and its sampling parameters.

Served are methods whose views are prompts and pictures, on LLaVA, Qwen2-VL, Qwen2.5-VL and Qwen3-VL; on LLaVA also those of image
features, with ``engine_args(features=True)``. CODE lets the model write first: ``Views(path, ask=...)`` asks the engine.

In float32 the tokens are those of ``model.generate()`` with the same method, also when they are drawn with a seed. In bfloat16
and float16 the last bits of logits depend on which requests share a step, in vLLM as in any engine, so answers may differ
between runs there.

Importing this package imports neither torch nor vLLM.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "Group": ".views",
    "Views": ".views",
    "check_served": ".served",
    "engine_args": ".client",
    "generate": ".client",
    "served_methods": ".served",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

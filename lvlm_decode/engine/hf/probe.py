"""A self-check of the port: a tiny random model goes through it once.

It looks at what the lanes rely on and not at signatures: a wrapped function does not trip it, a moved argument does. It
passes on some releases where tests fail, so it adds to the list of tested versions and does not replace it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from . import kwargs, loop
from .cache import KV
from .kwargs import Prepared

_TOKENS = 3


def probe() -> list[str]:
    """What of the port does not work with the installed transformers, in words; empty when all does.

    Takes about 20 ms on a CPU, reads no file and leaves torch's random state as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.normal_()
        return _check(model)


def _check(model: LlamaForCausalLM) -> list[str]:
    ids = torch.tensor([[1, 5, 6, 7], [1, 9, 8, 4]])
    mask = torch.ones_like(ids)
    box: list[loop.Call] = []

    def keep(call: loop.Call) -> Tensor:
        box.append(call)
        return call.input_ids

    settings: dict[str, Any] = dict(max_new_tokens=_TOKENS, do_sample=False)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    steps = [
        ("the arguments of a loop", lambda: loop.generate(model, keep, **inputs, **settings)),
        ("the arguments of the first forward", lambda: _prepared(model, inputs)),
        ("a forward with a cache", lambda: _forward(model, inputs)),
        ("positions and padding", lambda: _places(model, inputs)),
        ("taking tokens back", lambda: _rollback(model, inputs)),
        ("reordering rows", lambda: _reorder(model, inputs)),
        ("a greedy loop on a stand-in", lambda: _loop(model, box[0], inputs, settings) if box else None),
    ]
    failed = []
    for what, step in steps:
        try:
            said = step()
        except Exception as error:  # whatever moved: every kind of failure is an answer here
            said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if isinstance(said, str):
            failed.append(f"{what}: {said}")
    if box and box[0].cache is None:
        failed.append("the cache is no longer handed to custom_generate under a name we know")
    return failed


def _prepared(model: LlamaForCausalLM, inputs: dict[str, Any]) -> Prepared:
    return loop.prepare(lambda **more: loop.generate(model, None, **inputs, **more), inputs["attention_mask"], (), ())


def _prefilled(model: LlamaForCausalLM, inputs: dict[str, Any]) -> tuple[KV, Any]:
    kv = KV.growing(model)
    out = kwargs.run(model.forward, kwargs.first_forward([_prepared(model, inputs)], 0), kv.cache, 1)
    return kv, out


def _next(model: LlamaForCausalLM, kv: KV, tokens: Tensor, at: int) -> Tensor:
    positions = torch.full_like(tokens, at)
    return kwargs.run(model.forward, kwargs.further_forward(tokens, positions, None), kv.cache, 1).logits[:, -1]


def _forward(model: LlamaForCausalLM, inputs: dict[str, Any]) -> str | None:
    kv, out = _prefilled(model, inputs)
    if kv.length != inputs["input_ids"].shape[1]:
        return f"the cache holds {kv.length} of {inputs['input_ids'].shape[1]} tokens"
    if out.logits.shape[1] != 1:
        return f"{out.logits.shape[1]} positions have logits and 1 was asked for"
    return None if kwargs.cache_in(out) is not None else "the output holds no cache"


def _places(model: LlamaForCausalLM, inputs: dict[str, Any]) -> str | None:
    """Forwards take any argument, so one that was renamed is dropped without a word."""
    width, tokens = inputs["input_ids"].shape[1], torch.tensor([[3], [2]])
    kv, _ = _prefilled(model, inputs)
    near = _next(model, kv, tokens, width)
    kv.drop(1)
    if torch.allclose(near, _next(model, kv, tokens, width + 5), atol=1e-5):
        return "a forward does not heed the positions it is given"
    mask = (torch.arange(width) > 0).long().expand(2, -1)
    other = inputs["input_ids"].clone()
    other[:, 0] = 9
    one, two = (
        _prefilled(model, {"input_ids": i, "attention_mask": mask})[1].logits for i in (inputs["input_ids"], other)
    )
    return None if torch.allclose(one, two, atol=1e-5) else "a forward does not heed the mask it is given"


def _rollback(model: LlamaForCausalLM, inputs: dict[str, Any]) -> str | None:
    kv, _ = _prefilled(model, inputs)
    width = inputs["input_ids"].shape[1]
    tokens = torch.tensor([[3], [2]])
    want = _next(model, kv, tokens, width)
    kv.drop(1)
    _next(model, kv, tokens.flip(0), width)
    kv.drop(1)
    got = _next(model, kv, tokens, width)
    return None if torch.allclose(want, got, atol=1e-5) else "the token run again has other logits"


def _reorder(model: LlamaForCausalLM, inputs: dict[str, Any]) -> str | None:
    width, tokens = inputs["input_ids"].shape[1], torch.tensor([[3], [3]])
    kv, _ = _prefilled(model, inputs)
    want = _next(model, kv, tokens, width)
    other, _ = _prefilled(model, inputs)
    other.reorder(torch.tensor([1, 0]))
    got = _next(model, other, tokens, width)
    if not torch.allclose(want.flip(0), got, atol=1e-5):
        return "the rows did not change places"
    return None if not torch.allclose(want, got, atol=1e-5) else "the rows cannot be told apart"


def _loop(model: LlamaForCausalLM, call: loop.Call, inputs: dict[str, Any], settings: dict[str, Any]) -> str | None:
    forwards = []

    def forward(*args: Any, **given: Any) -> Any:
        forwards.append(given)
        return model.forward(*args, **given)

    got = loop.run_loop(model, call, forward)
    want = type(model).generate(model, **inputs, **settings)
    if not torch.equal(got, want):
        return "other tokens than generate()"
    return None if len(forwards) == _TOKENS else "the loop does not call the stand-in's forward"

"""Runs functions of the authors' repositories, read from a folder of checkouts, on small models of today's transformers.

Nothing of theirs is kept here. A function or class is cut out of its file by name and executed with the names that it needs;
what their old version of transformers gave it (a cache, rotary tables, a model's methods) is given by stand-ins.
"""

from __future__ import annotations
import __future__

import ast
import copy
import hashlib
import math
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from cases import TOKENS, Named, distribution
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from lvlm_decode.engine.hf.kwargs import take_cache, with_cache


class Missing(Exception):
    """A repository that is not in the folder."""


class Repository:
    """A checkout of one repository.

    Args:
        folder: with one checkout per repository.
        name: of the checkout's folder.
        source: owner and name on GitHub.
        commit: that the records were made from.
    """

    def __init__(self, folder: Path, name: str, source: str, commit: str):
        self.path, self.source, self.commit = folder / name, source, commit

    def read(self, file: str) -> str:
        if not (self.path / file).is_file():
            raise Missing(f"{self.source} @ {self.commit}: no {self.path / file}")
        return (self.path / file).read_text(encoding="utf-8")

    def digest(self, file: str) -> str:
        return hashlib.sha256(self.read(file).encode()).hexdigest()

    def load(self, file: str, *names: str, **given: Any) -> SimpleNamespace:
        """The functions, classes and constants of these names; ``Class.method`` is the method alone.

        Args:
            given: names that they use, beside those of torch, numpy and typing.
        """
        tree = ast.parse(self.read(file))
        wanted: list[ast.stmt] = []
        for name in names:
            scope: Any = tree
            for piece in name.split("."):
                scope = next(
                    node
                    for node in scope.body
                    if getattr(node, "name", None) == piece
                    or (isinstance(node, ast.Assign) and any(getattr(t, "id", None) == piece for t in node.targets))
                )
            if isinstance(scope, ast.FunctionDef | ast.ClassDef):
                scope.decorator_list = [
                    one for one in scope.decorator_list if "dataclass" in ast.dump(one) or "no_grad" in ast.dump(one)
                ]
            wanted.append(scope)
        code = compile(
            ast.Module(wanted, []),
            str(self.path / file),
            "exec",
            flags=__future__.annotations.compiler_flag,
            dont_inherit=True,
        )
        space: dict[str, Any] = {
            "torch": torch,
            "nn": nn,
            "F": nn.functional,
            "np": np,
            "math": math,
            "types": types,
            "copy": copy,
            "deepcopy": copy.deepcopy,
            "warnings": warnings,
            "Tensor": Tensor,
            "logging": mock.MagicMock(),
            "logger": mock.MagicMock(),
            **{name: getattr(typing, name) for name in ("Any", "Dict", "List", "Optional", "Tuple", "Union")},
            "LogitsProcessor": transformers.LogitsProcessor,
            "LogitsProcessorList": transformers.LogitsProcessorList,
            "StoppingCriteriaList": transformers.StoppingCriteriaList,
            "apply_rotary_pos_emb": rotated,
            "repeat_kv": modeling_llama.repeat_kv,
            "print": lambda *args, **more: None,
            **given,
        }
        exec(code, space)
        return SimpleNamespace(**{name.rsplit(".", 1)[-1]: space[name.rsplit(".", 1)[-1]] for name in names})


def rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, position_ids: Any = None) -> tuple[Tensor, Tensor]:
    """Today's rotary embedding under its old signature; the tables hold the rows of these positions alone."""
    return modeling_llama.apply_rotary_pos_emb(query, key, cos, sin)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Code that sends tensors and modules to the GPU keeps them where they are."""

    def staying(to: Any) -> Any:
        def moved(self: Any, *args: Any, **more: Any) -> Any:
            args = tuple(one for one in args if one != "cuda")
            return to(self, *args, **more) if args or more else self

        return moved

    with (
        mock.patch.object(Tensor, "cuda", lambda self, *args, **more: self),
        mock.patch.object(Tensor, "to", staying(Tensor.to)),
        mock.patch.object(nn.Module, "to", staying(nn.Module.to)),
    ):
        yield


# --- Their sampling loops


Branch = Callable[..., SimpleNamespace]


def forward(model: Any, pixels: Tensor | None, **more: Any) -> Branch:
    """A branch that feeds all tokens to the model at every step: without a cache there is none to get wrong."""

    def run(ids: Tensor, **asked: Any) -> SimpleNamespace:
        images = {} if pixels is None else {"pixel_values": pixels}
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=False, **images, **more, **asked)
        return SimpleNamespace(logits=out.logits, attentions=out.attentions, hidden_states=out.hidden_states)

    return run


def without_image(model: Any) -> Branch:
    """The same for the prompt without its image."""
    plain = forward(model, None)
    return lambda ids, **asked: plain(ids[ids != model.config.image_token_id][None], **asked)


def recorded(given: Tensor) -> Branch:
    """A branch that says what was drawn: (T, N) logits, one row a step."""
    state = {"step": -1}

    def run(ids: Tensor, **asked: Any) -> SimpleNamespace:
        state["step"] += 1
        return SimpleNamespace(
            logits=given[None, state["step"] : state["step"] + 1], attentions=None, hidden_states=None
        )

    return run


class Stand:
    """What a sampling loop takes for the model.

    Args:
        branches: by the ending of ``prepare_inputs_for_generation``: "" is the model itself.
    """

    def __init__(self, branches: dict[str, Branch], **attributes: Any):
        self.branches = branches
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.generation_config = SimpleNamespace(
            pad_token_id=0,
            eos_token_id=None,
            output_scores=False,
            output_attentions=False,
            output_hidden_states=False,
            return_dict_in_generate=False,
        )
        for name, value in attributes.items():
            setattr(self, name, value)
        for ending in branches:
            name = "prepare_inputs_for_generation" + (f"_{ending}" if ending else "")
            setattr(self, name, self._prepared(ending))

    def _prepared(self, ending: str) -> Callable[..., dict[str, Any]]:
        return lambda input_ids, **kwargs: {"branch": ending, "ids": input_ids}

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, **more: Any) -> Any:
        return model_kwargs

    def __call__(self, branch: str, ids: Tensor, **asked: Any) -> Any:
        if asked.get("mask_idx") is not None:
            return self.branches[branch](ids, hidden=asked["mask_idx"])
        more = {"output_attentions": True} if asked.get("output_attentions") else {}
        return self.branches[branch](ids, **more)


def sampled(sample: Callable[..., Any], stand: Stand, ids: Tensor, tokens: int = TOKENS, **kwargs: Any) -> Named:
    """The tokens of an authors' sampling loop, where the most probable one is drawn, and what they are drawn from."""
    seen: list[Tensor] = []

    def keep(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    def ended(input_ids: Tensor, scores: Any) -> bool:
        return input_ids.shape[1] >= ids.shape[1] + tokens

    def most(probabilities: Tensor, num_samples: int) -> Tensor:
        return probabilities.argmax(-1, keepdim=True)

    with mock.patch.object(torch, "multinomial", most), torch.no_grad():
        out = sample(stand, ids, logits_processor=keep, stopping_criteria=ended, **kwargs)
    return {"tokens": out[0, ids.shape[1] :], "scores": distribution(torch.stack([scores[0] for scores in seen]))}


# --- Their attention, in a model of today


class OldCache:
    """Today's cache as transformers 4.36 to 4.40 had it."""

    def __init__(self, cache: DynamicCache):
        self.cache = cache

    def get_usable_length(self, new: int, layer: int) -> int:
        return self.cache.get_seq_length(layer)

    def update(self, key: Tensor, value: Tensor, layer: int, kwargs: Any = None) -> tuple[Tensor, Tensor]:
        return self.cache.update(key, value, layer)


def layers_of(model: Any) -> Any:
    return model.model.language_model.layers


def old(model: Any) -> Any:
    """A copy of the model, whose attention modules have the attributes that they had."""
    model = copy.deepcopy(model)
    text = model.config.get_text_config()
    for layer in layers_of(model):
        attention = layer.self_attn
        attention.num_heads, attention.hidden_size = text.num_attention_heads, text.hidden_size
        attention.num_key_value_heads = text.num_key_value_heads
        attention.num_key_value_groups = text.num_attention_heads // text.num_key_value_heads
        attention.pretraining_tp = 1
    return model


def as_theirs(model: Any) -> SimpleNamespace:
    """The model under the path at which the authors look for its layers."""
    return SimpleNamespace(model=SimpleNamespace(layers=layers_of(model)))


def causal(queries: int, slots: int) -> Tensor:
    """(1, 1, q, S) what is added to scores."""
    seen = torch.ones(queries, slots, dtype=torch.bool).tril(slots - queries)
    return torch.zeros(queries, slots).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def adapted(attention: Any, tuples: bool) -> None:
    """Let an attention module whose ``forward`` is the authors' be called as today's transformers call it.

    Args:
        tuples: the cache of a layer is a pair of keys and values, as up to transformers 4.35.
    """
    theirs, kept = attention.forward, {}

    def today(hidden_states: Tensor, position_embeddings: Any, **more: Any) -> Any:
        past_key_values = take_cache(more)
        attention.rotary_emb = lambda values, seq_len=None: position_embeddings
        queries, layer = hidden_states.shape[1], attention.layer_idx
        before = past_key_values.get_seq_length(layer)
        past = OldCache(past_key_values) if not tuples else kept.get("pair") if before else None
        out = theirs(
            hidden_states=hidden_states,
            attention_mask=causal(queries, before + queries),
            position_ids=None,
            past_key_value=past,
            output_attentions=False,
            use_cache=True,
        )
        if tuples:
            kept["pair"] = out[2]
            past_key_values.update(*(states[:, :, -queries:] for states in out[2]), layer)
        return out[0], None

    attention.forward = today


def greedy(model: Any, inputs: dict[str, Tensor], process: Any = None, tokens: int = TOKENS) -> Named:
    """The greedy answer of a model with a cache, through a processor of logits."""
    cache, ids, given, seen = DynamicCache(config=model.config.get_text_config()), inputs["input_ids"], dict(inputs), []
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            scores = model(**given, **with_cache(cache), use_cache=True).logits[:, -1].float()
            seen.append(scores if process is None else process(ids, scores))
            token = seen[-1].argmax(-1, keepdim=True)
            ids, given = torch.cat([ids, token], 1), {"input_ids": token}
    return {"tokens": ids[0, start:], "scores": distribution(torch.cat(seen))}


def words_alone(model: Any) -> Callable[..., Any]:
    """The language model as a callable of tokens, for the branches that authors run by themselves."""

    def run(input_ids: Tensor, use_cache: bool = True, past_key_values: Any = None) -> Any:
        cache = DynamicCache(config=model.config.get_text_config()) if past_key_values is None else past_key_values
        with torch.no_grad():
            return model(input_ids=input_ids, **with_cache(cache), use_cache=True)

    return run


def all_of(repositories: Iterable[Repository]) -> list[str]:
    """Those that are missing, in words."""
    return [f"{one.source} @ {one.commit}" for one in repositories if not one.path.is_dir()]

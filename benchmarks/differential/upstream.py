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
from transformers import DynamicCache, modeling_outputs
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

    def load(
        self, file: str, *names: str, drop: Callable[[ast.stmt], bool] | None = None, **given: Any
    ) -> SimpleNamespace:
        """The functions, classes and constants of these names; ``Class.method`` is the method alone.

        Args:
            drop: which statements are left out, where code cannot run as it is released.
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
            for node in ast.walk(scope):
                # Those that write documentation are left out.
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    known = ("dataclass", "no_grad", "staticmethod", "property", "abstractmethod")
                    node.decorator_list = [one for one in node.decorator_list if ast.dump(one).find("docstring") < 0]
                    assert all(any(word in ast.dump(one) for word in known) for one in node.decorator_list)
            wanted.append(scope)
        module = ast.Module(wanted, [])
        if drop is not None:
            for scope in list(ast.walk(module)):
                for field, body in ast.iter_fields(scope):
                    if isinstance(body, list) and any(isinstance(one, ast.stmt) and drop(one) for one in body):
                        kept = [one for one in body if not (isinstance(one, ast.stmt) and drop(one))]
                        setattr(scope, field, kept or [ast.Pass(lineno=1, col_offset=0)])
        code = compile(
            module,
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
            "BaseModelOutputWithPast": modeling_outputs.BaseModelOutputWithPast,
            "CausalLMOutputWithPast": modeling_outputs.CausalLMOutputWithPast,
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
        return said(out.logits, out)

    return run


def said(logits: Tensor, out: Any = None, past: Any = None) -> SimpleNamespace:
    """An output as sampling loops take it apart."""
    attentions, states = getattr(out, "attentions", None), getattr(out, "hidden_states", None)
    return SimpleNamespace(logits=logits, attentions=attentions, hidden_states=states, past_key_values=past)


def without_image(model: Any) -> Branch:
    """The same for the prompt without its image."""
    plain = forward(model, None)
    return lambda ids, **asked: plain(ids[ids != model.config.image_token_id][None], **asked)


def recorded(given: Tensor) -> Branch:
    """A branch that says what was drawn: (T, N) logits, one row a step."""
    rows = iter(given)
    return lambda ids, **asked: said(next(rows)[None, None])


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
        return lambda input_ids, past_key_values=None, **kwargs: {
            "branch": ending,
            "ids": input_ids,
            "past_key_values": past_key_values,
        }

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, **more: Any) -> Any:
        return {**model_kwargs, "past_key_values": outputs.past_key_values}

    def __call__(self, branch: str, ids: Tensor, **asked: Any) -> Any:
        flags = ("return_dict", "output_attentions", "output_hidden_states")
        given = {key: value for key, value in asked.items() if value is not None and (key not in flags or value)}
        given.pop("return_dict", None)
        return self.branches[branch](ids, **given)


def sampled(
    sample: Callable[..., Any], stand: Any, ids: Tensor, tokens: int = TOKENS, process: Any = None, **kwargs: Any
) -> Named:
    """The tokens of an authors' sampling loop, where the most probable one is drawn, and what they are drawn from.

    Args:
        process: a processor of logits of their own.
    """
    seen: list[Tensor] = []

    def keep(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.clone() if process is None else process(input_ids, scores))
        return seen[-1]

    class Ended(list[Any]):
        def __call__(self, input_ids: Tensor, scores: Any) -> Tensor:
            return torch.tensor([input_ids.shape[1] >= ids.shape[1] + tokens])

    def most(probabilities: Tensor, num_samples: int) -> Tensor:
        return probabilities.argmax(-1, keepdim=True)

    with mock.patch.object(torch, "multinomial", most), torch.no_grad():
        out = sample(stand, ids, logits_processor=keep, stopping_criteria=Ended(), **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    return {"tokens": out[0, ids.shape[1] :], "scores": distribution(torch.stack([scores[0] for scores in seen]))}


def embedded(model: Any, ids: Tensor, pixels: Tensor | None = None, features: Tensor | None = None) -> Tensor:
    """(1, T, D) what the first decoder layer is given."""
    embeddings = model.get_input_embeddings()(ids)
    if pixels is not None:
        features = model.get_image_features(pixels).pooler_output[0]
    if features is not None:
        embeddings[ids == model.config.image_token_id] = features
    return embeddings.detach()


def eager(model: Any) -> Any:
    """A copy of the model that can say what it attends to."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return model


class Whole:
    """What the ``forward`` of an authors' LLaVA finds on itself; the whole text is read at every step.

    A step that is not the first one is given the embeddings of the first, so that what was done to those of the image lasts.

    Args:
        decoder: (inputs_embeds, ...) -> states.
    """

    def __init__(self, model: Any, pixels: Tensor | None, decoder: Any = None, **attributes: Any):
        self.whole, self.pixels, self.kept = model, pixels, torch.empty(0)
        self.decoder = decoder or model.model.language_model
        self.lm_head = model.lm_head
        self.config = SimpleNamespace(
            output_attentions=False, output_hidden_states=False, use_return_dict=True, use_cache=False, pretraining_tp=1
        )
        for name, value in attributes.items():
            setattr(self, name, value)

    def prepare_inputs_labels_for_multimodal(self, ids: Tensor, mask: Any, past: Any, labels: Any, *images: Any) -> Any:
        if past is None:
            return None, mask, past, embedded(self.whole, ids, self.pixels), labels
        new = embedded(self.whole, ids[:, self.kept.shape[1] :])
        return None, mask, past, torch.cat([self.kept, new], 1), labels

    def model(self, inputs_embeds: Tensor, past_key_values: Any = None, **asked: Any) -> Any:
        if past_key_values is None:
            self.kept = inputs_embeds
        given = {key: value for key, value in asked.items() if key.startswith("output_") and value}
        return self.decoder(inputs_embeds=inputs_embeds, use_cache=False, **given)

    def branch(self, theirs: Callable[..., Any], **more: Any) -> Branch:
        """Their ``forward`` on this."""

        def run(ids: Tensor, **asked: Any) -> SimpleNamespace:
            out = theirs(self, input_ids=ids, return_dict=True, **more, **asked)
            return said(out.logits, out, past=True)

        return run


# --- Their model


class Bare(nn.Module):
    """What a model of the authors is derived from."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def post_init(self) -> None:
        pass


#: What stands in a file of LLaMA up to transformers 4.35.
LLAMA = (
    "_make_causal_mask",
    "_expand_mask",
    "LlamaRMSNorm",
    "LlamaRotaryEmbedding",
    "rotate_half",
    "apply_rotary_pos_emb",
    "repeat_kv",
    "LlamaMLP",
    "LlamaAttention",
    "LlamaDecoderLayer",
    "LlamaModel",
)


def llama(repository: Repository, file: str, model: Any, leave: Iterable[str] = (), **settings: Any) -> Any:
    """The authors' own decoder with the weights of the model's.

    Args:
        leave: names that their file does not have.
        settings: of the configuration.
    """
    kind = repository.load(
        file,
        *(name for name in LLAMA if name not in leave),
        LlamaPreTrainedModel=Bare,
        ACT2FN={"silu": nn.functional.silu},
    ).LlamaModel
    text = model.config.get_text_config()
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    sizes = ("vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act")
    config = SimpleNamespace(
        **{name: getattr(text, name) for name in names + sizes},
        pretraining_tp=1,
        rope_scaling=None,
        pad_token_id=None,
        output_attentions=False,
        output_hidden_states=False,
        use_cache=True,
        use_return_dict=True,
        **settings,
    )
    own = kind(config).float().eval()
    missing, unknown = own.load_state_dict(model.model.language_model.state_dict(), strict=False)
    assert not unknown and all("inv_freq" in name or "cached" in name for name in missing)
    return own


class Reading:
    """A branch whose cache is the authors' own: it reads the prompt, then a token at a time.

    Args:
        theirs: (inputs_embeds, past_key_values, ...) -> an output with ``past_key_values``, or a pair of which it is the first.
    """

    def __init__(self, theirs: Callable[..., Any], model: Any, pixels: Tensor | None):
        self.theirs, self.model, self.pixels = theirs, model, pixels

    def __call__(self, ids: Tensor, past_key_values: Any = None, **asked: Any) -> Any:
        if past_key_values is None:
            given = embedded(self.model, ids, self.pixels)
        else:
            given = embedded(self.model, ids[:, -1:])
        return self.theirs(
            inputs_embeds=given, past_key_values=past_key_values, use_cache=True, return_dict=True, **asked
        )


class Layer:
    """A decoder layer of today as transformers 4.36 to 4.49 called it; also says what it attends to."""

    def __init__(self, layer: Any, rotary: Any):
        self.layer, self.rotary = layer, rotary
        self.attention: list[Tensor] = []
        layer.self_attn.register_forward_hook(lambda module, args, out: self.attention.append(out[1]))

    @property
    def mlp(self) -> Any:
        return self.layer.mlp

    def __call__(
        self, hidden_states: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_value: Any, **more: Any
    ) -> Any:
        out = self.layer(
            hidden_states,
            attention_mask=attention_mask,
            position_embeddings=self.rotary(hidden_states, position_ids),
            **with_cache(past_key_value),
        )
        weights = self.attention.pop()
        return (out, weights, past_key_value) if more.get("output_attentions") else (out, past_key_value)


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


def greedy_whole(branch: Branch, ids: Tensor, tokens: int = TOKENS) -> Named:
    """The greedy answer of a branch."""
    seen, start, past = [], ids.shape[1], None
    with torch.no_grad():
        for _ in range(tokens):
            out = branch(ids) if past is None else branch(ids, past_key_values=past)
            seen.append(out.logits[:, -1].float())
            past = out.past_key_values if isinstance(branch, Reading) else None
            ids = torch.cat([ids, seen[-1].argmax(-1, keepdim=True)], 1)
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

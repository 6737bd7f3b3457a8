"""Loading the draft heads that the authors of ViSpec, MSD, EAGLE and EAGLE-3 published.

Their state dicts hold one decoder layer (``layers.0``, of EAGLE-3 ``midlayer``), ``fc``, for ViSpec ``img_fc`` and the adaptor
``imadpt``, for EAGLE-3 a norm, a language head and the tables of its vocabulary; and often a copy of the target's embedding,
which tells whether they belong together. Names and shapes are those of the code of JLKang/ViSpec-* (commit d0240c8 of the
ViSpec repository), lucylyn/MSD-* (fd76a5e; the one for Qwen2-VL has a norm before its attention) and SpecForge's
``LlamaForCausalLMEagle3`` (a6b6b02); a prefix such as ``module.`` that a trainer put before every name is taken off.

A head changes no answer, whatever its weights: what is checked here is that it *can* run. A head of another target of the same
sizes is warned of, where the file tells, and drafts what is seldom accepted.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine.hf.decoder import layer_count
from ...errors import InputError, UnsupportedError
from ...weights import read_safetensors
from .module import CONFIG, DraftHead, HeadConfig

#: Names of theirs that are not the head's own: the target's embedding and head, and rotary tables.
_FOREIGN = ("embed_tokens.weight", "lm_head.weight")
_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
#: What the files of weights are called, the first found is read.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
#: Settings of EAGLE-3 heads that change what they compute, and the value under which they do not.
_UNKNOWN_FLAGS = {
    "norm_before_fc": False,
    "fc_norm": False,
    "norm_output": False,
    "logit_scale": 1.0,
    "num_aux_hidden_states": 3,
    "use_aux_hidden_state": True,
}


def load(place: str | Path, target: Any, kind: str, **overrides: Any) -> DraftHead:
    """The head in a folder or a repository of the hub, this project's own or a published one.

    Args:
        place: a folder, or a hub id, with ``@revision`` where another one than the newest is wanted.
        target: the model it drafts for.
        kind: what the drafter takes: "vispec", "msd", "eagle" or "eagle3".
        overrides: further values of :class:`HeadConfig`, of a published head.

    Raises:
        InputError: no such place, no head in it, one of another kind, or one that does not fit ``target``.
        UnsupportedError: a head that computes what no head here computes.
    """
    folder = folder_of(place)
    if (folder / CONFIG).is_file():
        return DraftHead.from_pretrained(folder)
    state, config = _read_weights(folder), _read_config(folder)
    found = kind_of(state)
    if found != kind and (found, kind) != ("msd", "eagle"):
        raise InputError(f"{place} holds a head of kind {found!r}, by the names of its tensors; use drafter {found}.")
    try:
        return from_state_dict(state, target, kind, config, **overrides)
    except (InputError, UnsupportedError) as error:
        raise type(error)(f"{place}: {error}") from error


def folder_of(place: str | Path) -> Path:
    """The folder of a place: itself, or where a repository of the hub has been fetched to.

    Pickled weights are fetched only where a repository has no others.

    Raises:
        InputError: no such folder, or a repository that cannot be had.
    """
    if Path(place).is_dir():
        return Path(place)
    if not _HUB.fullmatch(str(place)):
        raise InputError(
            f"{place} holds no draft head (no such folder); train one with lvlm-decode train draft-head, or give a hub id."
        )
    from huggingface_hub import snapshot_download

    name, _, revision = str(place).partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            patterns = ["*.json", "pytorch_model*.bin"]
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    # All errors of the hub's client are one of these.
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"no draft head can be had from {place}: there is no such folder, and the hub says: {first} Fetch it where there "
            f"is a network with `hf download {name}`, and give the folder."
        ) from error
    return folder


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors by name, from one file or from shards; pickled ones are read without running code."""
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = _json(index).get("weight_map")
            if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
                raise InputError(f"{index} has no 'weight_map' from names to files; fetch the head again.")
            if any(Path(part).name != part for part in parts.values()):
                raise InputError(f"{index} names a file outside of its folder; fetch the head again.")
            files = sorted(set(parts.values()))
        elif (folder / name).is_file():
            files = [name]
        else:
            continue
        state: dict[str, Tensor] = {}
        for file in files:
            path = folder / file
            state |= read_safetensors(path) if path.suffix == ".safetensors" else _unpickled(path)
        return state
    raise InputError(
        f"{folder} holds no draft head: neither {CONFIG} nor {' nor '.join(_WEIGHTS)} is there; train one with "
        "lvlm-decode train draft-head, or fetch a published one."
    )


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing, and the index of its folder names it; fetch the head again.") from error
    # torch raises what its unpickler and its zip reader raise.
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise InputError(
            f"{path} holds more than tensors, or is damaged, and is not read, because a pickle can run code ({first}) Convert "
            "it to safetensors where it came from."
        ) from error
    # Trainers save the tensors themselves or in one field.
    for field in ("state_dict", "model", "module"):
        if isinstance(state, dict) and isinstance(state.get(field), dict):
            state = state[field]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} is no table of tensors by name; give the weights of a head.")
    return state


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return _json(path) if path.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); fetch the head again.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold a JSON object; fetch the head again.")
    return found


def kind_of(state: Mapping[str, Tensor]) -> str:
    """ "vispec" for a head with an adaptor, "eagle3" for one with ``midlayer``, else "msd": an EAGLE head has the same names,
    tell by where it came from.
    """
    if any("midlayer." in name for name in state):
        return "eagle3"
    return "vispec" if any("imadpt." in name for name in state) else "msd"


def from_state_dict(
    state: Mapping[str, Tensor],
    target: Any,
    kind: str | None = None,
    config: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> DraftHead:
    """The head of a published checkpoint, for ``target``.

    Args:
        state: tensors by name.
        target: the model it drafts for.
        kind: "vispec", "msd", "eagle" or "eagle3"; told from the names when ``None``.
        config: the ``config.json`` beside the weights; what it does not say is the target's.
        overrides: further values of :class:`HeadConfig`.

    Raises:
        InputError: tensors that are missing, unknown or of another shape than the target calls for, or a config of another
            target.
        UnsupportedError: settings that change what the head computes, and that no head here has.
    """
    kind = kind or kind_of(state)
    common = _common_prefix(state)
    own = {name.removeprefix(common): value for name, value in state.items() if "rotary_emb" not in name}
    embedding = own.get("embed_tokens.weight")
    own = {name: value for name, value in own.items() if kind == "eagle3" or not name.endswith(_FOREIGN)}
    own.pop("embed_tokens.weight", None)
    own = {re.sub(r"^midlayer\.", "layers.0.", name): value for name, value in own.items()}
    for name in ("fc.weight", "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight"):
        if name not in own:
            raise InputError(f"the state dict has no {name!r}, so it is no ViSpec, MSD, EAGLE or EAGLE-3 head.")
    values = _sizes(own, target, config or {}) | _flags(own, target, config or {}, kind)
    trim = _vocabulary(own, target) if kind == "eagle3" else None
    head = DraftHead(HeadConfig.for_target(target, kind, **{**values, **overrides}), trim)
    expected = {name: value for name, value in head.state_dict().items() if name != "trim"}
    missing, unknown = sorted(set(expected) - set(own)), sorted(set(own) - set(expected))
    if missing or unknown:
        raise InputError(
            f"the state dict does not fit a {kind} head: missing {', '.join(missing) or 'nothing'}; "
            f"unknown {', '.join(unknown) or 'nothing'}."
        )
    width = head.config.hidden_size
    for name, value in own.items():
        # The adaptor's queries alone may come with their heads joined; any other shape of equal size is a mix-up.
        joined = name == "imadpt.q" and value.shape == expected[name].flatten(1).shape
        if value.shape != expected[name].shape and not joined:
            raise InputError(
                f"{name} is {tuple(value.shape)} in the state dict and {tuple(expected[name].shape)} for this target "
                f"(hidden size {width}); the checkpoint belongs to another model."
            )
    if embedding is not None:
        _compare(embedding, target)
    loaded = {name: value.reshape(expected[name].shape).float() for name, value in own.items()}
    head.load_state_dict(loaded | ({} if trim is None else {"trim": trim}))
    return head.eval()


def _sizes(own: Mapping[str, Tensor], target: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of the head's layer, from its config and its shapes."""
    text = target.config.get_text_config(decoder=True)
    width, vocabulary = text.hidden_size, target.get_output_embeddings().weight.shape[0]
    for name, mine in (("hidden_size", width), ("target_hidden_size", width)):
        if config.get(name, mine) != mine:
            raise InputError(
                f"config.json says {name} {config[name]}, and the model has {mine}; give the head of this model."
            )
    # The embeddings of one model may be padded or cut by some rows, from one format of it to another.
    if abs(config.get("vocab_size", vocabulary) - vocabulary) > 0.01 * vocabulary:
        raise InputError(
            f"config.json says vocab_size {config['vocab_size']}, and the model has {vocabulary} tokens; give the head of "
            "this model."
        )
    wanted = config.get("target_model_type")
    if wanted and wanted not in (target.config.model_type, text.model_type):
        raise InputError(
            f"config.json says the head is for models of type {wanted!r}, and this one is {target.config.model_type!r}."
        )
    size = getattr(text, "head_dim", None) or width // text.num_attention_heads
    if "num_attention_heads" in config:
        size = config.get("head_dim") or width // config["num_attention_heads"]
    values = {
        "bias": "fc.bias" in own,
        "qkv_bias": "layers.0.self_attn.q_proj.bias" in own,
        # ViSpec's heads for Qwen have as many key heads as query heads, whatever the target has; MSD's have the target's.
        "num_heads": own["layers.0.self_attn.q_proj.weight"].shape[0] // size,
        "num_kv_heads": own["layers.0.self_attn.k_proj.weight"].shape[0] // size,
        "head_dim": size,
    }
    if "layers.0.mlp.gate_proj.weight" in own:
        values["intermediate_size"] = own["layers.0.mlp.gate_proj.weight"].shape[0]
    if "rms_norm_eps" in config:
        values["rms_eps"] = float(config["rms_norm_eps"])
    return values


def _flags(own: Mapping[str, Tensor], target: Any, config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What the head computes, from its config."""
    if "speculators_model_type" in config:
        raise UnsupportedError("this is a head in speculators' format, which is not read; give it in its authors' own.")
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(f"its feed-forward uses {config['hidden_act']!r}; heads with 'silu' alone are read.")
    # Both spellings of transformers; the newer one holds the base too.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    turning = rope.get("rope_type", rope.get("type", "default"))
    if turning not in ("default", "mrope"):
        raise UnsupportedError(
            f"its positions are scaled by {turning!r}; heads with plain ones or mrope alone are read."
        )
    values: dict[str, Any] = {}
    if theta := config.get("rope_theta", rope.get("rope_theta")):
        values["rope_theta"] = float(theta)
    if kind == "vispec" and "imadpt.q" in own:
        values["queries"] = own["imadpt.q"].shape[0]
    if kind != "eagle3":
        # MSD's head for Qwen2-VL names mrope, and its authors hand it plain positions.
        values["input_norm"] = "layers.0.input_layernorm.weight" in own
        return values
    inner = config.get("eagle_config") or {}
    for name, plain in _UNKNOWN_FLAGS.items():
        for given in (config, inner):
            if given.get(name, plain) not in (plain, None):
                raise UnsupportedError(f"its config sets {name} = {given[name]}, which no head here computes.")
    values["residual_norm"] = bool(config.get("norm_before_residual", inner.get("norm_before_residual", False)))
    if config:
        values["mrope"] = tuple(rope.get("mrope_section") or ())
        values["mrope_interleaved"] = bool(rope.get("mrope_interleaved", False))
    # vLLM counts states, from 0 for the embeddings; SpecForge, whose list is nested, the layers that put them out.
    states = config.get("eagle_aux_hidden_state_layer_ids")
    if states is None and (nested := inner.get("eagle_aux_hidden_state_layer_ids")):
        states = [number + 1 for number in nested]
    if states is not None:
        values["states"] = checked_states(tuple(states), target)
    return values


def checked_states(states: tuple[int, ...], target: Any) -> tuple[int, ...]:
    """Three decoder layers of ``target``, 1 for the first.

    Raises:
        InputError: not three, or layers it does not have.
    """
    layers = layer_count(target)
    if len(states) != 3 or not all(1 <= state <= layers for state in states):
        raise InputError(f"states = {states} are not three of the model's layers 1 to {layers}; give others.")
    return states


def _vocabulary(own: dict[str, Tensor], target: Any) -> Tensor | None:
    """(N',) the tokens an EAGLE-3 head drafts, ``None`` for all; its tables are taken out of ``own``."""
    offsets, chosen = own.pop("d2t", None), own.pop("t2d", None)
    vocabulary = target.get_output_embeddings().weight.shape[0]
    rows = own["lm_head.weight"].shape[0] if "lm_head.weight" in own else 0
    if offsets is None:
        if "lm_head.weight" in own and rows != vocabulary:
            raise InputError(
                f"lm_head.weight has {rows} rows for a model of {vocabulary} tokens, and no d2t says which tokens they are."
            )
        return None
    if offsets.shape != (rows,) or offsets.is_floating_point():
        raise InputError(f"d2t is {tuple(offsets.shape)} and lm_head.weight has {rows} rows; they belong to two heads.")
    ids = torch.arange(rows) + offsets.long()
    if not bool((ids.diff() > 0).all()) or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise InputError(
            f"d2t does not name rising tokens of a vocabulary of {vocabulary}; the head belongs to another model."
        )
    if chosen is not None and not torch.equal(chosen.bool().nonzero()[:, 0], ids):
        raise InputError("d2t and t2d name different tokens; fetch the head again.")
    return ids


def _compare(embedding: Tensor, target: Any) -> None:
    """Warn of a head that came with the embedding of another model than ``target``."""
    mine = target.get_input_embeddings().weight.detach()
    if embedding.shape[1:] != mine.shape[1:]:
        raise InputError(
            f"embed_tokens.weight is {tuple(embedding.shape)} in the state dict and {tuple(mine.shape)} in this target; the "
            "checkpoint belongs to another model."
        )
    rows = torch.arange(0, min(len(embedding), len(mine)), max(1, min(len(embedding), len(mine)) // 64))
    own, theirs = mine[rows.to(mine.device)].float().cpu(), embedding[rows].float()
    # Within what float16 or bfloat16 make of the same numbers.
    if not torch.allclose(own, theirs, rtol=2**-6, atol=1e-4):
        warnings.warn(
            "the head came with the embedding of another model than this one: it will draft, no answer changes, and little "
            "of it will be accepted. Give the head of this model.",
            stacklevel=2,
        )


def _common_prefix(state: Mapping[str, Tensor]) -> str:
    name = next((name for name in state if name.endswith("fc.weight") and not name.endswith("img_fc.weight")), "")
    return name[: -len("fc.weight")]

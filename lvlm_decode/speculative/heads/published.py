"""Loading the draft heads that the authors of ViSpec, MSD and EAGLE published.

Their state dicts hold one decoder layer (``layers.0``, without an input norm), ``fc``, for ViSpec ``img_fc`` and the
adaptor ``imadpt``, and a copy of the target's embedding, which is dropped. Names and shapes are those of the code of
JLKang/ViSpec-* (commit d0240c8 of the ViSpec repository) and lucylyn/MSD-* (fd76a5e); a prefix such as ``module.`` that a
trainer put before every name is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...errors import InputError
from .module import DraftHead, HeadConfig

#: Names of theirs that are not the head's own: the target's embedding and head, and rotary tables.
_FOREIGN = ("embed_tokens.weight", "lm_head.weight")


def kind_of(state: Mapping[str, Tensor]) -> str:
    """ "vispec" for a head with an adaptor, else "msd": an EAGLE head has the same names, tell by where it came from."""
    return "vispec" if any(name.startswith("imadpt.") for name in state) else "msd"


def from_state_dict(
    state: Mapping[str, Tensor], target: nn.Module, kind: str | None = None, **overrides: Any
) -> DraftHead:
    """The head of a published checkpoint, for ``target``.

    Args:
        state: tensors by name.
        target: the model it drafts for.
        kind: "vispec", "msd" or "eagle"; told from the names when ``None``.
        overrides: further values of :class:`HeadConfig`.

    Raises:
        InputError: tensors that are missing, unknown or of another shape than the target calls for.
    """
    common = _common_prefix(state)
    own = {
        name.removeprefix(common): value
        for name, value in state.items()
        if not name.endswith(_FOREIGN) and "rotary_emb" not in name
    }
    for name in ("fc.weight", "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight"):
        if name not in own:
            raise InputError(f"the state dict has no {name!r}, so it is no ViSpec, MSD or EAGLE head.")
    kind = kind or kind_of(own)
    text = target.config.get_text_config(decoder=True)
    width = text.hidden_size
    size = getattr(text, "head_dim", None) or width // text.num_attention_heads
    values: dict[str, Any] = {
        "bias": "fc.bias" in own,
        "qkv_bias": "layers.0.self_attn.q_proj.bias" in own,
        # Published Qwen heads have as many key heads as query heads, whatever the target has.
        "num_heads": own["layers.0.self_attn.q_proj.weight"].shape[0] // size,
        "num_kv_heads": own["layers.0.self_attn.k_proj.weight"].shape[0] // size,
        "intermediate_size": own["layers.0.mlp.gate_proj.weight"].shape[0],
        "head_dim": size,
    }
    if "imadpt.q" in own:
        values["queries"] = own["imadpt.q"].shape[0]
    head = DraftHead(HeadConfig.for_target(target, kind, **{**values, **overrides}))
    expected = head.state_dict()
    missing, unknown = sorted(set(expected) - set(own)), sorted(set(own) - set(expected))
    if missing or unknown:
        raise InputError(
            f"the state dict does not fit a {kind} head: missing {', '.join(missing) or 'nothing'}; "
            f"unknown {', '.join(unknown) or 'nothing'}."
        )
    for name, value in own.items():
        # The adaptor's queries alone may come with their heads joined; any other shape of equal size is a mix-up.
        joined = name == "imadpt.q" and value.shape == expected[name].flatten(1).shape
        if value.shape != expected[name].shape and not joined:
            raise InputError(
                f"{name} is {tuple(value.shape)} in the state dict and {tuple(expected[name].shape)} for this target "
                f"(hidden size {width}); the checkpoint belongs to another model."
            )
    head.load_state_dict({name: value.reshape(expected[name].shape).float() for name, value in own.items()})
    return head.eval()


def _common_prefix(state: Mapping[str, Tensor]) -> str:
    name = next((name for name in state if name.endswith("fc.weight") and not name.endswith("img_fc.weight")), "")
    return name[: -len("fc.weight")]

"""Running a draft head while decoding: weights folded once, keys and values in place.

A text slot needs ``W_fc [e ; W_img [f ; g] + b_img] + b_fc``, where ``g`` is fixed once the prompt is read. So per token
it is a row of a table (``W_e e + b`` for the whole vocabulary), plus one product with ``f``, plus a constant. This equals
the module up to rounding, which changes no answer: the target verifies. An EAGLE-3 head has a norm where the others have
that product, so its slots are put together as the module does it.

Letters as in ``module``; ``S`` slots in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..drafters.base import PromptFeatures
from .module import DraftHead, Slots

#: Bytes up to which the table of token inputs is kept; beyond, its rows are worked out as they are needed.
TABLE_BYTES = 64 << 20


class HeadRunner:
    """A :class:`DraftHead` tied to a target's embedding and language head.

    Args:
        head: the head; used in the target's dtype and device.
        target: the module that decodes.
    """

    def __init__(self, head: DraftHead, target: Any):
        config = head.config
        out = target.get_output_embeddings()
        self.target_weight = out.weight
        self.head = head.to(out.weight.device, out.weight.dtype).eval()
        self.config, self.embed = config, target.get_input_embeddings()
        self.trim: Tensor | None = head.trim
        if config.states:
            self.out_weight, self.out_bias = self.head.lm_head.weight, None
        else:
            self.out_weight = out.weight if self.trim is None else out.weight[self.trim]
            self.out_bias = None if out.bias is None else out.bias if self.trim is None else out.bias[self.trim]
        width = config.hidden_size
        self.device, self.dtype = out.weight.device, out.weight.dtype
        self.w_global: Tensor | None = None
        self.table: Tensor | None = None
        with torch.no_grad():
            if not config.states:
                self._fold(width)
            attention, mlp = head.layer.self_attn, head.layer.mlp
            qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
            self.w_qkv = torch.cat([p.weight for p in qkv])
            self.b_qkv = torch.cat([p.bias for p in qkv]) if config.qkv_bias else None
            self.w_o, self.w_down = attention.o_proj.weight, mlp.down_proj.weight
            self.w_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            self.norm = head.layer.post_attention_layernorm.weight
        self.grouped = config.num_kv_heads != config.num_heads
        self._cos = self._sin = torch.empty(0)
        self._tril = torch.empty(0, 0)

    def _fold(self, width: int) -> None:
        """Fold what stands before the layer."""
        head, config = self.head, self.config
        from_embed, from_feature = head.fc.weight[:, :width], head.fc.weight[:, width:]
        if config.use_global:
            self.w_global = from_feature @ head.img_fc.weight[:, width:]
            shift: Tensor | float = from_feature @ head.img_fc.bias if head.img_fc.bias is not None else 0.0
            from_feature = from_feature @ head.img_fc.weight[:, :width]
        else:
            shift = 0.0
        bias = head.fc.bias if head.fc.bias is not None else torch.zeros(width, device=self.device, dtype=self.dtype)
        self.b_slot = bias + shift
        self.w_embed, self.w_feature = from_embed.contiguous(), from_feature.t().contiguous()
        rows = self.embed.weight.shape[0]
        if rows * width * self.dtype.itemsize <= TABLE_BYTES:
            self.table = F.linear(self.embed(torch.arange(rows, device=self.device)), self.w_embed, self.b_slot)

    def following(self, prompt: PromptFeatures, roots: Tensor) -> Tensor:
        """(R, T, D) what stands for the token after each position of a prompt, ``roots`` (R,) after its last one."""
        if self.config.image == "token":
            return self.embed(torch.cat([prompt.ids[:, 1:], roots[:, None]], 1)).to(self.dtype)
        return torch.cat([prompt.embeds[:, 1:], self.embed(roots)[:, None]], 1).to(self.dtype)

    def rotary(self, upto: int) -> tuple[Tensor, Tensor]:
        """cos, sin (>= upto, head_dim)."""
        if len(self._cos) < upto:
            positions = torch.arange(max(2 * upto, 256), device=self.device)[None]
            cos, sin = self.head.rotary(positions)
            self._cos, self._sin = cos[0, 0].to(self.dtype), sin[0, 0].to(self.dtype)
        return self._cos, self._sin

    def causal(self, start: int, stop: int) -> Tensor:
        """(stop - start, stop) bool: slot i sees slots up to itself."""
        if len(self._tril) < stop:
            self._tril = torch.ones(2 * stop, 2 * stop, dtype=torch.bool, device=self.device).tril()
        return self._tril[start:stop, :stop]

    def constant(self, slots: Slots) -> Tensor | None:
        """(R, 1, D) what the global vector of each row adds to every slot; ``None`` without one."""
        return None if self.w_global is None or slots.g is None else (slots.g @ self.w_global.t())[:, None]

    def inputs(self, tokens: Tensor, features: Tensor, constant: Tensor | None) -> Tensor:
        """Inputs of text slots: ``tokens`` (R, t) that follow ``features`` (R, t, D)."""
        if self.config.states:
            return self.head.text_slots(self.embed(tokens), features, None)
        if self.table is not None:
            z = self.table[tokens]
        else:
            z = F.linear(self.embed(tokens), self.w_embed, self.b_slot)
        z = z + features @ self.w_feature
        return z if constant is None else z + constant

    def step(
        self, z: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, start: int, mask: Tensor | None
    ) -> Tensor:
        """Run slots after the ``start`` slots of the cache, writing theirs behind.

        Args:
            z: inputs, see :meth:`inputs`.
            cos, sin: (t, head_dim) or (R, 1, t, head_dim) at their positions.
            keys, values: (R, kv heads, capacity, head_dim).
            mask: broadcastable to (R, 1, t, start + t) bool; ``None`` lets every slot see all.

        Returns:
            (R, t, D) guessed features.
        """
        config = self.config
        rows, t, _ = z.shape
        heads, kv, size = config.num_heads, config.num_kv_heads, config.head_dim
        x, z = self.head.entered(z)
        x = F.linear(x, self.w_qkv, self.b_qkv).view(rows, t, heads + 2 * kv, size).transpose(1, 2)
        turned, v = x[:, : heads + kv], x[:, heads + kv :]
        half = size // 2
        rotated = torch.cat([-turned[..., half:], turned[..., :half]], -1)
        turned = torch.addcmul(turned * cos, rotated, sin)
        stop = start + t
        keys[:, :, start:stop] = turned[:, heads:]
        values[:, :, start:stop] = v
        out = F.scaled_dot_product_attention(
            turned[:, :heads], keys[:, :, :stop], values[:, :, :stop], attn_mask=mask, enable_gqa=self.grouped
        )
        z = z + F.linear(out.transpose(1, 2).reshape(rows, t, heads * size), self.w_o)
        gate, up = F.linear(F.rms_norm(z, self.norm.shape, self.norm, config.rms_eps), self.w_up).chunk(2, -1)
        return z + F.linear(F.silu(gate) * up, self.w_down)

    def logits(self, features: Tensor) -> Tensor:
        """(..., N') float32 draft logits, over the trimmed vocabulary if there is one."""
        if self.config.states:
            features = self.head.norm(features)
        return F.linear(features, self.out_weight, self.out_bias).float()

    def token_ids(self, chosen: Tensor) -> Tensor:
        """Ids of the target's vocabulary."""
        return chosen if self.trim is None else self.trim[chosen]

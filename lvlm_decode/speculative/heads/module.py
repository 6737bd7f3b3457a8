"""One draft head whose flags give EAGLE, MSD, ViSpec and EAGLE-3.

Slot t of the head sees the feature ``f_t`` of the target (what its language head reads) and the embedding ``e_{t+1}`` of
the token that follows, and guesses ``f_{t+1}``; the target's own language head turns the guess into a draft:

    z_t = W_fc [e_{t+1} ; f'_t] + b_fc           text slots; then one decoder layer without input norm or final norm
    f'_t = f_t                                   EAGLE (arXiv 2401.15077), MSD (arXiv 2505.14260)
    f'_t = W_img [f_t ; g_t] + b_img             ViSpec (arXiv 2509.15235): g_t, a vector of the last image before t

What image slots hold is the flag ``image``:

    fuse      as text slots                                                             EAGLE
    direct    z_t = e_{t+1}, the projected image feature itself                          MSD
    compress  each image's slots become queries - 1 vectors of a vision adaptor, at the
              image's last positions; text keeps its positions                           ViSpec
    drop      image slots are left out                                                   an ablation
    token     as text slots, with the embedding of the placeholder for e                 EAGLE-3

EAGLE-3 (arXiv 2503.01840) has another slot and a language head of its own over the tokens it may draft:

    f_t = W_fc [a_t ; b_t ; c_t]                 states of three decoder layers of the target, mixed
    z_t = [RMS(e_{t+1}) ; f_t]                   attention reads [RMS(e) ; RMS(f)], its output is added to f
    scores = W_head RMS(fhat_{t+1})              the guess goes on as it is, before that norm

The published code is followed where the papers differ from it: ViSpec's paper adds ``W_g g``, its code concatenates, of
which the paper's form is a special case. Embeddings and, but for EAGLE-3, language head are the target's, frozen and not
stored.

Letters: ``R`` rows (views times samples), ``T`` positions, ``D`` width, ``N`` vocabulary, ``M`` slots of an image,
``q`` adaptor queries.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ...engine.hf.decoder import fingerprint
from ...errors import EvalError, InputError, ParameterError, UnknownNameError
from ...reading import Closed, checked, read_json
from ...weights import load_into, read_safetensors

ImageMode = Literal["fuse", "direct", "compress", "drop", "token"]

#: The flags of each kind of head, and the draft tree of its authors' code, sized for a GPU.
KINDS: dict[str, dict[str, Any]] = {
    "eagle": {"image": "fuse", "use_global": False, "rows": 60, "depth": 8, "top_k": 10},
    "msd": {"image": "direct", "use_global": False, "rows": 60, "depth": 6, "top_k": 10},
    "vispec": {"image": "compress", "use_global": True, "rows": 30, "depth": 4, "top_k": 8},
    "eagle3": {"image": "token", "use_global": False, "bias": False, "rows": 60, "depth": 8, "top_k": 10},
}

WEIGHTS, CONFIG = "head.safetensors", "head.json"


@dataclass(frozen=True)
class HeadConfig:
    """Sizes and flags of a :class:`DraftHead`.

    Args:
        kind: what it is called; see :data:`KINDS`.
        image: what image slots hold.
        use_global: whether text slots carry the global vector of the last image.
        queries: adaptor queries q; q - 1 of them stand for an image, the last one is the global vector.
        bias: whether ``fc`` (and ``img_fc``) have a bias.
        qkv_bias: whether the projections to queries, keys and values have one.
        input_norm: whether the layer has a norm before its attention, as MSD's head for Qwen2-VL.
        states: decoder layers whose states are mixed into the feature, 1 for the first (EAGLE-3); empty for the last hidden
            state as the language head reads it.
        residual_norm: whether attention's output is added to the feature after its norm; EAGLE-3 alone.
        mrope: how many frequencies of a head turn with each axis of the target's positions; empty for one axis, the number
            of the slot.
        mrope_interleaved: whether the axes take turns from frequency to frequency (Qwen3-VL) rather than in blocks.
        rows, depth, top_k: how it drafts unless the drafter says otherwise: rows verified at most, root included; deepest
            level (one more than the authors' D, which does not count the first); branching. ``top_k`` 1 drafts a chain.
        target, fingerprint: the model it was trained for: a name for people, and :func:`fingerprint` of its head.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    kind: str = "eagle"
    image: ImageMode = "fuse"
    use_global: bool = False
    queries: int = 2
    bias: bool = True
    qkv_bias: bool = False
    input_norm: bool = False
    states: tuple[int, ...] = ()
    residual_norm: bool = False
    mrope: tuple[int, ...] = ()
    mrope_interleaved: bool = False
    rms_eps: float = 1e-5
    rope_theta: float = 10000.0
    rows: int = 60
    depth: int = 6
    top_k: int = 10
    target: str = ""
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.image not in get_args(ImageMode):
            raise ParameterError(f"image = {self.image!r} is not valid; it is one of {', '.join(get_args(ImageMode))}.")
        if self.queries < 2:
            raise ParameterError(f"queries = {self.queries} is not valid; one compresses, one is global: at least 2.")
        if self.mrope and sum(self.mrope) * 2 != self.head_dim:
            raise ParameterError(
                f"mrope = {self.mrope} is not valid; the sections add up to half of head_dim, {self.head_dim // 2}."
            )
        if bool(self.states) != (self.image == "token"):
            raise ParameterError(
                f"states = {self.states} and image = {self.image!r} do not go together; EAGLE-3 has both, three layers and "
                "'token', every other head neither."
            )

    @property
    def has_adaptor(self) -> bool:
        return self.image == "compress" or self.use_global

    @classmethod
    def read(cls, path: Path) -> HeadConfig:
        """The config of a ``head.json``.

        Raises:
            InputError: a field that is missing, unknown or of another type, or a size no head has.
        """
        try:
            values: dict[str, Any] = dict(checked(_shape(), read_json(path), str(path)))
            values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
            config = cls(**values)
        except (EvalError, ParameterError) as error:
            raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        return config

    @classmethod
    def for_target(cls, module: Any, kind: str, **overrides: Any) -> HeadConfig:
        """The head of ``kind`` for the language model of ``module``: one layer of its own sizes.

        Raises:
            UnknownNameError: an unknown kind.
        """
        if kind not in KINDS:
            raise UnknownNameError(f"unknown kind of draft head {kind!r}; choose one of {', '.join(KINDS)}.")
        text = module.config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        values: dict[str, Any] = {
            "hidden_size": text.hidden_size,
            "num_heads": heads,
            "num_kv_heads": getattr(text, "num_key_value_heads", None) or heads,
            "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
            "intermediate_size": text.intermediate_size,
            "vocab_size": module.get_output_embeddings().weight.shape[0],
            "rms_eps": getattr(text, "rms_norm_eps", 1e-5),
            "rope_theta": (getattr(text, "rope_parameters", None) or {}).get("rope_theta", 10000.0),
            "kind": kind,
            "target": str(getattr(module, "name_or_path", "")).rstrip("/").rsplit("/", 1)[-1],
            "fingerprint": fingerprint(module),
            **KINDS[kind],
        }
        if kind == "eagle3":
            values["states"] = default_states(text.num_hidden_layers)
            rope = getattr(text, "rope_parameters", None) or {}
            values["mrope"] = tuple(rope.get("mrope_section") or ())
            values["mrope_interleaved"] = bool(rope.get("mrope_interleaved", "qwen3" in module.config.model_type))
        return cls(**{**values, **overrides})


def default_states(layers: int) -> tuple[int, int, int]:
    """The decoder layers whose states EAGLE-3 mixes unless told otherwise: the second, the middle one, the fourth last.

    A target of fewer than eight layers has the first, the middle one and the last but one.
    """
    return (2, layers // 2, layers - 3) if layers >= 8 else (1, max(1, layers // 2), max(1, layers - 1))


@functools.cache
def _shape() -> type[Closed]:
    """`HeadConfig` as a file holds it: the same fields and types, sizes above 0 and no larger than any model's."""
    from pydantic import Field, create_model

    hints = get_type_hints(HeadConfig)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(HeadConfig):
        kind: Any = hints[field.name]
        sizes: dict[Any, dict[str, Any]] = {int: {"ge": 1, "lt": 2**24}, float: {"gt": 0, "allow_inf_nan": False}}
        limits = sizes.get(kind, {})
        default: Any = ... if field.default is dataclasses.MISSING else field.default
        if kind == tuple[int, ...]:
            # JSON has no tuples.
            kind, default = list[Annotated[int, Field(ge=1, lt=2**24)]], list(default)
        fields[field.name] = (Annotated[kind, Field(**limits)] if limits else kind, default)
    return create_model("HeadShape", __base__=Closed, **fields)


class _Attention(nn.Module):
    def __init__(self, config: HeadConfig):
        super().__init__()
        width, bias = config.hidden_size, config.qkv_bias
        read = 2 * width if config.states else width
        self.q_proj = nn.Linear(read, config.num_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(read, config.num_kv_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(read, config.num_kv_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, width, bias=False)


class _Mlp(nn.Module):
    def __init__(self, config: HeadConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class _Layer(nn.Module):
    """The decoder layer; no norm before attention unless the head has one."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        if config.input_norm or config.states:
            self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_eps)
        if config.states:
            self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_eps)
        self.self_attn = _Attention(config)
        self.mlp = _Mlp(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_eps)


class _Adaptor(nn.Module):
    """ViSpec's vision adaptor: learnable queries attend to an image's features; no norm, no residual, no positions."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        width, heads, size = config.hidden_size, config.num_heads, config.head_dim
        self.q = nn.Parameter(torch.randn(config.queries, heads, size) * size**-0.5)
        self.k_proj = nn.Linear(width, heads * size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, heads * size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * size, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(S, M, D) features of S images, (S, M) bool which of them exist -> (S, q, D)."""
        images, _, _ = x.shape
        _, heads, size = self.q.shape
        k, v = (proj(x).unflatten(-1, (heads, size)).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        q = self.q.transpose(0, 1).expand(images, -1, -1, -1).to(k.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.o_proj(out.transpose(1, 2).flatten(2))


@dataclass
class Slots:
    """What the layer reads of a prompt.

    Args:
        z: (R, T, D) layer inputs; (R, T, 2 D) of a head with a language head of its own.
        positions: (R, T) long, or (axes, R, T).
        seen: (R, T) bool: slots that exist; the others are padding, or image slots that were left out.
        g: (R, D) global vector that text after the prompt carries, or ``None``.
    """

    z: Tensor
    positions: Tensor
    seen: Tensor
    g: Tensor | None


class DraftHead(nn.Module):
    """A draft head. ``R`` rows are independent; several images per row are allowed.

    Submodules carry the names of the published checkpoints.

    Args:
        config: sizes and flags.
        trim: (N',) ids of the tokens it may draft, after VocabTrim (arXiv 2506.22694); ``None`` for all.
    """

    def __init__(self, config: HeadConfig, trim: Tensor | None = None):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.fc = nn.Linear((len(config.states) or 2) * width, width, bias=config.bias)
        self.layers = nn.ModuleList([_Layer(config)])
        self.inverse_frequencies: Tensor
        self.axis: Tensor
        self.trim: Tensor | None
        if config.states:
            self.norm = nn.RMSNorm(width, eps=config.rms_eps)
            self.lm_head = nn.Linear(width, config.vocab_size if trim is None else len(trim), bias=False)
        if config.has_adaptor:
            self.imadpt = _Adaptor(config)
        if config.use_global:
            self.img_fc = nn.Linear(2 * width, width, bias=config.bias)
            with torch.no_grad():
                # [I | 0]: at first the global vector changes nothing, so text-only training carries over.
                self.img_fc.weight.zero_()
                self.img_fc.weight[:, :width].fill_diagonal_(1.0)
                if self.img_fc.bias is not None:
                    self.img_fc.bias.zero_()
        inverse = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        self.register_buffer("inverse_frequencies", inverse, persistent=False)
        self.register_buffer("axis", _axes(config), persistent=False)
        self.register_buffer("trim", trim)

    @property
    def layer(self) -> _Layer:
        (layer,) = self.layers
        assert isinstance(layer, _Layer)
        return layer

    def restrict(self, trim: Tensor) -> None:
        """Let it draft the tokens ``trim`` (N',) alone."""
        self.trim = trim
        if self.config.states:
            whole = self.lm_head.weight.data
            self.lm_head = nn.Linear(whole.shape[1], len(trim), bias=False).to(whole.device, whole.dtype)
            self.lm_head.weight.data.copy_(whole[trim])

    def lift(self, hidden: Tensor, layers: Mapping[int, Tensor]) -> Tensor:
        """(R, T, D) the target's features: last hidden states (R, T, D), or the states of the head's own layers, mixed."""
        if not self.config.states:
            return hidden
        return self.fc(torch.cat([layers[layer] for layer in self.config.states], -1))

    def slots(
        self, embeds: Tensor, features: Tensor, image: Tensor, mask: Tensor, positions: Tensor | None = None
    ) -> Slots:
        """The layer's inputs for a whole prompt.

        Args:
            embeds: (R, T, D) embedding of the token *after* each position; image tokens: the projected feature, or the
                embedding of the placeholder where image slots hold that.
            features: (R, T, D) the target's feature at each position, see :meth:`lift`.
            image: (R, T) bool: the token after the position belongs to an image. A run of such tokens is one image.
            mask: (R, T) bool: False at padding.
            positions: (axes, R, T) of the target, for a head that turns with several axes.

        Raises:
            InputError: an image with fewer tokens than stand for it.
        """
        config = self.config
        if positions is None or not config.mrope:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        image = image & mask
        spans = _spans(image) if config.has_adaptor else None
        adapted = g = last = None
        if spans is not None and len(spans.rows):
            if config.image == "compress" and int(spans.lengths.min()) < config.queries - 1:
                raise InputError(
                    f"an image of {int(spans.lengths.min())} tokens cannot be compressed to {config.queries - 1}."
                )
            inside = torch.arange(int(spans.lengths.max()), device=embeds.device)
            exists = inside < spans.lengths[:, None]
            index = (spans.starts[:, None] + inside).clamp(max=embeds.shape[1] - 1)
            adapted = self.imadpt(embeds[spans.rows[:, None], index], exists)
        if config.use_global:
            if adapted is None or spans is None:
                g = torch.zeros_like(features)
            else:
                passed = spans.passed(image)
                number = spans.offsets[:, None] + passed - 1
                g = adapted[number.clamp(min=0), -1] * (passed > 0)[..., None]
            last = g[:, -1]
        z = self.text_slots(embeds, features, g)
        seen = mask
        if config.image == "direct":
            z = torch.where(image[..., None], embeds, z)
        elif config.image in ("compress", "drop"):
            seen = mask & ~image
        if config.image == "compress" and adapted is not None and spans is not None:
            places = spans.starts + spans.lengths - (config.queries - 1)
            places = places[:, None] + torch.arange(config.queries - 1, device=places.device)
            rows = spans.rows[:, None].expand_as(places)
            z = z.index_put((rows, places), adapted[:, :-1].to(z.dtype))
            seen = seen.index_put((rows, places), torch.ones_like(places, dtype=torch.bool))
        return Slots(z, positions, seen, last)

    def text_slots(self, embeds: Tensor, features: Tensor, g: Tensor | None) -> Tensor:
        """Inputs of text slots; ``g`` (R, T, D) or (R, 1, D), if the head has a global vector."""
        if self.config.states:
            return torch.cat([self.layer.input_layernorm(embeds), features], -1)
        if self.config.use_global:
            g = features.new_zeros(()) if g is None else g
            features = self.img_fc(torch.cat([features, g.expand_as(features)], -1))
        return self.fc(torch.cat([embeds, features], -1))

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin (R, 1, T, head_dim) at ``positions`` (R, T) or (axes, R, T)."""
        angles = positions[..., None].float() * self.inverse_frequencies
        if angles.dim() == 4:
            angles = angles.gather(0, self.axis.expand(1, *angles.shape[1:]))[0]
        angles = torch.cat([angles, angles], -1)[:, None]
        return angles.cos(), angles.sin()

    def forward(self, slots: Slots) -> Tensor:
        """(R, T, D) guessed features, causal, each slot attending to the slots that exist."""
        out, _, _ = self.run_layer(slots.z, slots.positions, slots.seen)
        return out

    def run_layer(self, z: Tensor, positions: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer over whole rows: (R, T, D) outputs, keys and values (R, kv heads, T, head_dim)."""
        config, layer = self.config, self.layer
        x, z = self.entered(z)
        q, k, v = self.projected(x, positions)
        width = z.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=z.device).tril()
        # A slot always sees itself, so that rows of padding give numbers and not NaN.
        mask = (causal & seen[:, None, :]) | torch.eye(width, dtype=torch.bool, device=z.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask[:, None], enable_gqa=config.num_kv_heads != config.num_heads
        )
        z = z + layer.self_attn.o_proj(out.transpose(1, 2).flatten(2))
        return z + self.feed_forward(z), k, v

    def entered(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads of the layer's inputs, and (R, T, D) what its output is added to."""
        config, layer = self.config, self.layer
        if not config.states:
            return layer.input_layernorm(z) if config.input_norm else z, z
        embeds, features = z.chunk(2, -1)
        normed = layer.hidden_norm(features)
        return torch.cat([embeds, normed], -1), normed if config.residual_norm else features

    def projected(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (R, heads, T, head_dim) of what attention reads, turned to ``positions``."""
        attention, size = self.layer.self_attn, self.config.head_dim
        cos, sin = (value.to(x.dtype) for value in self.rotary(positions))
        q, k, v = (
            projection(x).unflatten(-1, (-1, size)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return q * cos + _rotate(q) * sin, k * cos + _rotate(k) * sin, v

    def feed_forward(self, z: Tensor) -> Tensor:
        mlp, x = self.layer.mlp, self.layer.post_attention_layernorm(z)
        return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write ``head.safetensors`` and ``head.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            name: (value.to(dtype) if value.is_floating_point() else value).cpu().contiguous()
            for name, value in self.state_dict().items()
        }
        save_file(state, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(self.config), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> DraftHead:
        """The head that :meth:`save_pretrained` wrote.

        Raises:
            InputError: no head in ``folder``, or one whose files are damaged or do not fit each other.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise InputError(
                f"{folder} holds no draft head ({CONFIG} is missing); train one with: lvlm-decode train draft-head."
            )
        config = HeadConfig.read(folder / CONFIG)
        state = read_safetensors(folder / WEIGHTS)
        strange = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
        if strange:
            raise InputError(
                f"{folder / WEIGHTS}: tensor {strange[0]} holds numbers that are not finite; train it again."
            )
        head = cls(config, state.get("trim"))
        load_into(head, state, str(folder / WEIGHTS))
        return head.to(dtype).eval()


def _axes(config: HeadConfig) -> Tensor | None:
    """(head_dim / 2,) the axis of the positions that each frequency turns with; ``None`` for one axis."""
    if not config.mrope:
        return None
    axis = torch.arange(len(config.mrope)).repeat_interleave(torch.tensor(config.mrope))
    if config.mrope_interleaved:
        # The first axis has what the others leave of their turns.
        axis = torch.zeros_like(axis)
        for number, count in enumerate(config.mrope[1:], start=1):
            axis[number : count * len(config.mrope) : len(config.mrope)] = number
    return axis


def _rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


@dataclass
class _Spans:
    """Runs of image slots, in row order: the row, start and length of each, and how many come before each row."""

    rows: Tensor
    starts: Tensor
    lengths: Tensor
    offsets: Tensor

    def passed(self, image: Tensor) -> Tensor:
        """(R, T) how many runs have ended before each position."""
        ended = torch.zeros_like(image, dtype=torch.long)
        stops = self.starts + self.lengths
        inside = stops < image.shape[1]
        ended[self.rows[inside], stops[inside]] = 1
        return ended.cumsum(1)


def _spans(image: Tensor) -> _Spans:
    before = F.pad(image, (1, 0))[:, :-1]
    after = F.pad(image, (0, 1))[:, 1:]
    first, last = (image & ~before).nonzero(), (image & ~after).nonzero()
    counts = (image & ~before).sum(1)
    return _Spans(first[:, 0], first[:, 1], last[:, 1] - first[:, 1] + 1, counts.cumsum(0) - counts)

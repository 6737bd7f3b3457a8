"""Which methods and families the contract of ``lvlm_decode.testing`` holds here, with which parameters, and in which runs."""

import copy
import functools

import torch
import transformers

import lvlm_decode_data
from lvlm_decode.engine.hf import decoder, versions
from lvlm_decode.engine.modes import NEEDS
from lvlm_decode.families import FAMILIES as REGISTERED
from lvlm_decode.families import family_of
from lvlm_decode.methods import METHODS, load
from lvlm_decode.testing.contract import Case
from lvlm_decode.testing.families import OF_EACH_KIND
from lvlm_decode.testing.models import tiny

#: All families but those that the installed transformers itself breaks.
FAMILIES = [
    family
    for family in REGISTERED
    if family not in versions.BROKEN.get(versions.minor_of(transformers.__version__), {})
]


def is_controller(name: str) -> bool:
    return hasattr(load(name), "decode")


NAMES = [name for name in METHODS if not is_controller(name)]

#: Parameters under which a method works on models this small.
SMALL = {name: parameters for name, parameters in OF_EACH_KIND.values() if parameters} | {
    "mod": dict(share=0.3),
    "damro": dict(k=3),
    "code": dict(max_description=3),
    "sid": dict(share=0.3),
    "crops": dict(share=0.3, decay=0.3, text_tokens=(2, 6), text_rate=0.3),
    "m3id": dict(decay=0.3),
    "uscd": dict(threshold=0.6),
    "vaf": dict(enhance=1.6, suppress=0.5),
    "spin": dict(share=0.5),
    "vti": dict(text=4.0),
    "revis": dict(threshold=-0.05, layer=1),
    "memvr": dict(ratio=0.5, threshold=0.6),
    "ilvad": dict(tokens=3, tau=1.1, alpha=3.0),
    "cai": dict(threshold=1.5, first_layer=1, gamma=1.5),
}
#: Methods whose own rules mask tokens even where they are switched off.
MASKS = ("code", "deco")


@functools.cache
def projector(family: str) -> torch.nn.Module:
    """Another projector than the model's."""
    other = copy.deepcopy(family_of(tiny(family).model).projector())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return other


@functools.cache
def directions(family: str, *more: int) -> torch.Tensor:
    """(L, D, ...) what calibration might give, orthonormal where there are several of a layer."""
    module = family_of(tiny(family).model).decoding_module(tiny(family).model)
    shape = decoder.layer_count(module), decoder.width(module), *more
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    return torch.linalg.qr(drawn).Q if more else drawn


#: Methods that need vectors -> what makes them for a family.
DIRECTIONS = {"vti": directions, "revis": directions, "nullu": lambda family: directions(family, 6)}


@functools.cache
def pool() -> tuple[str, ...]:
    """Unrelated images: shipped scenes, which no test shows to a model as small as these."""
    return tuple(str(scene.path) for scene in lvlm_decode_data.load_scenes("heldout")[:3])


def method_of(name: str, family: str, parameters=None):
    parameters = dict(SMALL.get(name, {}) if parameters is None else parameters)
    if name == "cicd":
        parameters["images"] = pool()
    if name == "dcd":
        parameters["negative"] = projector(family)
    if name in DIRECTIONS:
        parameters["vectors"] = DIRECTIONS[name](family)
    return load(name)(**parameters)


@functools.cache
def case(name: str, family: str) -> Case:
    return Case(method_of(name, family), tiny(family), masks=name in MASKS)


def refusal(name: str, family: str) -> str | None:
    """The words of the reason why a method must refuse a family."""
    adapter = family_of(tiny(family).model)
    return next((NEEDS[need] for need in load(name).needs if not getattr(adapter, f"has_{need}")), None)


def family_for(name: str) -> str:
    """LLaVA, or the first family that has what the method needs."""
    return next(family for family in ("llava", *FAMILIES) if refusal(name, family) is None)


CELLS = [(name, family) for name in NAMES for family in FAMILIES]
HONOURED = [pair for pair in CELLS if refusal(*pair) is None]
REFUSED = [pair for pair in CELLS if refusal(*pair) is not None]

#: Every family runs these in the default run (and OPERA, in its own file).
KINDS = {kind: name for kind, (name, _) in OF_EACH_KIND.items()}


def by_default(name: str, family: str) -> bool:
    """Whether the default run takes this pair: every method on one family, and one method of each kind on every family."""
    return family == family_for(name) or name in KINDS.values()

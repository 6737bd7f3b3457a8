"""The port: the only place that names what transformers can rename.

``versions``: which releases were tested. ``probe``: whether an untested one works. ``kwargs``: arguments by name. ``loop``:
Hugging Face's loops on a stand-in of the module. ``cache``: keys and values. ``vision``: encoded images.
``blueprint``: a model without weights. ``decoder``: layers, norm, head, attention.
"""

from . import decoder
from .blueprint import blueprint, is_blueprint
from .cache import KV, cache_among, check_empty, check_own, check_plain, is_fixed, is_own
from .inputs import check_inputs, mask_of, model_inputs, positions_of
from .kwargs import (
    Prepared,
    cache_in,
    first_forward,
    further_forward,
    give_cache,
    joined,
    kept_of,
    last_of_first,
    left_pad,
    run,
    take_cache,
    take_images,
    with_cache,
    with_images,
)
from .libraries import require, require_adapters, require_model
from .loop import (
    Call,
    Proxy,
    asked,
    check_mode,
    check_training,
    compiled,
    generate,
    given,
    named,
    prepare,
    run_loop,
    synced,
)
from .places import check_gathered, device_for, unwrapped
from .vision import Encoded

__all__ = [
    "KV",
    "Call",
    "Encoded",
    "Prepared",
    "Proxy",
    "asked",
    "blueprint",
    "cache_among",
    "cache_in",
    "check_empty",
    "check_gathered",
    "check_inputs",
    "check_mode",
    "check_own",
    "check_plain",
    "check_training",
    "compiled",
    "decoder",
    "device_for",
    "first_forward",
    "further_forward",
    "generate",
    "give_cache",
    "given",
    "is_blueprint",
    "is_fixed",
    "is_own",
    "joined",
    "kept_of",
    "last_of_first",
    "left_pad",
    "mask_of",
    "model_inputs",
    "named",
    "positions_of",
    "prepare",
    "require",
    "require_adapters",
    "require_model",
    "run",
    "run_loop",
    "synced",
    "take_cache",
    "take_images",
    "unwrapped",
    "with_cache",
    "with_images",
]

"""What must hold of a model family's adapter: the model reacts to image and prompt, rows are prepared as the model's own would
be, and a method of each kind keeps its contract on it.

    from lvlm_decode.testing import check_family
    from lvlm_decode.testing.models import Tiny, react

    def test_my_family():
        check_family(Tiny("my_lvlm", react(MyModel(config)), image_ids, pixels), family=MyFamily)

``models.py`` has the tiny models of this library's own families to begin from.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..attachment import attach, detach
from ..engine.batch import Batch
from ..engine.run import Run
from ..families.base import Family
from ..method import BELOW
from ..methods import load, parse
from .contract import Case, Check, method_checks, run_all, same_tokens
from .models import Tiny, tiny

#: A method of each kind, by what it changes, with parameters for models of four layers.
OF_EACH_KIND: dict[str, tuple[str, dict[str, Any]]] = {
    "image": ("vcd", {}),
    "text": ("icd", {}),
    "layers": ("dola", dict(layers=(0, 1, 3))),
    "attention": ("pai", dict(alpha=0.5, gamma=1.5, first_layer=1)),
    "steering": ("vista", dict(strength=0.4)),
}


def _nats(case: Case, one: dict[str, Any], other: dict[str, Any]) -> float:
    """How far apart the answers to two inputs are."""
    with torch.no_grad():
        a, b = (case.zoo.model(**inputs).logits[:, -1].log_softmax(-1) for inputs in (one, other))
    return float((a.exp() * (a - b)).sum())


def reacts_to_its_image(case: Case) -> None:
    """Without this every other rule about views could pass on a model that is blind."""
    zoo = case.zoo
    one, other = zoo.inputs(["is it"], seed=0), zoo.inputs(["is it"], seed=5)
    same_tokens(one["input_ids"], other["input_ids"], "prompts about two images")
    nats = _nats(case, one, other)
    assert nats > 0.05, f"answers to two images are {nats:.2g} nats apart; give the projector more gain (models.react)"
    noised = Run(zoo.model, load("vcd")(), one, seed=0, family=case.family)
    own, view = (noised.samples[v][0].images[0].features for v in (0, 1))
    assert (own - view).abs().mean() > 0.05 * own.abs().mean(), "a noised image has the features of the image"


def reacts_to_its_prompt(case: Case) -> None:
    nats = _nats(case, case.zoo.inputs(["is it"]), case.zoo.inputs(["no it"]))
    assert nats > 0.05, f"answers to two prompts are {nats:.2g} nats apart"


def rows_of_a_mixed_batch_say_what_they_say_alone(case: Case) -> None:
    """Several images, no image and one, under the case's method."""
    zoo = case.zoo
    if zoo.text_only:
        rows = [zoo.row("is it a dog", images=2, seed=1), zoo.row("ab", images=0), zoo.row("is", images=1, seed=3)]
    else:
        rows = [zoo.row("is it a dog", seed=1), zoo.row("ab", seed=2)]
    new = dict(do_sample=False, max_new_tokens=4, min_new_tokens=4, output_logits=True, return_dict_in_generate=True)
    attach(zoo.model, case.method, family=case.adapter)
    try:
        whole = zoo.model.generate(**zoo.batch(rows), sample_ids=range(len(rows)), seed=0, **new)
        for number, row in enumerate(rows):
            alone = zoo.model.generate(**zoo.batch([row]), sample_ids=[number], seed=0, **new)
            same_tokens(alone.sequences[0, -4:], whole.sequences[number, -4:], f"row {number} alone")
            finite = alone.logits[0][0] > -BELOW / 2
            torch.testing.assert_close(
                alone.logits[0][0][finite], whole.logits[0][number][finite], atol=2e-5, rtol=1e-4
            )
    finally:
        detach(zoo.model)


def plain_rows_are_prepared_as_the_model_would(case: Case) -> None:
    zoo = case.zoo
    counts = [zoo.max_images, 0, 1] if zoo.text_only else [1, 1, 1]
    inputs = zoo.inputs(["is it a dog", "ab", "is"], images=counts, seed=1)
    how = dict(do_sample=False, max_new_tokens=6)
    before = zoo.model.generate(**copy.copy(inputs), **how)
    attach(zoo.model, load("plain")(), family=case.adapter)
    try:
        same_tokens(zoo.model.generate(**inputs, **how), before, "with the plain method attached")
    finally:
        detach(zoo.model)


def image_spans_hold_exactly_the_placeholders(case: Case) -> None:
    """The spans of a sample's images are its placeholders, and nothing of an image is left when it is taken away."""
    zoo = case.zoo
    images = min(2, zoo.max_images)
    batch = Batch(case.family, zoo.inputs(["is it"], images=images))
    (sample,) = batch.samples
    inside = torch.zeros_like(sample.input_ids, dtype=torch.bool)
    spans = sample.image_spans()
    assert len(spans) == images, f"{len(spans)} spans of {images} images"
    for (start, stop), image in zip(spans, sample.images):
        inside[start:stop] = True
        assert stop - start == len(image.features), f"{stop - start} places for {len(image.features)} features"
    same_tokens(inside, sample.input_ids == zoo.image_token, "places inside the spans")
    left = sample.without_image().sample.input_ids
    assert not torch.isin(left, torch.tensor(list(zoo.special.values()))).any(), "markers of an image are left"
    assert len(left) == len(sample.input_ids) - len((~batch.family.drop_image(sample.input_ids)).nonzero())


def family_checks(model: Tiny | str, *, family: type[Family] | None = None) -> list[Check]:
    """The rules of a family, and the contract of a method of each kind on it, as checks to be called.

    Args:
        model: a tiny model of the family (weights of unit gain, see ``models.react``), or the name of one of ``models.py``.
        family: the adapter, where no entry point registers it.
    """
    zoo = tiny(model) if isinstance(model, str) else model
    plain = Case(load("plain")(), zoo, family)
    rules = (
        reacts_to_its_image,
        reacts_to_its_prompt,
        plain_rows_are_prepared_as_the_model_would,
        image_spans_hold_exactly_the_placeholders,
    )
    checks = [Check(rule, plain) for rule in rules]
    flip = parse("ritual", transform="horizontal_flip")
    checks += [
        Check(rows_of_a_mixed_batch_say_what_they_say_alone, Case(method, zoo, family))
        for method in (load("vcd")(), flip)
    ]
    for name, parameters in OF_EACH_KIND.values():
        checks += method_checks(load(name)(**parameters), zoo, family=family)
    return checks


def check_family(model: Tiny | str, *, family: type[Family] | None = None) -> None:
    """Hold a model family's adapter to its rules; takes what :func:`family_checks` takes.

    Raises:
        AssertionError: names the rules that are broken, with what was expected.
    """
    run_all(family_checks(model, family=family))

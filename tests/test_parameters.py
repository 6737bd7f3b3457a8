"""Parameters of every method and drafter: one sentence for what is not valid, the authors' names, readable signatures."""

import dataclasses
import inspect
import pickle
import re
import typing

import pytest
import torch

import lvlm_decode as ld
from lvlm_decode.errors import LvlmDecodeError, ParameterError, UnknownNameError
from lvlm_decode.method import Contrast
from lvlm_decode.methods import METHODS, load, parse
from lvlm_decode.methods.dola import DoLa
from lvlm_decode.methods.hgai import HGAI
from lvlm_decode.methods.vcd import VCD
from lvlm_decode.speculative.drafters import DRAFTERS, get

CLASSES = {name: load(name) for name in METHODS} | {name: get(name) for name in DRAFTERS}
#: Without these a class cannot be made.
NEEDED = {
    "cicd": {"images": "a folder"},
    "vti": {"vectors": "a file"},
    "nullu": {"vectors": "a file"},
    "revis": {"vectors": "a file"},
}
ODD = [
    "1",
    "",
    None,
    True,
    1.5,
    float("nan"),
    float("inf"),
    -1,
    [],
    ["x"],
    (),
    {},
    object(),
    torch.ones(2),
    10**9,
    b"x",
]
FIELDS = [(name, f.name) for name, cls in CLASSES.items() for f in dataclasses.fields(cls) if f.init]


def make(name, **given):
    return CLASSES[name](**{**NEEDED.get(name, {}), **given})


@pytest.mark.parametrize("name,parameter", FIELDS, ids=[f"{n}-{p}" for n, p in FIELDS])
def test_a_value_is_taken_or_refused_in_one_sentence(name, parameter):
    refused = 0
    for value in ODD:
        try:
            made = make(name, **{parameter: value})
        except LvlmDecodeError as error:
            refused += 1
            text = str(error)
            assert "\n" not in text and text.endswith(".")
            if isinstance(error, ParameterError):
                # Another parameter may be named where the two must go together.
                assert re.match(rf"{name}: \w+ = .* is not valid; it must be ", text)
        except OSError:
            # A folder of weights that is not there, read when the drafter is made.
            assert parameter == "path"
        else:
            kept = getattr(made, parameter)
            assert kept is value or kept == (tuple(value) if isinstance(value, list) else value)
            assert not isinstance(kept, float) or kept == kept
    assert refused > 0 or parameter in ("disturbance",)


@pytest.mark.parametrize("name,parameter", FIELDS, ids=[f"{n}-{p}" for n, p in FIELDS])
def test_an_object_is_refused_with_parameter_value_and_range(name, parameter):
    thing = object()
    with pytest.raises(ParameterError) as caught:
        make(name, **{parameter: thing})
    assert str(caught.value).startswith(f"{name}: {parameter} = {thing!r} is not valid; it must be ")
    assert caught.value.parameter == parameter and "object" not in caught.value.expected


NUMBERS = [
    (name, f.name)
    for name, cls in CLASSES.items()
    for f in dataclasses.fields(cls)
    if f.init and str(f.type).split(" ")[0] in ("float", "int")
]


@pytest.mark.parametrize("name,parameter", NUMBERS, ids=[f"{n}-{p}" for n, p in NUMBERS])
def test_a_number_given_as_text_is_told_its_range(name, parameter):
    with pytest.raises(ParameterError, match=r"a (finite|whole) number") as caught:
        make(name, **{parameter: "1"})
    assert f"{parameter} = '1'" in str(caught.value)
    hint = next(f for f in dataclasses.fields(CLASSES[name]) if f.name == parameter).type
    if "None" not in hint:
        with pytest.raises(ParameterError, match=f"{parameter} = None is not valid"):
            make(name, **{parameter: None})


def test_the_sentences_of_two_values():
    with pytest.raises(ParameterError) as caught:
        ld.VCD(alpha="1")
    assert str(caught.value) == "vcd: alpha = '1' is not valid; it must be a finite number, at least 0."
    with pytest.raises(ParameterError) as caught:
        ld.VDGD(beta=None)
    assert str(caught.value) == "vdgd: beta = None is not valid; it must be a finite number, in (0, 1]."


def test_a_range_is_told_where_another_parameter_is_wrong_too():
    with pytest.raises(ParameterError, match=r"alpha = 'a' is not valid; it must be a finite number"):
        ld.VCD(alpha="a", beta="b")
    with pytest.raises(ParameterError, match="beta = 2 is not valid"):
        ld.VCD(alpha=1, beta=2)


ALIASES = [
    (name, alias, target)
    for name, cls in CLASSES.items()
    for alias, target in cls.aliases.items()
    if target in {f.name for f in dataclasses.fields(cls)}
]


@pytest.mark.parametrize("name,alias,target", ALIASES, ids=[f"{n}-{a}" for n, a, _ in ALIASES])
def test_the_authors_names_are_taken_by_the_classes(name, alias, target):
    value = getattr(make(name), target)
    assert make(name, **{alias: value}) == make(name, **{target: value}) == make(name)
    with pytest.raises(ParameterError, match=f"{target} twice"):
        make(name, **{alias: value, target: value})


@pytest.mark.parametrize("name", CLASSES)
def test_unknown_parameters_are_named(name):
    with pytest.raises(UnknownNameError, match=f"{name} has no parameter 'nonsense'; its parameters are: "):
        make(name, nonsense=1)
    with pytest.raises(ParameterError, match="without a name"):
        CLASSES[name](*range(99))


@pytest.mark.parametrize("name", CLASSES)
def test_signatures_are_readable_and_instances_stay_what_dataclasses_make(name):
    cls = CLASSES[name]
    parameters = inspect.signature(cls).parameters
    assert list(parameters) == [p for p in inspect.signature(cls.__init__).parameters if p != "self"]
    assert set(parameters) == {f.name for f in dataclasses.fields(cls) if f.init}
    one = make(name)
    assert pickle.loads(pickle.dumps(one)) == one
    if name in METHODS:
        assert dataclasses.replace(one) == one and hash(one) == hash(make(name))
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.name = "other"


def test_a_method_of_another_package_is_checked_by_its_annotations():
    @dataclasses.dataclass(frozen=True)
    class Own(Contrast):
        name: typing.ClassVar[str] = "own"
        aliases: typing.ClassVar[dict[str, str]] = {"w": "weight"}
        weight: float = 1.0
        steps: tuple[int, ...] = (1,)
        texts: list[str] = dataclasses.field(default_factory=list)

        def __post_init__(self):
            self.check(self.weight > 2 or self.weight == 1, "weight", "1 or above 2")

    assert Own(texts=["a"]).texts == ["a"] and Own().texts == []
    assert Own(w=3).weight == 3 and Own(4.0, [1, 2]).steps == (1, 2)
    with pytest.raises(
        ParameterError, match=r"^own: weight = 'x' is not valid; it must be a finite number, 1 or above 2\.$"
    ):
        Own("x")
    with pytest.raises(
        ParameterError, match=r"^own: steps = 'x' is not valid; it must be \[a whole number, \.\.\.\]\.$"
    ):
        Own(steps="x")


def test_values_of_a_command_line():
    """``None`` is null where it can be, and several values stand in brackets, parentheses or by themselves."""
    for null in ("None", "none", "null"):
        assert parse(f"vcd(beta={null})") == VCD(beta=None) == parse("vcd", beta=None if null == "null" else null)
    assert parse("vdd(absent=none)").absent == "none", "a text that is an option stays one"
    for several in ("[1,3]", "(1,3)", "1,3", "( 1, 3 )"):
        assert parse(f"hgai(alpha=0.5,layers={several})") == HGAI(alpha=0.5, layers=(1, 3))
        assert parse(f"hgai(layers={several},alpha=0.5)+vcd").parts()[0] == HGAI(alpha=0.5, layers=(1, 3))
    for several in ("(1,3)", "1,3", "( 1, 3 )", [1, 3]):
        assert parse("hgai", layers=several) == HGAI(layers=(1, 3))
        assert parse("dola", dola_layers=several) == DoLa(layers=(1, 3))
    for several in ("[a.png,b c.png]", "(a.png, b c.png)", "a.png,b c.png"):
        assert parse(f"cicd(images={several})").images == ("a.png", "b c.png")
    assert parse("cicd", images="(a.png,b.png)").images == ("a.png", "b.png")
    assert parse("cicd", images="a,b.png").images == "a,b.png", "a path may have a comma"
    assert parse("cicd", images="pool (2)").images == "pool (2)"


@pytest.mark.parametrize(
    "text,said",
    [
        ("vcd(alpha=1,beta)", "cannot read 'beta' in method"),
        ("vcd(1,3)", "cannot read '1' in method"),
        ("hgai(1,3)", "cannot read '1' in method"),
        (
            "hgai(layers=1,3,5)",
            r"layers = \[1, 3, 5\] is not valid; it must be \[a whole number, a whole number\] or None",
        ),
        ("hgai(layers=all)", r"layers = 'all' is not valid; it must be \[a whole number, a whole number\] or None"),
        ("hgai(layers=(1,[))", "closing|cannot read|not valid"),
        ("vcd(alpha=None)", "alpha = 'None' is not valid; it must be a finite number"),
    ],
)
def test_values_of_a_command_line_that_are_none(text, said):
    with pytest.raises((UnknownNameError, ParameterError), match=said):
        parse(text)

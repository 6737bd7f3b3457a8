"""A package that someone else might write: a method, a drafter, a family and an evaluator, with their entry points."""

from pathlib import Path

CODE = '''"""A method that someone might add: the image-free answer, averaged in; and one thing of every other kind."""

from dataclasses import dataclass
from typing import ClassVar

import lvlm_decode.method
from lvlm_decode.families.base import Family
from lvlm_decode.speculative.drafters import Drafter, Session
from lvlm_decode.speculative.tree import Tree, chain_shape


@dataclass(frozen=True)
class Toy(lvlm_decode.method.Contrast):
    """Adds the predictions without the image.

    Args:
        alpha: Weight of the view without the image.
    """

    name: ClassVar[str] = "toy"
    paper: ClassVar[str] = "none"
    costs: ClassVar[tuple[str, ...]] = ("text",)

    alpha: float = 0.5

    def views(self, sample, rng):
        return [sample.without_image(weight=self.alpha)]


class ToySession(Session):
    """Proposes the last token once more."""

    def propose(self, room):
        rows = [[text[-1], text[-1]][: 1 + room] for text in self.context.tokens]
        return Tree.of([(row, chain_shape(len(row))) for row in rows], self.context.device)


class ToyDrafter(Drafter):
    name = "toy-drafter"

    def begin(self, context):
        return ToySession(self, context)


class ToyFamily(Family):
    """Follows LLaVA's conventions."""


not_a_class = 3
'''
#: A module of its own: evaluators import no torch.
POPE = """
from lvlm_decode_evals.pope import Pope


class ToyPope(Pope):
    name = "toy-pope"
"""
ENTRIES = """
[lvlm_decode.methods]
toy = toy_package:Toy
broken = toy_package_that_is_not_there:X
number = toy_package:not_a_class
vcd = toy_package:Toy

[lvlm_decode.drafters]
toy-drafter = toy_package:ToyDrafter

[lvlm_decode.families]
toy_lvlm = toy_package:ToyFamily

[lvlm_decode.evaluators]
toy-pope = toy_pope:ToyPope
"""


def install(folder: Path) -> None:
    """Put the package and what pip writes about it into a folder."""
    (folder / "toy_package.py").write_text(CODE)
    (folder / "toy_pope.py").write_text(POPE)
    info = folder / "toy_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)

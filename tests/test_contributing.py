"""The contributor's page: the method it shows is the one in the repository, and one file and one line are enough."""

import re
from pathlib import Path

import contract

from lvlm_decode import catalogue
from lvlm_decode.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent


def test_the_diff_on_the_page_is_the_method_in_the_repository():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    diff = re.search(r"```diff\n(.*?)```", page, re.S).group(1)
    files = re.split(r"^diff --git .*\n", diff, flags=re.M)[1:]
    assert len(files) == 2
    added = {
        re.search(r"^\+\+\+ b/(.*)$", text, re.M).group(1): re.findall(r"^\+(?!\+\+ )(.*)$", text, re.M)
        for text in files
    }
    assert not re.search(r"^-(?!-- )", diff, re.M), "nothing is taken away"
    method, registry = added
    assert "\n".join(added[method]) + "\n" == (ROOT / method).read_text()
    (line,) = added[registry]
    assert line in (ROOT / registry).read_text().splitlines()


TOY = '''"""A method that someone might add: the image-free answer, averaged in."""

from dataclasses import dataclass
from typing import ClassVar

from lvlm_decode.method import Contrast


@dataclass(frozen=True)
class Toy(Contrast):
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
'''


def test_a_new_file_and_a_new_line_inherit_the_contract(tmp_path, monkeypatch):
    (tmp_path / "toy_method.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "toy", "toy_method:Toy")
    for family in ("llava", "gemma3"):
        contract.does_something("toy", family)
        contract.switched_off_equals_plain("toy", family)
        contract.stacked_equals_sequential("toy", family)
        contract.a_row_in_a_batch_equals_the_row_alone("toy", family)
        contract.verifying_a_draft_equals_decoding_it("toy", family)
        contract.beams_follow("toy", family)
        contract.prompt_lookup_follows("toy", family)
    assert catalogue.describe("toy")["parameters"][0]["description"] == "Weight of the view without the image."
    contract.cell.cache_clear()

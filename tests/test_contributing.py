"""The contributor's page: the method it shows is the one in the repository, and one file and one line are enough."""

import re
from pathlib import Path

import toys

from lvlm_decode import catalogue
from lvlm_decode.methods import METHODS
from lvlm_decode.testing import check_method

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


def test_a_new_file_and_a_new_line_inherit_the_contract(tmp_path, monkeypatch):
    toys.install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "toy", "toy_package:Toy")
    for family in ("llava", "gemma3"):
        check_method("toy", family)
    assert catalogue.describe("toy")["parameters"][0]["description"] == "Weight of the view without the image."

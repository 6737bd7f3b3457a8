"""A wheel built from the tree, unpacked elsewhere, runs the demo: everything it needs travels in it."""

import os
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

# What these tests share is dear to make: one worker makes it once.
pytestmark = pytest.mark.xdist_group("wheel")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel's contents in a folder of their own."""
    out = tmp_path_factory.mktemp("wheel")
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    # Built from a copy: setuptools leaves its scratch folders beside the sources.
    source = tmp_path_factory.mktemp("source") / "tree"
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if names.returncode:
        pytest.skip("not a git checkout: which files belong to the tree is unknown")
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(ROOT / name, source / name) if _same_device(source) else _copy(ROOT / name, source / name)
    done = subprocess.run(
        [sys.executable, "-c", build, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


def _same_device(folder) -> bool:
    return ROOT.stat().st_dev == folder.parent.stat().st_dev


def _copy(source, target) -> None:
    target.write_bytes(source.read_bytes())


@pytest.mark.full
def test_demo_from_the_wheel(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    code = (
        "import lvlm_decode, lvlm_decode_evals, lvlm_decode_data, pathlib, sys\n"
        f"here = pathlib.Path({str(installed)!r})\n"
        "for module in (lvlm_decode, lvlm_decode_evals, lvlm_decode_data):\n"
        "    assert pathlib.Path(module.__file__).is_relative_to(here), module.__file__\n"
        "from lvlm_decode import demo\n"
        "demo.CAPTION_SCENES, demo.TIMED_ROUNDS = 4, 1\n"
        "from lvlm_decode.cli import app\n"
        "from lvlm_decode_evals import configs, protocols\n"
        "assert 'pope-vcd-llava-1.5' in configs.table_titles() and 'opera-64' in protocols.names()\n"
        "app(['demo', '--images', '3', '--page', 'demo.html'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "POPE" in done.stdout and (tmp_path / "demo.html").stat().st_size > 20_000


def test_wheel_holds_data_and_licences(installed):
    names = {str(path.relative_to(installed)) for path in installed.rglob("*")}
    assert "lvlm_decode_data/tiny-llava/model.safetensors" in names
    assert any(name.startswith("lvlm_decode_data/heldout/") and name.endswith(".jpg") for name in names)
    assert any("licenses/LICENSE" in name for name in names)
    tables = {
        f"lvlm_decode_evals/papers/{path.relative_to(ROOT / 'configs')}" for path in ROOT.glob("configs/**/*.yaml")
    }
    assert len(tables) > 50 and tables <= names


def test_wheel_holds_every_module(installed):
    """Packages are listed by hand in pyproject.toml."""
    inside = {str(path.relative_to(installed)) for path in installed.rglob("*.py")}
    for folder, name in (("lvlm_decode", "lvlm_decode"), ("evals", "lvlm_decode_evals"), ("data", "lvlm_decode_data")):
        modules = {f"{name}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}
        assert modules and not modules - inside


def test_wheel_takes_no_name_that_others_use(installed):
    """`evals` and `data` are other people's import names."""
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"lvlm_decode", "lvlm_decode_data", "lvlm_decode_evals"}

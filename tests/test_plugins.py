"""What other packages bring through entry points: found, named with their package, held to the same rules."""

import json
import subprocess
import sys

import pytest
import transformers
from typer.testing import CliRunner

import lvlm_decode as ld
from lvlm_decode import catalogue, plugins
from lvlm_decode.errors import DependencyError, UnknownNameError, UnsupportedError
from lvlm_decode.families import family_of
from lvlm_decode.families.base import Family
from lvlm_decode.methods import load, parse
from lvlm_decode.speculative import drafters
from lvlm_decode.testing.models import tiny
from lvlm_decode_evals import evaluator_class


def test_a_method_of_another_package_is_used_like_any_other(site):
    assert load("toy").name == "toy" and load("vcd") is ld.VCD
    assert parse("toy(alpha=0.25)+vcd").methods[0].alpha == 0.25
    zoo = tiny("llava")
    inputs = zoo.inputs(["is it"])
    how = dict(max_new_tokens=6, do_sample=False)
    base = zoo.model.generate(**inputs, **how)
    with ld.attached(zoo.model, "toy(alpha=4)"):
        assert not base.equal(zoo.model.generate(**inputs, **how))
    found = catalogue.describe("toy")
    assert (
        found["package"] == "toy-package"
        and found["parameters"][0]["description"] == "Weight of the view without the image."
    )
    assert catalogue.describe("vcd")["package"] is None and "toy" not in catalogue.markdown()


@pytest.mark.full
def test_the_command_line_names_the_package(site):
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from lvlm_decode.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, check=False)
    assert "Methods of other packages: toy (toy-package)\n" in done.stdout
    assert "'broken' of package toy-package cannot be loaded" in done.stdout
    done = subprocess.run([sys.executable, "-c", code, "methods"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "from package toy-package" in done.stdout
    assert "warning: 'broken' of package toy-package cannot be loaded" in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", "scene:0", "--method", "broken"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "'broken' of package toy-package cannot be loaded" in done.stderr


def test_drafters_families_and_evaluators_too(site):
    assert drafters.parse("toy-drafter(stop=0.5)").stop == 0.5
    assert evaluator_class("toy-pope").name == "toy-pope"
    config = type("Config", (), {"model_type": "toy_lvlm"})
    parts = {"config": config, "get_image_features": lambda self, pixel_values: None, "forward": lambda self: None}
    model = type("Model", (), parts)()
    assert type(family_of(model)).__name__ == "ToyFamily"


def test_an_entry_that_cannot_be_used_is_one_sentence(site):
    with pytest.raises(
        DependencyError, match=r"'broken' of package toy-package cannot be loaded .*ModuleNotFoundError"
    ):
        load("broken")
    with pytest.raises(
        DependencyError, match=r"'number' of package toy-package is .* no class that derives from Method"
    ):
        load("number")
    with pytest.raises(UnknownNameError, match=r"unknown method 'toyy'; .*toy"):
        load("toyy")


class Renamed(Family):
    """The tiny LLaVA under a model type that nobody registered."""


def test_an_unknown_family_is_attached_with_its_adapter(monkeypatch):
    zoo = tiny("llava")
    inputs, how = zoo.inputs(["is it"]), dict(max_new_tokens=6, do_sample=False, seed=0)
    with ld.attached(zoo.model, "vcd"):
        want = zoo.model.generate(**inputs, **how)
    monkeypatch.setattr(type(zoo.model.config), "model_type", "nobodys_lvlm")
    with pytest.raises(
        UnsupportedError, match=r"'nobodys_lvlm' is not supported.*attach\(model, method, family=MyFamily\)"
    ):
        ld.attach(zoo.model, "vcd")
    with ld.attached(zoo.model, "vcd", family=Renamed):
        assert zoo.model.generate(**inputs, **how).equal(want)
    form = ld.VCD().processor(zoo.model, inputs, seed=0, family=Renamed)
    assert zoo.model.generate(**inputs, max_new_tokens=6, do_sample=False, logits_processor=[form]).equal(want)


def test_doctor_lists_what_can_be_used_of_other_packages(site):
    from lvlm_decode import doctor

    plugins.plugins.cache_clear()
    with pytest.warns(UserWarning, match="its entry is ignored"):
        report = doctor.examine()
    assert report.plugins == {
        "methods": ["toy (toy-package)"],
        "drafters": ["toy-drafter (toy-package)"],
        "evaluators": ["toy-pope (toy-package)"],
        "families": ["toy_lvlm (toy-package)"],
    }
    told = [text for text in report.unusable]
    assert [text.partition(" of package")[0] for text in told] == ["'broken'", "'number'"]


def test_doctor_names_models_that_the_release_breaks(monkeypatch):
    from lvlm_decode import doctor

    minor = doctor.versions.minor_of(transformers.__version__)
    monkeypatch.setitem(doctor.versions.BROKEN, minor, {"smolvlm": "its forward fails there"})
    assert "It breaks smolvlm, which is refused: its forward fails there." in doctor.text(doctor.examine())


def test_doctor_prints_versions_and_the_self_check(monkeypatch):
    from lvlm_decode.cli import app

    done = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["trouble"] == [] and report["tested"]
    assert {"torch", "transformers", "python", "lvlm-decode"} <= set(report["versions"])
    monkeypatch.setattr("lvlm_decode.engine.hf.probe.probe", lambda: ["reordering rows: no"])
    done = CliRunner().invoke(app, ["doctor"])
    assert (
        done.exit_code == 1
        and "the self-check of the engine failed: reordering rows: no; run: pip install" in done.stdout
    )

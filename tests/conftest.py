"""Fixtures every test file may use: recorded cases, threads, seeds."""

import os
from pathlib import Path

import pytest

# Their assertions say what differed, as those of test files do.
pytest.register_assert_rewrite("contract", "helpers", "runs", "lvlm_decode.testing")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent


def shared_path(relative: str) -> Path:
    """A recorded case outside the repository, or a skip that says where it was looked for."""
    root = Path(os.environ.get("LVLM_DECODE_SHARED", ROOT.parent / "shared"))
    path = root / relative
    if not path.exists():
        pytest.skip(f"recorded case {relative} is not at {root}; set LVLM_DECODE_SHARED to the folder that holds it")
    return path


def needs_adapters() -> None:
    """Skip, with the reason, where the installed transformers and peft do not go together."""
    from lvlm_decode.engine import hf
    from lvlm_decode.errors import DependencyError

    try:
        hf.require_adapters()
    except DependencyError as error:
        pytest.skip(str(error))


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="also run the tests marked full: the whole contract, for instance"
    )


def pytest_collection_modifyitems(config, items):
    import transformers

    from lvlm_decode.engine.hf import versions

    broken = versions.BROKEN.get(versions.minor_of(transformers.__version__), {})
    for item in items:
        given = getattr(item, "callspec", None)
        for family in (
            broken.keys() & {value for value in given.params.values() if isinstance(value, str)} if given else ()
        ):
            reason = f"transformers {transformers.__version__} breaks {family}: {broken[family]}"
            item.add_marker(pytest.mark.skip(reason=reason))
    if config.getoption("--full"):
        return
    left = [item for item in items if item.get_closest_marker("full")]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_test_process():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """Random weights and draws are the same whatever tests ran before."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model_folder():
    """The folder of the small LLaVA."""
    import lvlm_decode_data

    return lvlm_decode_data.tiny_path("tiny-llava")


@pytest.fixture(scope="session")
def loaded(model_folder):
    """The small LLaVA as the runner loads it, once for a test process."""
    from lvlm_decode_evals.runner import load

    return load(str(model_folder))


@pytest.fixture(scope="session")
def source():
    """Twenty questions of POPE's adversarial split about the scenes that ship."""
    import lvlm_decode_data
    from lvlm_decode_evals import evaluator
    from lvlm_decode_evals.loaders import scene_source

    whole = scene_source(evaluator("pope"), lvlm_decode_data.load_scenes("heldout")[:12])
    return whole.only(["adversarial"]).first(20)


@pytest.fixture(scope="session")
def finished(loaded, source, tmp_path_factory):
    """The folder of one uninterrupted run."""
    from runs import run_of

    out = tmp_path_factory.mktemp("whole")
    run_of(loaded, source, out).execute()
    return out


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder with an installed package that registers one thing of every kind, on the path."""
    import toys

    import lvlm_decode as ld
    from lvlm_decode import plugins

    toys.install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    plugins.plugins.cache_clear()
    with pytest.warns(
        UserWarning, match="toy-package registers 'vcd' in lvlm_decode.methods, a name that lvlm_decode has"
    ):
        ld.methods.names()
    yield tmp_path
    plugins.plugins.cache_clear()

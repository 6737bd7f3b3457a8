"""The documentation: it builds without a warning, its code runs, its commands can be read, what it quotes is said."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import typer
from conftest import ROOT

from lvlm_decode import catalogue
from lvlm_decode.cli import app
from lvlm_decode.methods import METHODS
from lvlm_decode_evals import EVALUATORS, evaluator_class

PAGES = sorted((ROOT / "docs").glob("*.md"))
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="module")
def generated():
    """Path -> Markdown of the pages that are made from the code."""
    from tools import docs_pages

    return dict(docs_pages.pages())


@pytest.mark.full
def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in METHODS:
        assert (tmp_path / "site" / "methods" / f"{name}.html").stat().st_size > 5000, name


@pytest.mark.full
@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python" in p.read_text(encoding="utf-8")], ids=lambda p: p.name
)
def test_python_blocks_run_offline(page, tmp_path):
    """The blocks of a page run one after the other in one process, as a reader types them."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S))
    with served_tiny(tmp_path) if SERVED in code else contextlib.nullcontext(SERVED) as address:
        run_block(code.replace(SERVED, address), tmp_path)


#: Where the page on serving calls the server of its own example.
SERVED = "http://127.0.0.1:8000"


@contextlib.contextmanager
def served_tiny(folder):
    """The address of the example's server, on a free port."""
    command = [sys.executable, "-m", "lvlm_decode", "serve", "--model", "tiny", "--method", "vcd", "--port", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        said = []
        for line in server.stderr:
            said.append(line)
            if found := re.search(r"http://[\d.]+:\d+", line):
                break
        else:
            pytest.fail("".join(said))
        yield found[0]
    finally:
        server.terminate()
        server.wait(30)
        server.stderr.close()


def run_block(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_command_lines_can_be_read(generated):
    """Every line of a bash block names a command, and options that it has."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES] + list(generated.values())
    texts.append((ROOT / "README.md").read_text(encoding="utf-8"))
    lines = {
        line
        for text in texts
        for block in re.findall(r"```bash\n(.*?)```", text, re.S)
        for line in block.splitlines()
        if line.startswith("lvlm-decode ")
    }
    assert len(lines) > len(METHODS) + len(EVALUATORS)
    for line in lines:
        words, command = shlex.split(line, comments=True)[1:], typer.main.get_command(app)
        while hasattr(command, "commands"):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        command.make_context("lvlm-decode", words)


def test_every_method_and_benchmark_has_its_page(generated):
    for name in METHODS:
        page, found = generated[f"methods/{name}.md"], catalogue.describe(name)
        assert found["summary"] in page and found["arxiv"] in page and found["cost"] in page
        assert all(f"| `{parameter['name']}` |" in page for parameter in found["parameters"]), name
    assert "| vcd | sample |" in generated["methods/vcd.md"] and "| plain | greedy |" in generated["methods/vcd.md"]
    for name in EVALUATORS:
        page = generated[f"evaluators/{name}.md"]
        assert "## Columns" in page
        # Every option has a description.
        for option in dataclasses.fields(evaluator_class(name)):
            assert re.search(rf"^\| `{option.name}` \| [^|]+ \| [A-Z\"][^|]+\. \|$", page, re.M), (name, option.name)
    assert "Accepted lines of answer files" in generated["evaluators/pope.md"]


def test_the_page_of_a_method_draws_what_is_recorded(generated):
    record = json.loads((ROOT / "benchmarks" / "effect" / "results.json").read_text(encoding="utf-8"))
    assert set(record["methods"]) | set(record["left_out"]) <= set(METHODS)
    plain = record["methods"]["plain"]["rates"]
    for name, cell in record["methods"].items():
        page = generated[f"methods/{name}.md"]
        if name == "plain":
            continue
        (figure,) = re.findall(r"<svg.*?</svg>", page)
        for key in ("chair_s", "recall"):
            assert f": {100 * cell['rates'][key]:.0f} % (plain {100 * plain[key]:.0f} %)" in figure, (name, key)
        places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', figure)]
        middle = float(re.search(r'<line x1="([\d.]+)" x2="\1"', figure)[1])
        values = [cell["minus_plain"][key][0] for key in ("chair_s", "recall", "length")]
        # Rounded to a tenth of a pixel.
        assert all(
            (place - middle) * value >= 0 or abs(place - middle) < 0.1 for place, value in zip(places, values)
        ), name
    for name, why in record["left_out"].items():
        assert why.removeprefix(f"{name}: ") in generated[f"methods/{name}.md"]


def test_quoted_messages_are_in_the_sources():
    quoted = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    assert len(quoted) > 8
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("lvlm_decode", "evals")
        for path in (ROOT / folder).rglob("*.py")
    )
    for sentence in quoted:
        assert sentence in sources, sentence


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files_of_the_repository(page):
    """Also for those who read it there, where the pages that are made from the code are not."""
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).is_file(), target

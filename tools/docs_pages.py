"""Pages of the documentation that follow from the code: methods, benchmarks, models, commands, API. A hook of mkdocs.

They are made when the site is built and not committed, so they cannot go stale: ``mkdocs build --strict``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from lvlm_decode import catalogue, checkpoints
from lvlm_decode.examples import EXIT_STATUS
from lvlm_decode.methods import METHODS, load
from lvlm_decode.vllm import served_methods
from lvlm_decode_evals import EVALUATORS, evaluator_class
from lvlm_decode_evals.forms import Form
from lvlm_decode_evals.parsers import RULES

ROOT = Path(__file__).resolve().parent.parent
# mkdocs loads a hook by its path, so the package it belongs to is not found by itself.
sys.path.insert(0, str(ROOT))
from tools import docs_figures  # noqa: E402

BLOB = "https://arxiv.org/abs/"
#: Splits of the recorded POPE, in the order of the tables.
SPLITS = ("random", "popular", "adversarial")
#: What the API page shows: heading, module, names.
API = (
    ("Decoding", "lvlm_decode", ("attach", "detach", "attached", "last_run", "parse", "explain")),
    ("Writing a method", "lvlm_decode", ("Method", "Contrast", "View", "Step", "Family")),
    ("Evaluation", "lvlm_decode_evals.api", ("evaluate", "score", "read_run", "Evaluation", "Scores")),
    ("Evaluators", "lvlm_decode_evals.base", ("Evaluator", "Question", "Answer", "Row")),
    ("Data that ships", "lvlm_decode_data", ("load_scenes", "tiny_path", "synonyms")),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    for path, text in pages():
        files.append(File.generated(config, path, content=text))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put every method and benchmark into the navigation."""
    for entry in config.nav:
        for title, pages_of in entry.items():
            if title == "Methods":
                pages_of += [{name: f"methods/{name}.md"} for name in METHODS]
            elif title == "Benchmarks":
                pages_of += [{name: f"evaluators/{name}.md"} for name in sorted(EVALUATORS)]
    return config


def pages() -> Iterator[tuple[str, str]]:
    """(path, Markdown) of every generated page."""
    yield "methods/index.md", _methods()
    for name in METHODS:
        yield f"methods/{name}.md", method_page(name)
    yield "evaluators/index.md", _evaluators()
    for name in sorted(EVALUATORS):
        yield f"evaluators/{name}.md", evaluator_page(name)
    yield "models.md", _models()
    yield "choose.md", choose_page()
    yield "commands.md", _commands()
    yield "api.md", _api()
    yield "writing-a-method.md", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    yield "changes.md", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# --- methods ---------------------------------------------------------------------------------------------------------


def _methods() -> str:
    rows = [f"| [`{n}`]({n}.md) | {catalogue.describe(n)['summary']} |" for n in METHODS]
    return "\n".join(["# Methods", "", "| method | what it does |", "|---|---|", *rows, ""])


def method_page(name: str) -> str:
    """One method: sentence, equation and notes of its module, parameters, cost, limits, measured rows."""
    found = catalogue.describe(name)
    lines = [f"# {name}", "", found["summary"], ""]
    if found["arxiv"]:
        lines += [f"Paper: [{found['paper']}]({BLOB}{found['arxiv']}).", ""]
    lines += ["```bash", f"lvlm-decode generate scene:12 --method {name}", "```", "", "## How it works", ""]
    module = inspect.getdoc(sys.modules[load(name).__module__]) or ""
    lines += [prose(module), "", "## Parameters", ""]
    if found["parameters"]:
        lines += ["| name | default | meaning |", "|---|---|---|"]
        lines += [
            f"| `{p['name']}` | {'required' if p['required'] else _code(p['default'])} | {_cell(p['description'])} |"
            for p in found["parameters"]
        ]
        if found["aliases"]:
            lines += ["", "Authors' names: " + ", ".join(f"`{a}` for `{n}`" for a, n in found["aliases"].items()) + "."]
    else:
        lines.append("It has none.")
    lines += ["", "## Cost and limits", "", f"Beside plain decoding it costs {found['cost']}."]
    if found["needs"]:
        lines += ["", f"It needs a model with: {', '.join(found['needs'])}."]
    lines += ["", f"It runs with {', '.join(found['supports'])}."]
    lines += [f"\nIt does not run with {mode}: {why}" for mode, why in found["refuses"].items()]
    why = served_methods()[name]
    lines += [
        "",
        "[vLLM](../serving.md) serves it." if why is None else f"[vLLM](../serving.md) does not serve it: {why}.",
    ]
    lines += ["", "## Effect on captions", "", docs_figures.effect(name), "", "## Measured", "", measured(name), ""]
    return "\n".join(lines)


def prose(docstring: str) -> str:
    """A docstring as Markdown: indented blocks become code, double backquotes single ones."""
    out: list[str] = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        if all(line.startswith("    ") for line in paragraph.splitlines()):
            out.append("```text\n" + inspect.cleandoc("\n" + paragraph) + "\n```")
        else:
            out.append(_escaped(paragraph))
    return "\n\n".join(out)


def _escaped(text: str) -> str:
    """Text whose marks Markdown would take for its own, outside of code."""
    text = text.replace("``", "`")
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if i % 2 else re.sub(r"([*_<>\[\]|])", r"\\\1", part) for i, part in enumerate(parts))


def _cell(text: str) -> str:
    return _escaped(text).replace("\n", " ")


def _code(value: Any) -> str:
    text = str(value)
    return "`" + (text if len(text) <= 60 else text[:57] + "...").replace("|", "\\|").replace("\n", " ") + "`"


def recorded(benchmark: str) -> dict[tuple[str, str, str], dict[str, float]]:
    """(method, decoding, split) -> rates of the small LLaVA, means over the seeds, from ``benchmarks/methods``."""
    record = json.loads((ROOT / "benchmarks/methods/tiny-llava.json").read_text(encoding="utf-8"))
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for cell in record["cells"]:
        if cell["benchmark"] == benchmark:
            found.setdefault((_line(cell["method"]), cell["decoding"], cell["split"]), []).append(cell["summary"])
    return {
        key: {
            rate: sum(seed[rate] for seed in seeds) / len(seeds)
            for rate, value in seeds[0].items()
            if isinstance(value, int | float)
        }
        | {"seeds": len(seeds)}
        for key, seeds in found.items()
    }


def _line(method: str) -> str:
    """A method's name in a table; DCD's control is not DCD."""
    return "dcd(alpha=0)" if method.startswith("dcd(alpha=0") else method.partition("(")[0]


def pope_cells() -> dict[tuple[str, str, str], dict[str, float]]:
    return recorded("pope")


def caption_cells() -> dict[tuple[str, str], dict[str, float]]:
    """(method, decoding) -> CHAIR of the small LLaVA, from ``benchmarks/controllers``."""
    record = json.loads((ROOT / "benchmarks/controllers/quality-tiny-llava-chair.json").read_text(encoding="utf-8"))
    return {(c["method"], c["decoding"]): c["summary"] for c in record}


def measured(name: str) -> str:
    """The recorded rows of a method on the small LLaVA, beside plain greedy decoding."""
    lines: list[str] = []
    pope, captions = recorded("pope"), recorded("chair")
    rows = {key[:2] for key in pope if key[0] == name}
    if rows:
        number = pope["plain", "greedy", SPLITS[0]]["n"]
        lines += [f"POPE on emoji scenes ({number:.0f} questions a split), small LLaVA, accuracy:", ""]
        lines += ["| method | decoding | seeds | random | popular | adversarial |", "|---|---|---|---|---|---|"]
        for key in [("plain", "greedy"), *sorted(rows - {("plain", "greedy")})]:
            values = " | ".join(f"{100 * pope[(*key, split)]['accuracy']:.1f} %" for split in SPLITS)
            lines.append(f"| {key[0]} | {key[1]} | {pope[(*key, SPLITS[0])]['seeds']} | {values} |")
    sampled = {key[:2]: value for key, value in captions.items() if key[0] == name}
    if sampled:
        number = captions["plain", "greedy", "captions"]["captions"]
        lines += ["", f"Captions of {number:.0f} emoji scenes, small LLaVA:", ""]
        lines += [
            "| method | decoding | seeds | captions that name something absent | recall | tokens |",
            "|---|---|---|---|---|---|",
        ]
        for key, value in {("plain", "greedy"): captions["plain", "greedy", "captions"], **sampled}.items():
            rates = f"{100 * value['chair_s']:.1f} % | {100 * value['recall']:.1f} % | {value['length']:.1f}"
            lines.append(f"| {key[0]} | {key[1]} | {value['seeds']} | {rates} |")
    chair = {key: value for key, value in caption_cells().items() if key[0] == name}
    if chair:
        lines += ["", "Captions of 150 emoji scenes, small LLaVA:", ""]
        lines += ["| method | decoding | captions that name something absent | recall |", "|---|---|---|---|"]
        for key, value in {("plain", "greedy"): caption_cells()["plain", "greedy"], **chair}.items():
            lines.append(f"| {key[0]} | {key[1]} | {100 * value['chair_s']:.1f} % | {100 * value['recall']:.1f} % |")
    lines.append("")
    lines.append(
        "The intervals are wide; `benchmarks` has them, with the controls."
        if len(lines) > 1
        else "No row is recorded yet."
    )
    return "\n".join(lines)


# --- benchmarks, models, choice --------------------------------------------------------------------------------------


def _evaluators() -> str:
    lines = ["# Benchmarks", "", "| name | what it asks |", "|---|---|"]
    for name in sorted(EVALUATORS):
        said = (inspect.getdoc(evaluator_class(name)) or "").split("\n\n")[0].replace("\n", " ")
        lines.append(f"| [`{name}`]({name}.md) | {_cell(said)} |")
    lines += ["", "All of them but those with a judge also run on emoji scenes, offline:", ""]
    return "\n".join([*lines, "```bash", "lvlm-decode eval pope --limit 20 --out runs", "```", ""])


def evaluator_page(name: str) -> str:
    """One benchmark: what its module says, options, columns, accepted answers."""
    cls = evaluator_class(name)
    lines = [f"# {name}", ""]
    if cls.paper:
        lines += [f"Paper: {_escaped(cls.paper)}.", ""]
    lines += [prose(inspect.getdoc(sys.modules[cls.__module__]) or ""), "", "## Options", ""]
    fields = dataclasses.fields(cls)
    if fields:
        notes: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            notes |= catalogue.documented(inspect.cleandoc(base.__doc__ or ""))
        lines += ["| name | default | meaning |", "|---|---|---|"]
        lines += [f"| `{f.name}` | {_code(f.default)} | {_cell(notes[f.name])} |" for f in fields]
        if any(f.name == "rule" for f in fields):
            lines += ["", "Rules that read an answer; they differ because the original scripts do:", ""]
            lines += [f"- `{rule}`: {_cell(_first(function))}" for rule, function in RULES.items()]
    else:
        lines.append("It has none.")
    lines += ["", "## Columns", "", "| column | better |", "|---|---|"]
    lines += [f"| {_cell(column.title)} | {column.better or ''} |" for column in cls.columns]
    forms = [f for f in vars(sys.modules[cls.__module__]).values() if inspect.isclass(f) and issubclass(f, Form)]
    if examples := [f"{form.by}:\n{form.example}" for form in forms if "example" in vars(form)]:
        lines += ["", "## Accepted lines of answer files", "", "```text", *examples, "```"]
    lines += ["", "```bash", f"lvlm-decode score {name} answers.jsonl", "```", ""]
    return "\n".join(lines)


def _first(thing: Any) -> str:
    """The first paragraph of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n\n")[0]


def _models() -> str:
    lines = ["# Models", "", "| `config.model_type` | checkpoints |", "|---|---|"]
    for kind, ids in checkpoints.CHECKPOINTS.items():
        links = ", ".join(f"[{name}](https://huggingface.co/{name})" for name in ids)
        lines.append(f"| `{kind}` | {links} |")
    needing = [name for name in METHODS if load(name).needs]
    lines += [
        "",
        "Every method is tested on every family, on tiny models of random weights. Some need a part that not every",
    ]
    lines += ["family has, and say so before the first token:", ""]
    lines += [f"- [`{name}`](methods/{name}.md) needs: {', '.join(load(name).needs)}" for name in needing]
    return "\n".join([*lines, ""])


def choose_page() -> str:
    """Which method for captions, for yes/no questions and for latency, from the records."""
    pope, chair = pope_cells(), caption_cells()
    mean = {
        key[:2]: sum(pope[(*key[:2], split)]["accuracy"] for split in SPLITS) / len(SPLITS)
        for key in pope
        if all((*key[:2], split) in pope for split in SPLITS)
    }
    lines = [
        "# Which method?",
        "",
        "What the records of the small LLaVA say. A large model may differ: measure on your own.",
    ]
    lines += [
        "",
        "## Yes/no questions",
        "",
        "Mean POPE accuracy over the three splits, the best ten and plain decoding:",
        "",
    ]
    lines += ["| method | decoding | accuracy |", "|---|---|---|"]
    best = sorted(mean, key=mean.__getitem__, reverse=True)
    shown = [key for key in best if key in best[:10] or key[0] == "plain"]
    lines += [f"| {name} | {how} | {100 * mean[name, how]:.1f} % |" for name, how in shown]
    lines += [
        "",
        "Answer greedily first; a method that samples is to be compared with greedy decoding and with `mask`.",
    ]
    effects = docs_figures.effects()
    lines += ["", "## Captions", ""]
    lines += [
        f"Greedy captions of {effects['scenes']} scenes; fewer absent objects is better, and so are more of the objects that are "
        "there. In brackets the 95 % interval of the difference from plain decoding, in points. Fewer words name fewer objects "
        "of both kinds, so read both columns.",
        "",
    ]
    lines += [
        "| method | captions that name something absent | objects of the picture that are named |",
        "|---|---|---|",
    ]
    for key in sorted(effects["methods"], key=lambda key: effects["methods"][key]["rates"]["chair_s"]):
        cell = effects["methods"][key]
        shown = []
        for rate in ("chair_s", "recall"):
            _, low, high = (100 * bound for bound in cell["minus_plain"][rate])
            shown.append(
                f"{100 * cell['rates'][rate]:.0f} %" + ("" if key == "plain" else f" [{low:+.0f}, {high:+.0f}]")
            )
        lines.append(f"| [{key}](methods/{key}.md) | {' | '.join(shown)} |")
    lines += ["", "Searches and sampled captions, 150 scenes:", ""]
    lines += ["| method | decoding | captions that name something absent | recall |", "|---|---|---|---|"]
    for key in sorted(chair, key=lambda key: chair[key]["chair_s"]):
        lines.append(
            f"| {key[0]} | {key[1]} | {100 * chair[key]['chair_s']:.1f} % | {100 * chair[key]['recall']:.1f} % |"
        )
    record = json.loads((ROOT / "benchmarks/speculative/captions.json").read_text(encoding="utf-8"))["arms"]
    lines += ["", "## Latency", "", "Time per token relative to plain `generate()`, captions, batch 1, two cores:", ""]
    lines += ["| method and drafter | time |", "|---|---|"]
    for arm in (
        "plain | vispec",
        "plain",
        "vcd | vispec",
        "vcd | automaton(shortest=1)",
        "vcd",
        "vcd+ritual | vispec",
        "vcd+ritual",
    ):
        lines.append(f"| {arm.replace(' | ', ' with ')} | {record[arm]['vs_plain']:.2f} |")
    lines += ["", "A drafter changes no token. Layer-wise methods (`dola`, `deco`) add no row to the forward.", ""]
    return "\n".join(lines)


# --- commands and API ------------------------------------------------------------------------------------------------


def _commands() -> str:
    import typer

    from lvlm_decode.cli import app

    root = typer.main.get_command(app)
    lines = ["# Commands", "", "```text", inspect.cleandoc(EXIT_STATUS.replace("\b\n", "")), "```", ""]

    def below(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from below(command, f"{prefix}{name} ")
            else:
                yield f"{prefix}{name}", command

    for name, command in below(root, ""):
        with command.make_context(
            f"lvlm-decode {name}", [], resilient_parsing=True, help_option_names=["-h", "--help"]
        ) as context:
            lines += [f"## {name}", "", "```text", command.get_help(context).replace("\b", ""), "```", ""]
    return "\n".join(lines)


def _api() -> str:
    lines = ["# Python API", ""]
    for heading, module, names in API:
        lines += [f"## {heading}", ""]
        for name in names:
            thing = getattr(importlib.import_module(module), name)
            kind = "class " if inspect.isclass(thing) else ""
            lines += [f"### {name}", "", "```text", f"{kind}{module}.{name}{_signature(thing)}", "```", ""]
            lines += ["```text", inspect.getdoc(thing) or "", "```", ""]
            if inspect.isclass(thing):
                for method, function in vars(thing).items():
                    if inspect.isfunction(function) and not method.startswith("_") and function.__doc__:
                        said = inspect.cleandoc(function.__doc__)
                        lines += [
                            f"#### {name}.{method}",
                            "",
                            "```text",
                            f"{method}{_signature(function)}",
                            "",
                            said,
                            "```",
                            "",
                        ]
    return "\n".join(lines)


def _signature(thing: Any) -> str:
    try:
        text = str(inspect.signature(thing))
    except ValueError:
        return "(...)"
    return re.sub(r"<(object|function) [^>]*>", "...", text)

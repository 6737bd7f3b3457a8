"""The structure that design and reviews ask for: imports point down, none hides in a function, one room per thing."""

import ast
import inspect
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from lvlm_decode import attached
from lvlm_decode.methods import METHODS, load
from lvlm_decode.testing.models import tiny

PACKAGES = {"lvlm_decode": ROOT / "lvlm_decode", "lvlm_decode_evals": ROOT / "evals"}
#: Rooms from the ground up; a file imports from its own room and from those before it.
FLOORS = [
    "errors",
    "weights",
    "parameters",
    "weights",
    "plugins",
    "weights",
    "engine.hf",
    "engine.hooks",
    "families",
    "method",
    "engine",
    "methods",
    "controllers",
]
CORE = (
    "lvlm_decode.engine",
    "lvlm_decode.methods",
    "lvlm_decode.families",
    "lvlm_decode.controllers",
    "lvlm_decode.method",
)


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


MODULES = modules()


def target(module: str, path: Path, node: ast.ImportFrom) -> list[str]:
    """The modules of this repository that an import names."""
    if node.level:
        base = module.split(".")
        base = base if path.name == "__init__.py" else base[:-1]
        base = base[: len(base) - node.level + 1]
        name = ".".join([*base, *([node.module] if node.module else [])])
    else:
        name = node.module or ""
    inner = [f"{name}.{alias.name}" for alias in node.names if f"{name}.{alias.name}" in MODULES]
    if inner and len(inner) == len(node.names):
        return inner
    return [name, *inner] if name in MODULES else inner


def imports(module: str, inside_functions: bool = False) -> set[str]:
    """What a module imports when it is imported (or, instead, inside its functions); what is for a type checker is left out."""
    path = MODULES[module]
    found: set[str] = set()

    def walk(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and inside == inside_functions:
                found.update(target(module, path, child))
            walk(child, inside or isinstance(child, ast.FunctionDef | ast.Lambda))

    walk(ast.parse(path.read_text()), False)
    return found - {module}


def test_no_module_imports_itself_by_a_detour():
    graph = {module: imports(module) for module in MODULES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        if module in way:
            pytest.fail(" -> ".join([*way[way.index(module) :], module]))
        if module in done:
            return
        for other in sorted(graph[module]):
            # A package's own __init__ is imported before its parts whatever they do.
            if not module.startswith(other + "."):
                visit(other, (*way, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith(CORE)])
def test_no_import_hides_in_a_function_of_the_core(module):
    assert imports(module, inside_functions=True) == set()


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith(CORE)])
def test_the_core_imports_downwards(module):
    def floor(name: str) -> int:
        rest = name.removeprefix("lvlm_decode.")
        rooms = [room for room in FLOORS if rest == room or rest.startswith(room + ".")]
        return FLOORS.index(max(rooms, key=len)) if rooms else len(FLOORS)

    above = [other for other in imports(module) if other != "lvlm_decode" and floor(other) > floor(module)]
    assert above == []


def test_scorers_import_no_model_code():
    """Only the bridges to models import torch: their names are known."""
    allowed = {"runner", "run"}
    found = set()
    for module, path in MODULES.items():
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        if module.startswith("lvlm_decode_evals.") and any("torch" in ast.dump(node) for node in top):
            found.add(module.rpartition(".")[2])
    assert found <= allowed, found


@pytest.mark.parametrize("room", ["speculative", "reading"])
def test_what_decodes_imports_no_evaluation_outside_its_commands(room):
    """Arrows point down: `lvlm_decode.reading` lies below both packages, and only commands stand above the evaluation."""
    found = {
        module: sorted(others)
        for module in MODULES
        if module.startswith(f"lvlm_decode.{room}") and not module.endswith(".commands")
        if (others := {o for o in imports(module) | imports(module, True) if o.startswith("lvlm_decode_evals")})
    }
    assert found == {}


@pytest.mark.parametrize("name", METHODS)
def test_views_have_one_signature(name):
    """Whoever reads one method knows the types of all: what is given is a sample and its generator."""
    views = inspect.signature(load(name).views)
    given = {parameter.name: parameter.annotation for parameter in views.parameters.values()}
    assert given == {"self": inspect.Parameter.empty, "sample": "Sample", "rng": "torch.Generator"}
    assert views.return_annotation == "list[View]"


#: The main way of ``input_ids``, from the caller's ``generate()`` to the model's forward. Hugging Face's ``generate()`` lies
#: before the strategy and its loop before the mitigated forward; the port is where they are entered and left.
STACKED = ["attachment", "engine.strategy", "engine.mitigated", "engine.stack"]
DRAFTED = ["attachment", "engine.strategy", "speculative.generate", "engine.stack"]


@pytest.mark.parametrize(
    ("drafter", "settings", "way"),
    [(None, {}, STACKED), (None, {"num_beams": 2}, STACKED), ("lookup", {}, DRAFTED)],
    ids=["greedy", "beams", "drafts"],
)
def test_the_main_way_enters_each_file_once(drafter, settings, way):
    zoo = tiny("llava")
    taken: list[list[str]] = []
    names = {str(path): module.removeprefix("lvlm_decode.") for module, path in MODULES.items()}

    def note(module, args):
        """The files on the stack, outermost first; calls within one file count once."""
        files, frame = [], sys._getframe()
        while frame is not None:
            name = names.get(str(Path(frame.f_code.co_filename).resolve()), "")
            if name and not name.startswith("engine.hf") and files[-1:] != [name]:
                files.append(name)
            frame = frame.f_back
        taken.append(files[::-1])

    hook = zoo.model.get_decoder().layers[0].register_forward_pre_hook(note)
    try:
        with attached(zoo.model, "vcd", processor=zoo.processor, drafter=drafter):
            zoo.model.generate(**zoo.inputs(["is it", "ab"]), max_new_tokens=3, do_sample=False, **settings)
    finally:
        hook.remove()
    assert len(taken) > 1
    assert all(files == way for files in taken), taken


def test_one_name_has_one_meaning():
    """The engine's names of classes are not taken again by the evaluation."""
    names: dict[str, set[str]] = {"lvlm_decode": set(), "lvlm_decode_evals": set()}
    for module, path in MODULES.items():
        if not module.startswith("lvlm_decode.") or module.startswith(CORE):
            tree = ast.parse(path.read_text())
            names[module.partition(".")[0]] |= {n.name for n in tree.body if isinstance(n, ast.ClassDef)}
    shared = {name for name in names["lvlm_decode"] & names["lvlm_decode_evals"] if not name.startswith("_")}
    # Left as they are: choices.Contrast (a thing that differs in two scenes) and api.Prepared (an evaluation ready to run).
    assert {"Run", "Method"} <= names["lvlm_decode"] and shared <= {"Contrast", "Prepared"}


def test_no_test_file_imports_from_another():
    """What several test files share stands in a module beside them: an import would collect the other's tests and fixtures."""
    files = {path.stem: path for path in (ROOT / "tests").glob("*.py")}
    tests = {name for name in files if name.startswith("test_")}
    found = {}
    for name, path in files.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
            elif isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
        if wrong := {module.rpartition(".")[2] for module in imported} & tests:
            found[name] = wrong
    assert len(tests) > 50 and found == {}


def test_a_type_checker_knows_every_name_of_the_package():
    """The block for type checkers in lvlm_decode/__init__.py imports what its table of names says, from the same place."""
    import lvlm_decode

    tree = ast.parse((ROOT / "lvlm_decode" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {alias.asname: f".{line.module}" for line in block.body for alias in line.names}
    assert told == lvlm_decode._NAMES

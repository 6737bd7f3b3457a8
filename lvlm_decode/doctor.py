"""What is installed, whether it was tested together, and whether the engine works with it: ``lvlm-decode doctor``."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from typing import Any

from packaging.requirements import Requirement

from . import __version__
from .engine.hf import versions
from .errors import DependencyError
from .plugins import Plugin

#: Shown first; the rest of what the metadata ask for follows.
_FIRST = ("torch", "torchvision", "transformers", "tokenizers", "huggingface_hub", "accelerate")


@dataclass(frozen=True)
class Report:
    """What :func:`examine` found.

    Args:
        versions: package -> installed version, or ``None``.
        tested: whether this minor release of transformers was tested.
        broken: model type -> what this release of transformers itself breaks of it; such models are refused.
        devices: names of the devices torch can use, the CPU first.
        missing: extra -> packages of it that are not installed.
        plugins: "methods", "drafters", "evaluators", "families" -> "name (package)" of what other packages bring and can be used.
        unusable: what other packages bring and cannot be loaded, one sentence each; the rest works without it.
        trouble: what does not work, one sentence each; empty when all does.
    """

    versions: dict[str, str | None]
    tested: bool
    broken: dict[str, str]
    devices: list[str]
    missing: dict[str, list[str]]
    plugins: dict[str, list[str]]
    unusable: list[str]
    trouble: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def installed(package: str) -> str | None:
    """The installed version of a package, or ``None``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def examine() -> Report:
    """Look at the environment, and run the port's self-check, whatever the version."""
    wanted: dict[str, list[Requirement]] = {"": []}
    for line in metadata("lvlm-decode").get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        extra = str(requirement.marker).partition("extra == ")[2].strip("\"'") if requirement.marker else ""
        wanted.setdefault(extra, []).append(requirement)
    names = [*_FIRST, *(r.name for r in wanted[""] if r.name not in _FIRST)]
    found: dict[str, str | None] = {"lvlm-decode": __version__, "python": platform.python_version()}
    found.update({name: installed(name) for name in names})
    trouble = [
        f"{r.name} {have or 'is missing'}: lvlm-decode needs {r.name}{r.specifier}; run: pip install '{r.name}{r.specifier}'"
        for r in wanted[""]
        if (have := installed(r.name)) is None or not r.specifier.contains(have, prereleases=True)
    ]
    missing = {
        extra: absent
        for extra, requirements in wanted.items()
        if extra and (absent := [r.name for r in requirements if installed(r.name) is None])
    }
    devices, checked = _engine()
    brought, unusable = _plugins()
    return Report(
        found,
        versions.tested(found["transformers"] or "0"),
        versions.BROKEN.get(versions.minor_of(found["transformers"] or "0"), {}),
        devices,
        missing,
        brought,
        unusable,
        [*trouble, *checked],
    )


def _plugins() -> tuple[dict[str, list[str]], list[str]]:
    """What other packages bring by group, and why some of it cannot be used."""
    import lvlm_decode_evals

    from . import families, methods
    from .speculative import drafters

    groups: dict[str, tuple[dict[str, Plugin], str]] = {
        "methods": (methods.foreign(), "Method"),
        "drafters": (drafters.foreign(), "Drafter"),
        "evaluators": (lvlm_decode_evals.foreign(), "Evaluator"),
        "families": (families.foreign(), "Family"),
    }
    brought: dict[str, list[str]] = {group: [] for group in groups}
    unusable = []
    for group, (found, base) in groups.items():
        for plugin in found.values():
            try:
                plugin.load(base)
            except DependencyError as error:
                unusable.append(str(error))
            else:
                brought[group].append(f"{plugin.name} ({plugin.package})")
    return brought, unusable


def _engine() -> tuple[list[str], list[str]]:
    """Devices, and what of the engine does not work here."""
    try:
        import torch

        from .engine.hf.probe import probe
    except Exception as error:  # an import that fails is the answer
        return [], [f"the engine cannot be imported: {type(error).__name__}: {error}"]
    cards = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        cards.append("mps")
    moved = [f"the self-check of the engine failed: {what}; run: pip install '{versions.RANGE}'" for what in probe()]
    return [f"cpu ({torch.get_num_threads()} threads)", *cards], moved


def text(report: Report) -> str:
    """The report as a person reads it."""
    lines = [f"{name:<18}{have or 'not installed'}" for name, have in report.versions.items()]
    tested = f"{versions.FLOOR} to {versions.TESTED[-1]}"
    lines.append(f"\ntransformers was tested from {tested}; this one {'is' if report.tested else 'is not'} among them.")
    lines += [f"It breaks {name}, which is refused: {why}." for name, why in report.broken.items()]
    lines.append(f"Devices: {', '.join(report.devices) or 'none'}")
    for extra, packages in report.missing.items():
        lines.append(f"Extra [{extra}] lacks {', '.join(packages)}; run: pip install 'lvlm-decode[{extra}]'")
    for group, found in report.plugins.items():
        if found:
            lines.append(f"{group.capitalize()} of other packages: {', '.join(found)}")
    lines += report.unusable
    lines.append("")
    lines.extend(report.trouble or ["The self-check of the engine passed."])
    return "\n".join(lines)

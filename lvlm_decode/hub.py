"""Methods as files: settings in ``generation_config.json``, and a repository that ``generate(custom_generate=...)`` runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from . import __version__
from .errors import FileFormatError, LvlmDecodeError, MissingFileError, OutputError, UnsupportedError
from .method import Method, Sum
from .methods import load

#: Where a method's settings stand, and under which key.
FILE, KEY = "generation_config.json", "lvlm_decode"

_GENERATE = '''"""Decodes with {title}; the package lvlm-decode does the work."""

from lvlm_decode import attached
from lvlm_decode.hub import of_settings

SETTINGS = {settings}


def generate(model, **arguments):
    """What ``model.generate(**arguments)`` takes and returns."""
    given = {{name: value for name, value in arguments.items() if value is not None}}
    with attached(model, of_settings(SETTINGS, "SETTINGS")):
        return model.generate(**given)
'''

_CARD = """---
library_name: transformers
license: apache-2.0
tags:
- custom_generate
- lvlm-decode
---

# {title}

{papers}

```python
model.generate(**inputs, custom_generate="this repository", trust_remote_code=True)
```

`model` is a vision-language model of a family that lvlm-decode supports, and `inputs` is the whole output of its processor.
Settings: `{settings}`.
"""


def settings_of(method: Method) -> list[dict[str, Any]]:
    """A method, or the parts of a sum, as JSON values.

    Raises:
        UnsupportedError: a parameter that is no JSON value, such as a model.
    """
    found = []
    for part in method.parts():
        parameters = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        for name, value in parameters.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise UnsupportedError(
                    f"{part.name}: {name} is {type(value).__name__}, which no file of settings can hold; give a path or a name."
                ) from error
        found.append({"name": part.name, "parameters": json.loads(json.dumps(parameters))})
    return found


def of_settings(settings: Any, where: str) -> Method:
    """The method that :func:`settings_of` described.

    Args:
        where: the file, for messages.

    Raises:
        FileFormatError: not such a description.
    """
    try:
        parts = [load(part["name"])(**part["parameters"]) for part in settings]
        return parts[0] if len(parts) == 1 else Sum.of(*parts)
    except (TypeError, KeyError, IndexError) as error:
        raise FileFormatError(
            f"{where}: {KEY!r} must be a list of objects with 'name' and 'parameters', as Method.save_pretrained writes it."
        ) from error
    except LvlmDecodeError as error:
        raise FileFormatError(f"{where}: {error}") from error


def save_pretrained(method: Method, folder: str | Path) -> None:
    """Write the method's settings into ``generation_config.json`` of ``folder``; what else stands there is kept."""
    settings = settings_of(method)
    path = Path(folder) / FILE
    found = _read(path) if path.exists() else {}
    _write(path, json.dumps({**found, KEY: settings}, indent=2) + "\n")


def from_pretrained(folder: str | Path) -> Method:
    """The method whose settings stand in ``generation_config.json`` of ``folder``.

    Raises:
        MissingFileError: no such file, or one that names no method.
        FileFormatError: a file that cannot be read, an unknown method or parameter.
    """
    path = Path(folder) / FILE
    found = _read(path) if path.exists() else {}
    if KEY not in found:
        raise MissingFileError(f"{path} names no method of lvlm-decode; write one with method.save_pretrained(folder).")
    return of_settings(found[KEY], str(path))


def export(method: Method, folder: str | Path) -> None:
    """Write a repository for ``model.generate(**inputs, custom_generate=folder, trust_remote_code=True)``: code,
    requirements, card and settings.
    """
    folder, settings = Path(folder), settings_of(method)
    title = " + ".join(part.name for part in method.parts())
    papers = "\n".join(f"- {p.paper}{f', arXiv {p.arxiv}' if p.arxiv else ''}" for p in method.parts())
    _write(folder / "custom_generate" / "generate.py", _GENERATE.format(title=title, settings=repr(settings)))
    _write(folder / "custom_generate" / "requirements.txt", f"lvlm-decode>={__version__}\n")
    _write(folder / "README.md", _CARD.format(title=title, papers=papers, settings=json.dumps(settings)))
    save_pretrained(method, folder)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(found, dict):
        raise FileFormatError(f"{path} must hold a JSON object.")
    return found


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error}); give another folder.") from error

"""Methods, drafters, evaluators and families of other packages, found through entry points.

    [project.entry-points."lvlm_decode.methods"]
    mymethod = "my_package.mymethod:MyMethod"

The groups are ``lvlm_decode.methods``, ``lvlm_decode.drafters``, ``lvlm_decode.evaluators`` and ``lvlm_decode.families`` (the
name is the family's ``config.model_type`` there). A name that this library has itself is never taken by another package.
Imports no torch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import DependencyError


@dataclass(frozen=True)
class Plugin:
    """One entry of another package.

    Args:
        name: what users call it.
        package: the distribution it comes with.
        entry: where its class is.
    """

    name: str
    package: str
    entry: EntryPoint

    def load(self, base: str) -> Any:
        """The class.

        Args:
            base: name of the class that it must derive from, for the message.

        Raises:
            DependencyError: the package cannot be imported, or the entry is no class; names package and entry.
        """
        try:
            found = self.entry.load()
        except Exception as error:  # whatever another package raises while it is imported
            raise DependencyError(
                f"{self.name!r} of package {self.package} cannot be loaded from {self.entry.value!r}: "
                f"{type(error).__name__}: {error}; update or remove the package."
            ) from error
        if not (isinstance(found, type) and base in {cls.__name__ for cls in found.__mro__}):
            raise DependencyError(
                f"{self.name!r} of package {self.package} is {self.entry.value!r}, which is no class that derives from {base}; "
                "its entry point must name one."
            )
        return found


@functools.cache
def plugins(group: str, own: Collection[str] = ()) -> dict[str, Plugin]:
    """The plug-ins of a group by name.

    Args:
        own: names that this library has itself; entries under them are ignored with a warning.
    """
    found: dict[str, Plugin] = {}
    for entry in sorted(entry_points(group=group), key=lambda entry: (entry.name, str(entry.value))):
        package = entry.dist.name if entry.dist is not None else "an unknown package"
        if entry.name in own or entry.name in found:
            other = found[entry.name].package if entry.name in found else "lvlm_decode"
            warnings.warn(
                f"package {package} registers {entry.name!r} in {group}, a name that {other} has; its entry is ignored.",
                stacklevel=2,
            )
            continue
        found[entry.name] = Plugin(entry.name, package, entry)
    return found

"""Which transformers and torch this library was tested with. Metadata, README, constraints and the matrix follow this file.

It imports neither of them, so that the command line and the tools can read it quickly.
"""

from __future__ import annotations

from packaging.version import Version

#: Releases of transformers that the matrix ran; the first is the floor, the last the newest.
TESTED = ("5.18.0", "5.19.0", "5.20.2", "5.22.2", "5.23.0", "5.24.0")
FLOOR = TESTED[0]
#: The next minor release after the newest tested one; the metadata stop below it.
CEILING = f"{Version(TESTED[-1]).major}.{Version(TESTED[-1]).minor + 1}"
TORCH_FLOOR = "2.11"
#: What pip is asked to install where another version is installed.
RANGE = f"transformers>={FLOOR},<{CEILING}"

#: Model types that a release of transformers itself breaks: minor release -> model type -> what happens there.
BROKEN = {
    "5.20": {"smolvlm": "its forward there reshapes the image features to a number of patches that they do not have"}
}


def minor_of(version: str) -> str:
    """ "5.24" of "5.24.0" and of "5.24.0.dev0"."""
    parsed = Version(version)
    return f"{parsed.major}.{parsed.minor}"


def tested(version: str) -> bool:
    """Whether a release of the same minor version was tested."""
    return minor_of(version) in {minor_of(one) for one in TESTED}

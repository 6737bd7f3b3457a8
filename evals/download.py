"""Fetch the benchmarks' own files from their owners, with pinned checksums, and verify what is there.

A file is written under its final name only after its checksum was right. A file that is there with other content is
never overwritten. Without a network the same command says which file to put where.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import os
import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lvlm_decode.errors import EvalError, FileFormatError, LvlmDecodeError, MissingFileError, UnknownNameError

from .upstream import DATASETS, SOURCES, Source, sources

FOLDER_VARIABLE = "LVLM_DECODE_DATA"
TIMEOUT = 30.0
_CHUNK = 1 << 20


def data_folder() -> Path:
    """Where fetched files go unless told otherwise: $LVLM_DECODE_DATA, else ~/.cache/lvlm-decode."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "lvlm-decode")


@dataclass(frozen=True)
class Found:
    """A file of a data set as it lies on disk.

    state: "ok", "missing", "wrong" (other content than pinned), "unpinned" (there, but no checksum is known to compare
    with). sha256: of the content, decompressed where only the .gz is there; None when missing.
    """

    source: Source
    path: Path
    state: str
    sha256: str | None = None

    def sentence(self) -> str:
        pinned = f"sha256 {self.source.sha256}" if self.source.sha256 else "no sha256 is pinned"
        size = f"{self.source.bytes:,} bytes, " if self.source.bytes else ""
        return {
            "ok": f"{self.path}: as pinned.",
            # A line each for what is copied from it: where to, where from, and what it must be.
            "missing": f"{self.path}: missing; put there\n  {self.source.url}\n  ({size}{pinned})",
            "wrong": f"{self.path}: sha256 is {self.sha256}, pinned is {self.source.sha256}; it is another version or "
            f"damaged. Move it away and fetch it again from {self.source.url}.",
            "unpinned": f"{self.path}: there, sha256 {self.sha256}; no checksum is pinned for this file.",
        }[self.state]


def _digest(file: io.BufferedIOBase) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(path: Path) -> str:
    """sha256 of a file's content, decompressed if it is gzip. Raises FileFormatError for a damaged gzip file."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not packed:
            return _digest(file)
        try:
            with gzip.open(file) as content:
                return _digest(content)
        except (OSError, EOFError, zlib.error) as error:
            raise FileFormatError(f"{path} is a damaged gzip file ({error}); fetch it again.") from error


def check(source: Source, folder: Path) -> Found:
    """How a file stands under `folder`; a .gz of it counts as well."""
    path = Path(folder) / source.dataset / source.name
    packed = path.with_name(f"{path.name}.gz")
    there = path if path.is_file() else packed if packed.is_file() else None
    if there is None:
        return Found(source, path, "missing")
    digest = digest_of(there)
    if source.sha256 is None:
        return Found(source, there, "unpinned", digest)
    return Found(source, there, "ok" if digest == source.sha256 else "wrong", digest)


def wanted(datasets: Sequence[str], with_images: bool = False) -> list[Source]:
    """The files of some data sets (all of them for none given). Raises UnknownNameError for one nobody knows."""
    for name in datasets:
        if name not in DATASETS:
            raise UnknownNameError.of("data set", name, DATASETS)
    chosen = [source for name in datasets or DATASETS for source in sources(name)]
    return [source for source in chosen if with_images or not source.on_request]


def identify(path: Path) -> Source | None:
    """Which pinned file a file is, by its content; None for one nobody knows."""
    if not Path(path).is_file():
        raise MissingFileError(f"{path} is not a file; give a file or the name of a data set.")
    digest = digest_of(path)
    return next((source for source in SOURCES if source.sha256 == digest), None)


def address(source: Source, mirror: str | None) -> str:
    """Where to fetch a file: its owner, or DATASET/NAME below a mirror (http, file:// or a folder)."""
    if mirror is None:
        return source.url
    base = mirror if "://" in mirror else Path(mirror).resolve().as_uri()
    return f"{base.rstrip('/')}/{source.dataset}/{source.name}"


def fetch(source: Source, folder: Path, mirror: str | None = None, timeout: float = TIMEOUT) -> Found:
    """Download one file and verify it before it gets its name.

    Raises EvalError when the content is not what is pinned, and what urllib raises when it cannot be fetched.
    """
    path = Path(folder) / source.dataset / source.name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    url = address(source, mirror)
    digest, size = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response, open(partial, "wb") as file:
            while chunk := response.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        if source.sha256 is not None and digest.hexdigest() != source.sha256:
            raise EvalError(
                f"{url} gave {size} bytes with sha256 {digest.hexdigest()}; pinned are {source.bytes} bytes with "
                f"{source.sha256}. Nothing was kept: the file has changed or the transfer was broken."
            )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return Found(source, path, "ok" if source.sha256 else "unpinned", digest.hexdigest())


def unpack(archive: Path) -> list[Path]:
    """Unpack a zip file beside itself; files that are there with the right size stay. Returns its files."""
    target = archive.parent
    try:
        with zipfile.ZipFile(archive) as content:
            if not all(entry.filename for entry in content.infolist()):
                raise FileFormatError(f"{archive} holds a file without a name; fetch it again.")
            members = [entry for entry in content.infolist() if not entry.is_dir()]
            for entry in members:
                path = target / entry.filename
                if not path.resolve().is_relative_to(target.resolve()):
                    raise FileFormatError(f"{archive} holds {entry.filename!r}, which points outside its folder.")
                if not (path.is_file() and path.stat().st_size == entry.file_size):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with content.open(entry) as packed, open(path, "wb") as file:
                        shutil.copyfileobj(packed, file, _CHUNK)
    # What zipfile and zlib raise for damaged headers, unknown methods and encrypted members.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, ValueError) as error:
        if isinstance(error, LvlmDecodeError):
            raise
        raise FileFormatError(f"{archive} is no readable zip file ({error}); fetch it again.") from error
    return [target / entry.filename for entry in members]


def get(
    datasets: Sequence[str],
    folder: Path,
    *,
    mirror: str | None = None,
    with_images: bool = False,
    tell: Callable[[str], None] = print,
    timeout: float = TIMEOUT,
) -> list[Found]:
    """Fetch what is missing of some data sets, telling licences first, and verify all of it.

    Raises EvalError with one line per file when some could not be fetched (what to put where), came with a wrong
    checksum, or are there with other content.
    """
    chosen = wanted(datasets, with_images)
    trouble: list[str] = []
    result: list[Found] = []
    unreachable: set[str] = set()
    for source in chosen:
        tell(f"{source.dataset}/{source.name}: {source.what}. Licence: {source.licence}.")
    for source in chosen:
        found = check(source, folder)
        host = address(source, mirror).split("/")[2]
        if found.state == "missing" and host not in unreachable:
            try:
                found = fetch(source, folder, mirror, timeout)
                tell(f"{found.path}: fetched from {address(source, mirror)}")
            except urllib.error.HTTPError as error:
                tell(f"{error.url} answered {error.code} {error.reason}")
            except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
                tell(f"{host or source.name} cannot be reached ({getattr(error, 'reason', error)}).")
                # Without a network every further file of a host would only wait for the timeout.
                if host:
                    unreachable.add(host)
            except LvlmDecodeError as error:
                trouble.append(str(error))
                continue
        result.append(found)
        if found.state in ("missing", "wrong"):
            trouble.append(found.sentence())
        elif found.path.suffix == ".zip":
            unpack(found.path)
    if trouble:
        first = (
            f"{len(trouble)} of {len(chosen)} files are not there as pinned. Put them where they belong, or give the same "
            "command where there is a network; what is there is kept."
        )
        raise EvalError("\n".join([first, *trouble]))
    return result

"""Who writes into a folder: one run, or the shards of one run side by side.

A lock is a small file made in one step, which network file systems can do too, and kept alive by its holder
(`filelock.SoftFileLease`). The lock of a process that has ended on this machine is taken over at once; that of another
machine after `LEASE` seconds without a sign of life. Beside the lock a note says who holds it and since when.

    OUT/pope/random/.lock              a whole run; also held for a moment by a shard that starts
    OUT/pope/random/.lock-1-of-3       the first of three shards
    OUT/pope/random/.lock.note         who and since when
"""

from __future__ import annotations

import contextlib
import getpass
import json
import re
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import SoftFileLease, Timeout

from lvlm_decode.errors import LockedError, OutputError

# Seconds without a sign of life after which the lock of another machine's process is taken over.
LEASE = 120.0
# Seconds to wait for a lock that is held: a shard that starts holds the whole lock for a moment.
WAIT = 3.0
# And to wait for one that is held in passing: by a shard that starts, or while shards are merged.
PATIENCE = 60.0
_SHARE = re.compile(r"\.lock-(\d+)-of-(\d+)")


@contextlib.contextmanager
def writing(folders: Sequence[Path], index: int = 0, count: int = 1, passing: bool = False) -> Iterator[Hold]:
    """Hold these folders as share `index` (from 0) of `count`; made where they are missing.

    passing: it is held for a moment only, so that others wait for it.

    Raises LockedError in one sentence when another run holds one of them, OutputError when one cannot be written.
    """
    hold = Hold(passing)
    try:
        for folder in sorted(set(map(Path, folders))):
            hold.take(folder, index, count)
        yield hold
    finally:
        hold.release()


class Hold:
    """The locks that one run holds."""

    def __init__(self, passing: bool = False) -> None:
        self._passing = passing
        self._leases: list[SoftFileLease] = []

    def take(self, folder: Path, index: int, count: int) -> None:
        """Add a folder; as `writing`."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as unless_all_went_well:
                whole = own = self._acquire(folder, ".lock")
                unless_all_went_well.callback(self._release, whole)
                if count > 1:
                    own = self._acquire(folder, f".lock-{index + 1}-of-{count}")
                    unless_all_went_well.callback(self._release, own)
                for path in sorted(folder.glob(".lock-*")):
                    share = _SHARE.fullmatch(path.name)
                    if share and (count == 1 or int(share[2]) != count):
                        # Nobody can start a shard meanwhile: that takes the whole lock. A dead one's lock goes here.
                        self._release(self._acquire(folder, path.name))
                unless_all_went_well.pop_all()
            if own is not whole:
                self._release(whole)
            self._leases.append(own)
            note = {"since": datetime.now().astimezone().isoformat(" ", "seconds"), "by": _me()}
            _note(own).write_text(json.dumps(note | ({"passing": True} if self._passing else {})) + "\n")
        except OSError as error:
            raise OutputError.of(folder, error) from error

    def check(self) -> None:
        """Raise LockedError if another run has taken a lock over, for instance because this machine slept."""
        for lease in self._leases:
            if lease.compromise is not None:
                raise LockedError(
                    f"{Path(lease.lock_file).parent} was taken over by another run while this one gave no sign of life; "
                    "start again when that one is done."
                )

    def release(self) -> None:
        """Give all locks back."""
        while self._leases:
            self._release(self._leases.pop())

    def _acquire(self, folder: Path, name: str) -> SoftFileLease:
        path = folder / name
        lease = SoftFileLease(path, lease_duration=LEASE, thread_local=False)
        deadline = time.monotonic() + PATIENCE
        while True:
            before = _state(path)
            try:
                lease.acquire(timeout=WAIT)
                return lease
            except Timeout as error:
                if before is not None and before == _state(path) and _never_written(path):
                    continue
                if _in_passing(path) and time.monotonic() < deadline:
                    continue
                if _elsewhere(path) and _silent(lease):
                    return lease
                raise LockedError(_sentence(path)) from error

    def _release(self, lease: SoftFileLease) -> None:
        # Where the disk has become read-only the lock stays, and is taken over by the next run.
        with contextlib.suppress(OSError):
            if lease.compromise is None:
                _note(lease).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            lease.release()


def _note(lease: SoftFileLease) -> Path:
    return Path(f"{lease.lock_file}.note")


def _me() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "a user without a name"


def _marker(path: Path) -> dict[str, str]:
    """pid and host in a lock's own file; empty when it has just gone."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
    return {}


def _elsewhere(path: Path) -> bool:
    host = _marker(path).get("host", "")
    return host.partition("?")[0] != socket.gethostname()


def _silent(lease: SoftFileLease) -> bool:
    """Watch the lock of another machine: True once it was taken over, False at its first sign of life."""
    path = Path(lease.lock_file)
    deadline = time.monotonic() + LEASE + WAIT
    before = _state(path)
    while time.monotonic() < deadline and _state(path) == before:
        with contextlib.suppress(Timeout):
            lease.acquire(timeout=WAIT)
            return True
    return False


def _state(path: Path) -> tuple[float, int] | None:
    """Time of the last change and inode of a lock; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime, found.st_ino


def _never_written(path: Path) -> bool:
    """Whether a lock is empty: its process was killed, or the disk was full, between making the file and writing into it.

    filelock keeps empty locks for ever, for the sake of its own older versions, and takes over damaged ones that do not
    change. So a character is put into an empty one. A holder that comes back to life writes over it.
    """
    # Not made anew where it has just gone.
    with contextlib.suppress(OSError), open(path, "r+b") as file:
        if not file.read(1):
            file.write(b"?")
            return True
    return False


def _noted(path: Path) -> dict[str, Any]:
    """The note beside a lock; empty while there is none."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(Path(f"{path}.note").read_text())
    return {}


def _in_passing(path: Path) -> bool:
    """Whether a lock is held for a moment: by a shard that starts, which writes no note, or for merging."""
    note = _noted(path)
    return not note or bool(note.get("passing"))


def _sentence(path: Path) -> str:
    marker, note = _marker(path), _noted(path)
    share = _SHARE.fullmatch(path.name)
    who = f"shard {share[1]}/{share[2]}" if share else "another run"
    since = f", since {note['since']}" if "since" in note else ""
    by = f" by {note['by']}" if "by" in note else ""
    host = marker.get("host", "?").partition("?")[0]
    return (
        f"{path.parent} is being written by {who} (process {marker.get('pid', 'unknown')} on {host or 'this machine'}{by}"
        f"{since}); wait until it is done, stop it, or give another --out."
    )

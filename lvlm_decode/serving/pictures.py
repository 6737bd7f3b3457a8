"""The picture behind an address in a request: data in the request itself, a file, or something on the network."""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LvlmDecodeError
from .refusals import Refused

#: Bytes of one picture, its pixels, seconds to fetch it, and how often an address may send us on.
MOST_BYTES, MOST_PIXELS, MOST_SECONDS, MOST_HOPS = 20_000_000, 50_000_000, 10.0, 3
#: Decoders that a client's bytes get to.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


@dataclass(frozen=True)
class Pictures:
    """Where pictures may come from, beside the request itself.

    Args:
        fetch: addresses on the network are fetched.
        private: also from addresses that are not public: this machine, a local network.
        folder: files below this folder may be named.
    """

    fetch: bool = False
    private: bool = False
    folder: Path | None = None

    def open(self, address: str) -> Any:
        """The RGB PIL image.

        Raises:
            Refused: 400, in one sentence that says what is wrong with the address or the picture, or what is not allowed.
        """
        kind = address.partition(":")[0].lower()
        if kind == "data":
            return _picture(_inline(address))
        if kind == "file":
            return _picture(self._file(address))
        if kind in ("http", "https"):
            if not self.fetch:
                raise _refused("pictures are not fetched from the network here; send them as data:image/png;base64,...")
            return _picture(self._fetched(address))
        raise _refused(
            f"the address begins with {address[:20]!r}; expected data:image/...;base64, or an allowed address."
        )

    def _file(self, address: str) -> bytes:
        if self.folder is None:
            raise _refused("files of the server are not read here; send pictures as data:image/png;base64,...")
        parts = urllib.parse.urlsplit(address)
        inside = self.folder.resolve()
        path = (inside / urllib.parse.unquote(parts.path).lstrip("/")).resolve()
        if parts.netloc not in ("", "localhost") or not path.is_relative_to(inside) or not path.is_file():
            raise _refused("there is no such file below the folder whose files may be named; write file:///NAME.")
        if path.stat().st_size > MOST_BYTES:
            raise _refused(_TOO_LARGE)
        return path.read_bytes()

    def _fetched(self, address: str) -> bytes:
        deadline = time.monotonic() + MOST_SECONDS
        for _ in range(MOST_HOPS + 1):
            try:
                found, moved = self._get(address, deadline)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _refused(f"the picture could not be fetched ({type(error).__name__}).") from error
            if moved is None:
                return found
            address = urllib.parse.urljoin(address, moved)
        raise _refused(f"the address sent us on more than {MOST_HOPS} times.")

    def _get(self, address: str, deadline: float) -> tuple[bytes, str | None]:
        """What an address holds, or where it sends us."""
        parts = urllib.parse.urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise _refused("the address is none of http or https.")
        secure = parts.scheme == "https"
        place = (parts.hostname, parts.port or (443 if secure else 80))
        connection = _Pinned(*place, self._allowed(*place), deadline, secure)
        # A server that sends a byte now and then would never run into the timeout of a single wait.
        timer = threading.Timer(max(deadline - time.monotonic(), 0), connection.cut)
        timer.start()
        try:
            target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            connection.request("GET", target, headers={"User-Agent": "lvlm-decode", "Accept": "image/*"})
            # Closed by itself: an answer without a length keeps the socket from the connection.
            with connection.getresponse() as answer:
                if answer.status in (301, 302, 303, 307, 308) and (moved := answer.getheader("Location")):
                    return b"", moved
                if answer.status != 200:
                    raise _refused(f"the picture could not be fetched (status {answer.status}).")
                found = bytearray()
                while piece := answer.read1(65536):
                    found += piece
                    if len(found) > MOST_BYTES:
                        raise _refused(_TOO_LARGE)
                return bytes(found), None
        finally:
            timer.cancel()
            connection.close()

    def _allowed(self, host: str, port: int) -> str:
        """The address that ``host`` stands for now; every further look-up might give another, so that one is used."""
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        for one in found:
            number = ipaddress.ip_address(one.partition("%")[0])
            number = getattr(number, "ipv4_mapped", None) or number
            if not self.private and (not number.is_global or number.is_multicast):
                raise _refused("the address is not public, and pictures are fetched from public ones only.")
        return found[0]


class _Pinned(http.client.HTTPConnection):
    """A connection to an address that was checked, for a host's name."""

    def __init__(self, host: str, port: int, address: str, deadline: float, secure: bool):
        super().__init__(host, port)
        self._address, self._deadline, self._secure = address, deadline, secure
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        left = max(self._deadline - time.monotonic(), 0.001)
        self.sock = socket.create_connection((self._address, self.port), timeout=left)
        if self._secure:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
        self._socket = self.sock

    def cut(self) -> None:
        """End whatever waits on the connection."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def _inline(address: str) -> bytes:
    head, comma, data = address.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise _refused("a data address is written data:image/png;base64, and then the picture.")
    if len(data) > MOST_BYTES * 4 // 3 + 4:
        raise _refused(_TOO_LARGE)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused(f"the data of the address is no base64 ({error}).") from error


def _picture(content: bytes) -> Any:
    from PIL import Image, ImageOps

    from lvlm_decode_evals.pictures import rgb

    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures; here they are refused, in words.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise _refused(f"it has {image.width} x {image.height} pixels, and at most {MOST_PIXELS} are read.")
        # As their camera noted which way is up.
        return rgb(ImageOps.exif_transpose(image), "the picture")
    except LvlmDecodeError as error:
        raise _refused(f"{error}.") from error
    except Refused:
        raise
    # Decoders raise whatever they like.
    except Exception as error:
        raise _refused(f"it cannot be read as a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} file.") from error


_TOO_LARGE = f"it has more than {MOST_BYTES // 1_000_000} megabytes."


def _refused(why: str) -> Refused:
    return Refused(400, f"a picture of the request is refused: {why}", "messages", "invalid_image")

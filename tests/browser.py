"""A headless Chromium, driven through chromedriver's own protocol (W3C WebDriver), for tests of the pages."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def missing() -> str | None:
    """Why there is no browser here, or ``None``."""
    if shutil.which("chromedriver") is None:
        return "chromedriver is not installed (Debian packages chromium and chromium-driver)"
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        return "no Chromium is installed (Debian packages chromium and chromium-driver)"
    return None


class Browser:
    """One session; use it as a context manager."""

    def __enter__(self) -> Browser:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        port = None
        for line in self.process.stdout:
            if "started successfully on port" in line:
                port = line.rstrip(".\n").rpartition(" ")[2]
                break
        self.base = f"http://127.0.0.1:{port}/session"
        options = {"args": [*FLAGS, f"--user-data-dir={self.folder.name}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.base += "/" + self._send("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._send("", method="DELETE")
        finally:
            self.process.terminate()
            self.process.wait(10)
            self.process.stdout.close()
            self.folder.cleanup()

    def _send(self, path: str, body: Any = None, method: str = "POST") -> Any:
        data = None if method == "DELETE" else json.dumps(body or {}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.base + path, data, headers, method=method)
        # A proxy of the environment has no business between two programs of one machine.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
            return json.loads(reply.read())["value"]

    def cdp(self, command: str, **parameters: Any) -> Any:
        """A command of Chrome's own protocol."""
        return self._send("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, page: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Open a file in a window of this size and colour scheme, and wait until its script has run."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._send("/url", {"url": page.resolve().as_uri()})
        until = time.monotonic() + 20
        while self.run("return document.documentElement.dataset.ready") != "true":
            assert time.monotonic() < until, self.log()
            time.sleep(0.05)

    def run(self, script: str, *arguments: Any) -> Any:
        """What ``script``, the body of a function, returns."""
        return self._send("/execute/sync", {"script": script, "args": list(arguments)})

    def key(self, key: str) -> None:
        """Press a key where the focus is; named keys by their code point in the WebDriver standard."""
        keys = {"type": "key", "id": "keyboard", "actions": [{"type": t, "value": key} for t in ("keyDown", "keyUp")]}
        self._send("/actions", {"actions": [keys]})

    def move(self, x: float, y: float, click: bool = False) -> None:
        """Move the pointer to a place of the window, and click there."""
        actions: list[dict[str, Any]] = [{"type": "pointerMove", "x": round(x), "y": round(y), "duration": 0}]
        if click:
            actions += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._send("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": actions}]})

    def log(self) -> list[str]:
        """What the page complained about since the last call."""
        return [entry["message"] for entry in self._send("/se/log", {"type": "browser"})]

    def overflow(self) -> int:
        """By how many pixels the page is wider than its window."""
        return self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def picture(self, path: Path, whole: bool = True) -> None:
        """A screenshot."""
        shot = self.cdp("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

"""A headless Chromium, driven through the DevTools protocol: loads a page, reads it, clicks, takes pictures.

Looks for `chromium` or `chrome` (Debian: `apt-get install chromium`); what the page asks the network for is recorded.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-port=0",
)  # fmt: skip


def found() -> str | None:
    """Path of the browser, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


class Tab:
    """One page of the browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._session, self._count = socket, "", 0
        self.requests: list[str] = []  # addresses that the page asked for
        self.errors: list[str] = []  # uncaught exceptions, and what the console and the browser call errors
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; events that arrive before its answer are recorded."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]  # type: ignore[no-any-return]
            self._record(answer.get("method", ""), answer.get("params", {}))

    def _record(self, event: str, said: dict[str, Any]) -> None:
        if event in ("Network.requestWillBeSent", "Network.webSocketCreated"):
            self.requests.append(said["url"] if "url" in said else said["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            details = said["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Runtime.consoleAPICalled" and said["type"] == "error":
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in said["args"]))
        elif event == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.errors.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")

    def size(self, width: int, height: int, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def read(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def wait(self, expression: str, timeout: float = 30.0) -> Any:
        """Until an expression is true; its value. Raises TimeoutError with the text of the page."""
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(RuntimeError):  # between two documents there is none to ask
                if value := self.read(expression):
                    return value
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{expression} never held; the page says: {self.read('document.body.innerText')[:1500]}"
                )
            time.sleep(0.02)

    def click(self, text: str, within: str = "button, a, .q-item") -> None:
        """Click the first element whose first line is this text (the name of an icon may follow)."""
        first = "(e => e.innerText.trim().split('\\n')[0])"
        find = f"[...document.querySelectorAll({within!r})].find(e => e.offsetParent && {first}(e) === {text!r})"
        self.wait(f"!!{find}")
        self.read(f"{find}.click()")

    def picture(self, path: Path) -> None:
        """Save the whole page as PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def browser() -> Iterator[Tab]:
    """A fresh browser with one tab; ended with its block."""
    program = found()
    if program is None:
        raise FileNotFoundError("no chromium here (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port_file, deadline = Path(profile) / "DevToolsActivePort", time.monotonic() + 60
            while not port_file.is_file() or len(port_file.read_text().split()) < 2:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{program} did not start (exit code {process.poll()})")
                time.sleep(0.05)
            port, path = port_file.read_text().split()
            address = f"ws://127.0.0.1:{port}{path}"
            with connect(address, max_size=None, proxy=None, ping_interval=None, close_timeout=1) as socket:
                try:
                    yield Tab(socket)
                finally:
                    socket.send(json.dumps({"id": 0, "method": "Browser.close"}))
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

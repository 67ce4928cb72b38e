"""A headless Chromium, driven over a pipe by its own protocol: nothing but Debian's package.

Everything waits for a condition inside the page; nothing waits for time. It reaches this machine
alone: its background networking is off, and every other host name resolves to nothing.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

ANSWER_S = 60.0  # reached only when something hangs
FLAGS = (
    "--headless",
    "--no-sandbox",  # tests run as root in containers, and see pages of their own alone
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-pipe",
)


# It reads descriptor 3 and writes 4, whatever numbers this process has for them.
MOVE = """
import fcntl, os, sys
theirs = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for number, descriptor in zip((3, 4), theirs):
    os.dup2(descriptor, number)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One browser with one page. Close it, or use it as a context manager."""

    def __init__(self, program: str, width: int = 1440, height: int = 900) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="kvferry-browser-")
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-S", "-c", MOVE, str(theirs_in), str(theirs_out), program),
                *FLAGS,
                *(f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}"),
                "about:blank",
            ],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Debian's program is a script: it and its child end together
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number = 0
        self._received = b""
        self._session = ""
        self.console: list[str] = []
        targets = self._call("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self._call(
            "Target.attachToTarget", {"targetId": page["targetId"], "flatten": True}
        )
        self._session = attached["sessionId"]
        self._call("Page.enable")
        self._call("Runtime.enable")
        self.size(width, height)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def size(self, width: int, height: int) -> None:
        """The window's size, in pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", metrics)

    def scheme(self, value: str) -> None:
        """`light` or `dark`, as the system would say."""
        features = [
            {"name": "prefers-color-scheme", "value": value},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self._call("Emulation.setEmulatedMedia", {"features": features})

    def open(self, url: str) -> None:
        """Goes to a page."""
        failed = self._call("Page.navigate", {"url": url}).get("errorText")
        assert not failed, f"{url}: {failed}"
        self.until("document.readyState === 'complete'")

    def ask(self, expression: str) -> Any:
        """What a JavaScript expression gives; promises are awaited."""
        answer = self._call(
            "Runtime.evaluate",
            {"expression": expression, "returnByValue": True, "awaitPromise": True},
        )
        problem = answer.get("exceptionDetails")
        assert problem is None, f"{expression}: {problem}"
        return answer["result"].get("value")

    def until(self, condition: str) -> None:
        """Waits until a JavaScript condition holds, looking whenever the page draws."""
        end_s = time.monotonic() + ANSWER_S
        while not self.ask(f"Boolean({condition})"):
            assert time.monotonic() < end_s, f"never true: {condition}; console: {self.console}"
            self.ask("new Promise((then) => setTimeout(then, 20))")

    def move_to(self, selector: str) -> None:
        """Puts the mouse on the middle of an element."""
        x, y = self.ask(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self._call("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def screenshot(self, path: Path) -> bytes:
        """The whole page as a PNG file."""
        answer = self._call("Page.captureScreenshot", {"format": "png"})
        data = base64.b64decode(answer["data"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return data

    def _call(self, method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {
            "id": self._number,
            "method": method,
            "params": parameters or {},
        }
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            if answer.get("method") == "Runtime.consoleAPICalled":
                parts = answer["params"]["args"]
                self.console.append(" ".join(str(part.get("value", "")) for part in parts))
            elif answer.get("method") == "Runtime.exceptionThrown":
                self.console.append(str(answer["params"]["exceptionDetails"]))

    def _read(self) -> dict[str, Any]:
        end_s = time.monotonic() + ANSWER_S
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._in], [], [], end_s - time.monotonic())
            assert ready, "the browser does not answer"
            data = os.read(self._in, 1 << 20)
            assert data, f"the browser ended with {self._process.poll()}"
            self._received += data
        frame, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(frame)
        return message

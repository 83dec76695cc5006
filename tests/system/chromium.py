"""A headless Chromium that tests can drive, over its own debugging protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

import aiohttp
import pytest

_START_TIMEOUT_S = 60.0
_CALL_TIMEOUT_S = 60.0
_ENDPOINT = "DevTools listening on "


class Browser:
    """One tab. Skips the test where there is no Chromium.

    Args:
        width, height: of the window, pixels.
        dark: what `prefers-color-scheme` says.

    Attributes:
        problems: what the page complained of so far: uncaught exceptions, errors in the log (blocked by its own
            security policy, failed requests).
    """

    def __init__(self, width: int = 1440, height: int = 1800, *, dark: bool = False) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            pytest.skip("no Chromium on PATH")
        self.problems: list[str] = []
        self._next_id = 0
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [
                program,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--remote-debugging-port=0",
                f"--user-data-dir={self._profile.name}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._runner = asyncio.Runner()
        try:
            self._runner.run(self._connect(self._endpoint()))
            self.resize(width, height)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            self.call("Emulation.setEmulatedMedia", features=[scheme])
            for domain in ("Page", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop it, with all its processes."""
        self._runner.run(self._disconnect())
        self._stop()

    def navigate(self, url: str) -> None:
        """Go to a page, and return once it is loaded."""
        failed = self.call("Page.navigate", url=url).get("errorText")
        if failed:
            raise AssertionError(f"{url}: {failed}")
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def resize(self, width: int, height: int) -> None:
        """Another size of the window, pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for.

        Raises:
            AssertionError: it threw.
        """
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise AssertionError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def wait_for(self, condition: str, timeout_s: float = 20.0) -> None:
        """Return once a JavaScript condition holds.

        Raises:
            AssertionError: it did not within the time.
        """
        deadline = time.monotonic() + timeout_s
        script = f"new Promise((done) => {{ const look = () => ({condition}) ? done(true) : Date.now() > end "
        script += "? done(false) : setTimeout(look, 20); look(); })"
        while True:
            left_ms = max(0.0, deadline - time.monotonic()) * 1000
            try:
                holds = self.evaluate(f"(() => {{ const end = Date.now() + {left_ms}; return {script}; }})()")
            except RuntimeError:
                # The page was left while it looked; the next one is asked.
                holds = False
            if holds:
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout_s:g} s: {condition}; the page said {self.problems}")

    def click(self, selector: str) -> None:
        """A real click, in the middle of what a CSS selector finds."""
        box = self.evaluate(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)}); found.scrollIntoView("
            "{block: 'center', behavior: 'instant'}); const {x, y, width, height} = found.getBoundingClientRect(); "
            "return [x + width / 2, y + height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def fill(self, selector: str, text: str) -> None:
        """Replace a field's text, as typing would."""
        self.evaluate(
            f"(() => {{ const it = document.querySelector({json.dumps(selector)}); it.focus(); it.select(); }})()"
        )
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, control: bool = False) -> None:
        """A key, by its name in the DOM (`Enter`, `ArrowRight`, `Tab`)."""
        code = {"Enter": 13, "Tab": 9, "ArrowLeft": 37, "ArrowRight": 39}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                modifiers=2 if control else 0,
            )

    def screenshot(self, path: Path, *, whole_page: bool = True) -> None:
        """Write a PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole_page)
        path.write_bytes(base64.b64decode(answer["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A method of the debugging protocol.

        Raises:
            RuntimeError: it failed.
        """
        return self._runner.run(asyncio.wait_for(self._call(method, parameters), _CALL_TIMEOUT_S))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._next_id += 1
        await self._socket.send_json({"id": self._next_id, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._next_id:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            details = message["params"]["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            entry = message["params"]["entry"]
            self.problems.append(f"{entry['text']} {entry.get('url', '')}".strip())

    def _endpoint(self) -> str:
        """Address of the debugging protocol, which Chromium prints at its start."""
        lines: queue.Queue[str] = queue.Queue()
        # The pipe is read to its end: a full one would stop the browser.
        threading.Thread(target=lambda: [lines.put(line) for line in self._process.stderr or ()], daemon=True).start()
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            line = lines.get(timeout=max(0.01, deadline - time.monotonic()))
            if line.startswith(_ENDPOINT):
                return line.removeprefix(_ENDPOINT).strip()

    async def _connect(self, endpoint: str) -> None:
        self._session = aiohttp.ClientSession()
        base = endpoint.replace("ws://", "http://").split("/devtools/")[0]
        async with self._session.get(f"{base}/json/list") as answer:
            tabs = await answer.json()
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        self._socket = await self._session.ws_connect(address, max_msg_size=0)

    async def _disconnect(self) -> None:
        await self._socket.close()
        await self._session.close()

    def _stop(self) -> None:
        self._runner.close()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=10)
        self._profile.cleanup()

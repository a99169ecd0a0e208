"""Headless Chromium through chromedriver's own protocol: open a page, ask it, look at it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = "needs Chromium and its driver: apt-get install -y chromium chromium-driver"
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
_ALONE = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the driver is on this machine


class Browser:
    """One browser with an empty profile."""

    def __init__(self, profile: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
        self._driver = subprocess.Popen(
            [str(DRIVER), f"--port={self._port}"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        options = {"binary": BROWSER, "args": [*_FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._session = ""
        try:
            self._wait()
            self._session = "/session/" + self._ask("/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        except BaseException:
            self.close()
            raise

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, media: str = "") -> None:
        """Open a file at a size, in a color scheme, as on the screen or for ``print``."""
        self._devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._devtools("Emulation.setEmulatedMedia", media=media, features=features)
        self._ask(f"{self._session}/url", {"url": path.resolve().as_uri()})

    def ask(self, script: str) -> Any:
        """What the body of a function returns on the page."""
        return self._ask(f"{self._session}/execute/sync", {"script": script, "args": []})

    def console(self) -> list[str]:
        """Everything on the console since the last call, warnings and refused requests too."""
        return [
            f"{entry['level']}: {entry['message']}"
            for entry in self._ask(f"{self._session}/se/log", {"type": "browser"})
        ]

    def picture(self, path: Path) -> None:
        """A PNG of the whole page."""
        shot = self._devtools("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def paper(self, path: Path) -> None:
        """A PDF of the page on A4."""
        shot = self._devtools("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End the browser and its driver."""
        try:
            if self._session:
                self._ask(self._session, method="DELETE")
        finally:
            self._driver.terminate()
            self._driver.wait(10)

    def _devtools(self, command: str, **parameters: object) -> Any:
        return self._ask(f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _wait(self) -> None:
        for _ in range(200):
            try:
                if self._ask("/status")["ready"]:
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        raise RuntimeError("chromedriver does not answer")

    def _ask(self, path: str, body: object = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with _ALONE.open(request, timeout=60) as response:
                return json.loads(response.read())["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.loads(error.read())["value"]["message"]) from error

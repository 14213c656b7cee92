"""Headless Chromium for the tests of pages, by the WebDriver protocol, and its driver as a fixture."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

CHROMIUM, DRIVER = (
    next((found for name in names if (found := shutil.which(name))), None)
    for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))
)
needs_browser = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs Chromium and its chromedriver")

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # key of an element in the JSON of the WebDriver protocol


class Browser:
    """Headless Chromium by the WebDriver protocol: JSON over HTTP."""

    def __init__(self, port, profile, width):
        self._port = port
        self._session = ""
        arguments = [*ARGUMENTS, f"--user-data-dir={profile}", f"--window-size={width},900"]
        options = {"args": arguments, "binary": CHROMIUM}
        if width < 500:
            metrics = {"width": width, "height": 800, "pixelRatio": 1.0}
            options["mobileEmulation"] = {"deviceMetrics": metrics}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        self._session = "/" + self._call("POST", "/session", {"capabilities": wanted})["sessionId"]

    def _call(self, method, path, body=None):
        where = f"http://127.0.0.1:{self._port}" + (f"/session{self._session}{path}" if self._session else path)
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(where, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def open(self, address):
        self._call("POST", "/url", {"url": address})

    def run(self, script, *arguments):
        """Run a function body in the page."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector):
        return self._call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector):
        self._call("POST", f"/element/{self.find(selector)}/click", {})

    def choose_files(self, selector, *paths):
        text = "\n".join(map(str, paths))
        self._call("POST", f"/element/{self.find(selector)}/value", {"text": text})

    def texts(self, selector):
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def wait_for(self, script, *arguments):
        end = time.monotonic() + 30
        while not (value := self.run(f"return {script}", *arguments)):
            assert time.monotonic() < end, f"not true in 30 s: {script}\n{self.texts('main')}"
            time.sleep(0.05)
        return value

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def errors(self):
        """Errors of the console."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def close(self):
        self._call("DELETE", "")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The port of a chromedriver."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("driver") / "log"
    with subprocess.Popen([DRIVER, f"--port={port}", f"--log-path={log}"], stdout=subprocess.DEVNULL) as process:
        try:
            for _ in range(300):
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield port
        finally:
            process.terminate()

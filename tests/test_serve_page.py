"""The page, in a real browser: pictures are chosen and dropped, tasks are chosen, answers are read from the page."""

import base64
import io
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from tests.helpers import NANO, save_nano_task, served
from vpt.models.bank import TaskBank

CHROMIUM, DRIVER = (
    next((found for name in names if (found := shutil.which(name))), None)
    for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs Chromium and its chromedriver"),
]

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
EVIL = "<img src=x onerror=document.title='evil'>"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # what the WebDriver protocol calls an element in JSON
DROP = """
const [bytes, name] = arguments, data = new DataTransfer();
data.items.add(new File([Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0))], name, {type: "image/png"}));
for (const kind of ["dragenter", "dragover", "drop"]) {
  const event = new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true});
  document.getElementById("drop").dispatchEvent(event);
}
"""
SET_LEAST = """
const slider = document.getElementById("least");
slider.value = arguments[0];
slider.dispatchEvent(new Event("input"));
"""


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
        """What a function body returns in the page."""
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
        """What the console says of errors."""
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


@pytest.fixture(params=[1100, 390], ids=["desk", "phone"])
def browser(request, driver, tmp_path):
    opened = Browser(driver, tmp_path / "profile", request.param)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    save_nano_task(folder / "colours.safetensors", 0, ["red", EVIL, "blue"], prompt="deep", num_tokens=2)
    save_nano_task(folder / "shapes.safetensors", 1, ["round", "square"], prompt="shallow", num_tokens=3)
    save_nano_task(folder / "things.safetensors", 2, ["tree", EVIL], prompt=None, task="detection", channels=16)
    bank = TaskBank(NANO)
    for path in sorted(folder.iterdir()):
        bank.load(path)
    with served(bank, max_body_mb=0.2) as client:
        yield client


def photo(path, size=(160, 120)):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def answers(browser):
    """Of each card: the name of its picture, and its rows of label and value by task."""
    return browser.run(
        """return [...document.querySelectorAll(".card")].map((card) => [
          card.querySelector(".name").textContent,
          Object.fromEntries([...card.querySelectorAll("h2")].map((title) => [title.textContent,
            [...title.nextElementSibling.querySelectorAll("li")].map(
              (row) => [row.querySelector(".label").textContent, row.querySelector(".value").textContent])]))])"""
    )


def test_a_picture_is_dropped_two_tasks_are_chosen_and_their_answers_are_shown(browser, client, tmp_path):
    browser.open(str(client.base_url))
    browser.wait_for("document.querySelectorAll('.task').length === 3")
    assert browser.texts("#about") == ["3 tasks on vit_nano_patch8_64.vpt"]
    data = photo(tmp_path / "a.png").read_bytes()
    browser.run(DROP, base64.b64encode(data).decode(), "<b>sky</b>.png")
    browser.wait_for("document.querySelectorAll('.bars li').length === 3")
    browser.click("[value=shapes]")
    browser.wait_for("document.querySelectorAll('.bars li').length === 5")
    ((name, found),) = answers(browser)
    assert name == "<b>sky</b>.png"
    assert list(found) == ["colours", "shapes"]
    response = client.post("/predict?task=colours&task=shapes", files={"pictures": data}).json()
    for task, prediction in response["pictures"][0]["tasks"].items():
        wanted = [[entry["class"], f"{100 * entry['probability']:.1f} %"] for entry in prediction["predictions"]]
        assert found[task] == wanted
    assert EVIL in [label for label, _ in found["colours"]]
    assert browser.run("return document.title") == "vpt"
    assert browser.run("return document.querySelectorAll('img').length") == 0
    widths = browser.run("return [...document.querySelectorAll('.bar')].map((bar) => bar.offsetWidth)")
    assert max(widths) > 20  # the policy lets the script size the bars
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.errors() == []
    browser.screenshot(tmp_path / "page.png")


def test_boxes_are_drawn_and_counted_and_follow_the_least_score(browser, client, tmp_path):
    browser.open(str(client.base_url))
    browser.wait_for("document.querySelectorAll('.task').length === 3")
    browser.click("[value=colours]")
    browser.click("[value=things]")
    browser.choose_files("#files", photo(tmp_path / "b.png"))
    browser.wait_for("document.querySelector('.counts') && document.querySelector('.card canvas')")
    data = (tmp_path / "b.png").read_bytes()
    found = client.post("/predict?task=things&min_score=0.05", files={"pictures": data}).json()
    scores = [box["score"] for box in found["pictures"][0]["tasks"]["things"]["predictions"]]
    drawings, numbers = [], []
    for least in ("0.05", "0.9"):
        browser.run(SET_LEAST, least)
        ((_, shown),) = answers(browser)
        numbers.append(sum(int(number) for _, number in shown["things"]))
        drawings.append(browser.run("return document.querySelector('canvas').toDataURL()"))
    assert numbers == [len(scores), sum(score >= 0.9 for score in scores)]
    assert numbers[0] > numbers[1]
    assert drawings[0] != drawings[1]
    assert browser.run("return document.title") == "vpt"


def test_what_is_wrong_is_said_on_the_card_of_the_picture(browser, client, tmp_path):
    browser.open(str(client.base_url))
    browser.wait_for("document.querySelectorAll('.task').length === 3")
    bad, large = tmp_path / "bad.png", tmp_path / "large.png"
    bad.write_bytes(b"no picture")
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    large.write_bytes(buffer.getvalue())
    browser.choose_files("#files", bad, large, photo(tmp_path / "good.png"))
    browser.wait_for("document.querySelectorAll('.problem').length === 2 && document.querySelector('.bars li')")
    problems = sorted(browser.texts(".problem"))
    assert problems[0].startswith("bad.png: not an image")
    assert problems[1] == "large.png is larger than 0.2 MB."
    browser.click("[value=colours]")
    assert browser.texts("#message") == ["Choose a task."]


def test_a_server_that_is_gone_is_said(browser, client, tmp_path):
    browser.open(str(client.base_url))
    browser.wait_for("document.querySelectorAll('.task').length === 3")
    browser.run("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    browser.choose_files("#files", photo(tmp_path / "a.png"))
    browser.wait_for("document.querySelector('.problem')")
    assert browser.texts(".problem") == ["The server does not answer. Is it still running?"]

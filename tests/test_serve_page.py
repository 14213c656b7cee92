"""The page, in a real browser: images are chosen and dropped, tasks are chosen, answers are read from the page."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests.browser import Browser, driver, needs_browser  # noqa: F401  # a fixture
from tests.helpers import NANO, save_nano_task, served
from vpt.models.bank import TaskBank

pytestmark = [pytest.mark.slow, needs_browser]

EVIL = "<img src=x onerror=document.title='evil'>"
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


@pytest.fixture(params=[1100, 390], ids=["desk", "phone"])
def browser(request, driver, tmp_path):  # noqa: F811  # the fixture
    opened = Browser(driver, tmp_path / "profile", request.param)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    save_nano_task(folder / "colours.safetensors", 0, ["red", EVIL, "blue"], prompt="deep", num_tokens=2)
    save_nano_task(folder / "constructor.safetensors", 1, ["round", "square"], prompt="shallow", num_tokens=3)
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


def test_the_answers_of_two_tasks_for_a_dropped_image_are_shown(browser, client, tmp_path):
    browser.open(str(client.base_url))
    browser.wait_for("document.querySelectorAll('.task').length === 3")
    assert browser.texts("#about") == ["3 tasks on vit_nano_patch8_64.vpt"]
    data = photo(tmp_path / "a.png").read_bytes()
    browser.run(DROP, base64.b64encode(data).decode(), "<b>sky</b>.png")
    browser.wait_for("document.querySelectorAll('.bars li').length === 3")
    browser.click("[value=constructor]")
    browser.wait_for("document.querySelectorAll('.bars li').length === 5")
    ((name, found),) = answers(browser)
    assert name == "<b>sky</b>.png"
    assert list(found) == ["colours", "constructor"]
    response = client.post("/predict?task=colours&task=constructor", files={"images": data}).json()
    for task, prediction in response["images"][0]["tasks"].items():
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


def test_boxes_are_drawn_and_counted_and_follow_the_lowest_score(browser, client, tmp_path):
    browser.open(str(client.base_url))
    browser.wait_for("document.querySelectorAll('.task').length === 3")
    browser.click("[value=colours]")
    browser.click("[value=things]")
    browser.choose_files("#files", photo(tmp_path / "b.png"))
    browser.wait_for("document.querySelector('.counts') && document.querySelector('.card canvas')")
    data = (tmp_path / "b.png").read_bytes()
    found = client.post("/predict?task=things&min_score=0.05", files={"images": data}).json()
    scores = [box["score"] for box in found["images"][0]["tasks"]["things"]["predictions"]]
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


def test_a_problem_is_shown_on_the_card_of_the_image(browser, client, tmp_path):
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
    assert problems[0].startswith("bad.png: not a")
    assert problems[1] == "large.png is larger than 0.2 MB."
    browser.click("[value=colours]")
    assert browser.texts("#message") == ["Choose a task."]


def test_a_stopped_server_is_reported(browser, client, tmp_path):
    browser.open(str(client.base_url))
    browser.wait_for("document.querySelectorAll('.task').length === 3")
    browser.run("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    browser.choose_files("#files", photo(tmp_path / "a.png"))
    browser.wait_for("document.querySelector('.problem')")
    assert browser.texts(".problem") == ["The server does not answer. Is it still running?"]

"""The report of a comparison, opened from the disk in a real browser."""

import shutil

import pytest

import vpt.compare.__main__
from tests.browser import Browser, driver, needs_browser  # noqa: F401  # a fixture
from tests.helpers import SMALL_COMPARISON
from vpt.compare import report

pytestmark = [pytest.mark.slow, needs_browser]

EVIL = "<img src=x onerror=document.title='evil'>"
POOR = 'define.poor="tuning=linear head.init=paper optim.head_lr=1e-9"'  # disagrees with the others
CHARTS = ("parameters", "curves", "shots")
ASKED = """
const names = performance.getEntriesByType("resource").map((one) => one.name);
return names.filter((name) => !name.startsWith("data:"));
"""
CELLS = """
const rows = [...document.querySelectorAll("#table tbody tr")];
return rows.map((row) => (row.querySelector(arguments[0]) ?? row).firstChild.textContent);
"""
LAYERS = """
const layers = [...document.querySelectorAll(`#${arguments[0]} svg [data-method]`)];
return layers.map((one) => one.dataset.method);
"""
CHOOSE = """
const box = document.getElementById("setting");
box.value = arguments[0];
box.dispatchEvent(new Event("change"));
"""
PRESS = """
const target = document.querySelector(arguments[0]);
target.focus();
for (const key of arguments[1]) target.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
return [...document.querySelectorAll("#tip div")].map((line) => line.textContent);
"""
LABELS = """
const frames = [...document.querySelectorAll("#parameters .label")].map((element) => element.getBoundingClientRect());
return frames.map((frame) => [frame.left, frame.top, frame.right, frame.bottom]);
"""
COLOURS = """
const style = getComputedStyle(document.documentElement);
return Object.fromEntries(arguments[0].map((name) => [name, style.getPropertyValue(name).trim()]));
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory, photos):
    """The address and content of a report with a class name that is HTML."""
    root, output = tmp_path_factory.mktemp("evil") / "photos", tmp_path_factory.mktemp("made") / "c"
    shutil.copytree(photos, root)
    for split in root.iterdir():
        (split / "rose").rename(split / EVIL)
    words = ["methods=[linear,prompt_deep]", POOR, "seeds=2", "rates=[0.001,1]", "shots=[1,4]", f"output={output}"]
    words += ["dataset=folder", f"dataset.root={root}", "augment=none", *SMALL_COMPARISON]
    comparison = vpt.compare.__main__.compare(vpt.compare.__main__.read_options(words))
    assert any(setting["disputed"] for setting in comparison.content["settings"])
    return f"file://{output / 'report.html'}", comparison.content


@pytest.fixture(params=[1200, 390], ids=["desk", "phone"])
def browser(request, driver, tmp_path):  # noqa: F811
    opened = Browser(driver, tmp_path / "profile", request.param)
    yield opened
    opened.close()


def column(browser, number):
    """A column of the table, from the top."""
    return browser.run(CELLS, f"td:nth-child({number})")


def percents(texts):
    return [float(text.removesuffix(" %")) for text in texts]


def test_the_page_is_complete_and_loads_nothing(browser, page):
    address, content = page
    browser.open(address)
    browser.wait_for("document.querySelectorAll('canvas').length === 3")
    assert browser.errors() == []
    assert browser.run(ASKED) == []
    for name in CHARTS:
        assert browser.run(LAYERS, name) == ["0", "1", "2"]
    assert browser.run(
        "return [...document.querySelectorAll('section')].filter((one) => one.hidden).map((one) => one.id)"
    ) == ["classes-section"]
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.texts("#about")[0].startswith("classification, 3 classes (train 12, val 9, test 12)")
    rows = content["settings"][-1]["rows"]
    assert column(browser, 1) == [row["method"] for row in rows] == ["linear", "prompt_deep", "poor"]
    assert column(browser, 2) == [f"{100 * row['mean']:.1f} %" for row in rows]
    assert column(browser, 4) == [f"{row['trained']:,}" for row in rows]
    assert browser.run("return [...document.images].every((one) => one.complete && one.naturalWidth > 0)")
    assert browser.run("return document.title").startswith("vpt: folder, 3 methods")
    browser.run(CHOOSE, "0")
    disputed = content["settings"][0]["disputed"]
    assert browser.run("return document.images.length") == len(disputed) > 0
    named = [content["classes"][content["images"][index]["truth"]] for index in disputed]
    assert browser.texts(".cards strong") == [f"is {name}" for name in named]
    assert EVIL in content["classes"]
    assert browser.run("return document.querySelectorAll('script').length") == 2


def test_headings_sort_in_both_directions(browser, page):
    browser.open(page[0])
    browser.wait_for("document.querySelectorAll('#table tbody tr').length === 3")
    heading = "#table th:nth-child(4) button"
    browser.click(heading)
    trained = [int(text.replace(",", "")) for text in column(browser, 4)]
    assert trained == sorted(trained)
    assert browser.run("return document.activeElement.textContent") == "trained parameters"
    browser.click(heading)
    assert [int(text.replace(",", "")) for text in column(browser, 4)] == sorted(trained, reverse=True)
    assert browser.run("return document.querySelector('#table [aria-sort]').getAttribute('aria-sort')") == "descending"
    browser.click("#table th:nth-child(2) button")
    tops = percents(column(browser, 2))
    assert tops == sorted(tops, reverse=True)  # the best first


def test_settings_and_methods_are_selected(browser, page):
    address, content = page
    browser.open(address)
    browser.wait_for("document.querySelectorAll('canvas').length === 3")
    for index in (0, 1):
        browser.run(CHOOSE, str(index))
        assert percents(column(browser, 2)) == [
            round(100 * row["mean"], 1) for row in content["settings"][index]["rows"]
        ]
        chosen = [
            [f"{100 * one['val']:.1f} %" for one in row["search"] if one["rate"] == row["rate"]]
            for row in content["settings"][index]["rows"]
        ]
        shown = browser.run(
            "return [...document.querySelectorAll('#search .chosen')].map((cell) => [cell.firstChild.textContent])"
        )
        assert shown == chosen
    browser.click("#legend button:nth-child(2)")
    assert browser.run("return document.querySelectorAll('canvas').length") == 2
    for name in CHARTS:
        assert browser.run(LAYERS, name) == ["0", "2"]
    browser.click("#legend button:nth-child(2)")
    assert browser.run("return document.querySelectorAll('canvas').length") == 3


def test_the_keyboard_reads_values_of_charts(browser, page):
    address, content = page
    browser.open(address)
    browser.wait_for("document.querySelectorAll('canvas').length === 3")
    linear, deep, _ = content["settings"][-1]["rows"]
    lines = browser.run(PRESS, "#parameters svg", ["ArrowRight"])
    assert (lines[0], lines[1], lines[-1]) == (
        "linear",
        f"test top1 {100 * linear['mean']:.1f} %",
        f"{linear['trained']:,} trained parameters",
    )
    lines = browser.run(PRESS, "#curves svg", ["ArrowRight", "ArrowRight", "ArrowDown"])
    assert lines == ["prompt_deep", "epoch 2", f"val top1 {100 * deep['curve'][1]:.1f} %"]
    counts = {(target, predicted): count for target, predicted, count in linear["confusion"]}
    lines = browser.run(PRESS, "canvas", ["ArrowRight", "ArrowRight"])
    names = content["classes"]
    assert lines[:2] == [f"is {names[0]}", f"linear predicts {names[1]}"]
    assert lines[2].startswith(f"{counts.get((0, 1), 0)} of 4")
    browser.run(PRESS, "canvas", ["Escape"])
    assert browser.run("return document.getElementById('tip').hidden")


def test_labels_of_many_methods_do_not_overlap(browser, page, tmp_path):
    content = dict(page[1])
    names = [f"method_{number}" for number in range(12)]
    row = content["settings"][-1]["rows"][1]
    rows = [
        {**row, "method": name, "trained": 9000 + 300 * (at % 4), "mean": 0.6 + 0.004 * at, "min": 0.55, "max": 0.66}
        for at, name in enumerate(names)
    ]
    content["methods"] = [{**content["methods"][0], "name": name} for name in names]
    content["settings"] = [{**content["settings"][-1], "rows": rows}]
    (tmp_path / "report.html").write_text(report.to_html(content))
    browser.open(f"file://{tmp_path / 'report.html'}")
    browser.wait_for("document.querySelectorAll('canvas').length === 12")
    boxes = browser.run(LABELS)
    assert len(boxes) == 12
    for index, one in enumerate(boxes):
        for other in boxes[:index]:
            wide, high = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
            assert min(wide, high) < 3
    assert browser.errors() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_have_enough_contrast(browser, page, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser._call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": media})
    browser.open(page[0])
    colours = browser.run(
        COLOURS, ["--card", "--paper", "--ink", "--soft", "--wrong", *(f"--m{index}" for index in range(8))]
    )
    card, paper = colours.pop("--card"), colours.pop("--paper")
    for name, colour in colours.items():
        least = 3 if name.startswith("--m") else 4.5  # of WCAG 2.2, for marks and for text
        assert min(contrast(colour, card), contrast(colour, paper)) >= least, name


def contrast(one, other):
    """The contrast of two colours as WCAG defines it, 1 to 21."""
    light = sorted((luminance(one), luminance(other)))
    return (light[1] + 0.05) / (light[0] + 0.05)


def luminance(colour):
    digits = colour.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

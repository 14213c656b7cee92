"""Checks of the documentation: navigation, links, commands, the files that it names, and the size of the README."""

import re
import runpy
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml

import vpt
from vpt.config.command_line import check_command_line, refuse_unread
from vpt.config.schema import schema_options

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)  # of the README
TEXTS = {path.relative_to(ROOT): path.read_text() for path in [*PAGES, ROOT / "README.md", ROOT / "CHANGELOG.md"]}


def nav_pages(entries):
    for entry in entries:
        for target in entry.values() if isinstance(entry, dict) else [entry]:
            yield from nav_pages(target) if isinstance(target, list) else [target]


def found(pattern):
    return sorted({(str(path), match) for path, text in TEXTS.items() for match in re.findall(pattern, text)})


def test_every_page_is_in_the_navigation_once():
    assert sorted(nav_pages(SITE["nav"])) == [str(page.relative_to(DOCS)) for page in PAGES]


def test_links_lead_to_files():
    links = found(r"\]\((?!https?:)([^)#\s]+)")
    assert len(links) > 50
    assert [link for link in links if not (ROOT / link[0]).parent.joinpath(link[1]).exists()] == []


def test_every_command_exists():
    commands = found(r"python -m vpt\.([a-z_]+)")
    assert len({name for _, name in commands}) == 11
    assert [command for command in commands if not (ROOT / "vpt" / command[1] / "__main__.py").exists()] == []


def test_every_train_command_is_accepted():
    lines = found(r"(?m)^python -m vpt\.train ([^#\n]+)")
    commands = {line.replace("[CHOICE]", "").strip() for _, line in lines}
    assert len(commands) > 5
    for command in commands:
        refuse_unread(check_command_line(command.split()))


def test_files_that_are_named_exist():
    files = found(r"`((?:vpt|tests|scripts|conf|docs)/[\w/]+(?:\.py|\.yaml|/))`")
    assert [file for file in files if not (ROOT / file[1]).exists()] == []
    assert [test for test in found(r"`(?:tests/)?(test_\w+\.py)`") if not (ROOT / "tests" / test[1]).exists()] == []


def test_api_pages_cover_modules_that_exist_and_every_public_name():
    modules = found(r"(?m)^::: (vpt[\w.]+)")
    assert [one for one in modules if not (ROOT / one[1].replace(".", "/")).with_suffix(".py").exists()] == []
    index = (DOCS / "api" / "index.md").read_text()
    assert [name for name in vpt.__all__ if f"`vpt.{name}`" not in index] == []


def test_the_first_two_blocks_of_the_readme_are_one_line_each_that_sets_up_and_runs():
    (_, train), (_, test) = BLOCKS[:2]
    for command in (train, test):
        assert command.count("\n") == 1
        assert command.startswith("python3 -m venv .venv && ")
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
    assert train.endswith(".venv/bin/python -m vpt.train +experiment=quickstart\n")
    assert test.endswith(".venv/bin/python -m pytest\n")


def test_the_page_of_keys_has_every_key_with_its_meaning():
    (hook,) = SITE["hooks"]
    rows = dict(re.findall(r"(?m)^\| `([\w.]+)` \| `[^`]+` \| (.+) \|$", runpy.run_path(ROOT / hook)["key_tables"]()))
    assert set(rows) == {key for key, entry in schema_options() if not is_dataclass(entry.type)}
    assert rows["prompt.rank"].endswith("; with prompt.form=bilinear")
    assert [key for key, entry in schema_options() if key in rows and not entry.metadata.get("about")] == []
    assert (DOCS / "keys.md").read_text().count("<!-- tables of keys -->") == 1


def test_the_readme_is_short():
    lines = README.splitlines()
    setup = {command.strip() for _, command in BLOCKS[:2]}
    assert len(lines) < 150
    assert [line for line in lines if len(line) > 120 and line not in setup] == []


def test_choices_in_the_readme_are_accepted():
    choices = re.findall(r"`((?:(?:prompt|optim|augment|train|backbone)[.\w]*=[\w.:]+ ?)+)`", README)
    assert len(choices) >= 5
    for choice in choices:
        refuse_unread(check_command_line(choice.split()))


def test_the_readme_names_six_files_to_read_first():
    (paragraph,) = re.findall(r"^Read these files first: (.*?)\n\n", README, re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"\]\(vpt/[\w/]+\.py\)", paragraph)) == 6


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_loads_nothing_from_the_network(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "-q", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    pages = [path.read_text() for path in tmp_path.rglob("*.html")]
    assert len(pages) > len(PAGES)
    loaded = re.compile(r"""<(?:script|img|iframe)[^>]*src=["']?(?:https?:)?//|<link[^>]*href=["']?(?:https?:)?//""")
    assert [match for page in pages for match in loaded.findall(page)] == []

"""Checks of the documentation: navigation, links, commands and the files that it names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import vpt
from vpt.config.command_line import check_command_line

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
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
        check_command_line(command.split())


def test_files_that_are_named_exist():
    files = found(r"`((?:vpt|tests|scripts|conf|docs)/[\w/]+(?:\.py|\.yaml|/))`")
    assert [file for file in files if not (ROOT / file[1]).exists()] == []
    assert [test for test in found(r"`(?:tests/)?(test_\w+\.py)`") if not (ROOT / "tests" / test[1]).exists()] == []


def test_api_pages_cover_modules_that_exist_and_every_public_name():
    modules = found(r"(?m)^::: (vpt[\w.]+)")
    assert [one for one in modules if not (ROOT / one[1].replace(".", "/")).with_suffix(".py").exists()] == []
    index = (DOCS / "api" / "index.md").read_text()
    assert [name for name in vpt.__all__ if f"`vpt.{name}`" not in index] == []


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_loads_nothing_from_the_network(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "-q", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    pages = [path.read_text() for path in tmp_path.rglob("*.html")]
    assert len(pages) > len(PAGES)
    loaded = re.compile(r"""<(?:script|img|iframe)[^>]*src=["']?(?:https?:)?//|<link[^>]*href=["']?(?:https?:)?//""")
    assert [match for page in pages for match in loaded.findall(page)] == []

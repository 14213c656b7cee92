"""Checks of the README: its size, its two commands, its configuration keys and its files."""

import re
import subprocess
from pathlib import Path

import pytest

from vpt.config.command_line import check_command_line

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_the_first_two_blocks_are_one_line_each_that_sets_up_and_runs():
    (_, train), (_, test) = BLOCKS[:2]
    for command in (train, test):
        assert command.count("\n") == 1
        assert command.startswith("python3 -m venv .venv && ")
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
    assert train.endswith(".venv/bin/python -m vpt.train +experiment=quickstart\n")
    assert test.endswith(".venv/bin/python -m pytest\n")


def test_it_is_short():
    lines = TEXT.splitlines()
    setup = {command.strip() for _, command in BLOCKS[:2]}
    assert len(lines) < 150
    assert [line for line in lines if len(line) > 120 and line not in setup] == []


def train_commands():
    lines = [line for language, block in BLOCKS[2:] if language == "bash" for line in block.splitlines()]
    return [line.split("#")[0].split()[3:] for line in lines if line.startswith("python -m vpt.train")]


@pytest.mark.parametrize("arguments", train_commands(), ids=" ".join)
def test_every_train_command_is_accepted(arguments):
    check_command_line(arguments)


def test_choices_in_the_text_are_accepted():
    choices = re.findall(r"`((?:(?:prompt|optim|augment|train|backbone)[.\w]*=[\w.:]+ ?)+)`", TEXT)
    assert len(choices) >= 5
    for choice in choices:
        check_command_line(choice.split())


def test_the_files_to_read_first_are_six():
    (paragraph,) = re.findall(r"^Read these files first: (.*?)\n\n", TEXT, re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"\]\(vpt/[\w/]+\.py\)", paragraph)) == 6


def test_links_lead_to_files():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", TEXT):
        assert (ROOT / link).exists(), link

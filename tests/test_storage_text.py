"""Text of strangers in terminals and in CSV files."""

import csv
import io

import pytest

from vpt.storage.text import plain_cell, printable, to_csv

FORMULAS = ["=1+1", "+1", "-2+3", "@SUM(1)", "\t=1", "\r=1", "'=1", "''-1"]
HARMLESS = ["cat", "'quoted'", "a=b", "", "a\r\nb", 'say "hi", twice', "Größe", "é-1", " =1"]


def read(content):
    return [*csv.reader(io.StringIO(content.decode(), newline=""))]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_text_that_begins_like_a_formula_is_escaped_as_cell_and_as_column_and_read_back(text):
    for row in read(to_csv([text], [[text]])):
        assert row == [f"'{text}"]
        assert plain_cell(row[0]) == text


@pytest.mark.parametrize("text", HARMLESS)
def test_other_texts_are_written_and_read_as_they_are(text):
    ((_, cell),) = read(to_csv(["a", "b"], [["x", text]]))[1:]
    assert cell == plain_cell(cell) == text


def test_numbers_stay_numbers_and_none_is_empty():
    assert to_csv(["a", "b", "c"], [[-1, -0.25, None]], digits=3) == b"a,b,c\n-1,-0.250,\n"
    assert to_csv(["a"], [[-1e-9], [True]]) == b"a\n-1e-09\nTrue\n"


def test_control_characters_reach_neither_a_terminal_nor_a_file():
    evil = "\x1b[31mred\x07\x9b\x7f\ud800"
    assert to_csv(["a"], [[evil]]) == b"a\n\\x1b[31mred\\x07\\x9b\\x7f\\ud800\n"
    assert printable(f"{evil}\u202e\n") == r"\x1b[31mred\x07\x9b\x7f\ud800\u202e\n"

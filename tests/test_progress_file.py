"""The journal of a command that can be typed again."""

import json
import multiprocessing
import os

import pytest

from vpt.predict.progress_file import Entry, Journal, stamp_of
from vpt.storage.lock import LockedError

COMMAND = {"vpt": "1", "top_k": 5, "classes": None}
BATCHES = [
    [
        Entry("a/ü,\n.jpg", (1200, 5), {"pets": [[1, 0.1], [0, 1e-9]]}),
        Entry("b.jpg", (7, 6), None, "b.jpg: no picture"),
    ],
    [Entry("gone.jpg", None, None, "gone.jpg: no such file"), Entry("c\udcff.jpg", (3, 2**62), {"pets": []})],
]


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "new" / "out.csv.partial", COMMAND)
    assert list(journal.entries()) == []
    for batch in BATCHES:
        journal.add(batch)
    journal.close()
    return journal


def read(journal, command=COMMAND):
    return list(Journal(journal.path, command).entries())


def test_what_was_added_is_read_again(journal):
    assert read(journal) == BATCHES[0] + BATCHES[1]


def test_each_batch_is_in_the_file_before_the_next_is_added(tmp_path):
    journal = Journal(tmp_path / "j", COMMAND)
    list(journal.entries())
    for number, batch in enumerate(BATCHES, 1):
        journal.add(batch)
        assert len(read(journal)) == 2 * number
    journal.close()


def test_nothing_is_made_before_the_first_batch_and_nothing_is_left_at_the_end(tmp_path):
    journal = Journal(tmp_path / "new" / "j", COMMAND)
    list(journal.entries())
    journal.remove()
    assert list(tmp_path.iterdir()) == []
    journal.add(BATCHES[0])
    journal.remove()
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_cut_at_any_byte_gives_its_whole_batches_and_goes_on_as_if_it_had_not_been_cut(journal):
    whole = journal.path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 3
    for length in range(len(whole) + 1):
        journal.path.write_bytes(whole[:length])
        again = Journal(journal.path, COMMAND)
        num_batches = max(0, sum(end <= length for end in ends) - 1)
        assert list(again.entries()) == [entry for batch in BATCHES[:num_batches] for entry in batch]
        for batch in BATCHES[num_batches:]:
            again.add(batch)
        again.close()
        assert journal.path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"\0\0\0\n", b"[[1, 2]]\n", b'[["a.jpg", [1], null, null]]\n', b"7\n", b"\xff\n"])
def test_from_a_broken_line_on_nothing_counts(journal, line):
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(lines[0] + lines[1] + line + lines[2])
    again = Journal(journal.path, COMMAND)
    assert list(again.entries()) == BATCHES[0]
    again.add(BATCHES[1])
    again.close()
    assert journal.path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"top_k": 3},
            r"out\.csv\.partial: .*another command has done so far \(top_k was 5, now 3\); .* delete the fil",
        ),
        ({"classes": "cat"}, r"\(classes was None, now cat\)"),
        ({"task b": "77"}, r"\(task b was None, now 77\)"),
    ],
)
def test_the_journal_of_another_command_is_refused_and_stays(journal, change, message):
    before = journal.path.read_bytes()
    with pytest.raises(ValueError, match=message):
        read(journal, {**COMMAND, **change})
    with pytest.raises(ValueError, match="top_k was 5, now None"):
        read(journal, {key: value for key, value in COMMAND.items() if key != "top_k"})
    assert journal.path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"my own notes",
        b"my own notes\n",
        b"[]\n",
        b"{}\n",
        json.dumps({"vpt_journal": 99, "command": {}}).encode() + b"\n",
    ],
)
def test_a_file_that_is_no_journal_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "out.csv.partial"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"out\.csv\.partial: no journal of this version of vpt; delete it, or name"):
        list(Journal(path, COMMAND).entries())
    assert path.read_bytes() == content


def test_a_stamp_changes_with_size_and_time_of_a_file(tmp_path):
    path = tmp_path / "a.jpg"
    assert stamp_of(path) is None
    path.write_bytes(b"1")
    os.utime(path, ns=(5, 5))
    assert stamp_of(path) == (1, 5)
    os.utime(path, ns=(5, 6))
    assert stamp_of(path) == (1, 6)


def test_two_commands_at_once_do_not_write_to_one_file(tmp_path):
    first = Journal(tmp_path / "out.csv.partial", COMMAND)
    list(first.entries())
    first.add(BATCHES[0])

    def second():
        with pytest.raises(LockedError, match=r"out\.csv\.partial is in use by process \d+ on "):
            Journal(tmp_path / "out.csv.partial", COMMAND).add(BATCHES[1])

    process = multiprocessing.get_context("fork").Process(target=second)
    process.start()
    process.join()
    assert process.exitcode == 0
    first.add(BATCHES[1])
    first.close()
    assert read(first) == BATCHES[0] + BATCHES[1]
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv.partial"]

"""The progress file of a command that resumes when it is typed again."""

import multiprocessing
import os

import pytest

from vpt.predict.progress_file import Entry, ProgressFile, stamp_of
from vpt.storage.lock import LockedError

COMMAND = {"vpt": "1", "top_k": 5, "classes": None}
BATCHES = [
    [
        Entry("a/ü,\n.jpg", (1200, 5), {"pets": [[1, 0.1], [0, 1e-9]]}),
        Entry("b.jpg", (7, 6), None, "b.jpg: not an image"),
    ],
    [Entry("gone.jpg", None, None, "gone.jpg: no such file"), Entry("c\udcff.jpg", (3, 2**62), {"pets": []})],
]


@pytest.fixture
def progress(tmp_path):
    progress = ProgressFile(tmp_path / "new" / "out.csv.partial", COMMAND)
    assert list(progress.entries()) == []
    for batch in BATCHES:
        progress.add(batch)
    progress.close()
    return progress


def read(progress, command=COMMAND):
    return list(ProgressFile(progress.path, command).entries())


def test_entries_are_read_as_they_were_added(progress):
    assert read(progress) == BATCHES[0] + BATCHES[1]


def test_the_file_is_created_with_the_first_batch_holds_each_before_the_next_and_is_removed_at_the_end(tmp_path):
    progress = ProgressFile(tmp_path / "new" / "j", COMMAND)
    list(progress.entries())
    progress.remove()
    assert list(tmp_path.iterdir()) == []
    for number, batch in enumerate(BATCHES, 1):
        progress.add(batch)
        assert len(read(progress)) == 2 * number
    progress.remove()
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_cut_at_any_byte_resumes_behind_its_last_whole_batch(progress):
    whole = progress.path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 3
    for length in range(len(whole) + 1):
        progress.path.write_bytes(whole[:length])
        again = ProgressFile(progress.path, COMMAND)
        num_batches = max(0, sum(end <= length for end in ends) - 1)
        assert list(again.entries()) == [entry for batch in BATCHES[:num_batches] for entry in batch]
        for batch in BATCHES[num_batches:]:
            again.add(batch)
        again.close()
        assert progress.path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"\0\0\0\n", b"[[1, 2]]\n", b'[["a.jpg", [1], null, null]]\n', b"7\n", b"\xff\n"])
def test_a_broken_line_and_all_behind_it_are_ignored(progress, line):
    lines = progress.path.read_bytes().splitlines(keepends=True)
    progress.path.write_bytes(lines[0] + lines[1] + line + lines[2])
    again = ProgressFile(progress.path, COMMAND)
    assert list(again.entries()) == BATCHES[0]
    again.add(BATCHES[1])
    again.close()
    assert progress.path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_k": 3}, r"out\.csv\.partial: .*\(top_k was 5, now 3\).*delete"),
        ({"classes": "cat"}, r"\(classes was None, now cat\)"),
        ({"task b": "77"}, r"\(task b was None, now 77\)"),
        ({"top_k": None}, r"\(top_k was 5, now None\)"),
    ],
)
def test_a_file_of_another_command_is_refused_and_stays(progress, change, words):
    before = progress.path.read_bytes()
    with pytest.raises(ValueError, match=words):
        read(progress, {key: value for key, value in (COMMAND | change).items() if value is not None})
    assert progress.path.read_bytes() == before


@pytest.mark.parametrize("content", ["notes", "notes\n", "[]\n", "{}\n", '{"vpt_progress": 99, "command": {}}\n'])
def test_a_file_of_another_format_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "out.csv.partial"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"out\.csv\.partial: not a progress file"):
        list(ProgressFile(path, COMMAND).entries())
    assert path.read_text() == content


def test_a_stamp_changes_with_size_and_time_of_a_file(tmp_path):
    path = tmp_path / "a.jpg"
    assert stamp_of(path) is None
    path.write_bytes(b"1")
    for time in (5, 6):
        os.utime(path, ns=(5, time))
        assert stamp_of(path) == (1, time)


def test_two_commands_at_once_do_not_write_to_one_file(tmp_path):
    first = ProgressFile(tmp_path / "out.csv.partial", COMMAND)
    list(first.entries())
    first.add(BATCHES[0])

    def second():
        with pytest.raises(LockedError, match=r"out\.csv\.partial is in use by process \d+ on "):
            ProgressFile(tmp_path / "out.csv.partial", COMMAND).add(BATCHES[1])

    process = multiprocessing.get_context("fork").Process(target=second)
    process.start()
    process.join()
    assert process.exitcode == 0
    first.add(BATCHES[1])
    first.close()
    assert read(first) == BATCHES[0] + BATCHES[1]
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv.partial"]

import csv
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import make_folder, touch
from vpt.data.readers.tables import read_csv, read_list
from vpt.storage.text import to_csv

# List files


@pytest.fixture
def vtab(tmp_path):
    make_folder(tmp_path, {"images/x": 8})
    (tmp_path / "train800.txt").write_text("images/x/0.png 0\nimages/x/1.png 1\n\nimages/x/2.png 2\n")
    (tmp_path / "val200.txt").write_text("images/x/3.png 2\n")
    (tmp_path / "test.txt").write_text("images/x/4.png 1\nimages/x/5.png 0")
    return tmp_path


def test_list_files_are_read_as_they_are(vtab):
    splits = read_list(vtab)
    targets = {split: samples.targets for split, samples in splits.items()}
    assert targets == {"train": (0, 1, 2), "val": (2,), "test": (1, 0)}
    assert splits["test"].classes == ("0", "1", "2")
    assert splits["test"].names == ("images/x/4.png", "images/x/5.png")
    assert splits["test"].read(1).getpixel((0, 0)) == (5, 5, 5)


def test_names_may_have_spaces_and_train_may_lack_a_class_of_other_lists(vtab):
    touch(vtab / "a b.png")
    (vtab / "test.txt").write_text("a b.png 3\r\n")
    splits = read_list(vtab)
    assert (splits["test"].names, splits["train"].classes) == (("a b.png",), ("0", "1", "2", "3"))


def test_missing_lists_are_split_off_train(vtab):
    (vtab / "all.txt").write_text("".join(f"images/x/{i}.png {i % 2}\n" for i in range(8)))
    for (val, test), targets in (
        ((0.25, 0.25), {"train": [0, 0, 1, 1], "val": [0, 1], "test": [0, 1]}),
        ((0.5, 0), {"train": [0, 0, 1, 1], "val": [0, 0, 1, 1]}),
    ):
        splits = read_list(vtab, "all.txt", None, None, val_fraction=val, test_fraction=test)
        assert {split: sorted(samples.targets) for split, samples in splits.items()} == targets


@pytest.mark.parametrize(
    ("name", "lines", "words"),
    [
        *(
            ("train800", f"images/x/0.png 0\nimages/x/1.png {second}\nimages/x/2.png {third}\n", words)
            for second, third, words in (
                (2, 4, "line 3: label 4, but no image of any list has label 3"),
                (1, 999_999_999, "line 3: label 999999999, but"),
                (0, 0, "one class only, '0'"),
                (1, 10**9, "line 3: .* is not `relative/path label`"),
                (1, "9" * 5000, "line 3: .* is not `relative/path label`"),
            )
        ),
        *(
            ("test", f"images/x/5.png 0\n{line}\n", f"line 2: {words}")
            for line, words in (
                ("images/x/6.png 4", "label 4, but no image of any list has label 3"),
                ("images/x/6.png -1", ".* is not `relative/path label`"),
                ("images/x/6.png one", ".* is not `relative/path label`"),
                ("images/x/6.png 1.0", ".* is not `relative/path label`"),
                ("images/x/6.png", ".* is not `relative/path label`"),
                ("images/x/9.png 1", "no such file .*9.png"),
                ("../secret.png 1", ".*secret.png is outside of root="),
                ("/etc/hostname 1", "/etc/hostname is outside"),
                ("images/../images/x/5.png 1", ".* is a duplicate, first at .*test.txt, line 1"),
                ("images/x/0.png 0", ".* is a duplicate, first at .*train800.txt, line 1"),
            )
        ),
        ("test", "\n", "no lines"),
    ],
)
def test_a_wrong_list_is_refused_by_file_and_line(name, lines, words, vtab, monkeypatch):
    touch(vtab.parent / "secret.png")
    (vtab / f"{name}.txt").write_text(lines)
    monkeypatch.chdir(vtab)
    for root in (vtab, "."):
        with pytest.raises(ValueError, match=rf"{name}\.txt.*{words}"):
            read_list(root)
    with pytest.raises(ValueError, match=r"train1000\.txt: no such file"):
        read_list(vtab, train="train1000.txt")


# CSV


def write_csv(root: Path, text: str, encoding: str = "utf-8") -> Path:
    make_folder(root, {"p": 6})
    (root / "data.csv").write_text(text, encoding=encoding)
    return root / "data.csv"


def test_a_csv_with_splits_is_read_as_it_is(tmp_path):
    text = "label,split,path\ndog,train,p/0.png\ncat,train,p/1.png\ndog,Valid,p/2.png\ncat,test,p/3.png\n"
    splits = read_csv(write_csv(tmp_path, text))
    assert {split: samples.targets for split, samples in splits.items()} == {"train": (1, 0), "val": (1,), "test": (0,)}
    assert splits["test"].classes == ("cat", "dog")
    assert splits["test"].read(0).getpixel((0, 0)) == (3, 3, 3)


def test_cells_that_were_escaped_for_spreadsheets_are_read_as_they_were(tmp_path):
    text = to_csv(["path", "label"], [["p/0.png", "=1"], ["p/1.png", "-2"]]).decode()
    assert read_csv(write_csv(tmp_path, text), val_fraction=0)["train"].classes == ("-2", "=1")


def test_a_csv_without_splits_is_split_by_class_and_numbers_are_sorted_by_value(tmp_path):
    rows = "".join(f"p/{i}.png,{(10, 9)[i % 2]}\n" for i in range(6))
    splits = read_csv(write_csv(tmp_path, "path,label\n" + rows), val_fraction=0.3)
    counts = {split: Counter(samples.targets) for split, samples in splits.items()}
    assert counts == {split: {0: 1, 1: 1} for split in ("train", "val", "test")}
    assert splits["train"].classes == ("9", "10")


def test_a_spreadsheet_with_a_byte_order_mark_and_an_own_root_is_read(tmp_path):
    path = write_csv(tmp_path, "path,label\n0.png,Äpfel\n1.png,Birnen\n", encoding="utf-8-sig")
    assert read_csv(path, root=tmp_path / "p", val_fraction=0)["train"].classes == ("Birnen", "Äpfel")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label\np/0.png,a\n", r"no column 'path', only \['file', 'label'\]"),
        ("path;name\np/0.png;a\n", "no column 'path'"),
        ("", "no column 'path'"),
        ("path,label\n", "no train rows"),
        ("path,label\np/0.png,a\np/1.png,\n", "row 3: path 'p/1.png' and label ''"),
        ("path,label\np/0.png,a\np/9.png,a\n", "row 3: no such file .*9.png"),
        ("path,label\np/0.png,a\n../x.png,a\n", "row 3: .*x.png is outside"),
        ("path,label\np/0.png,a\np/0.png,b\n", "row 3: p/0.png is a duplicate, first at .*row 2"),
        ("path,label,split\np/0.png,a,extra\n", "row 2: split 'extra'; allowed: train, val, test"),
        ("path,label,split\np/0.png,cats,\np/2.png,dogs,\np/1.png,cat,val\n", "row 4: .*did you mean 'cats'"),
        ("path,label,split\np/0.png,a,test\n", "no train rows"),
        ("path,label\np/0.png,a\np/1.png,a\n", "one class only, 'a'"),
        ("path,label\np/0.png,Äpfel\n", "not UTF-8"),
        ('path,label\np/0.png,a\np/1.png,"b\np/2.png,a\n', "row 3: .*quotation mark"),
        ('path,label\np/0.png,a\np/1.png,"' + "x" * 200_000, "row 3: .*quotation mark"),
        (f"path,label\np/0.png,a\np/1.png,{'7' * 5000}\n", "row 3: .*5,000 characters"),
        (f"path,label\n{'x' * 100_000},a\n", "row 2: .*100,000 characters"),
        (f"path,label,split\np/0.png,a,{'x' * 100_000}\n", "row 2: split"),
        (f"{'x' * 100_000},label\n", "no column 'path'"),
        (f"path,label,split\np/0.png,a,\np/1.png,b,\np/2.png,{'c' * 1000},val\n", "row 4: class"),
    ],
)
def test_a_wrong_csv_is_refused_by_row(text, words, tmp_path):
    path = write_csv(tmp_path, text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"data\.csv.*{words}") as error:
        read_csv(path)
    assert len(str(error.value)) < 500 + 2 * len(str(path))  # long texts are cut
    with pytest.raises(ValueError, match=r"none\.csv: no such file"):
        read_csv(tmp_path / "none.csv")


def test_a_table_of_a_spreadsheet_is_read_and_what_was_guessed_is_noted(tmp_path):
    for sign, name in ((";", "semicolons"), ("\t", "tabs")):
        notes = []
        text = f"path{sign}label\np\\0.png{sign}cat\np\\1.png{sign}dog, old\np\\2.png{sign}cat\n"
        train = read_csv(write_csv(tmp_path / name, text), notes=notes, val_fraction=0)["train"]
        assert (train.names, train.classes) == (("p/0.png", "p/1.png", "p/2.png"), ("cat", "dog, old"))
        assert {note.code for note in notes} == {"delimiter", "backslashes"}


@pytest.mark.parametrize(
    ("labels", "code", "names"),
    [
        (["cat", "dog", "cat|dog"], "several_labels", ("cat|dog",)),
        (["a|b", "b|c"], "several_labels", ("a|b", "b|c")),
        (["cat", "dog", '"dog,cat"', '"salt, pepper"'], "several_labels", ("dog,cat",)),
        (["caf\u00e9", "cafe\u0301", "tea"], "composed", ("cafe\u0301",)),
    ],
)
def test_labels_that_are_read_otherwise_than_they_may_be_meant_are_noted(labels, code, names, tmp_path):
    notes = []
    text = "".join(f"p/{number}.png,{label}\n" for number, label in enumerate(labels))
    classes = read_csv(write_csv(tmp_path, "path,label\n" + text), notes=notes, val_fraction=0)["train"].classes
    assert [(note.code, note.names) for note in notes] == [(code, names)]
    assert len(classes) == len(labels) - (code == "composed")


def test_groups_of_a_table_are_a_column(tmp_path):
    rows = "".join(f"p/{i}.png,{'ab'[i % 2]},{i // 2}\n" for i in range(6))
    path = write_csv(tmp_path, "path,label,patient\n" + rows)
    splits = read_csv(path, group="patient")
    assert sorted(len(set(samples.groups)) for samples in splits.values()) == [1, 1, 1]
    assert {len(samples) for samples in splits.values()} == {2}
    with pytest.raises(ValueError, match=r"data\.csv: no column 'person'"):
        read_csv(path, group="person")
    path.write_text("path,label,patient\np/0.png,a,1\np/1.png,b,\n")
    with pytest.raises(ValueError, match=r"row 3: column 'patient' is empty"):
        read_csv(path, group="patient")


def test_a_file_whose_name_is_decomposed_on_the_disk_is_found(tmp_path):
    path = write_csv(tmp_path, "path,label\ncaf\u00e9.png,a\np/1.png,b\n")
    touch(tmp_path / "cafe\u0301.png")
    assert read_csv(path, val_fraction=0)["train"].names[0] == "cafe\u0301.png"


cells = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).map(str.strip).filter(bool)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(labels=st.sets(cells, min_size=2, max_size=8), numbers=st.booleans(), data=st.data())
def test_any_labels_of_a_csv_are_classes_one_to_one_as_train_has_them(labels, numbers, data, tmp_path_factory):
    if numbers:
        labels = data.draw(st.sets(st.integers(0, 10**6).map(str), min_size=2, max_size=8))
    root = tmp_path_factory.mktemp("table")
    of_val = data.draw(st.lists(st.sampled_from(sorted(labels)), max_size=4))
    rows = [(label, "train") for label in sorted(labels)] + [(label, "val") for label in of_val]
    with (root / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split"))
        for number, (label, split) in enumerate(rows):
            (root / f"{number}.png").touch()
            writer.writerow((f"{number}.png", label, split))
    splits = read_csv(root / "a.csv", val_fraction=0)
    are_numbers = all(label.isascii() and label.isdecimal() for label in labels)
    expected = tuple(sorted(labels, key=int if are_numbers else None))
    for split, samples in splits.items():
        assert samples.classes == expected
        assert len(set(expected)) == len(labels)
        wanted = [label for label, of_split in rows if of_split == split]
        assert [samples.classes[target] for target in samples.targets] == wanted

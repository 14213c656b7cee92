import csv
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import make_folder, touch
from vpt.data.readers.tables import read_csv, read_list

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
    for fractions, targets in (
        ((0.25, 0.25), {"train": [0, 0, 1, 1], "val": [0, 1], "test": [0, 1]}),
        ((0.5, 0), {"train": [0, 0, 1, 1], "val": [0, 0, 1, 1]}),
    ):
        splits = read_list(vtab, "all.txt", None, None, *fractions)
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


def test_a_csv_without_splits_is_split_by_class_and_numbers_are_sorted_by_value(tmp_path):
    rows = "".join(f"p/{i}.png,{(10, 9)[i % 2]}\n" for i in range(6))
    splits = read_csv(write_csv(tmp_path, "path,label\n" + rows), val_fraction=0.3)
    counts = {split: Counter(samples.targets) for split, samples in splits.items()}
    assert counts == {"train": {0: 2, 1: 2}, "val": {0: 1, 1: 1}}
    assert splits["train"].classes == ("9", "10")


def test_a_spreadsheet_with_a_byte_order_mark_and_an_own_root_is_read(tmp_path):
    path = write_csv(tmp_path, "path,label\n0.png,Äpfel\n1.png,Birnen\n", encoding="utf-8-sig")
    assert read_csv(path, root=tmp_path / "p", val_fraction=0)["train"].classes == ("Birnen", "Äpfel")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label\np/0.png,a\n", r"no column 'path', only \['file', 'label'\]"),
        ("path;label\np/0.png;a\n", "no column 'path'"),
        ("", "no column 'path'"),
        ("path,label\n", "no train rows"),
        ("path,label\np/0.png,a\np/1.png,\n", "row 3: path 'p/1.png' and label ''"),
        ("path,label\np/0.png,a\np/9.png,a\n", "row 3: no such file .*9.png"),
        ("path,label\np/0.png,a\n../x.png,a\n", "row 3: .*x.png is outside"),
        ("path,label\np/0.png,a\np/0.png,b\n", "row 3: p/0.png is a duplicate, first at .*row 2"),
        ("path,label,split\np/0.png,a,dev\n", "row 2: split 'dev'; allowed: train, val, test"),
        ("path,label,split\np/0.png,cats,\np/2.png,dogs,\np/1.png,cat,val\n", "row 4: .*did you mean 'cats'"),
        ("path,label,split\np/0.png,a,test\n", "no train rows"),
        ("path,label\np/0.png,a\np/1.png,a\n", "one class only, 'a'"),
        ("path,label\np/0.png,Äpfel\n", "not UTF-8"),
    ],
)
def test_a_wrong_csv_is_refused_by_row(text, words, tmp_path):
    path = write_csv(tmp_path, text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"data\.csv.*{words}"):
        read_csv(path)
    with pytest.raises(ValueError, match=r"none\.csv: no such file"):
        read_csv(tmp_path / "none.csv")


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

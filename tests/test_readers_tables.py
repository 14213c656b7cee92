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
    assert {split: samples.targets for split, samples in splits.items()} == {
        "train": (0, 1, 2),
        "val": (2,),
        "test": (1, 0),
    }
    assert splits["test"].classes == ("0", "1", "2")
    assert splits["test"].names == ("images/x/4.png", "images/x/5.png")
    assert splits["test"].read(1).getpixel((0, 0)) == (5, 5, 5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((0, 2, 4), r"train800.txt, line 3: label 4, but no image of any list has label 3"),
        ((0, 1, 999_999_999), r"train800.txt, line 3: label 999999999, but no image of any list has label 3"),
        ((0, 0, 0), r"train800.txt: one class only, '0'; add images"),
        ((0, 1, 10**9), r"train800.txt, line 3: .* is not `relative/path label`"),
        ((0, 1, "9" * 5000), r"train800.txt, line 3: .* is not `relative/path label`"),
    ],
)
def test_labels_that_do_not_count_from_0_are_refused(labels, message, vtab):
    lines = [f"images/x/{i}.png {label}\n" for i, label in enumerate(labels)]
    (vtab / "train800.txt").write_text("".join(lines))
    with pytest.raises(ValueError, match=message):
        read_list(vtab)


def test_train_may_lack_a_class_that_other_lists_have_and_a_label_out_of_range_names_its_line(vtab):
    (vtab / "test.txt").write_text("images/x/4.png 3\nimages/x/5.png 0")
    assert read_list(vtab)["train"].classes == ("0", "1", "2", "3")
    (vtab / "test.txt").write_text("images/x/4.png 9\nimages/x/5.png 0")
    with pytest.raises(ValueError, match=r"test.txt, line 1: label 9, but no image of any list has label 3"):
        read_list(vtab)


def test_without_a_val_list_val_is_split_off_train(vtab):
    lines = [f"images/x/{i}.png {i % 2}\n" for i in range(4)]
    (vtab / "train800val200.txt").write_text("".join(lines))
    splits = read_list(vtab, train="train800val200.txt", val=None, test=None, val_fraction=0.5)
    assert list(splits) == ["train", "val"]
    assert sorted(splits["val"].targets) == [0, 1]


def test_without_a_test_list_test_is_split_off_train(vtab):
    lines = [f"images/x/{i}.png {i % 2}\n" for i in range(8)]
    (vtab / "all.txt").write_text("".join(lines))
    splits = read_list(vtab, train="all.txt", val=None, test=None, val_fraction=0.25, test_fraction=0.25)
    assert {split: sorted(samples.targets) for split, samples in splits.items()} == {
        "train": [0, 0, 1, 1],
        "val": [0, 1],
        "test": [0, 1],
    }


def test_a_name_with_spaces_is_a_name(vtab):
    touch(vtab / "a b.png")
    (vtab / "test.txt").write_text("a b.png 1\r\n")
    assert read_list(vtab)["test"].names == ("a b.png",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/x/6.png 4", r"test.txt, line 2: label 4, but no image of any list has label 3"),
        ("images/x/6.png -1", r"test.txt, line 2: .* is not `relative/path label`"),
        ("images/x/6.png one", r"test.txt, line 2: .* is not `relative/path label`"),
        ("images/x/6.png 1.0", r"test.txt, line 2: .* is not `relative/path label`"),
        ("images/x/6.png", r"test.txt, line 2: .* is not `relative/path label`"),
        ("images/x/9.png 1", r"test.txt, line 2: no such file .*9.png"),
        ("../secret.png 1", r"test.txt, line 2: secret.png is outside of root="),
        ("/etc/hostname 1", r"test.txt, line 2: /etc/hostname is outside of root="),
        ("images/../images/x/5.png 1", r"test.txt, line 2: .* twice, first at .*test.txt, line 1"),
        ("images/x/0.png 0", r"test.txt, line 2: .* twice, first at .*train800.txt, line 1"),
    ],
)
def test_a_wrong_line_is_refused_by_file_and_number(line, message, vtab):
    touch(vtab.parent / "secret.png")
    (vtab / "test.txt").write_text(f"images/x/5.png 0\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_list(vtab)


def test_paths_that_leave_a_relative_root_are_refused(vtab, monkeypatch):
    touch(vtab.parent / "secret.png")
    (vtab / "test.txt").write_text("../secret.png 1\n")
    monkeypatch.chdir(vtab)
    with pytest.raises(ValueError, match="is outside of root="):
        read_list(".")


def test_a_missing_or_empty_list_is_refused_by_name(vtab):
    with pytest.raises(ValueError, match=r"train1000.txt: no such file"):
        read_list(vtab, train="train1000.txt")
    (vtab / "test.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"test.txt: no lines"):
        read_list(vtab)


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


def test_whole_numbers_are_sorted_by_value_and_keep_their_name(tmp_path):
    rows = "".join(f"p/{i}.png,{label}\n" for i, label in enumerate([10, 9, 2]))
    train = read_csv(write_csv(tmp_path, "path,label\n" + rows), val_fraction=0)["train"]
    assert train.classes == ("2", "9", "10")
    assert train.targets == (2, 1, 0)


def test_a_csv_without_splits_is_split_by_class(tmp_path):
    rows = "".join(f"p/{i}.png,{'ab'[i % 2]}\n" for i in range(6))
    splits = read_csv(write_csv(tmp_path, "path,label\n" + rows), val_fraction=0.3)
    assert {split: Counter(samples.targets) for split, samples in splits.items()} == {
        "train": {0: 2, 1: 2},
        "val": {0: 1, 1: 1},
    }


def test_a_spreadsheet_with_a_byte_order_mark_and_an_own_root_is_read(tmp_path):
    path = write_csv(tmp_path, "path,label\n0.png,Äpfel\n1.png,Birnen\n", encoding="utf-8-sig")
    assert read_csv(path, root=tmp_path / "p", val_fraction=0)["train"].classes == ("Birnen", "Äpfel")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\np/0.png,a\n", r"data.csv: no column 'path', only \['file', 'label'\]"),
        ("path;label\np/0.png;a\n", r"data.csv: no column 'path', only \['path;label'\]"),
        ("", r"data.csv: no column 'path', only \[\]"),
        ("path,label\n", "data.csv: no train rows"),
        ("path,label\np/0.png,a\np/1.png,\n", r"row 3: path 'p/1.png' and label ''; both"),
        ("path,label\np/0.png,a\np/9.png,a\n", r"row 3: no such file .*9.png"),
        ("path,label\np/0.png,a\n../x.png,a\n", r"row 3: x.png is outside"),
        ("path,label\np/0.png,a\np/0.png,b\n", r"row 3: p/0.png is there twice, first at .*row 2"),
        ("path,label,split\np/0.png,a,dev\n", r"row 2: split 'dev'; allowed: train, val, test"),
        (
            "path,label,split\np/0.png,cats,train\np/2.png,dogs,train\np/1.png,cat,val\n",
            r"row 4: class 'cat'.*did you mean 'cats'",
        ),
        ("path,label,split\np/0.png,a,test\n", "no train rows"),
        ("path,label\np/0.png,a\np/1.png,a\n", r"data.csv: one class only, 'a'; add images"),
    ],
)
def test_a_wrong_csv_is_refused_by_row(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_csv(write_csv(tmp_path, text))


def test_a_csv_that_is_missing_or_no_text_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"data.csv: no such file"):
        read_csv(tmp_path / "data.csv")
    with pytest.raises(ValueError, match=r"data.csv: not UTF-8 text"):
        read_csv(write_csv(tmp_path, "path,label\np/0.png,Äpfel\n", encoding="latin-1"))


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

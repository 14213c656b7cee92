import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vpt.data.classification import (
    ClassificationDataset,
    Samples,
    fruit_root,
    read_csv,
    read_folder,
    read_list,
    stratified_split,
    take_per_class,
)
from vpt.data.images import ImageError
from vpt.data.transforms import EvalTransform, Preprocessing


def touch(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (colour, colour, colour)).save(path)
    return path


def make_folder(root: Path, counts: dict[str, int]) -> Path:
    """Write pictures: `{"train/cat": 3}` makes three of them in train/cat."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            touch(root / folder / f"{i}.png", colour=i)
    return root


def names_by_split(splits: dict[str, Samples]) -> dict[str, set[str]]:
    return {split: set(samples.names) for split, samples in splits.items()}


# Folders


def test_split_folders_are_read_as_they_are(tmp_path):
    make_folder(tmp_path, {"train/dog": 2, "train/cat": 1, "val/dog": 1, "test/cat": 2})
    splits = read_folder(tmp_path)
    assert list(splits) == ["train", "val", "test"]
    assert all(samples.classes == ("cat", "dog") for samples in splits.values())
    assert splits["train"].names == ("train/cat/0.png", "train/dog/0.png", "train/dog/1.png")
    assert splits["train"].targets == (0, 1, 1)
    assert splits["val"].targets == (1,)
    assert splits["test"].targets == (0, 0)
    assert splits["train"].read(2).getpixel((0, 0)) == (1, 1, 1)


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_of_val_are_val(name, tmp_path):
    make_folder(tmp_path, {"train/a": 2, f"{name}/a": 1})
    assert read_folder(tmp_path)["val"].names == (f"{name}/a/0.png",)


def test_two_val_folders_are_refused(tmp_path):
    make_folder(tmp_path, {"train/a": 2, "valid/a": 1, "val/a": 1})
    with pytest.raises(ValueError, match="both val/ and valid/"):
        read_folder(tmp_path)


def test_class_numbers_come_from_train_even_if_val_lacks_a_class(tmp_path):
    make_folder(tmp_path, {"train/a": 1, "train/b": 1, "train/c": 1, "val/c": 1})
    assert read_folder(tmp_path)["val"].targets == (2,)


def test_a_class_that_train_does_not_have_is_refused_by_name(tmp_path):
    make_folder(tmp_path, {"train/cats": 1, "train/dogs": 1, "val/cat": 1})
    with pytest.raises(ValueError, match=r"val/cat: class 'cat' is not among .* did you mean 'cats'"):
        read_folder(tmp_path)


def test_a_dot_folder_is_not_a_class(tmp_path):
    make_folder(tmp_path, {"train/a": 2, "train/.ipynb_checkpoints": 1, "train/a/.hidden": 1})
    touch(tmp_path / "train" / "a" / "._0.png")
    splits = read_folder(tmp_path, val_fraction=0)
    assert splits["train"].classes == ("a",)
    assert splits["train"].names == ("train/a/0.png", "train/a/1.png")


def test_other_files_are_ignored_and_upper_case_pictures_are_not(tmp_path):
    make_folder(tmp_path, {"train/a": 1})
    (tmp_path / "train" / "a" / "notes.txt").write_text("x")
    (tmp_path / "train" / "labels.csv").write_text("x")
    touch(tmp_path / "train" / "a" / "B.JPG")
    assert read_folder(tmp_path, val_fraction=0)["train"].names == ("train/a/0.png", "train/a/B.JPG")


def test_an_empty_class_folder_is_refused_by_name(tmp_path):
    make_folder(tmp_path, {"train/a": 1, "train/b": 0})
    with pytest.raises(ValueError, match="train/b: no pictures"):
        read_folder(tmp_path)


@pytest.mark.parametrize("folders", [{}, {"train": 0}, {"train": 3}])
def test_no_pictures_at_all_tells_the_layout(folders, tmp_path):
    make_folder(tmp_path, folders)
    with pytest.raises(ValueError, match=r"no class folders; expected <root>/train/<class>/<picture>"):
        read_folder(tmp_path)


def test_val_without_train_tells_the_layout(tmp_path):
    make_folder(tmp_path, {"val/a": 1})
    with pytest.raises(ValueError, match=r"has val/ but no train/; expected"):
        read_folder(tmp_path)


def test_a_missing_root_is_refused_by_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"dataset.root=.*nowhere is no folder"):
        read_folder(tmp_path / "nowhere")


def test_class_folders_under_the_root_are_split_by_seed(tmp_path):
    make_folder(tmp_path, {"a": 20, "b": 2, "c": 1})
    splits = read_folder(tmp_path, val_fraction=0.25, test_fraction=0.25, seed=3)
    counts = {split: Counter(samples.targets) for split, samples in splits.items()}
    assert counts["train"] == {0: 10, 1: 1, 2: 1}
    assert counts["val"] == {0: 5}
    assert counts["test"] == {0: 5, 1: 1}
    every = [name for samples in splits.values() for name in samples.names]
    assert len(every) == len(set(every)) == 23
    assert names_by_split(read_folder(tmp_path, 0.25, 0.25, seed=3)) == names_by_split(splits)
    assert names_by_split(read_folder(tmp_path, 0.25, 0.25, seed=4)) != names_by_split(splits)


def test_a_missing_val_is_split_off_train_and_reads_its_own_pictures(tmp_path):
    make_folder(tmp_path, {"train/a": 10, "test/a": 1})
    splits = read_folder(tmp_path)
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 8, "val": 2, "test": 1}
    for samples in (splits["train"], splits["val"]):
        for i, name in enumerate(samples.names):
            number = int(Path(name).stem)
            assert samples.read(i).getpixel((0, 0)) == (number, number, number)


def test_nothing_to_split_off_is_refused(tmp_path):
    make_folder(tmp_path, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match=r"no class has two pictures.*val_fraction=0"):
        read_folder(tmp_path)


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0), (1.0, 0), (0.5, 0.5), (float("nan"), 0)])
def test_fractions_out_of_range_are_refused(val, test, tmp_path):
    make_folder(tmp_path, {"a": 4})
    with pytest.raises(ValueError, match=r"val_fraction=.*allowed"):
        read_folder(tmp_path, val, test)


def test_pictures_are_not_decoded_at_load_and_a_broken_one_is_named_when_read(tmp_path):
    make_folder(tmp_path, {"train/a": 1})
    (tmp_path / "train" / "a" / "broken.jpg").write_bytes(b"nothing")
    train = read_folder(tmp_path, val_fraction=0)["train"]
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        train.read(1)


def test_the_fruit_set_is_complete_and_no_picture_is_in_two_splits():
    splits = read_folder(fruit_root())
    assert {split: set(Counter(s.targets).values()) for split, s in splits.items()} == {
        "train": {22},
        "val": {8},
        "test": {24},
    }
    assert len(splits["train"].classes) == 14
    files = list(fruit_root().rglob("*.jpg"))
    assert len({file.read_bytes() for file in files}) == len(files) == 756
    assert sum(file.stat().st_size for file in files) < 2_800_000
    assert all(samples.read(i).size == (80, 80) for samples in splits.values() for i in range(len(samples)))


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


def test_class_names_can_be_given(vtab):
    assert read_list(vtab, classes=["a", "b", "c", "d"])["val"].classes == ("a", "b", "c", "d")
    with pytest.raises(ValueError, match=r"train800.txt, line 4: label 2, but there are 2 classes.*dataset.classes"):
        read_list(vtab, classes=["a", "b"])


def test_without_a_val_list_val_is_split_off_train(vtab):
    lines = [f"images/x/{i}.png {i % 2}\n" for i in range(4)]
    (vtab / "train800val200.txt").write_text("".join(lines))
    splits = read_list(vtab, train="train800val200.txt", val=None, test=None, val_fraction=0.5)
    assert list(splits) == ["train", "val"]
    assert sorted(splits["val"].targets) == [0, 1]


def test_a_name_with_spaces_is_a_name(vtab):
    touch(vtab / "a b.png")
    (vtab / "test.txt").write_text("a b.png 1\r\n")
    assert read_list(vtab)["test"].names == ("a b.png",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/x/6.png 3", r"test.txt, line 2: label 3, but there are 3 classes, 0 to 2, by train800.txt"),
        ("images/x/6.png -1", r"test.txt, line 2: .* is not `relative/path label`"),
        ("images/x/6.png one", r"test.txt, line 2: .* is not `relative/path label`"),
        ("images/x/6.png 1.0", r"test.txt, line 2: .* is not `relative/path label`"),
        ("images/x/6.png", r"test.txt, line 2: .* is not `relative/path label`"),
        ("images/x/9.png 1", r"test.txt, line 2: there is no file .*9.png"),
        ("../secret.png 1", r"test.txt, line 2: '../secret.png' leaves the folder"),
        ("/etc/hostname 1", r"test.txt, line 2: '/etc/hostname' leaves the folder"),
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
    with pytest.raises(ValueError, match="leaves the folder"):
        read_list(".")


def test_a_missing_or_empty_list_is_refused_by_name(vtab):
    with pytest.raises(ValueError, match=r"no file .*train1000.txt; check dataset.root"):
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
    text = "label,split,path\ndog,train,p/0.png\ncat,train,p/1.png\ndog,valid,p/2.png\ncat,test,p/3.png\n"
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
    path = write_csv(tmp_path, "path,label\n0.png,Äpfel\n", encoding="utf-8-sig")
    assert read_csv(path, root=tmp_path / "p", val_fraction=0)["train"].classes == ("Äpfel",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\np/0.png,a\n", r"data.csv: no column 'path', only \['file', 'label'\]"),
        ("path;label\np/0.png;a\n", r"data.csv: no column 'path', only \['path;label'\]"),
        ("", r"data.csv: no column 'path', only \[\]"),
        ("path,label\n", "data.csv: no train rows"),
        ("path,label\np/0.png,a\np/1.png,\n", r"row 3: path 'p/1.png' and label ''; both"),
        ("path,label\np/0.png,a\np/9.png,a\n", r"row 3: there is no file .*9.png"),
        ("path,label\np/0.png,a\n../x.png,a\n", r"row 3: '../x.png' leaves"),
        ("path,label\np/0.png,a\np/0.png,a\n", r"row 3: p/0.png is there twice, first at .*row 2"),
        ("path,label,split\np/0.png,a,dev\n", r"row 2: split 'dev'; allowed: train, val, test"),
        ("path,label,split\np/0.png,cats,train\np/1.png,cat,val\n", r"row 3: class 'cat'.*did you mean 'cats'"),
        ("path,label,split\np/0.png,a,test\n", "no train rows"),
    ],
)
def test_a_wrong_csv_is_refused_by_row(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_csv(write_csv(tmp_path, text))


def test_a_csv_that_is_missing_or_no_text_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*data.csv; check dataset.path"):
        read_csv(tmp_path / "data.csv")
    with pytest.raises(ValueError, match=r"data.csv is not UTF-8 text"):
        read_csv(write_csv(tmp_path, "path,label\np/0.png,Äpfel\n", encoding="latin-1"))


def test_a_stratified_split_holds_out_its_part_of_each_class():
    targets = [0] * 100 + [1] * 10 + [2] * 2 + [3]
    keep, held = stratified_split(targets, 0.2, seed=0)
    assert Counter(targets[i] for i in held) == {0: 20, 1: 2, 2: 1}
    assert keep == sorted(keep)
    assert sorted(keep + held) == list(range(len(targets)))
    assert stratified_split(targets, 0.2, seed=0) == (keep, held)
    assert stratified_split(targets, 0.2, seed=1) != (keep, held)


def test_a_stratified_split_never_takes_a_whole_class():
    keep, held = stratified_split([0, 0, 0], 0.99, seed=0)
    assert (len(keep), len(held)) == (1, 2)
    assert stratified_split([0, 0, 0], 0.0, seed=0) == ([0, 1, 2], [])
    with pytest.raises(ValueError, match=r"fraction to hold out is 1\.0"):
        stratified_split([0, 0], 1.0, seed=0)


def test_k_shot_takes_as_many_of_each_class():
    train = read_folder(fruit_root())["train"]
    few = take_per_class(train, 3, seed=0)
    assert Counter(few.targets) == dict.fromkeys(range(14), 3)
    assert all(name.split("/")[1] == few.classes[target] for name, target in zip(few.names, few.targets, strict=True))
    assert few.names != take_per_class(train, 3, seed=1).names
    assert np.array_equal(np.asarray(few.read(5)), np.asarray(train.read(train.names.index(few.names[5]))))


def test_k_shot_of_a_class_that_is_too_small_is_refused_by_name(tmp_path):
    train = read_folder(make_folder(tmp_path, {"train/a": 3, "train/b": 2}), val_fraction=0)["train"]
    with pytest.raises(ValueError, match=r"class 'b' has 2 train pictures, fewer than num_per_class=3"):
        take_per_class(train, 3, seed=0)
    with pytest.raises(ValueError, match="num_per_class is 0"):
        take_per_class(train, 0, seed=0)


# The data set


def test_an_item_is_an_image_and_its_target():
    half = (0.5, 0.5, 0.5)
    dataset = ClassificationDataset(
        read_folder(fruit_root())["test"], EvalTransform(Preprocessing((32, 32), half, half))
    )
    image, target = dataset[30]
    assert len(dataset) == 336
    assert (image.shape, image.dtype, target) == ((3, 32, 32), torch.float32, 1)


def test_the_seed_of_an_item_comes_from_seed_epoch_and_index():
    samples = read_folder(fruit_root())["val"]

    def seeds(seed):
        dataset = ClassificationDataset(samples, lambda image, seed: torch.tensor(seed), seed)
        return [int(dataset[key][0]) for key in ((0, 1), (1, 0), (0, 0), (1, 1), (12, 3), (1, 23))]

    assert len(set(seeds(0) + seeds(1))) == 12
    assert seeds(0) == seeds(0)
    dataset = ClassificationDataset(samples, lambda image, seed: torch.tensor(seed))
    assert dataset[1][0] == dataset[0, 1][0]


def test_samples_can_be_sent_to_a_worker():
    few = take_per_class(read_folder(fruit_root())["train"], 1, seed=0)
    again = pickle.loads(pickle.dumps(few))
    assert again == few
    assert again.read(0) == few.read(0)

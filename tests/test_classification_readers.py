import os
import pickle
from collections import Counter
from pathlib import Path
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.helpers import make_folder, names_by_split, touch
from vpt.data.image_files import is_ignored
from vpt.data.images import ImageError
from vpt.data.readers import folder
from vpt.data.readers.folder import fruit_root, read_folder
from vpt.data.samples import check_readable
from vpt.data.splits import split_named, stratified_split, take_per_class

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


@pytest.mark.parametrize("name", ["valid", "validation", "Val", "VALID"])
def test_names_of_splits_have_variants_and_are_case_insensitive(name, tmp_path):
    splits = read_folder(make_folder(tmp_path, {"Train/a": 1, "Train/b": 1, "Train/c": 1, f"{name}/c": 1}))
    assert splits["val"].names == (f"{name}/c/0.png",)
    assert splits["val"].targets == (2,)
    assert splits["val"].classes == ("a", "b", "c")


def test_hidden_and_other_files_are_ignored_and_subfolders_and_links_to_them_are_read_once(tmp_path):
    make_folder(tmp_path, {"a": 1, "a/2023": 1, "b": 1, ".ipynb_checkpoints": 1, "a/.hidden": 1, "__MACOSX/a": 1})
    for name in ("notes.txt", "._0.png"):
        (tmp_path / "a" / name).write_text("x")
    (tmp_path / "a" / "me").symlink_to(tmp_path / "a")
    touch(tmp_path / "a" / "B.JPG")
    train = read_folder(tmp_path, val_fraction=0, test_fraction=0)["train"]
    assert train.classes == ("a", "b")
    assert train.names == ("a/0.png", "a/2023/0.png", "a/B.JPG", "b/0.png")
    assert train.targets == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        ({"images/a": 1, "images/b": 1}, r"only one class folder, images; did you mean root=.*/images\?"),
        ({"x/y/a": 1, "x/y/b": 1}, r"did you mean root=.*/x/y\?"),
        ({"x/Train/a": 1}, r"did you mean root=.*/x\?"),
        ({"train/x/a": 1, "train/x/b": 1}, "move the class folders of .*/train/x to .*/train"),
        ({"a": 2}, "only one class folder, a; add a folder for each other class"),
        ({"a": 2, "a/b": 1, "a/c": 1}, "add a folder"),
        ({"a/b": 2}, "add a folder"),
        ({"train/a": 2, "valid/a": 1, "val/a": 1}, "both val and valid"),
        ({"train/cats": 1, "train/dogs": 1, "val/cat": 1}, "val/cat: class 'cat' .* did you mean 'cats'"),
        ({"train/a": 1, "train/b": 0}, "train/b: no images"),
        ({}, "no class folders; expected <root>/train/<class>/<image>"),
        ({"train": 3}, "no class folders"),
        ({"val/a": 1}, "val but no train found; expected"),
        ({"a": 1, "b": 1}, r"val_fraction=0\.2: train has too few images"),
    ],
)
def test_wrong_folders_are_refused_with_what_is_wrong(folders, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        read_folder(make_folder(tmp_path, folders))
    with pytest.raises(ValueError, match=r"root=.*nowhere is no folder"):
        read_folder(tmp_path / "nowhere")


def test_an_image_that_links_reach_twice_is_refused(tmp_path):
    make_folder(tmp_path, {"train/a": 2, "train/b": 1})
    (tmp_path / "val").mkdir()
    for link, target in (("val/a", "train/a"), ("train/b/1.png", "train/a/1.png")):
        (tmp_path / link).symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=rf"{link}.* is a duplicate, first at .*{target}"):
            read_folder(tmp_path)
        (tmp_path / link).unlink()


def test_class_folders_under_the_root_are_split_by_seed(tmp_path):
    make_folder(tmp_path, {"a": 20, "b": 2, "c": 1})
    splits = read_folder(tmp_path, val_fraction=0.25, test_fraction=0.25, seed=3)
    counts = {split: Counter(samples.targets) for split, samples in splits.items()}
    assert counts == {"train": {0: 10, 1: 1, 2: 1}, "val": {0: 5}, "test": {0: 5, 1: 1}}
    every = [name for samples in splits.values() for name in samples.names]
    assert len(every) == len(set(every)) == 23
    assert names_by_split(read_folder(tmp_path, val_fraction=0.25, test_fraction=0.25, seed=3)) == names_by_split(
        splits
    )
    assert names_by_split(read_folder(tmp_path, val_fraction=0.25, test_fraction=0.25, seed=4)) != names_by_split(
        splits
    )


def test_a_missing_val_is_split_off_train_and_reads_its_own_images(tmp_path):
    make_folder(tmp_path, {"train/a": 10, "train/b": 5, "test/a": 1})
    splits = read_folder(tmp_path)
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 12, "val": 3, "test": 1}
    for samples in (splits["train"], splits["val"]):
        for i, name in enumerate(samples.names):
            number = int(Path(name).stem)
            assert samples.read(i).getpixel((0, 0)) == (number, number, number)


def test_the_headers_of_all_images_can_be_checked_and_nothing_is_decoded_before(tmp_path):
    make_folder(tmp_path, {"a": 2, "b": 1})
    train = read_folder(tmp_path, val_fraction=0)["train"]
    check_readable(train)
    (tmp_path / "a" / "1.png").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"a/1\.png: not an image[^;]*; formats: .*WEBP.*; replace or remove"):
        check_readable(train)
    (tmp_path / "b" / "0.png").unlink()
    with pytest.raises(ImageError, match=r"a/1\.png: not an image.*; 1 more cannot be read; replace or remove"):
        check_readable(train)
    check_readable(train.take([0]))
    with pytest.raises(ImageError, match=r"a/1\.png"):
        train.read(1)


def test_the_fruit_set_is_complete_and_no_image_is_in_two_splits():
    splits = read_folder(fruit_root())
    counts = {split: set(Counter(samples.targets).values()) for split, samples in splits.items()}
    assert counts == {"train": {22}, "val": {8}, "test": {24}}
    assert len(splits["train"].classes) == 14
    files = list(fruit_root().rglob("*.jpg"))
    assert len({file.read_bytes() for file in files}) == len(files) == 756
    assert sum(file.stat().st_size for file in files) < 2_800_000
    assert all(samples.read(i).size == (80, 80) for samples in splits.values() for i in range(len(samples)))


# Splitting


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0), (1.0, 0), (0.5, 0.5), (float("nan"), 0)])
def test_fractions_out_of_range_are_refused(val, test, tmp_path):
    with pytest.raises(ValueError, match="val_fraction="):
        read_folder(make_folder(tmp_path, {"a": 4, "b": 4}), val_fraction=val, test_fraction=test)
    with pytest.raises(ValueError, match=r"fraction=1\.0"):
        stratified_split([0, 0], 1.0, seed=0)


def test_a_stratified_split_holds_out_its_part_of_each_class():
    targets = [0] * 100 + [1] * 10 + [2] * 2 + [3]
    keep, held = stratified_split(targets, 0.2, seed=0)
    assert Counter(targets[i] for i in held) == {0: 20, 1: 2, 2: 1}
    assert keep == sorted(keep)
    assert sorted(keep + held) == list(range(len(targets)))
    assert stratified_split(targets, 0.2, seed=0) == (keep, held)
    assert stratified_split(targets, 0.2, seed=1) != (keep, held)
    assert [len(indices) for indices in stratified_split([0, 0, 0], 0.99, seed=0)] == [1, 2]  # never a whole class
    assert stratified_split([0, 0, 0], 0.0, seed=0) == ([0, 1, 2], [])


@pytest.mark.parametrize("new", ["x", "y", "z", "0", "00"])
def test_a_new_image_leaves_the_split_of_the_others_alone(new):
    targets = [i % 2 for i in range(40)]
    names = [f"{i}.png" for i in range(40)]

    def held_names(targets, names):
        return {names[i] for i in stratified_split(targets, 0.25, seed=0, names=names)[1]}

    before, after = held_names(targets, names), held_names([1, *targets], [new, *names])
    moved = before ^ (after - {new})
    assert len(moved) <= 1
    assert all(targets[names.index(name)] == 1 for name in moved)


def test_k_shot_takes_as_many_of_each_class():
    train = read_folder(fruit_root())["train"]
    few = take_per_class(train, 3, seed=0)
    assert Counter(few.targets) == dict.fromkeys(range(14), 3)
    assert all(name.split("/")[1] == few.classes[target] for name, target in zip(few.names, few.targets, strict=True))
    assert few.names != take_per_class(train, 3, seed=1).names
    assert few.read(5) == train.read(train.names.index(few.names[5]))
    again = pickle.loads(pickle.dumps(few))
    assert again == few
    assert again.read(0) == few.read(0)
    for num, words in ((23, "class .* has 22 train images, fewer than"), (0, "num_per_class=0")):
        with pytest.raises(ValueError, match=words):
            take_per_class(train, num, seed=0)


# What is ignored, guessed or split off is noted


def noted(root, **options):
    """The classes, the number of images of each split, and the names of each note by its code."""
    notes = []
    splits = read_folder(root, notes=notes, **options)
    numbers = {split: len(samples) for split, samples in splits.items()}
    return splits["train"].classes, numbers, {note.code: note.names for note in notes}


@pytest.mark.parametrize(
    ("folders", "classes", "numbers", "notes"),
    [
        ({"Training/a": 2, "Training/b": 3, "Testing/a": 1, "dev/b": 1}, "ab", (5, 1, 1), {}),
        ({"training_set/a": 2, "training_set/b": 3, "test-set/a": 1}, "ab", (3, 2, 1), {"split_off": ("val",)}),
        ({"train/a": 2, "train/b": 3, "eval/a": 1, "extra/x": 3}, "ab", (5, 1), {"ignored_folders": ("extra",)}),
        ({"train/a": 2, "train/b": 3, "val/b": 1, "test": 5}, "ab", (5, 1), {"unlabelled": ("test",)}),
        ({"train/a": 2, "train/b": 1, "train": 1, "val/b": 1}, "ab", (3, 1), {"loose": ("train/0.png",)}),
        ({"a": 5, "b": 5}, "ab", (6, 2, 2), {"split_off": ("val", "test"), "copied_folders": ("a", "b")}),
        ({"a": 2, "b": 2}, "ab", (2, 2), {"split_off": ("val",), "copied_folders": ("a", "b")}),
        (
            {"": 1, "raw/x": 1, "raw/y": 2, "small/x": 2, "small/y": 1},
            ("raw", "small"),
            (2, 2, 2),
            {"loose": ("0.png",), "deep_folders": ("raw", "small"), "split_off": ("val", "test")},
        ),
        ({"train/a": 2, "train/a/x": 1, "train/b": 2, "val/b": 1}, "ab", (5, 1), {"deep_folders": ("a",)}),
    ],
)
def test_what_is_not_read_as_it_may_be_meant_is_noted(folders, classes, numbers, notes, tmp_path):
    found = noted(make_folder(tmp_path, folders))
    in_order = tuple(found[1][split] for split in ("train", "val", "test") if split in found[1])
    assert (found[0], in_order, found[2]) == (tuple(classes), numbers, notes)


@pytest.mark.parametrize(
    "folders",
    [
        {"train/steam": 3, "train/electric": 3, "bus": 3, "car": 3},
        {"train": 3, "bus": 3, "car": 3},
        {"test": 3, "bus": 3, "car": 3},
        {"dev/a": 1, "test/a": 1, "bus": 3},
    ],
)
def test_folders_that_may_be_splits_or_classes_are_refused_until_layout_decides(folders, tmp_path):
    make_folder(tmp_path, folders)
    with pytest.raises(ValueError, match=r"layout=splits .* layout=classes"):
        read_folder(tmp_path)
    assert set(noted(tmp_path, layout="classes")[0]) == {name.partition("/")[0] for name in folders}
    if "train/steam" in folders:
        classes, numbers, notes = noted(tmp_path, layout="splits")
        assert (classes, numbers) == (("electric", "steam"), {"train": 4, "val": 2})
        assert notes["ignored_folders"] == ("bus", "car")


def test_links_that_lead_in_a_circle_end_in_an_error_that_names_them(tmp_path):
    make_folder(tmp_path, {"train/a": 2, "train/b": 1})
    (tmp_path / "train" / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "train" / "b" / "self.png").symlink_to("self.png")
    with pytest.raises(ValueError, match=r"duplicate, first at .*a/up/train"):
        read_folder(tmp_path)
    (tmp_path / "train" / "a" / "up").unlink()
    with pytest.raises(ImageError, match=r"self\.png: cannot be read"):
        check_readable(read_folder(tmp_path)["train"])


def test_images_of_formats_that_cannot_be_read_are_noted_and_those_of_rare_endings_are_read(tmp_path):
    make_folder(tmp_path, {"train/a": 1, "train/b": 1, "val/a": 1})
    for name in ("train/a/1.jfif", "train/b/1.JPE", "train/b/2.heic", "val/a/photo", "val/a/3.psd"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, "JPEG")
    (tmp_path / "val" / "a" / "LICENSE").write_text("text")
    _, numbers, notes = noted(tmp_path)
    assert numbers == {"train": 4, "val": 1}
    assert notes == {"ignored": ("train/b/2.heic", "val/a/3.psd", "val/a/photo")}
    for name in ("0.png", "1.JPE"):
        (tmp_path / "train" / "b" / name).unlink()
    with pytest.raises(ValueError, match=r"train/b: no images; 1 image file cannot be read: 1 \.heic"):
        read_folder(tmp_path)


def test_class_names_are_composed_and_must_be_utf_8(tmp_path):
    make_folder(tmp_path, {"train/caf\u00e9": 1, "train/cafe\u0301/x": 1, "train/tea": 1, "val/cafe\u0301": 1})
    classes, numbers, notes = noted(tmp_path)
    assert (classes, numbers) == (("caf\u00e9", "tea"), {"train": 3, "val": 1})
    assert notes["composed"] == ("cafe\u0301",)
    make_folder(tmp_path, {os.fsdecode(b"train/h\xe9risson"): 1})
    with pytest.raises(ValueError, match=r"risson.*UTF-8"):
        read_folder(tmp_path)


@pytest.mark.timeout(60)
@pytest.mark.slow
def test_as_many_classes_as_a_task_file_takes_are_read_in_linear_time(tmp_path, monkeypatch):
    folders = [tmp_path / f"{number:05d}" for number in range(100_000)]
    monkeypatch.setattr(folder, "_subfolders", lambda given: folders if given == tmp_path else [])
    monkeypatch.setattr(folder, "find_images", lambda given, left_out=None: [given / "0.png", given / "1.png"])
    monkeypatch.setattr(folder, "_is_copy", lambda *_: False)
    splits = read_folder(tmp_path, val_fraction=0.5)
    assert [len(samples) for samples in splits.values()] == [100_000, 100_000]


# Groups and folds


def make_visits(root, sizes):
    """Images p<patient>_<visit> of each class: `{"a": [3, 1]}` has three of the first patient, one of the second."""
    for name, of_class in sizes.items():
        for patient, num in enumerate(of_class):
            for visit in range(num):
                touch(root / name / f"p{patient}_{visit}.png")
    return root


def held_out(root, **options):
    """The names that fold after fold holds out."""
    return [read_folder(root, fold=fold, val_fraction=0, **options)["test"].names for fold in range(options["folds"])]


def test_folds_hold_out_each_image_once_and_spread_each_class_evenly(tmp_path):
    make_folder(tmp_path, {"a": 11, "b": 7, "c": 2})
    folds = held_out(tmp_path, folds=3)
    assert sorted(name for names in folds for name in names) == sorted(
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")
    )
    counts = [Counter(name[0] for name in names) for names in folds]
    assert all(max(of[label] for of in counts) - min(of[label] for of in counts) <= 1 for label in "abc")
    assert max(map(len, folds)) - min(map(len, folds)) <= 1
    assert folds == held_out(tmp_path, folds=3)
    assert folds != held_out(tmp_path, folds=3, seed=1)


def test_folds_are_test_or_else_val(tmp_path):
    make_folder(tmp_path, {"train/a": 10, "train/b": 10, "test/a": 2})
    splits = read_folder(tmp_path, folds=5, fold=4)
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 16, "val": 4, "test": 2}
    make_folder(tmp_path, {"val/a": 1})
    with pytest.raises(ValueError, match=r"folds=5: .* val and a test"):
        read_folder(tmp_path, folds=5)


def test_groups_are_in_one_fold_and_folds_have_the_sizes_of_group_k_fold(tmp_path):
    sizes = [9, 7, 6, 5, 4, 3, 2]
    make_visits(tmp_path, {"a": sizes, "b": sizes})
    folds = held_out(tmp_path, folds=3, group=r"(p\d)_")
    groups = [{Path(name).name[:2] for name in names} for names in folds]
    assert sum(map(len, groups)) == len(sizes)
    # From the largest on, each to the smallest: 9 + 3, 7 + 4 (or 5), 6 + 5 ...
    assert sorted(map(len, folds)) == [22, 24, 26]
    for names in folds:
        assert Counter(name[0] for name in names)["a"] == len(names) / 2


def test_val_and_test_are_split_off_by_groups(tmp_path):
    make_visits(tmp_path, {"a": [4] * 10, "b": [4] * 10, "c": [3]})
    splits = read_folder(tmp_path, group=r"p\d+")
    groups = {split: {Path(name).name.partition("_")[0] for name in samples.names} for split, samples in splits.items()}
    assert {split: len(found) for split, found in groups.items()} == {"train": 6, "val": 2, "test": 2}
    assert set.union(*groups.values()) == {f"p{number}" for number in range(10)}
    assert "c/p0_0.png" in splits["train"].names  # a class of one group is trained


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group": "("}, "group=.*no regular expression"),
        ({"group": "x"}, "group=x: not found in the name a/p0_0.png"),
        ({"group": "p", "val_fraction": 0.2}, "two groups"),
        ({"folds": 100}, "folds=100: train has 8 images only"),
        ({"folds": 3, "group": r"p\d"}, "folds=3: train has 2 groups only"),
        ({"folds": 2, "fold": 2}, "fold=2: must be"),
        ({"fold": 1}, "fold=1"),
    ],
)
def test_groups_and_folds_that_cannot_be_are_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        read_folder(make_visits(tmp_path, {"a": [2, 2], "b": [2, 2]}), **options)


def test_groups_that_the_data_have_in_two_splits_are_noted(tmp_path):
    make_visits(tmp_path, {"train/a": [1, 2], "train/b": [1], "val/a": [0, 1]})
    assert noted(tmp_path, group=r"p\d")[2]["shared_groups"] == ("p1",)


# Any name of a folder but those of splits.
folder_names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=20)
class_names = folder_names.filter(
    lambda name: (
        not is_ignored(name)
        and normalize("NFC", name) == name
        and split_named(name) is None
        and len(name.encode()) < 200
    )
)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(names=st.sets(class_names, min_size=2, max_size=8), data=st.data())
def test_any_names_of_folders_are_classes_one_to_one_as_train_has_them(names, data, tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    of_val = data.draw(st.sets(st.sampled_from(sorted(names)), min_size=1))
    for split, members in (("train", names), ("val", of_val)):
        for name in members:
            (root / split / name).mkdir(parents=True)
            (root / split / name / "0.png").touch()
    splits = read_folder(root)
    for split, members in (("train", names), ("val", of_val)):
        samples = splits[split]
        assert samples.classes == tuple(sorted(names))
        assert {samples.classes[target] for target in samples.targets} == members
        assert [Path(name).parts[1] for name in samples.names] == [samples.classes[i] for i in samples.targets]

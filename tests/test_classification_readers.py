import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import make_folder, names_by_split, touch
from vpt.data.images import ImageError
from vpt.data.readers.folder import fruit_root, read_folder
from vpt.data.samples import ClassificationDataset, ClassificationSamples, check_readable
from vpt.data.splits import SPLIT_OF, stratified_split, take_per_class
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing

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
def test_other_names_of_val_are_val(name, tmp_path):
    make_folder(tmp_path, {"train/a": 2, "train/b": 2, f"{name}/a": 1})
    assert read_folder(tmp_path)["val"].names == (f"{name}/a/0.png",)


def test_capitals_in_the_names_of_splits_do_not_make_them_classes(tmp_path):
    make_folder(tmp_path, {"Train/a": 2, "Train/b": 2, "TEST/a": 1})
    splits = read_folder(tmp_path, val_fraction=0.5)
    assert splits["train"].classes == ("a", "b")
    assert splits["test"].names == ("TEST/a/0.png",)


def test_two_val_folders_are_refused(tmp_path):
    make_folder(tmp_path, {"train/a": 2, "valid/a": 1, "val/a": 1})
    with pytest.raises(ValueError, match="both val and valid are val"):
        read_folder(tmp_path)


def test_class_numbers_come_from_train_even_if_val_lacks_a_class(tmp_path):
    make_folder(tmp_path, {"train/a": 1, "train/b": 1, "train/c": 1, "val/c": 1})
    assert read_folder(tmp_path)["val"].targets == (2,)


def test_a_class_that_train_does_not_have_is_refused_by_name(tmp_path):
    make_folder(tmp_path, {"train/cats": 1, "train/dogs": 1, "val/cat": 1})
    with pytest.raises(ValueError, match=r"val/cat: class 'cat' is not among .* did you mean 'cats'"):
        read_folder(tmp_path)


def test_a_dot_folder_is_not_a_class(tmp_path):
    make_folder(tmp_path, {"train/a": 2, "train/b": 1, "train/.ipynb_checkpoints": 1, "train/a/.hidden": 1})
    touch(tmp_path / "train" / "a" / "._0.png")
    splits = read_folder(tmp_path, val_fraction=0)
    assert splits["train"].classes == ("a", "b")
    assert splits["train"].names == ("train/a/0.png", "train/a/1.png", "train/b/0.png")


def test_other_files_are_ignored_and_upper_case_pictures_are_not(tmp_path):
    make_folder(tmp_path, {"train/a": 1, "train/b": 1})
    (tmp_path / "train" / "a" / "notes.txt").write_text("x")
    (tmp_path / "train" / "labels.csv").write_text("x")
    touch(tmp_path / "train" / "a" / "B.JPG")
    assert read_folder(tmp_path, val_fraction=0)["train"].names[:-1] == ("train/a/0.png", "train/a/B.JPG")


def test_pictures_in_folders_below_a_class_folder_are_of_that_class(tmp_path):
    make_folder(tmp_path, {"a/2023": 1, "a/2024": 1, "b": 1})
    assert read_folder(tmp_path, val_fraction=0)["train"].targets == (0, 0, 1)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({"images/a": 1, "images/b": 1}, r"only one class folder, images; did you mean root=.*/images\?"),
        ({"x/y/a": 1, "x/y/b": 1}, r"only one class folder, x; did you mean root=.*/x/y\?"),
        ({"x/Train/a": 1}, r"only one class folder, x; did you mean root=.*/x\?"),
        (
            {"train/x/a": 1, "train/x/b": 1},
            r"/train only one class folder, x; move the class .* of .*/train/x to .*/train",
        ),
        ({"a": 2}, r"only one class folder, a; add a folder for each other class, .*/<class>/<image>"),
        ({"a": 2, "a/b": 1, "a/c": 1}, r"only one class folder, a; add a folder for each"),
        ({"a/b": 2}, r"only one class folder, a; add a folder for each"),
    ],
)
def test_one_class_only_is_refused_and_wrapped_classes_are_found(folders, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_folder(make_folder(tmp_path, folders))


def test_a_link_back_to_its_folder_does_not_multiply_pictures(tmp_path):
    make_folder(tmp_path, {"a": 2, "b": 1})
    (tmp_path / "a" / "me").symlink_to(tmp_path / "a")
    assert read_folder(tmp_path, val_fraction=0)["train"].names == ("a/0.png", "a/1.png", "b/0.png")


def test_a_picture_that_links_reach_twice_is_refused(tmp_path):
    make_folder(tmp_path / "root", {"train/a": 2, "train/b": 1})
    (tmp_path / "root" / "val").mkdir()
    (tmp_path / "root" / "val" / "a").symlink_to(tmp_path / "root" / "train" / "a")
    with pytest.raises(ValueError, match=r"val/a/0.png is there twice, first at .*train/a/0.png"):
        read_folder(tmp_path / "root")
    (tmp_path / "root" / "val" / "a").unlink()
    (tmp_path / "root" / "train" / "b" / "1.png").symlink_to(tmp_path / "root" / "train" / "a" / "1.png")
    with pytest.raises(ValueError, match=r"train/b/1.png is there twice, first at .*train/a/1.png"):
        read_folder(tmp_path / "root")


def test_an_empty_class_folder_is_refused_by_name(tmp_path):
    make_folder(tmp_path, {"train/a": 1, "train/b": 0})
    with pytest.raises(ValueError, match="train/b: no images"):
        read_folder(tmp_path)


@pytest.mark.parametrize("folders", [{}, {"train": 0}, {"train": 3}])
def test_no_pictures_at_all_tells_the_layout(folders, tmp_path):
    make_folder(tmp_path, folders)
    with pytest.raises(ValueError, match=r"no class folders; expected <root>/train/<class>/<image>"):
        read_folder(tmp_path)


def test_val_without_train_tells_the_layout(tmp_path):
    make_folder(tmp_path, {"val/a": 1})
    with pytest.raises(ValueError, match=r"val but no train found; expected"):
        read_folder(tmp_path)


def test_a_missing_root_is_refused_by_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"root=.*nowhere is no folder"):
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
    make_folder(tmp_path, {"train/a": 10, "train/b": 5, "test/a": 1})
    splits = read_folder(tmp_path)
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 12, "val": 3, "test": 1}
    for samples in (splits["train"], splits["val"]):
        for i, name in enumerate(samples.names):
            number = int(Path(name).stem)
            assert samples.read(i).getpixel((0, 0)) == (number, number, number)


def test_nothing_to_split_off_is_refused(tmp_path):
    make_folder(tmp_path, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match=r"val_fraction=0.2: train has too few images"):
        read_folder(tmp_path)


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0), (1.0, 0), (0.5, 0.5), (float("nan"), 0)])
def test_fractions_out_of_range_are_refused(val, test, tmp_path):
    make_folder(tmp_path, {"a": 4, "b": 4})
    with pytest.raises(ValueError, match=r"val_fraction="):
        read_folder(tmp_path, val, test)


def test_pictures_are_not_decoded_at_load_and_a_broken_one_is_named_when_read(tmp_path):
    make_folder(tmp_path, {"train/a": 1, "train/b": 1})
    (tmp_path / "train" / "a" / "broken.jpg").write_bytes(b"nothing")
    train = read_folder(tmp_path, val_fraction=0)["train"]
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        train.read(1)


def test_pictures_that_cannot_be_read_are_found_at_once(tmp_path):
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
    with pytest.raises(ImageError, match=r"b/0\.png: no such file"):
        check_readable(train.take([0, 2]))


def test_pictures_that_are_no_files_need_no_check():
    check_readable(ClassificationSamples(classes=("a", "b"), targets=(0, 1), names=("0", "1"), reader=lambda _: 1 / 0))


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


# Splitting


def test_a_stratified_split_holds_out_its_part_of_each_class():
    targets = [0] * 100 + [1] * 10 + [2] * 2 + [3]
    keep, held = stratified_split(targets, 0.2, seed=0)
    assert Counter(targets[i] for i in held) == {0: 20, 1: 2, 2: 1}
    assert keep == sorted(keep)
    assert sorted(keep + held) == list(range(len(targets)))
    assert stratified_split(targets, 0.2, seed=0) == (keep, held)
    assert stratified_split(targets, 0.2, seed=1) != (keep, held)


@pytest.mark.parametrize("new", ["x", "y", "z", "0", "00"])
def test_a_new_picture_leaves_the_split_of_the_others_alone(new):
    targets = [i % 2 for i in range(40)]
    names = [f"{i}.png" for i in range(40)]

    def held_names(targets, names):
        return {names[i] for i in stratified_split(targets, 0.25, seed=0, names=names)[1]}

    before, after = held_names(targets, names), held_names([1, *targets], [new, *names])
    moved = before ^ (after - {new})
    assert len(moved) <= 1
    assert all(targets[names.index(name)] == 1 for name in moved)


def test_a_split_of_a_folder_is_kept_when_a_picture_is_added(tmp_path):
    make_folder(tmp_path, {"a": 20, "b": 20, "c": 20})
    before = read_folder(tmp_path)["val"].names
    touch(tmp_path / "a" / "00.png")
    after = read_folder(tmp_path)["val"].names
    assert len(set(before) ^ (set(after) - {"a/00.png"})) <= 1
    assert [name for name in before if name[0] != "a"] == [name for name in after if name[0] != "a"]


def test_a_stratified_split_never_takes_a_whole_class():
    keep, held = stratified_split([0, 0, 0], 0.99, seed=0)
    assert (len(keep), len(held)) == (1, 2)
    assert stratified_split([0, 0, 0], 0.0, seed=0) == ([0, 1, 2], [])
    with pytest.raises(ValueError, match=r"fraction=1\.0"):
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
    with pytest.raises(ValueError, match=r"class 'b' has 2 train images, fewer than num_per_class=3"):
        take_per_class(train, 3, seed=0)
    with pytest.raises(ValueError, match="num_per_class=0"):
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


# What a folder may be called, and no split is.
folder_names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=20)
class_names = folder_names.filter(
    lambda name: not name.startswith(".") and name.lower() not in SPLIT_OF and len(name.encode()) < 200
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

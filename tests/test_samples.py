"""Samples and data sets of both tasks."""

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.helpers import make_folder, read_one, write_coco
from vpt.data.loaders import EpochSampler
from vpt.data.readers.coco import read_coco
from vpt.data.readers.folder import read_folder
from vpt.data.samples import ClassificationDataset, DetectionDataset, collate_detection, data_digest
from vpt.data.transforms.boxes import DetectionEvalTransform, DetectionTrainTransform
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing

SMALL = Preprocessing(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture
def train(tmp_path):
    return read_coco(write_coco(tmp_path))["train"]


@pytest.fixture
def folders(tmp_path):
    return read_folder(make_folder(tmp_path, {"train/a": 2, "train/b": 1, "val/b": 1}))


@pytest.fixture
def with_crowd(tmp_path):
    rows = [{"bbox": [40, 4, 10, 10], "category_id": 17, "iscrowd": 1}, {"bbox": [20, 4, 10, 10], "category_id": 17}]
    return read_one(tmp_path / "crowd", rows)[0]


def digest_of_version_0_1(splits):
    """The digest in checkpoints of version 0.1, as it was computed there."""
    digest = hashlib.sha256()
    for split, members in splits.items():
        digest.update(f"{split} {members.classes} {members.names}".encode())
        for name in ("targets", "boxes", "labels", "crowd"):
            for value in getattr(members, name, ()):
                digest.update(value.tobytes() if isinstance(value, np.ndarray) else f"{value} ".encode())
        digest.update(f"{[path.stat().st_size for path in members.paths]}".encode())
    return digest.hexdigest()


def test_the_digest_is_that_of_version_0_1_and_depends_on_images_labels_and_sizes(tmp_path, folders):
    boxes = read_coco(write_coco(tmp_path))
    whole = data_digest(folders)
    assert whole == data_digest(folders) == digest_of_version_0_1(folders)
    assert data_digest(boxes) == digest_of_version_0_1(boxes)
    part, moved = folders["train"].take([0, 1]), np.array(boxes["val"].boxes[0])
    moved[0, 2] += 1
    relabelled = replace(folders["train"], targets=(1, 0, 1))
    digests = [whole, data_digest(folders | {"train": part}), data_digest(folders | {"train": relabelled})]
    digests += [data_digest(boxes), data_digest(boxes | {"val": replace(boxes["val"], boxes=(moved,))})]
    folders["val"].paths[0].write_bytes(b"123")
    assert len({*digests, data_digest(folders)}) == 6


def test_labels_are_read_in_one_way_for_both_tasks(with_crowd, folders):
    assert [with_crowd.labels_of(0).tolist(), with_crowd.class_counts().tolist()] == [[0, 1, 1], [1, 1]]
    assert with_crowd.label_text(0).startswith("3 boxes (")
    uncrowded = replace(with_crowd, crowd=(np.zeros(3, bool), *with_crowd.crowd[1:]))
    assert with_crowd.label_text(0) != uncrowded.label_text(0)
    assert with_crowd.take([]).class_counts().tolist() == [0, 0]
    images = folders["train"]
    assert [images.labels_of(2).tolist(), images.class_counts().tolist()] == [[1], [2, 1]]
    assert images.label_text(2) == "b"


def test_taken_samples_keep_what_belongs_together(train):
    taken = train.take([1, 2, 0]).take([1, 2])
    assert len(taken) == 2
    assert [Path(name).name for name in taken.names] == ["c.png", "a.png"]
    assert taken.image_ids == (102, 100)
    assert taken.sizes == ((64, 64), (32, 64))
    assert taken.read(1).size == (64, 32)
    assert taken.labels[1].tolist() == [0, 1]
    assert len(taken.boxes[0]) == len(taken.crowd[0]) == 0
    assert (taken.classes, taken.category_ids) == (train.classes, train.category_ids)


def test_samples_cannot_be_changed(train):
    for arrays in (train.boxes, train.labels, train.crowd):
        with pytest.raises(ValueError, match="read-only"):
            arrays[0][:] = 0
    with pytest.raises(AttributeError):
        train.boxes = ()


def test_an_item_for_classification_is_an_image_and_its_class(folders):
    image, target = ClassificationDataset(folders["train"], EvalTransform(SMALL))[2]
    assert (image.shape, image.dtype, target) == ((3, 32, 32), torch.float32, 1)


def test_an_item_for_detection_is_an_image_and_a_target_in_its_pixels(train):
    dataset = DetectionDataset(train, DetectionEvalTransform(SMALL))
    (image, target), (_, empty) = dataset[0], dataset[2]
    assert (len(dataset), image.shape, image.dtype) == (3, (3, 32, 32), torch.float32)
    assert target["boxes"].tolist() == [[0, 0, 32, 16], [4, 2, 12, 14]]
    assert target["labels"].tolist() == [0, 1]
    assert [tuple(empty[key].shape) for key in ("boxes", "labels", "crowd", "image_index")] == [(0, 4), (0,), (0,), ()]
    dtypes = [torch.float32, torch.int64, torch.bool, torch.int64]
    assert [empty[key].dtype for key in ("boxes", "labels", "crowd", "image_index")] == dtypes


def test_labels_and_crowd_stay_with_the_boxes_that_remain(with_crowd):
    right = [{"name": "Crop", "x_min": 32, "y_min": 0, "x_max": 64, "y_max": 32}]
    _, target = DetectionDataset(with_crowd, DetectionTrainTransform(SMALL, right))[0]
    torch.testing.assert_close(target["boxes"], torch.tensor([[8.0, 4.0, 18.0, 14.0]]), atol=1e-3, rtol=0)
    assert (target["labels"].tolist(), target["crowd"].tolist()) == ([1], [True])


def test_the_seed_of_an_item_depends_on_seed_epoch_and_index_only(folders, train):
    keys = [(0, 1), (1, 0), (0, 0), (1, 1), (12, 2), (1, 2)]
    for dataset, samples in ((ClassificationDataset, folders["train"]), (DetectionDataset, train)):
        found = [int(dataset(samples, SeedTransform(), seed)[key][0]) for seed in (0, 1) for key in keys]
        assert len(set(found)) == 12
        again = pickle.loads(pickle.dumps(dataset(samples, SeedTransform(), 0)))
        assert [int(again[key][0]) for key in reversed(keys)] == found[5::-1]
        assert again[1][0] == again[0, 1][0]


class SeedTransform:
    """Returns the seed as the image."""

    def __call__(self, image, *boxes_and_seed):
        tensor = torch.tensor(boxes_and_seed[-1])
        return tensor if len(boxes_and_seed) == 1 else (tensor, boxes_and_seed[0], np.arange(len(boxes_and_seed[0])))


def test_a_batch_for_detection_is_images_and_a_list_of_targets(train):
    dataset = DetectionDataset(train, DetectionEvalTransform(SMALL))
    first, second = DataLoader(dataset, batch_size=2, sampler=EpochSampler(3), collate_fn=collate_detection)
    assert (first[0].shape, second[0].shape) == ((2, 3, 32, 32), (1, 3, 32, 32))
    targets = [(len(target["boxes"]), int(target["image_index"])) for target in (*first[1], *second[1])]
    assert targets == [(2, 0), (1, 1), (0, 2)]

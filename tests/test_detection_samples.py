import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from tests.helpers import read_one, write_coco
from vpt.data.loaders import EpochSampler
from vpt.data.readers.coco import read_coco
from vpt.data.samples import DetectionDataset, collate_detection
from vpt.data.transforms.boxes import DetectionEvalTransform, DetectionTrainTransform
from vpt.data.transforms.preprocessing import Preprocessing

SMALL = Preprocessing(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
EXIF_ORIENTATION = 0x0112


def test_taken_samples_keep_what_belongs_together(tmp_path):
    train = read_coco(write_coco(tmp_path))["train"]
    taken = train.take([2, 0])
    assert len(taken) == 2
    assert [Path(name).name for name in taken.names] == ["c.png", "a.png"]
    assert taken.image_ids == (102, 100)
    assert taken.sizes == ((64, 64), (32, 64))
    assert taken.read(1).size == (64, 32)
    assert taken.labels[1].tolist() == [0, 1]
    assert len(taken.boxes[0]) == len(taken.crowd[0]) == 0
    assert (taken.classes, taken.category_ids) == (train.classes, train.category_ids)


def test_samples_cannot_be_changed(tmp_path):
    train = read_coco(write_coco(tmp_path))["train"]
    for arrays in (train.boxes, train.labels, train.crowd):
        with pytest.raises(ValueError, match="read-only"):
            arrays[0][:] = 0
    with pytest.raises(AttributeError):
        train.boxes = ()


def test_an_item_is_an_image_and_a_target_in_its_pixels(tmp_path):
    dataset = DetectionDataset(read_coco(write_coco(tmp_path))["train"], DetectionEvalTransform(SMALL))
    assert len(dataset) == 3
    image, target = dataset[0]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert target["boxes"].tolist() == [[0, 0, 32, 16], [4, 2, 12, 14]]
    assert target["labels"].tolist() == [0, 1]
    kinds = {key: (tuple(value.shape), value.dtype) for key, value in dataset[2][1].items()}
    assert kinds == {
        "boxes": ((0, 4), torch.float32),
        "labels": ((0,), torch.int64),
        "crowd": ((0,), torch.bool),
        "image_index": ((), torch.int64),
    }


def test_labels_and_crowds_go_with_the_boxes_that_stay(tmp_path):
    rows = [{"bbox": [40, 4, 10, 10], "category_id": 17, "iscrowd": 1}, {"bbox": [20, 4, 10, 10], "category_id": 17}]
    train, _ = read_one(tmp_path, rows)
    right = [{"name": "Crop", "x_min": 32, "y_min": 0, "x_max": 64, "y_max": 32}]
    _, target = DetectionDataset(train, DetectionTrainTransform(SMALL, right))[0]
    torch.testing.assert_close(target["boxes"], torch.tensor([[8.0, 4.0, 18.0, 14.0]]), atol=1e-3, rtol=0)
    assert target["labels"].tolist() == [1]
    assert target["crowd"].tolist() == [True]


def test_an_item_depends_on_seed_epoch_and_index_only(tmp_path):
    train = read_coco(write_coco(tmp_path))["train"]
    transform = DetectionTrainTransform(SMALL, [{"name": "CropAndPad", "percent": [-0.1, 0.4], "keep_size": False}])
    dataset = DetectionDataset(train, transform, seed=3)
    first = {key: dataset[key][1]["boxes"].tolist() for key in [(0, 0), (1, 0), (1, 1)]}
    again = pickle.loads(pickle.dumps(dataset))
    assert {key: again[key][1]["boxes"].tolist() for key in reversed(first)} == first
    assert first[0, 0] != first[1, 0]
    assert dataset[0][1]["boxes"].tolist() == first[0, 0]
    assert DetectionDataset(train, transform, seed=4)[0][1]["boxes"].tolist() != first[0, 0]


def test_a_batch_is_images_and_a_list_of_targets(tmp_path):
    dataset = DetectionDataset(read_coco(write_coco(tmp_path))["train"], DetectionEvalTransform(SMALL))
    loader = DataLoader(dataset, batch_size=2, sampler=EpochSampler(3), collate_fn=collate_detection)
    batches = list(loader)
    assert [tuple(images.shape) for images, _ in batches] == [(2, 3, 32, 32), (1, 3, 32, 32)]
    targets = [target for _, members in batches for target in members]
    assert [len(target["boxes"]) for target in targets] == [2, 1, 0]
    assert [int(target["image_index"]) for target in targets] == [0, 1, 2]
    assert Counter(map(tuple, targets)) == {("boxes", "labels", "crowd", "image_index"): 3}

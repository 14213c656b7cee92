import random
import signal
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from vpt.data.loaders import EpochSampler, build_loader, stable_seed
from vpt.data.readers.folder import fruit_root, read_folder
from vpt.data.samples import ClassificationDataset
from vpt.data.transforms.images import TrainTransform
from vpt.data.transforms.preprocessing import Preprocessing

HALF = (0.5, 0.5, 0.5)
AUGMENT = [{"name": "RandomResizedCrop", "scale": [0.3, 1.0]}, {"name": "HorizontalFlip"}]

# Python 3.12 warns when a process with threads forks, and torch has threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

properties = settings(max_examples=60, derandomize=True, deadline=None)
numbers, seeds, epochs = st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 1000)


class Keys(Dataset):
    """Returns the key."""

    def __init__(self, num):
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, key):
        return torch.tensor(key), key[1]


class Workers(Keys):
    """Returns the settings of the loader process."""

    def __getitem__(self, key):
        cv2_threads = sys.modules["cv2"].getNumThreads()
        signals = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2
        ignores = all(signal.getsignal(number) is signal.SIG_IGN for number in signals)
        return torch.tensor([torch.get_num_threads(), cv2_threads, ignores]), key[1]


@pytest.fixture(scope="module")
def fruit():
    transform = TrainTransform(Preprocessing((32, 32), HALF, HALF), AUGMENT)
    return ClassificationDataset(read_folder(fruit_root())["val"].take(range(20)), transform, seed=5)


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_a_stable_seed_differs_with_its_parts():
    parts = [(1, 23), (12, 3), (1, 2, 3), (123,), ("123",), (-1, 23), (0,), (0, 0)]
    seeds = [stable_seed(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_every_epoch_has_its_own_order():
    sampler = EpochSampler(50, seed=0, shuffle=True)
    assert len({tuple(order) for order in (sampler.order(0), sampler.order(1), range(50))}) == 3
    assert len(sampler) == 50


def test_a_batch_is_images_and_targets_and_the_last_one_is_smaller(fruit):
    loader = build_loader(fruit, 8, shuffle=False)
    (images, targets), *others = epoch_of(loader, 0)
    assert (images.shape, images.dtype) == ((8, 3, 32, 32), torch.float32)
    assert (targets.tolist(), targets.dtype) == ([0] * 8, torch.int64)
    assert [len(targets) for _, targets in others] == [8, 4]
    assert len(loader) == 3


def test_two_loader_processes_return_the_same_as_none(fruit):
    alone = build_loader(fruit, 8, shuffle=True, seed=1)
    workers = build_loader(fruit, 8, shuffle=True, seed=1, num_workers=2)
    for epoch in (0, 3):  # persistent workers live through both
        pairs = list(zip(epoch_of(alone, epoch), epoch_of(workers, epoch), strict=True))
        assert len(pairs) == 3
        for batch in pairs:
            assert all(torch.equal(one, other) for one, other in zip(*batch, strict=True))


def test_epochs_differ_in_augmentation_and_order(fruit):
    still, shuffled = build_loader(fruit, 20, shuffle=False), build_loader(fruit, 20, shuffle=True)
    assert not torch.equal(epoch_of(still, 0)[0][0], epoch_of(still, 1)[0][0])
    assert torch.equal(epoch_of(still, 0)[0][0], epoch_of(still, 0)[0][0])
    assert not torch.equal(epoch_of(shuffled, 0)[0][1], epoch_of(shuffled, 1)[0][1])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_does_not_touch_the_global_random_states(num_workers):
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    assert len(epoch_of(build_loader(Keys(6), 2, shuffle=True, num_workers=num_workers), 0)) == 3
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_worker_has_one_thread_and_leaves_signals_to_the_main_process(fruit):
    fruit[0]  # imports OpenCV and takes its threads away
    loader = build_loader(Workers(2), 2, shuffle=False, num_workers=1)
    assert epoch_of(loader, 0)[0][0].tolist() == [[1, 1, 1]] * 2
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match=r"empty"):
        build_loader(Keys(0), 2, shuffle=True)


@properties
@given(numbers, seeds, epochs, st.integers(1, 64), st.booleans(), st.data())
def test_an_epoch_has_every_index_once_also_if_it_is_resumed(num, seed, epoch, batch_size, shuffle, data):
    num_done = data.draw(st.integers(0, -(-num // batch_size))) * batch_size
    loader = build_loader(Keys(num), batch_size, shuffle=shuffle, seed=seed)
    sampler = loader.sampler
    assert sorted(sampler.order(epoch)) == list(range(num))
    sampler.set_epoch(epoch)
    whole = list(sampler)
    assert whole == [(epoch, index) for index in sampler.order(epoch)]
    before = whole[:num_done]
    sampler.set_epoch(epoch, num_done)
    rest = [tuple(key) for keys, _ in loader for key in keys.tolist()]
    assert before + rest == whole
    sizes = [len(targets) for _, targets in loader]
    assert all(size == batch_size for size in sizes[:-1])


@properties
@given(numbers, seeds, epochs)
def test_an_order_depends_on_size_seed_and_epoch_only(num, seed, epoch):
    one, other = EpochSampler(num, seed, shuffle=True), EpochSampler(num, seed, shuffle=True)
    other.set_epoch(epoch + 7)
    list(other)
    torch.manual_seed(epoch)
    assert one.order(epoch) == other.order(epoch)
    in_order = EpochSampler(num, seed, shuffle=False)
    assert in_order.order(epoch) == list(range(num))


def test_a_balanced_epoch_has_as_many_draws_of_each_class_and_resumes():
    targets = [5] * 900 + [0] * 90 + [2] * 10
    sampler = EpochSampler(len(targets), seed=3, shuffle=True, balanced=targets)
    sampler.set_epoch(1)
    drawn = [index for _, index in sampler]
    counts = Counter(targets[index] for index in drawn)
    assert len(drawn) == 1000
    assert all(280 < counts[label] < 390 for label in (0, 2, 5))  # 333, within 4 standard deviations
    assert len({index for index in drawn if targets[index] == 0}) > 80
    assert {index for index in drawn if targets[index] == 2} == set(range(990, 1000))
    assert sampler.order(2) != drawn == sampler.order(1)
    sampler.set_epoch(1, num_skipped=400)
    assert [index for _, index in sampler] == drawn[400:]

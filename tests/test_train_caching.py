"""Cached tokens and images change no result, save work, and the summary states what is cached or why not."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

import vpt.data.samples
from tests.helpers import metric_lines
from vpt import build
from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.saved import load_config, to_plain
from vpt.config.schema import CacheName
from vpt.config.validation import to_config
from vpt.data.tokens import TokenFolder
from vpt.models.vit import fingerprint, preprocessing_of
from vpt.task_types.base import task_type_of
from vpt.task_types.classification import Classification
from vpt.train import caching
from vpt.train.training import run

NUM_TRAIN, NUM_VAL, NUM_TEST = 18, 9, 12
SMALL = [
    *("train.epochs=2", "train.batch_size=8", "train.log_every=1", "num_workers=0", "prompt.num_tokens=2"),
    *("backbone.img_size=32", "augment=none", "device=cpu"),
]
LAST = "prompt.blocks=last:1"
BLOCK_0 = "no tokens: the prompt enters block 0"


def configured(root, photos, *overrides):
    own = "dataset=folder", f"dataset.root={photos}", f"run.root={root}", "run.name=a"
    return to_config(compose_config([*own, *SMALL, *overrides]))


def train(root, photos, *overrides):
    return run(configured(root, photos, *overrides))


def prepared(root, photos, *overrides):
    """Config, model and plan of a run that has not started."""
    config = configured(root, photos, *overrides)
    task_type = task_type_of(config)
    samples = task_type.read()
    model = task_type.build_model(samples["train"])
    data = task_type.build_data(samples, preprocessing_of(model.backbone.vit))
    return config, model, caching.plan_cache(config, model, data)


def planned(photos, *overrides):
    return prepared("runs", photos, *overrides)[2]


def results(run_dir):
    """The numbers of all steps, the bytes of the task file, and the last state."""
    lines = metric_lines(run_dir)
    assert sum("train/loss" in line for line in lines) >= 4
    last = safetensors.torch.load((run_dir / "last.checkpoint").read_bytes())
    tuned = {name: last[name].tolist() for name in last if name.startswith("tuned")}
    return lines, (run_dir / "task.safetensors").read_bytes(), tuned


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def count_through_block_0(model):
    """A list of the number of images in each batch that passes the first block, which is frozen."""
    counted = []
    model.backbone.vit.blocks[0].register_forward_hook(lambda _, arguments, output: counted.append(len(output)))
    return counted


def num_computed(root, photos, *overrides, change=lambda model: None):
    """Images of which a run with a cache on disk computes the tokens."""
    config, model, plan = prepared(root, photos, LAST, "cache=disk", "train.batch_size=9", *overrides)
    change(model)
    counted = count_through_block_0(model)
    assert len(caching.build_fit_inputs(config, model, plan).train_loader.dataset) == NUM_TRAIN
    return sum(counted)


@pytest.mark.parametrize(
    "overrides",
    [
        [LAST],
        ["prompt=none", "train.label_smoothing=0.1", "train.sampling=balanced"],
        ["prompt.blocks=[1,3]", "prompt.dropout=0.3", "train.ema=0.9", "train.accumulation=2"],
        ["prompt.blocks=last:2", "prompt.impl=concat", "train.precision=bf16", "train.batch_size=6"],
    ],
    ids=" ".join,
)
def test_a_run_on_cached_tokens_gives_the_same_numbers_and_the_same_task_file(tmp_path, photos, overrides):
    without = results(train(tmp_path / "off", photos, "cache=off", *overrides))
    for cache in ("ram", "disk"):
        assert results(train(tmp_path / cache, photos, f"cache={cache}", *overrides)) == without
    assert len(list((tmp_path / "disk" / "cache").iterdir())) == 2


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_run_on_cached_images_gives_the_same_numbers_and_the_same_task_file(tmp_path, photos):
    without = train(tmp_path / "off", photos, "augment=standard", "cache=off")
    assert results(train(tmp_path / "auto", photos, "augment=standard", "num_workers=2")) == results(without)


def test_cached_images_are_decoded_once(tmp_path, photos, monkeypatch):
    reads = []
    read_image = vpt.data.samples.read_image
    spy = lambda path, *how: reads.append(path) or read_image(path, *how)  # noqa: E731
    monkeypatch.setattr(vpt.data.samples, "read_image", spy)
    train(tmp_path, photos, "augment=standard", "train.epochs=3")
    cached = [path for path in reads if "test" not in path.parts]  # test is read once, and its worst images are drawn
    assert len(cached) == len(set(cached)) == NUM_TRAIN + NUM_VAL


def test_frozen_blocks_compute_each_image_once(tmp_path, photos, monkeypatch):
    build_model, counts = build.build_model, []

    def hooked(*arguments):
        model = build_model(*arguments)
        counts.append(count_through_block_0(model))
        return model

    monkeypatch.setattr("vpt.task_types.base.build_model", hooked)
    for cache in ("off", "auto"):
        train(tmp_path / cache, photos, LAST, f"cache={cache}", "train.batch_size=9", "prompt.init=uniform")
    at_the_end = NUM_VAL + NUM_TEST  # the whole model is evaluated
    assert sum(counts[0]) == 2 * (NUM_TRAIN + NUM_VAL) + at_the_end
    assert sum(counts[1]) == 1 + NUM_TRAIN + NUM_VAL + at_the_end  # one image to find shape and dtype


def test_tokens_are_computed_in_order_and_in_batches_like_those_of_training(photos):
    config, model, plan = prepared("runs", photos, LAST)
    counted = count_through_block_0(model)
    inputs = caching.build_fit_inputs(config, model, plan)
    assert counted == [8, 8, 8, 8, 1]  # 18 of train, the last batch filled up, and 9 of val
    for split, loader in (("train", inputs.train_loader), ("val", inputs.val_loader)):
        dataset = plan.data.datasets[split]
        for index in (0, 7, 8, len(dataset) - 1):
            tokens, target = loader.dataset[index]
            image, expected_target = dataset[index]
            torch.testing.assert_close(tokens, model.backbone.forward_frozen(image[None])[0][0])
            assert target == expected_target


def test_tokens_on_disk_are_found_by_every_later_run_that_they_are_right_for(tmp_path, photos):
    assert num_computed(tmp_path, photos) == NUM_TRAIN + NUM_VAL
    assert num_computed(tmp_path, photos) == 0
    assert num_computed(tmp_path, photos, "seed=3", "optim.head_lr=0.1", "prompt.num_tokens=5") == 0
    for change in ("augment.crop_pct=0.8", "train.precision=bf16", "prompt.blocks=last:2", "train.batch_size=6"):
        assert num_computed(tmp_path, photos, change) == NUM_TRAIN + NUM_VAL, change
    assert num_computed(tmp_path, photos) == 0


def test_tokens_on_disk_are_computed_again_for_a_cut_file_another_weight_and_another_image(tmp_path, photos):
    def change(model):
        vit = model.backbone.vit
        before = fingerprint(vit)
        with torch.no_grad():
            vit.blocks[0].mlp.fc1.weight[3, 5] += 1e-3
        assert fingerprint(vit) == before  # it reads a part of the weights only

    copy = tmp_path / "photos"
    shutil.copytree(photos, copy)
    num_computed(tmp_path, copy)
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    assert num_computed(tmp_path, copy) == NUM_TRAIN + NUM_VAL
    assert num_computed(tmp_path, copy) == 0
    assert num_computed(tmp_path, copy, change=change) == NUM_TRAIN + NUM_VAL
    path = copy / "train" / "rose" / "2.png"
    path.write_bytes(path.read_bytes() + b"0")
    assert num_computed(tmp_path, copy) == NUM_TRAIN  # those of val are found


def test_with_a_full_disk_training_continues_in_memory_or_without_a_cache(tmp_path, photos, monkeypatch, capsys):
    without = results(train(tmp_path / "off", photos, LAST, "cache=off"))
    monkeypatch.setattr(os, "posix_fallocate", full_disk, raising=False)
    capsys.readouterr()
    assert results(train(tmp_path / "a", photos, LAST, "cache=disk")) == without
    (note,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("no tokens on disk: "))
    assert note.endswith("; they are held in memory")
    assert "No space left on device: " in note
    assert list((tmp_path / "a" / "cache").iterdir()) == []
    monkeypatch.setattr(caching, "free_memory", lambda: 10.0)
    assert results(train(tmp_path / "b", photos, LAST, "cache=disk")) == without
    assert "; training continues without a cache\n" in capsys.readouterr().out


def test_a_file_that_cannot_be_read_back_is_reported(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.setattr(TokenFolder, "read", lambda *_: None)
    train(tmp_path, photos, LAST, "cache=disk", f"cache_dir={tmp_path / 'other'}")
    assert f"no tokens on disk: {tmp_path / 'other'} does not hold the tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("cache", "mode"), [("ram", "train"), ("disk", "dry")])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([LAST, "augment=standard"], "needs augment=none: augmentation is random; or type cache=auto$"),
        ([], "needs frozen blocks before the prompt, such as .*: the prompt enters"),
        (["prompt=shallow"], "needs frozen blocks before the prompt"),
        ([LAST, "cache_gb=0.0001"], r"needs 0\.4 MB, more than cache_gb=0\.0001; type cache_gb=0\.1$"),
    ],
)
def test_tokens_that_are_required_and_cannot_be_cached_are_refused(photos, cache, mode, overrides, message):
    with pytest.raises(ConfigError, match=f"^cache={cache} {message}") as raised:
        planned(photos, f"mode={mode}", *overrides, f"cache={cache}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["cache=off"], "off"),
        (["prompt=none"], "features, 0.0 MB in memory, computed once"),
        ([LAST], "tokens that enter block 4, 0.4 MB in memory, computed once"),
        ([LAST, "cache=disk"], "tokens that enter block 4, 0.4 MB in runs/cache, computed once"),
        ([LAST, "cache=disk", "cache_dir=/a b"], "tokens that enter block 4, 0.4 MB in /a b, computed once"),
        ([], f"images, 0.2 MB, decoded once ({BLOCK_0})"),
        (["augment=standard", LAST], "images, 0.2 MB, decoded once (no tokens: augmentation is random)"),
        ([LAST, "cache_gb=0.0003"], "images, 0.2 MB, decoded once (no tokens: 0.4 MB are more than cache_gb=0.0003)"),
        (["cache_gb=0.0001"], f"none ({BLOCK_0}; no images: decoded they are more than cache_gb=0.0001)"),
        (["train.epochs=1"], "none: no image is read in a second epoch"),
        ([LAST, "mode=dry"], "none: no image is read in a second epoch"),
        ([LAST, "mode=overfit", "cache=ram"], "none: no image is read in a second epoch"),
    ],
    ids=str,
)
def test_the_plan_states_in_one_line_what_is_cached_and_why_not_more(photos, overrides, text):
    plan = planned(photos, *overrides)
    assert plan.text == text
    assert (plan.tokens is not None) == text.startswith(("tokens", "features"))


def test_free_memory_limits_cache_ram_half_of_it_cache_auto_and_neither_the_disk(photos, monkeypatch):
    monkeypatch.setattr(caching, "free_memory", lambda: 6e5)
    text = "images, 0.2 MB, decoded once (no tokens: 0.4 MB are more than half of the free memory)"
    assert planned(photos, LAST).text == text
    assert planned(photos, LAST, "cache=ram").tokens is not None
    monkeypatch.setattr(caching, "free_memory", lambda: 2e5)
    with pytest.raises(ConfigError, match=r"needs 0\.4 MB, more than the free memory of 0\.2 MB; type cache=disk$"):
        planned(photos, LAST, "cache=ram")
    assert planned(photos, LAST, "cache=disk").tokens is not None


def test_without_room_for_images_training_continues(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.setattr(os, "posix_fallocate", full_disk, raising=False)
    run_dir = train(tmp_path, photos)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("cache "))
    assert "; no images: " in line
    assert line.endswith("No space left on device)")
    assert load_config(run_dir / "config.yaml").cache is CacheName.auto


def test_images_that_are_not_files_are_not_cached_but_their_tokens_are(photos, monkeypatch):
    read = Classification.read
    monkeypatch.setattr(
        Classification, "read", lambda task: {k: replace(samples, paths=()) for k, samples in read(task).items()}
    )
    assert planned(photos).text == f"none ({BLOCK_0}; no images: they are not files)"
    assert planned(photos, LAST).text.startswith("tokens that enter block 4")


def test_cache_off_is_saved_and_read(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_plain(configured(tmp_path, tmp_path, "cache=off"))))
    assert load_config(path).cache is CacheName.off


@pytest.mark.parametrize(
    ("limit", "free"), [("max", 8_000_000 * 1024), ("5000000000", 3_500_000_000), (None, 8_000_000 * 1024)]
)
def test_free_memory_is_that_of_the_machine_or_of_the_container(monkeypatch, limit, free):
    files = {
        "/proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable:  8000000 kB\n",
        "/sys/fs/cgroup/memory.max": limit,
        "/sys/fs/cgroup/memory.current": "2000000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 1500000000\ninactive_file 500000000\n",
    }

    def read_text(path):
        if files.get(str(path)) is None:
            raise FileNotFoundError
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert caching.free_memory() == free


def test_free_memory_is_that_of_the_smallest_control_group_of_this_process(tmp_path, monkeypatch):
    root = Path("/sys/fs/cgroup")
    for text, groups in {"1:cpu:/x\n0::/slurm/job\n": ["", "slurm", "slurm/job"], "0::/\n": [""]}.items():
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", lambda _, text=text: text)
            assert caching._control_groups() == [root / group for group in groups]
    groups = [tmp_path, tmp_path / "slurm", tmp_path / "slurm" / "job"]
    for folder, limit in zip(groups, ("max", "5000", "9000"), strict=True):
        folder.mkdir(exist_ok=True)
        for name, text in {"max": limit, "current": "3000", "stat": "anon 1\ninactive_file 500\n"}.items():
            (folder / f"memory.{name}").write_text(text)
    monkeypatch.setattr(caching, "_control_groups", lambda: groups)
    assert caching.free_memory() == 5000 - 3000 + 500

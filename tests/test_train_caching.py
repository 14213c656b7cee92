"""What a run keeps for later epochs changes no result, spares the work that it says it spares, and says why if not."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

import vpt.data.samples
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
    "train.epochs=2",
    "train.batch_size=8",
    "train.log_every=1",
    "num_workers=0",
    "prompt.num_tokens=2",
    "backbone.img_size=32",
    "augment=none",
    "device=cpu",
]
LAST = "prompt.blocks=last:1"


def configured(root, photos, *overrides):
    return compose_config(
        ["dataset=folder", f"dataset.root={photos}", f"run.root={root}", "run.name=a", *SMALL, *overrides]
    )


def train(root, photos, *overrides):
    return run(to_config(configured(root, photos, *overrides)))


def prepared(root, photos, *overrides):
    """Config, model and plan of a run that has not begun."""
    config = to_config(configured(root, photos, *overrides))
    kind = task_type_of(config)
    samples = kind.read()
    model = build.build_model(config, samples["train"].classes)
    data = kind.build_data(samples, preprocessing_of(model.backbone.vit))
    return config, model, caching.plan_cache(config, model, data)


def planned(photos, *overrides):
    return prepared("runs", photos, *overrides)[2]


def results(run_dir):
    """Everything that training left: the numbers of all steps, the task file's bytes, and the last state."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert sum("train/loss" in line for line in lines) >= 4
    last = safetensors.torch.load((run_dir / "last.checkpoint").read_bytes())
    return (
        lines,
        (run_dir / "task.safetensors").read_bytes(),
        {name: last[name].tolist() for name in last if name.startswith("tuned")},
    )


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def count_through_block_0(model):
    """A list that gets the number of pictures in each batch that goes through the first block, which is frozen."""
    counted = []
    model.backbone.vit.blocks[0].register_forward_hook(lambda _, arguments, output: counted.append(len(output)))
    return counted


def num_computed(root, photos, *overrides, change=lambda model: None):
    """Pictures of which a run with a cache on disk has to compute the tokens."""
    config, model, plan = prepared(root, photos, LAST, "cache=disk", "train.batch_size=9", *overrides)
    change(model)
    counted = count_through_block_0(model)
    assert len(caching.build_fit_inputs(config, model, plan).train_loader.dataset) == NUM_TRAIN
    return sum(counted)


@pytest.mark.parametrize(
    "overrides",
    [
        [LAST],
        ["prompt=none", "train.label_smoothing=0.1"],
        ["prompt.blocks=[1,3]", "prompt.dropout=0.3", "train.ema=0.9", "train.accumulation=2"],
        ["prompt.blocks=last:2", "prompt.impl=concat", "train.precision=bf16", "train.batch_size=6"],
    ],
    ids=" ".join,
)
def test_a_run_on_kept_tokens_gives_the_same_numbers_and_the_same_task_file(tmp_path, photos, overrides):
    without = results(train(tmp_path / "off", photos, "cache=off", *overrides))
    for cache in ("ram", "disk"):
        assert results(train(tmp_path / cache, photos, f"cache={cache}", *overrides)) == without
    assert len(list((tmp_path / "disk" / "cache").iterdir())) == 2


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_run_on_kept_pictures_gives_the_same_numbers_and_the_same_task_file(tmp_path, photos):
    without = train(tmp_path / "off", photos, "augment=standard", "cache=off")
    assert results(train(tmp_path / "auto", photos, "augment=standard", "num_workers=2")) == results(without)


def test_kept_pictures_are_decoded_once(tmp_path, photos, monkeypatch):
    reads = []
    read_image = vpt.data.samples.read_image
    spy = lambda path, *how: reads.append(path) or read_image(path, *how)  # noqa: E731
    monkeypatch.setattr(vpt.data.samples, "read_image", spy)
    train(tmp_path, photos, "augment=standard", "train.epochs=3")
    assert len(reads) == len(set(reads)) == NUM_TRAIN + NUM_VAL + NUM_TEST


def test_frozen_blocks_see_each_picture_once(tmp_path, photos, monkeypatch):
    build_model, counts = build.build_model, []

    def hooked(*arguments):
        model = build_model(*arguments)
        counts.append(count_through_block_0(model))
        return model

    monkeypatch.setattr(build, "build_model", hooked)
    for cache in ("off", "auto"):
        train(tmp_path / cache, photos, LAST, f"cache={cache}", "train.batch_size=9", "prompt.init=uniform")
    at_the_end = NUM_VAL + NUM_TEST  # the whole model is evaluated
    assert sum(counts[0]) == 2 * (NUM_TRAIN + NUM_VAL) + at_the_end
    assert sum(counts[1]) == 1 + NUM_TRAIN + NUM_VAL + at_the_end  # one picture tells shape and dtype


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


def test_tokens_on_disk_are_computed_again_when_their_file_was_cut_off(tmp_path, photos):
    num_computed(tmp_path, photos)
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    assert num_computed(tmp_path, photos) == NUM_TRAIN + NUM_VAL
    assert num_computed(tmp_path, photos) == 0


def test_tokens_on_disk_are_not_used_for_another_weight(tmp_path, photos):
    def change(model):
        vit = model.backbone.vit
        before = fingerprint(vit)
        with torch.no_grad():
            vit.blocks[0].mlp.fc1.weight[3, 5] += 1e-3
        assert fingerprint(vit) == before  # it looks at samples only

    num_computed(tmp_path, photos)
    assert num_computed(tmp_path, photos, change=change) == NUM_TRAIN + NUM_VAL


def test_tokens_on_disk_are_not_used_for_another_picture(tmp_path, photos):
    copy = tmp_path / "photos"
    shutil.copytree(photos, copy)
    num_computed(tmp_path / "runs", copy)
    path = copy / "train" / "rose" / "2.png"
    path.write_bytes(path.read_bytes() + b"0")
    assert num_computed(tmp_path / "runs", copy) == NUM_TRAIN  # those of val are found


def test_a_full_disk_is_told_and_training_goes_on_in_memory_or_without(tmp_path, photos, monkeypatch, capsys):
    without = results(train(tmp_path / "off", photos, LAST, "cache=off"))
    monkeypatch.setattr(os, "posix_fallocate", full_disk, raising=False)
    capsys.readouterr()
    assert results(train(tmp_path / "a", photos, LAST, "cache=disk")) == without
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no tokens on disk: ")]
    assert len(told) == 1
    assert told[0].endswith("; they are kept in memory")
    assert "No space left on device: " in told[0]
    assert list((tmp_path / "a" / "cache").iterdir()) == []
    monkeypatch.setattr(caching, "free_memory", lambda: 10.0)
    assert results(train(tmp_path / "b", photos, LAST, "cache=disk")) == without
    assert "; training goes on without a cache\n" in capsys.readouterr().out


def test_a_file_that_cannot_be_read_back_is_told(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.setattr(TokenFolder, "read", lambda *_: None)
    train(tmp_path, photos, LAST, "cache=disk", f"cache_dir={tmp_path / 'other'}")
    assert f"no tokens on disk: {tmp_path / 'other'} does not hold what was written" in capsys.readouterr().out


@pytest.mark.parametrize(("cache", "mode"), [("ram", "train"), ("disk", "dry")])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([LAST, "augment=standard"], "needs augment=none: augmentation is random; or type cache=auto$"),
        (
            [],
            r"needs frozen blocks before the prompt, such as prompt=deep prompt\.blocks=last:3: the prompt enters",
        ),
        (["prompt=shallow"], "needs frozen blocks before the prompt"),
        ([LAST, "cache_gb=0.0001"], r"needs 0\.4 MB, more than cache_gb=0\.0001; type cache_gb=0\.1$"),
    ],
)
def test_tokens_that_are_asked_for_and_cannot_be_kept_are_refused(photos, cache, mode, overrides, message):
    with pytest.raises(ConfigError, match=f"^cache={cache} {message}") as raised:
        planned(photos, f"mode={mode}", *overrides, f"cache={cache}")
    assert "\n" not in str(raised.value)


def test_tokens_that_memory_cannot_hold_are_refused_and_may_lie_on_disk(photos, monkeypatch):
    monkeypatch.setattr(caching, "free_memory", lambda: 2e5)
    with pytest.raises(
        ConfigError, match=r"^cache=ram needs 0\.4 MB, more than the free memory of 0\.2 MB; type cache=disk$"
    ):
        planned(photos, LAST, "cache=ram")
    assert planned(photos, LAST, "cache=disk").tokens is not None


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["cache=off"], "off"),
        ([LAST], "tokens that enter block 4, 0.4 MB in memory, computed once"),
        (["prompt=none"], "features, 0.0 MB in memory, computed once"),
        ([LAST, "cache=disk"], "tokens that enter block 4, 0.4 MB in runs/cache, computed once"),
        (
            [LAST, "cache=disk", "cache_dir=/else where"],
            "tokens that enter block 4, 0.4 MB in /else where, computed once",
        ),
        ([], "pictures, 0.2 MB, decoded once (no tokens: the prompt enters block 0)"),
        (["augment=standard", LAST], "pictures, 0.2 MB, decoded once (no tokens: augmentation is random)"),
        ([LAST, "cache_gb=0.0003"], "pictures, 0.2 MB, decoded once (no tokens: 0.4 MB are more than cache_gb=0.0003)"),
        (
            ["cache_gb=0.0001"],
            "none (no tokens: the prompt enters block 0; no pictures: decoded they are more than cache_gb=0.0001)",
        ),
        (["train.epochs=1"], "none: no picture is read in a second epoch"),
        ([LAST, "mode=dry"], "none: no picture is read in a second epoch"),
        ([LAST, "mode=overfit", "cache=ram"], "none: no picture is read in a second epoch"),
    ],
    ids=str,
)
def test_a_run_says_in_one_line_what_it_keeps_and_why_not_more(photos, overrides, text):
    plan = planned(photos, *overrides)
    assert plan.text == text
    assert (plan.tokens is not None) == text.startswith(("tokens", "features"))


def test_half_of_the_free_memory_is_the_limit_of_what_is_not_asked_for(photos, monkeypatch):
    monkeypatch.setattr(caching, "free_memory", lambda: 6e5)
    text = "pictures, 0.2 MB, decoded once (no tokens: 0.4 MB are more than half of the free memory)"
    assert planned(photos, LAST).text == text
    assert planned(photos, LAST, "cache=ram").tokens is not None


def test_without_room_for_pictures_training_goes_on_and_says_so(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.setattr(os, "posix_fallocate", full_disk, raising=False)
    train(tmp_path, photos)
    (told,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("cache "))
    assert "; no pictures: " in told
    assert told.endswith("No space left on device)")


def test_pictures_that_are_no_files_are_not_kept_but_their_tokens_are(photos, monkeypatch):
    read = Classification.read
    monkeypatch.setattr(
        Classification, "read", lambda kind: {k: replace(samples, paths=()) for k, samples in read(kind).items()}
    )
    assert planned(photos).text == "none (no tokens: the prompt enters block 0; no pictures: they are no files)"
    assert planned(photos, LAST).text.startswith("tokens that enter block 4")


def test_the_summary_of_a_run_says_what_is_kept(tmp_path, photos, capsys):
    run_dir = train(tmp_path, photos, LAST)
    assert "\ncache      tokens that enter block 4, 0.4 MB in memory, computed once\n" in capsys.readouterr().out
    assert load_config(run_dir / "config.yaml").cache is CacheName.auto


def test_a_config_that_says_off_can_be_read_again(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_plain(to_config(configured(tmp_path, tmp_path, "cache=off")))))
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


def test_free_memory_is_that_of_the_tightest_group_that_this_process_is_in(tmp_path, monkeypatch):
    groups = [tmp_path, tmp_path / "slurm", tmp_path / "slurm" / "job"]
    for folder, limit in zip(groups, ("max", "5000", "9000"), strict=True):
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("3000")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 500\n")
    monkeypatch.setattr(caching, "_control_groups", lambda: groups)
    assert caching.free_memory() == 5000 - 3000 + 500


def test_the_groups_of_a_process_are_found_from_the_outermost_to_its_own(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda _: "1:cpu:/x\n0::/slurm/job\n")
    root = Path("/sys/fs/cgroup")
    assert caching._control_groups() == [root, root / "slurm", root / "slurm" / "job"]
    monkeypatch.setattr(Path, "read_text", lambda _: "0::/\n")
    assert caching._control_groups() == [root]

import json
import math
from unittest.mock import Mock

import pytest
import yaml

from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.validation import to_config
from vpt.runs.folder import RunFolder
from vpt.runs.summary import result_table
from vpt.storage.lock import LockedError


def folder_of(tmp_path, *overrides, **options):
    config = to_config(compose_config([f"run.root={tmp_path}/runs", "run.name=mine", *overrides]))
    return RunFolder(config, config, **options)


def make(tmp_path, *overrides, **options):
    with folder_of(tmp_path, *overrides, **options) as folder:
        folder.make()
    return folder


def finish(folder, metrics=None):
    folder.task.write_text("")
    folder.result_file.write_text(json.dumps({"epochs": 3, "metrics": metrics or {}}))


def test_the_name_of_a_folder_follows_run_name_or_the_config_and_in_a_sweep_both(tmp_path):
    def name(*overrides, **options):
        return folder_of(tmp_path, *overrides, **options).path.name

    unnamed, photos = ["run.name=null"], ["dataset=folder", "run.name=null"]
    harmless = ("num_workers=3", "run.save_minutes=1")
    names = {name(*unnamed, more) for more in ("seed=0", "seed=1", "prompt=shallow", *harmless)}
    assert sorted(name.rpartition("_")[0] for name in names) == ["fruit_bilinear", "fruit_bilinear", "fruit_shallow"]
    assert name() == "mine"
    assert name(*photos, "dataset.root=a/photos") != name(*photos, "dataset.root=b/photos")
    assert name("seed=0", is_sweep=True) != name("seed=1", is_sweep=True)
    assert name(is_sweep=True).startswith("mine_")
    assert name(*unnamed, "cache=off", is_sweep=True) != name(*unnamed, "cache=auto", is_sweep=True)


def test_a_config_that_changes_the_result_is_refused_and_others_are_allowed(tmp_path, capsys):
    make(tmp_path)
    for harmless in ("num_workers=3", "train.log_every=3", "cache=off", "run.save_minutes=1", "auto_batch=true"):
        make(tmp_path, harmless)
    with pytest.raises(ConfigError, match=r"train\.epochs was 20, is now 3; seed was 0, is now 1\).*fresh=true"):
        make(tmp_path, "train.epochs=3", "seed=1")
    assert not capsys.readouterr().err
    make(tmp_path, "device=cpu")
    assert "device was auto, is now cpu" in capsys.readouterr().err


def test_only_a_finished_run_can_be_extended_and_only_by_more_epochs(tmp_path):
    with pytest.raises(ConfigError, match="there is no run in"):
        make(tmp_path, "extend=true")
    folder = make(tmp_path)
    with pytest.raises(ConfigError, match=r"has not done its 20 epochs: type train\.epochs=20"):
        make(tmp_path, "extend=true", "train.epochs=40")
    finish(folder)
    with pytest.raises(ConfigError, match="extend=true to train it on"):
        make(tmp_path, "train.epochs=40")
    with pytest.raises(ConfigError, match="extend=true needs more"):
        make(tmp_path, "extend=true", "train.epochs=10")
    with pytest.raises(ConfigError, match="seed was 0, is now 1"):
        make(tmp_path, "extend=true", "train.epochs=40", "seed=1")
    with folder_of(tmp_path, "extend=true") as same:
        assert same.is_finished
    folder.result_file.write_text(json.dumps({"epochs": 3, "metrics": {}, "planned_epochs": 20}))
    with folder_of(tmp_path, "extend=true", "train.epochs=40") as longer:
        assert longer.is_extended
        (longer.path / "config.yaml").write_text(longer.config_text)  # and is killed
    with folder_of(tmp_path, "extend=true", "train.epochs=40") as longer:
        assert not longer.is_finished
        longer.make()
    assert {path.name for path in folder.path.glob("result*")} == {"result_20.json"}


@pytest.mark.parametrize("other", ["fresh=true", "mode=dry"])
def test_extending_a_run_and_starting_anew_exclude_each_other(tmp_path, other):
    with pytest.raises(ConfigError, match=other):
        make(tmp_path, "extend=true", other)


def test_data_may_move(tmp_path):
    for parent in ("a", "b"):
        make(tmp_path, "dataset=folder", f"dataset.root={tmp_path}/{parent}/photos")
    with pytest.raises(ConfigError, match=r"dataset\.root was photos, is now images"):
        make(tmp_path, "dataset=folder", f"dataset.root={tmp_path}/a/images")


def test_a_finished_run_is_recognised_and_fresh_renames_its_folder(tmp_path, capsys):
    folder = make(tmp_path)
    assert not folder.is_finished
    finish(folder)
    with folder_of(tmp_path) as again:
        assert again.is_finished
        assert again.result()["epochs"] == 3
    for _ in range(2):
        with folder_of(tmp_path, "fresh=true", "seed=5") as anew:
            assert not anew.is_finished
            anew.make()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mine", "mine_1", "mine_2"]
    assert (tmp_path / "runs/mine_1/result.json").exists()
    assert "mine existed and was renamed to" in capsys.readouterr().err


def test_null_in_a_result_is_read_as_nan_and_a_result_that_is_damaged_is_named(tmp_path):
    folder = make(tmp_path)
    finish(folder, {"val": {"map": 0.5, "map_large": None}})
    values = folder.result()["metrics"]["val"]
    assert values["map"] == 0.5
    assert math.isnan(values["map_large"])
    assert "-" in result_table({"val": values})
    for content in ("{", "[]", '{"epochs": 1}', '{"epochs": 1, "metrics": {"val": 3}}', "null"):
        folder.result_file.write_text(content)
        with pytest.raises(ConfigError, match=r"result\.json: damaged"):
            folder.result()


def test_a_finished_run_requires_no_lock_and_moved_data_are_not_trusted(tmp_path, monkeypatch):
    one, two = (["dataset=folder", f"dataset.root={tmp_path}/{parent}/photos"] for parent in "ab")
    finish(make(tmp_path, *one))
    with folder_of(tmp_path, *two) as again:
        assert not again.is_finished

    monkeypatch.setattr("vpt.runs.folder.locked", Mock(side_effect=OSError(30, "Read-only file system")))
    with folder_of(tmp_path, *one) as again:
        assert again.is_finished


def test_a_moved_root_of_runs_makes_no_other_run(tmp_path):
    finish(make(tmp_path, "run.name=null"))
    (tmp_path / "runs").rename(tmp_path / "moved")
    with folder_of(tmp_path, f"run.root={tmp_path}/moved", "run.name=null") as again:
        assert again.is_finished


def test_keys_missing_from_an_old_config_had_their_defaults_and_unknown_ones_are_named(tmp_path):
    path = make(tmp_path).path / "config.yaml"
    values = yaml.safe_load(path.read_text())
    del values["data"], values["train"]["clip_norm"]
    path.write_text(yaml.safe_dump(values))
    make(tmp_path)
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"train\.clip_norm was 1\.0, is now 2\.0"):
        make(tmp_path, "train.clip_norm=2")
    path.write_text(yaml.safe_dump({**values, "train": 3}))
    with pytest.raises(ConfigError, match="train was 3, is now None"):
        make(tmp_path)


def test_a_dry_run_is_made_anew_each_time_and_leaves_the_real_one_alone(tmp_path):
    finish(make(tmp_path))
    for overrides in (["seed=1"], ["seed=2"]):
        with folder_of(tmp_path, "mode=dry", *overrides) as dry:
            assert not dry.path.exists()
            dry.make()
            finish(dry)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mine", "mine_dry"]


def test_folders_of_other_things_are_never_touched(tmp_path):
    for name in ("photos", "photos_dry"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "1.jpg").write_text("a photo")
    for option in ("fresh=true", "fresh=false", "mode=dry"):
        name = "photos_dry" if option == "mode=dry" else "photos"
        with pytest.raises(ConfigError, match="no run folder"):
            make(tmp_path, "run.name=photos", option)
        assert [path.name for path in (tmp_path / "runs" / name).iterdir()] == ["1.jpg"]
    finish(make(tmp_path, "run.name=mine_dry"))
    with pytest.raises(ConfigError, match="mine_dry: exists and is no dry run"):
        make(tmp_path, "mode=dry")


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "\x00"])
def test_a_config_that_cannot_be_read_is_named(tmp_path, content):
    folder = make(tmp_path)
    (folder.path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml: .*fresh=true") as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)
    make(tmp_path, "fresh=true")
    assert (tmp_path / "runs" / "mine_1" / "config.yaml").read_text() == content
    assert not (tmp_path / "runs" / "mine_1" / ".lock").exists()


def test_a_second_process_is_refused(tmp_path, monkeypatch):
    make(tmp_path)

    monkeypatch.setattr("fcntl.flock", Mock(side_effect=BlockingIOError(11, "Resource temporarily unavailable")))
    with pytest.raises(LockedError, match="mine is in use by"):
        make(tmp_path)
    with pytest.raises(LockedError, match="new is in use by"):
        make(tmp_path, "run.name=new")
    assert (tmp_path / "runs" / "new" / ".lock").exists()  # as that of a process which was as quick
    with pytest.raises(LockedError, match="new is in use by"):
        make(tmp_path, "run.name=new")


def test_a_folder_on_a_full_disk_is_named(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setattr("vpt.runs.folder.locked", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match="mine: cannot be locked: No space"):
        make(tmp_path)


def test_a_process_that_was_slower_does_not_take_the_folder_of_another_config(tmp_path):
    with folder_of(tmp_path) as slower:
        make(tmp_path, "seed=7")
        with pytest.raises(ConfigError, match="seed was 7, is now 0"):
            slower.make()


def test_files_of_a_process_that_was_killed_before_its_first_checkpoint_are_removed(tmp_path):
    path = folder_of(tmp_path).path
    path.mkdir(parents=True)
    names = [".lock", ".config.yaml.x1y2", ".next.checkpoint.x1y2", ".task.safetensors.x1y2", ".result.json.x1y2"]
    for leftovers in (names, ["metrics.jsonl", "events.out.tfevents.1.a.0"]):
        for name in leftovers:
            (path / name).write_text("old")
        make(tmp_path)
        assert [inner.name for inner in path.iterdir()] == ["config.yaml"]
    for name in ("metrics.jsonl", "last.checkpoint"):
        (path / name).write_text("old")
    make(tmp_path)
    assert (path / "metrics.jsonl").read_text() == "old"


def test_a_root_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.root=.*file: Not a directory; choose a folder"):
        make(tmp_path, f"run.root={tmp_path}/file", "run.name=mine")

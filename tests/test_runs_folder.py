import json
import math

import pytest
import yaml

from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.saved import conceal
from vpt.config.validation import to_config
from vpt.runs.folder import RunFolder
from vpt.runs.summary import result_table
from vpt.storage.lock import LockedError


def config_of(tmp_path, *overrides):
    return to_config(compose_config([f"run.root={tmp_path}/runs", *overrides]))


def folder_of(tmp_path, *overrides, **options):
    config = config_of(tmp_path, *overrides)
    return RunFolder(config, config, **options)


def begin(tmp_path, *overrides, **options):
    with folder_of(tmp_path, *overrides, **options) as folder:
        folder.make()
    return folder


def finish(folder, metrics=None):
    folder.task.write_text("")
    folder.result_file.write_text(json.dumps({"epochs": 3, "metrics": metrics or {}}))


def test_without_a_name_each_config_has_a_folder_of_its_own(tmp_path):
    names = {
        begin(tmp_path, *overrides).path.name
        for overrides in ([], [], ["seed=1"], ["prompt=shallow"], ["num_workers=3"], ["run.save_minutes=1"])
    }
    assert sorted(name.rpartition("_")[0] for name in names) == ["fruit_bilinear", "fruit_bilinear", "fruit_shallow"]


def test_without_a_name_the_same_folder_name_elsewhere_is_another_data_set(tmp_path):
    one, two = (
        folder_of(tmp_path, "dataset=folder", f"dataset.root={tmp_path}/{parent}/photos").path for parent in "ab"
    )
    assert one != two


def test_a_name_is_that_of_the_folder_but_in_a_sweep_each_run_has_its_own(tmp_path):
    assert folder_of(tmp_path, "run.name=mine").path.name == "mine"
    one, two = (folder_of(tmp_path, "run.name=mine", f"seed={seed}", is_sweep=True).path.name for seed in (0, 1))
    assert one != two
    assert {one[:5], two[:5]} == {"mine_"}


def test_what_would_change_the_result_is_refused_with_its_keys_and_what_would_not_is_allowed(tmp_path):
    begin(tmp_path, "run.name=mine")
    for harmless in ("num_workers=3", "train.log_every=3", "cache=off", "run.save_minutes=1", "auto_batch=true"):
        begin(tmp_path, "run.name=mine", harmless)
    with pytest.raises(
        ConfigError,
        match=r"train\.epochs was 20, is now 3; seed was 0, is now 1\); give .* run\.name=NAME, or type fresh=true",
    ):
        begin(tmp_path, "run.name=mine", "train.epochs=3", "seed=1")


def test_another_device_is_allowed_and_told(tmp_path, capsys):
    begin(tmp_path, "run.name=mine")
    begin(tmp_path, "run.name=mine", "device=cpu")
    assert "device was auto, is now cpu: last digits of numbers may differ" in capsys.readouterr().err


def test_data_may_move(tmp_path):
    for parent in ("a", "b"):
        begin(tmp_path, "run.name=mine", "dataset=folder", f"dataset.root={tmp_path}/{parent}/photos")
    with pytest.raises(ConfigError, match=r"dataset\.root was photos, is now pictures"):
        begin(tmp_path, "run.name=mine", "dataset=folder", f"dataset.root={tmp_path}/a/pictures")


def test_a_finished_run_is_known_and_fresh_puts_it_away_whole(tmp_path, capsys):
    folder = begin(tmp_path, "run.name=mine")
    assert not folder.is_finished
    finish(folder)
    with folder_of(tmp_path, "run.name=mine") as again:
        assert again.is_finished
        assert again.result()["epochs"] == 3
    for _ in range(2):
        with folder_of(tmp_path, "run.name=mine", "fresh=true", "seed=5") as anew:
            assert not anew.is_finished
            anew.make()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mine", "mine_1", "mine_2"]
    assert (tmp_path / "runs/mine_1/result.json").exists()
    assert "mine was there; it is" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"epochs": 1}', '{"epochs": 1, "metrics": {"val": 3}}', "null"])
def test_a_result_that_is_damaged_is_named(tmp_path, content):
    folder = begin(tmp_path, "run.name=mine")
    finish(folder)
    folder.result_file.write_text(content)
    with folder_of(tmp_path, "run.name=mine") as again, pytest.raises(ConfigError, match=r"result\.json: damaged"):
        again.result()


def test_a_metric_that_there_was_nothing_for_is_nan(tmp_path):
    folder = begin(tmp_path, "run.name=mine")
    finish(folder, {"val": {"map": 0.5, "map_large": None}})
    values = folder.result()["metrics"]["val"]
    assert values["map"] == 0.5
    assert math.isnan(values["map_large"])
    assert "-" in result_table({"val": values})


def test_a_finished_run_is_told_without_a_lock_or_the_right_to_write(tmp_path, monkeypatch):
    finish(begin(tmp_path, "run.name=mine"))

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("vpt.runs.folder.locked", refuse)
    with folder_of(tmp_path, "run.name=mine") as again:
        assert again.is_finished


def test_of_a_finished_run_data_in_another_place_are_looked_at_first(tmp_path):
    overrides = ["run.name=mine", "dataset=folder"]
    finish(begin(tmp_path, *overrides, f"dataset.root={tmp_path}/a/photos"))
    with folder_of(tmp_path, *overrides, f"dataset.root={tmp_path}/b/photos") as again:
        assert not again.is_finished


def test_where_runs_lie_makes_no_other_run(tmp_path):
    folder = begin(tmp_path)
    finish(folder)
    (tmp_path / "runs").rename(tmp_path / "moved")
    config = to_config(compose_config([f"run.root={tmp_path}/moved"]))
    with RunFolder(config, config) as again:
        assert again.path.name == folder.path.name
        assert again.is_finished


def test_keys_that_are_not_in_an_old_config_had_their_defaults_and_unknown_ones_are_named(tmp_path):
    path = begin(tmp_path, "run.name=mine").path / "config.yaml"
    values = yaml.safe_load(path.read_text())
    del values["data"], values["train"]["clip_norm"]
    path.write_text(yaml.safe_dump(values))
    begin(tmp_path, "run.name=mine")
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"train\.clip_norm was 1\.0, is now 2\.0"):
        begin(tmp_path, "run.name=mine", "train.clip_norm=2")
    path.write_text(yaml.safe_dump({**values, "train": 3}))
    with pytest.raises(ConfigError, match="train was 3, is now None"):
        begin(tmp_path, "run.name=mine")


def test_in_a_sweep_also_what_changes_no_result_makes_a_folder(tmp_path):
    one, two = (folder_of(tmp_path, f"cache={cache}", is_sweep=True).path for cache in ("off", "auto"))
    assert one != two


def test_a_dry_run_is_made_anew_each_time_and_leaves_the_real_one_alone(tmp_path):
    finish(begin(tmp_path, "run.name=mine"))
    for overrides in (["seed=1"], ["seed=2"]):
        with folder_of(tmp_path, "run.name=mine", "mode=dry", *overrides) as dry:
            assert not dry.path.exists()
            dry.make()
            finish(dry)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mine", "mine_dry"]


def test_a_real_run_is_never_taken_for_a_dry_one(tmp_path):
    finish(begin(tmp_path, "run.name=mine_dry"))
    with pytest.raises(ConfigError, match="mine_dry: is there, and no dry run"):
        begin(tmp_path, "run.name=mine", "mode=dry")


def test_a_folder_of_something_else_is_never_touched(tmp_path):
    for name in ("photos", "photos_dry"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "1.jpg").write_text("a photo")
    for option in ("fresh=true", "fresh=false", "mode=dry"):
        name = "photos_dry" if option == "mode=dry" else "photos"
        with pytest.raises(ConfigError, match="is there, and no run folder; choose another"):
            begin(tmp_path, "run.name=photos", option)
        assert [path.name for path in (tmp_path / "runs" / name).iterdir()] == ["1.jpg"]


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "\x00"])
def test_a_config_that_cannot_be_read_is_named(tmp_path, content):
    folder = begin(tmp_path, "run.name=mine")
    (folder.path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml: .*put it away with fresh=true") as caught:
        begin(tmp_path, "run.name=mine")
    assert "\n" not in str(caught.value)
    begin(tmp_path, "run.name=mine", "fresh=true")
    assert (tmp_path / "runs" / "mine_1" / "config.yaml").read_text() == content
    assert not (tmp_path / "runs" / "mine_1" / ".lock").exists()


def test_a_second_process_is_refused(tmp_path, monkeypatch):
    begin(tmp_path, "run.name=mine")

    def refuse(*_):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(LockedError, match="mine is in use by"):
        begin(tmp_path, "run.name=mine")
    with pytest.raises(LockedError, match="new is in use by"):
        begin(tmp_path, "run.name=new")
    assert (tmp_path / "runs" / "new" / ".lock").exists()  # as that of a process which was as quick
    with pytest.raises(LockedError, match="new is in use by"):
        begin(tmp_path, "run.name=new")


def test_a_process_that_was_slower_does_not_take_the_folder_of_another_config(tmp_path):
    with folder_of(tmp_path, "run.name=mine") as slower:
        begin(tmp_path, "run.name=mine", "seed=7")
        with pytest.raises(ConfigError, match="seed was 7, is now 0"):
            slower.make()


def test_what_a_run_left_before_its_first_checkpoint_is_removed(tmp_path):
    folder = begin(tmp_path, "run.name=mine")
    for name in ("metrics.jsonl", "events.out.tfevents.1.a.0"):
        (folder.path / name).write_text("old")
    begin(tmp_path, "run.name=mine")
    assert [path.name for path in folder.path.iterdir()] == ["config.yaml"]
    for name in ("metrics.jsonl", "last.checkpoint"):
        (folder.path / name).write_text("old")
    begin(tmp_path, "run.name=mine")
    assert (folder.path / "metrics.jsonl").read_text() == "old"


def test_a_process_that_was_killed_while_it_made_the_folder_leaves_no_trace(tmp_path):
    folder = folder_of(tmp_path, "run.name=mine").path
    folder.mkdir(parents=True)
    for name in (".lock", ".config.yaml.x1y2", ".next.checkpoint.x1y2", ".task.safetensors.x1y2", ".result.json.x1y2"):
        (folder / name).write_text("")
    begin(tmp_path, "run.name=mine")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.root=.*file: .*choose a folder that can be written to"):
        begin(tmp_path, f"run.root={tmp_path}/file", "run.name=mine")


def test_values_from_the_environment_are_used_and_not_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", "s3cret")
    overrides = [
        f"run.root={tmp_path}/runs",
        "run.name=mine",
        "dataset=folder",
        "dataset.root='${oc.env:CANARY}'",
        "dataset.title='${dataset.root}'",
        "device='${oc.env:NOT_SET,cpu}'",
    ]
    composed = compose_config(overrides)
    config = to_config(composed)
    assert config.dataset.root == config.dataset.title == "s3cret"
    assert config.device == "cpu"
    for _ in range(2):
        with RunFolder(config, conceal(config, composed)) as folder:
            folder.make()
    text = (folder.path / "config.yaml").read_text()
    assert "s3cret" not in text
    assert "root: ${oc.env:CANARY}" in text
    assert "title: ${dataset.root}" in text

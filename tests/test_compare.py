"""python -m vpt.compare: runs and resume, tables, files, refusals."""

import csv
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
from functools import partial

import pytest

import vpt.compare.__main__
from tests.helpers import ROOT, SMALL_COMPARISON, exit_code_of, train_with
from vpt import build
from vpt.compare import run_predictions, runs
from vpt.models.task_file import read_task
from vpt.models.tuning import count_parameters
from vpt.train import training as train

METHODS = ["linear", "bias", "few"]
compare = partial(exit_code_of, vpt.compare.__main__)


def words_of(photos, output, *words):
    """The words of a command; `words` replace the defaults."""
    own = ["methods=[linear,bias]", "define.few=prompt=deep prompt.num_tokens=3", "seeds=2", "rates=[1,30]"]
    given = {word.partition("=")[0] for word in words}
    rest = [f"output={output}", "dataset=folder", f"dataset.root={photos}", *SMALL_COMPARISON]
    return [*(word for word in [*own, *rest] if word.partition("=")[0] not in given), *words]


@pytest.fixture(scope="module")
def made(tmp_path_factory, photos):
    """The folder of a comparison of three methods, two rates and two seeds."""
    output = tmp_path_factory.mktemp("made") / "colours"
    vpt.compare.__main__.compare(vpt.compare.__main__.read_options(words_of(photos, output)))
    return output


@pytest.fixture
def trained(monkeypatch):
    """The names of the run folders in which training ran."""
    names, whole = [], train._Training.run

    def counted(training):
        names.append(training.folder.path.name)
        whole(training)

    monkeypatch.setattr(train._Training, "run", counted)
    return names


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def result_of(output, run):
    return json.loads((output / run["folder"] / "result.json").read_text())


def test_runs_csv_has_the_results_of_every_run(made):
    lines = read(made / "runs.csv")
    expected = {(name, seed, rate) for name in METHODS for seed, rate in ((0, 1.0), (0, 30.0))}
    chosen = {line["method"]: float(line["rate"]) for line in lines if line["chosen"] == "True"}
    expected |= {(name, 1, rate) for name, rate in chosen.items()}
    assert {(line["method"], int(line["seed"]), float(line["rate"])) for line in lines} == expected
    assert len(lines) == 9
    for line in lines:
        result = result_of(made, line)
        metrics = {
            f"{split}_{name}": value for split in ("val", "test") for name, value in result["metrics"][split].items()
        }
        assert {name: float(line[name]) for name in metrics} == metrics
        assert int(line["epochs"]) == result["epochs"] == 2
        assert int(line["task_bytes"]) == (made / line["folder"] / "task.safetensors").stat().st_size
        file = made / line["folder"] / run_predictions.FILE
        assert file.exists() == (line["chosen"] == "True" and line["seed"] == "0")
        if file.exists():
            predictions = json.loads(file.read_text())["predictions"]  # four test images of each class
            assert sum(label == index // 4 for index, label in enumerate(predictions)) / 12 == pytest.approx(
                float(line["test_top1"])
            )


def test_the_table_summarises_the_runs_chosen_on_val(made):
    table, lines = read(made / "table.csv"), read(made / "runs.csv")
    assert [row["method"] for row in table] == METHODS
    for row in table:
        chosen = [line for line in lines if line["method"] == row["method"] and line["chosen"] == "True"]
        assert [line["seed"] for line in chosen] == ["0", "1"]
        tops = [result_of(made, line)["metrics"]["test"]["top1"] for line in chosen]
        assert float(row["mean"]) == pytest.approx(sum(tops) / 2)
        assert (float(row["min"]), float(row["max"])) == (min(tops), max(tops))
        assert float(row["std"]) == pytest.approx(statistics.stdev(tops))
        seconds = [result_of(made, line)["seconds"] for line in chosen]
        assert float(row["train_seconds"]) == pytest.approx(sum(seconds) / 2)
        assert (row["split"], row["metric"], row["runs"], row["failed"]) == ("test", "top1", "2", "")
        search = [line for line in lines if line["method"] == row["method"] and line["seed"] == "0"]
        best = max(search, key=lambda line: (float(line["val_top1"]), -float(line["val_loss"])))
        assert float(row["rate"]) == float(best["rate"])
        assert row["rate_at_edge"] == "True"  # of two rates each is at an edge


def test_costs_are_those_of_the_models(made):
    rows, lines = ({row["method"]: row for row in read(made / name)} for name in ("table.csv", "runs.csv"))
    for name, row in rows.items():
        model = build.load_run(made / lines[name]["folder"], device="cpu").model
        tuned = sum(parameter.numel() for parameter in model.head.parameters())
        assert int(row["trained_head"]) == tuned
        if name == "few":
            assert int(row["trained_prompt"]) == count_parameters(model).prompt
            tuned += count_parameters(model).prompt
        if name == "bias":
            of_file = read_task(made / lines[name]["folder"] / "task.safetensors")
            assert of_file.tuned_backbone
            tuned += int(row["trained_backbone"])
        assert int(row["trained"]) == tuned
        assert float(row["switch_ms"]) > 0
    assert int(rows["bias"]["trained_backbone"]) > 0
    assert int(rows["bias"]["backward_bytes"]) > int(rows["linear"]["backward_bytes"]) > 0
    assert int(rows["bias"]["step_flops"]) > int(rows["linear"]["step_flops"]) > 0
    assert float(rows["linear"]["inference_flops_vs_bare"]) == 1
    assert [rows[name]["shares_batches"] for name in METHODS] == ["True", "False", "True"]


@pytest.mark.slow
def test_the_same_command_repeats_nothing(monkeypatch, capsys, photos, made, trained):
    before = [(made / name).read_bytes() for name in ("table.csv", "runs.csv")]
    for module, name in ((run_predictions, "_predict"), (runs, "measure_cost")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("it is repeated"))
    assert compare(monkeypatch, *words_of(photos, made)) == 0
    assert trained == []
    assert [(made / name).read_bytes() for name in ("table.csv", "runs.csv")] == before
    text = capsys.readouterr().out
    assert text.count("(finished before)") == 9
    assert str(made) in text.splitlines()[-1]


@pytest.mark.slow
def test_one_more_seed_trains_only_its_runs(monkeypatch, photos, made, trained):
    assert compare(monkeypatch, *words_of(photos, made, "seeds=3")) == 0
    assert sorted(name.partition("_")[0] for name in trained) == sorted(METHODS)
    assert all("_seed2_" in name for name in trained)
    assert compare(monkeypatch, *words_of(photos, made)) == 0
    assert len(trained) == 3


@pytest.mark.slow
def test_a_kill_loses_only_the_current_run(tmp_path, monkeypatch, photos, trained):
    words = words_of(photos, tmp_path / "c", "rates=1")

    def child():
        sys.stdout = sys.stderr = (tmp_path / "log").open("w")
        counted = train._Training.run

        def dying(training):
            if len(trained) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            counted(training)

        train._Training.run = dying
        vpt.compare.__main__.compare(vpt.compare.__main__.read_options(words))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (tmp_path / "c" / "report.html").exists()
    assert compare(monkeypatch, *words) == 0
    assert [name.rpartition("_")[0] for name in trained] == ["bias_seed0", "bias_seed1", "few_seed0", "few_seed1"]
    assert (tmp_path / "c" / "report.html").exists()


@pytest.mark.slow
def test_a_signal_exits_with_75_and_the_same_command_resumes(tmp_path, monkeypatch, capsys, photos, trained):
    words = words_of(photos, tmp_path / "c", "methods=linear", "seeds=1", "rates=1")
    counted = train._Training.run

    def stopping(training):
        if trained:
            signal.raise_signal(signal.SIGTERM)
        counted(training)

    with monkeypatch.context() as patch:
        patch.setattr(train._Training, "run", stopping)
        assert compare(patch, *words) == 75
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert compare(monkeypatch, *words) == 0
    assert [name.rpartition("_")[0] for name in trained] == ["linear_seed0", "few_seed0"]


@pytest.mark.slow
def test_a_rate_that_diverges_is_reported_and_another_is_chosen(tmp_path, monkeypatch, capsys, photos):
    words = words_of(photos, tmp_path / "c", "methods=few", "rates=[1,1e38]", "seeds=1")
    assert compare(monkeypatch, *words) == 0
    (row,) = read(tmp_path / "c" / "table.csv")
    assert (float(row["rate"]), row["failed"]) == (1.0, "")
    failed = read(tmp_path / "c" / "runs.csv")[1]
    assert (failed["chosen"], failed["test_top1"]) == ("False", "")
    assert "step 2, epoch 1" in failed["failed"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    failed: ")]
    assert "step 2, epoch 1 (lr/prompt 6.7e+35, lr/head 0.00067)" in line
    assert ".png" not in line


@pytest.mark.slow
def test_a_method_without_a_finished_run_is_a_row_with_the_reason(tmp_path, monkeypatch, capsys, photos):
    words = words_of(photos, tmp_path / "c", "methods=[few,linear]", "rates=1", "optim.prompt_lr=1e36")
    assert compare(monkeypatch, *words) == 1
    few, linear = read(tmp_path / "c" / "table.csv")
    assert (few["mean"], few["runs"], linear["runs"]) == ("", "0", "2")
    assert few["failed"].startswith("2 failed: ")
    assert "few: 2 failed: " in capsys.readouterr().out
    words = words_of(photos, tmp_path / "c", "methods=few", "rates=[1,2]", "seeds=1", "optim.prompt_lr=1e36")
    assert compare(monkeypatch, *words) == 1
    (few,) = read(tmp_path / "c" / "table.csv")
    assert (few["rate"], few["runs"]) == ("", "0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["methods=[linaer]"], "did you mean linear"),
        (["methods=[linear,linear]"], "methods: linear"),
        (["methods=linear", "methods=bias"], "methods is typed twice"),
        (["methods="], "methods="),
        (["method=[linear]"], "did you mean methods"),
        (["shot=3"], "did you mean shots"),
        (["prompt.num_tokns=3"], "did you mean prompt.num_tokens"),
        (["seeds=0"], "seeds=0"),
        (["seeds=[1,1]"], "seeds=1,1"),
        (["seeds"], "key=value"),
        (["rates=[1,-1]"], "rates=-1"),
        (["shots=[0]"], "shots=0"),
        (["shots=[1"], "shots=[1"),
        (["shots=5", "dataset.num_per_class=3"], "dataset.num_per_class=3"),
        (["shots=99"], "num_per_class=99"),
        (["seed=3"], "seeds=3"),
        (["run.name=a"], "output=FOLDER"),
        (["mode=dry"], "mode=dry"),
        (["-m"], "-m"),
        (["methods=prompt_deep", "prompt=shallow"], "prompt=shallow: method prompt_deep"),
        (["define.few="], "define.few="),
        (["define=3"], "define.NAME="),
        (["define.linear=tuning=bias"], "define.linear"),
        (["define.few=tuning=bais"], "did you mean bias"),
        (["define.few=seed=1"], "define.few: seed"),
        (["define.few=fast"], "key=value"),
        (["define.few=prompt=deep prompt.blocks=last:9"], "method few: prompt.blocks=last:9"),
        (["shots=1", "define.many=prompt=deep prompt.num_tokens=9999"], "method many: prompt.num_tokens=9999"),
        (["dataset=folder", "dataset.root=nowhere"], "dataset.root=nowhere"),
        (["output="], "output="),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    names = {word.partition("=")[0] for word in words}
    assert compare(monkeypatch, *words, *([] if names & {"methods", "method"} else ["methods=linear"])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_before_anything_is_measured(monkeypatch, capsys, tmp_path):
    (tmp_path / "comparison.json").write_text("{}")
    code = "import sys; from pathlib import Path; from vpt.storage.lock import locked\n"
    code += "with locked(Path(sys.argv[1], '.lock'), Path(sys.argv[1])): print('held', flush=True); input()"
    monkeypatch.setattr(runs, "measure_cost", lambda *_: pytest.fail("measured"))
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert compare(monkeypatch, "+experiment=quickstart", "methods=linear", f"output={tmp_path}") == 2
        holder.communicate("\n")
    assert f"{tmp_path} is in use by process {holder.pid}" in capsys.readouterr().err


def test_a_folder_with_other_files_is_refused(monkeypatch, capsys, tmp_path, photos):
    (tmp_path / "table.csv").write_text("mine")
    assert compare(monkeypatch, *words_of(photos, tmp_path)) == 2
    assert f"output={tmp_path}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


@pytest.mark.slow
def test_without_a_test_split_val_is_reported_with_a_warning(monkeypatch, capsys, tmp_path, photos):
    words = words_of(photos / "train", tmp_path / "c", "methods=linear", "seeds=1", "rates=1")
    assert compare(monkeypatch, *words, "dataset.test_fraction=0") == 0
    assert "no test split" in capsys.readouterr().out
    assert {row["split"] for row in read(tmp_path / "c" / "table.csv")} == {"val"}


@pytest.mark.slow
def test_boxes_are_compared_too(tmp_path, monkeypatch, capsys, boxes):
    words = ["dataset=coco", f"dataset.root={boxes}", "train.epochs=1", "train.batch_size=4", "num_workers=0"]
    words += ["head.channels=16", "backbone.img_size=96", "device=cpu", "seeds=2", f"output={tmp_path / 'c'}"]
    assert compare(monkeypatch, *words, "methods=[linear,prompt_deep]") == 0
    rows = read(tmp_path / "c" / "table.csv")
    assert [(row["metric"], row["runs"]) for row in rows] == [("map", "2")] * 2
    assert all(float(row["inference_flops_vs_bare"]) >= 1 for row in rows)
    assert int(rows[0]["trained_neck"]) > 0
    for line in read(tmp_path / "c" / "runs.csv"):
        if line["seed"] == "0":
            found = json.loads((tmp_path / "c" / line["folder"] / run_predictions.FILE).read_text())
            assert [len(of_class) for of_class in found["precision"].values()] == [2, 2]
            known = [value for value in found["precision"]["map"] if value is not None]
            assert sum(known) / len(known) == pytest.approx(float(line["test_map"]))
    assert compare(monkeypatch, *words, "methods=linear", "shots=1") == 2
    assert "dataset.num_per_class=1 is for classification" in capsys.readouterr().err


def test_a_run_is_that_of_the_training_command(made, tmp_path, photos):
    key = ("bias", "0", "1.0")
    (line,) = [line for line in read(made / "runs.csv") if (line["method"], line["seed"], line["rate"]) == key]
    words = ["dataset=folder", f"dataset.root={photos}", *SMALL_COMPARISON, "tuning=bias"]
    train_with(*words, f"run.root={tmp_path}", "run.name=x")
    folders = made / line["folder"], tmp_path / "x"
    metrics = [(folder / "metrics.jsonl").read_bytes() for folder in folders]
    assert metrics[0] == metrics[1]
    sizes = [(folder / "task.safetensors").stat().st_size for folder in folders]
    assert sizes[0] == pytest.approx(sizes[1], abs=200)  # the title of the run is in the file

import json
import re

import pytest
import torch

import vpt
from tests.helpers import SMALL_RUN, call, train_with
from vpt.config.errors import ConfigError
from vpt.models.task_file import open_task
from vpt.prune.__main__ import PruneOptions, prune_run

OPTIONS = [*SMALL_RUN, "train.batch_size=4", "num_workers=0", "prompt.num_tokens=4", "optim.prompt_lr=0.1"]


@pytest.fixture(scope="module")
def runs(photos, boxes, tmp_path_factory):
    """A run of each kind of task, and one without a prompt."""
    root = tmp_path_factory.mktemp("runs")
    classes = ["dataset=folder", f"dataset.root={photos}", *OPTIONS]
    find = ["dataset=coco", f"dataset.root={boxes}", "head.channels=16", "backbone.img_size=96", *OPTIONS]
    return {
        "classification": train_with(*classes, f"run.root={root}/classes"),
        "detection": train_with(*find, "train.epochs=1", f"run.root={root}/boxes"),
        "no prompt": train_with(*classes, "prompt=none", "train.epochs=1", f"run.root={root}/none"),
    }


@pytest.mark.parametrize(("kind", "select"), [("classification", "top1"), ("detection", "map")])
def test_smaller_task_files_are_written_with_what_they_cost(runs, kind, select, tmp_path, capsys):
    output = tmp_path / "pruned"
    metrics = prune_run(PruneOptions(str(runs[kind]), (1, 3), str(output)))
    assert {path.name for path in output.iterdir()} == {
        "prompt_3.safetensors",
        "prompt_1.safetensors",
        "prune.json",
    }
    result = json.loads((runs[kind] / "result.json").read_text())["metrics"]
    assert list(metrics) == [4, 3, 1]
    for split, values in result.items():
        assert metrics[4][split][select] == pytest.approx(values[select], abs=1e-6)  # all tokens: as the run ended
    written = json.loads((output / "prune.json").read_text())
    assert [entry["num_tokens"] for entry in written["pruned"]] == [4, 3, 1]
    scores, (_, whole) = torch.tensor(written["scores"]), open_task(runs[kind] / "task.safetensors")
    assert scores.shape == whole["prompt.tokens"].shape[:2]
    assert len(written["blocks"]) == len(scores)
    for keep in (3, 1):
        path = output / f"prompt_{keep}.safetensors"
        metadata, tensors = open_task(path)
        kept = scores.topk(keep, dim=1).indices.sort(dim=1).values
        assert torch.equal(tensors["prompt.tokens"], whole["prompt.tokens"].take_along_dim(kept[..., None], dim=1))
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in whole.items() if name != "prompt.tokens")
        assert metadata.metrics["val"][select] == pytest.approx(metrics[keep]["val"][select])
        assert metadata.note == f"Pruned from 4 to {keep} tokens in a block."
    said = capsys.readouterr().out
    assert re.search(rf"tokens +val {select} +change +test {select} +change", said)
    assert "prompt_1.safetensors (" in said


def test_a_pruned_prompt_trains_further(runs, photos, tmp_path):
    prune_run(PruneOptions(str(runs["classification"]), (2,), str(tmp_path)))
    start = tmp_path / "prompt_2.safetensors"
    options = [*OPTIONS, "prompt.num_tokens=2", f"prompt.init_from={start}", "optim.prompt_lr=1e-9", "train.epochs=1"]
    folder = train_with("dataset=folder", f"dataset.root={photos}", *options, f"run.root={tmp_path}/runs")
    tokens = [open_task(path)[1]["prompt.tokens"] for path in (start, folder / "task.safetensors")]
    torch.testing.assert_close(*tokens, rtol=1e-3, atol=1e-6)


def test_test_pictures_are_read_last_and_never_to_score(runs, tmp_path, monkeypatch):
    from vpt.engine import trainer
    from vpt.prune import token_importance as pruning

    order, evaluate, score = [], trainer.evaluate, pruning.token_importance
    monkeypatch.setattr(
        trainer, "evaluate", lambda *a, **options: order.append(options["description"]) or evaluate(*a, **options)
    )
    monkeypatch.setattr(pruning, "token_importance", lambda *a: order.append("scores") or score(*a))
    prune_run(PruneOptions(str(runs["classification"]), (3, 1), str(tmp_path)))
    numbers = ("4 tokens", "3 tokens", "1 tokens")
    assert order == ["scores", *(f"{split}, {number}" for split in ("val", "test") for number in numbers)]


@pytest.mark.parametrize(
    ("kind", "keep", "message"),
    [
        ("no prompt", (2,), "has no prompt that could be pruned; name a run with one"),
        ("classification", (4, 2), "keep=4: the prompt of .* has 4 tokens in a block, so keep less"),
    ],
)
def test_what_cannot_be_pruned_is_refused_and_nothing_is_written(runs, kind, keep, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        prune_run(PruneOptions(str(runs[kind]), keep, str(tmp_path / "pruned")))
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run=nowhere", "keep=2", "output=pruned"],
            "error: run=nowhere: not a run folder, it has no task.safetensors",
        ),
        (["run=nowhere", "keep=2", "output=file.txt"], "error: output=file.txt: is a file; name a folder"),
        (["run=nowhere", "kep=2"], "error: kep=2: not an option of the form key=value; did you mean keep?"),
        (["run=nowhere", "keep=2"], "error: output is needed: type output=..."),
    ],
)
def test_an_error_of_the_command_is_one_line(arguments, message, tmp_path):
    (tmp_path / "file.txt").touch()
    done = call(*arguments, cwd=tmp_path, module="vpt.prune")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{message}\n")


def test_a_bank_serves_prompts_of_all_sizes_side_by_side(runs, tmp_path):
    prune_run(PruneOptions(str(runs["classification"]), (3, 1), str(tmp_path)))
    bank = vpt.TaskBank("vit_nano_patch8_64")
    names = [bank.load(tmp_path / f"prompt_{keep}.safetensors") for keep in (3, 1)]
    images = torch.randn(2, 3, 64, 64)
    mixed = bank(images, names)
    for row, name in enumerate(names):
        model = vpt.load_task(tmp_path / f"{name}.safetensors", bank.vit)
        with torch.no_grad():
            torch.testing.assert_close(mixed[row], model(images)[row], rtol=1e-4, atol=1e-4)

"""python -m vpt.prune: smaller task files, their metrics, and refusals."""

import json
import re

import pytest
import torch

import vpt
from tests.helpers import SMALL_RUN, exit_code_of, train_with
from vpt.config.errors import ConfigError
from vpt.models.task_file import open_task
from vpt.prune import __main__ as command
from vpt.prune.__main__ import PruneOptions, prune_run

OPTIONS = [*SMALL_RUN, "train.batch_size=4", "num_workers=0", "prompt.num_tokens=4", "optim.prompt_lr=0.1"]


@pytest.fixture(scope="module")
def runs(photos, boxes, tmp_path_factory):
    """A run of each type of task, and one without a prompt."""
    root = tmp_path_factory.mktemp("runs")
    classes = ["dataset=folder", f"dataset.root={photos}", *OPTIONS]
    find = ["dataset=coco", f"dataset.root={boxes}", "head.channels=16", "backbone.img_size=96", *OPTIONS]
    return {
        "classification": train_with(*classes, f"run.root={root}/classes"),
        "detection": train_with(*find, "train.epochs=1", f"run.root={root}/boxes"),
        "no prompt": train_with(*classes, "prompt=none", "train.epochs=1", f"run.root={root}/none"),
    }


@pytest.mark.parametrize(("task_type", "select"), [("classification", "top1"), ("detection", "map")])
def test_pruning_writes_smaller_task_files_with_their_metrics(runs, task_type, select, tmp_path, capsys):
    output = tmp_path / "pruned"
    metrics = prune_run(PruneOptions(str(runs[task_type]), (1, 3), str(output)))
    assert {path.name for path in output.iterdir()} == {"prompt_3.safetensors", "prompt_1.safetensors", "prune.json"}
    result = json.loads((runs[task_type] / "result.json").read_text())["metrics"]
    assert list(metrics) == [4, 3, 1]
    for split, values in result.items():
        assert metrics[4][split][select] == pytest.approx(values[select], abs=1e-6)  # all tokens: as in training
    written = json.loads((output / "prune.json").read_text())
    assert [entry["num_tokens"] for entry in written["pruned"]] == [4, 3, 1]
    scores, (_, whole) = torch.tensor(written["scores"]), open_task(runs[task_type] / "task.safetensors")
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
    text = capsys.readouterr().out
    assert re.search(rf"tokens +val {select} +change +test {select} +change", text)
    assert "prompt_1.safetensors (" in text


def test_a_pruned_prompt_trains_further(runs, photos, tmp_path):
    prune_run(PruneOptions(str(runs["classification"]), (2,), str(tmp_path)))
    start = tmp_path / "prompt_2.safetensors"
    options = [*OPTIONS, "prompt.num_tokens=2", f"prompt.init_from={start}", "optim.prompt_lr=1e-9", "train.epochs=1"]
    folder = train_with("dataset=folder", f"dataset.root={photos}", *options, f"run.root={tmp_path}/runs")
    tokens = [open_task(path)[1]["prompt.tokens"] for path in (start, folder / "task.safetensors")]
    torch.testing.assert_close(*tokens, rtol=1e-3, atol=1e-6)


def test_test_is_read_last_and_never_scored(runs, tmp_path, monkeypatch):
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
    ("name", "keep", "message"),
    [("no prompt", (2,), "has no prompt"), ("classification", (4, 2), "keep=4: .* 4 tokens")],
)
def test_a_wrong_keep_is_refused_and_nothing_is_written(runs, name, keep, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        prune_run(PruneOptions(str(runs[name]), keep, str(tmp_path / "pruned")))
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=nowhere", "keep=2", "output=pruned"], "run=nowhere"),
        (["run=nowhere", "keep=2", "output=file.txt"], "output=file.txt: is a file"),
        (["run=nowhere", "kep=2"], "did you mean keep"),
        (["run=nowhere", "keep=2"], "output"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(monkeypatch, capsys, words, message, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").touch()
    assert exit_code_of(command, monkeypatch, *words) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert message in printed.err


def test_a_bank_serves_prompts_of_different_sizes(runs, tmp_path):
    prune_run(PruneOptions(str(runs["classification"]), (3, 1), str(tmp_path)))
    bank = vpt.TaskBank("vit_nano_patch8_64")
    names = [bank.load(tmp_path / f"prompt_{keep}.safetensors") for keep in (3, 1)]
    images = torch.randn(2, 3, 64, 64)
    mixed = bank(images, names)
    for row, name in enumerate(names):
        model = vpt.load_task(tmp_path / f"{name}.safetensors", bank.vit)
        with torch.no_grad():
            torch.testing.assert_close(mixed[row], model(images)[row], rtol=1e-4, atol=1e-4)

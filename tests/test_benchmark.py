"""The benchmark on tiny models: counts, files, refusals. No test checks a time."""

import csv
import json
import sys
from functools import partial

import pytest
import torch
from PIL import Image

from tests.helpers import exit_code_of
from vpt.benchmark import __main__ as benchmark
from vpt.benchmark import subjects
from vpt.config.command_line import parse_options

TINY = ["backbone=vit_tiny_patch16_224", "img_size=32", "batch_size=2", "rounds=1", "num_tokens=5,2", "device=cpu"]


def read_options(*arguments):
    return parse_options(benchmark.BenchmarkOptions, [*TINY, *arguments], benchmark.USAGE)


call = partial(exit_code_of, benchmark)


def build_subjects(*arguments, log=print):
    return list(subjects.build_subjects(read_options(*arguments), torch.device("cpu"), log))


def read_rows(folder):
    rows = csv.DictReader((folder / "benchmark.csv").read_text().splitlines())
    return {(row["subject"], row["num_tokens"]): row for row in rows}


def number(row, column):
    return float(row[column])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    names = ",".join(name for name in benchmark.SUBJECTS if name != "lora")  # peft takes seconds to import
    assert benchmark.benchmark(read_options(f"only={names}", f"output={folder}", "peak_tflops=1"))
    return folder


def test_every_subject_is_measured_for_every_number_of_tokens(measured):
    singles = ["bare", "linear", "full"]
    each = [(name, num) for name in ("deep", "deep_concat", "shallow", "shallow_concat") for num in ("2", "5")]
    last = [("last_concat", "10"), ("last_cached", "10")]
    rows = read_rows(measured)
    assert list(rows) == [*((name, "") for name in singles), *each, *last]
    for key, row in rows.items():
        assert number(row, "step_s") > 0
        assert number(row, "step_peak_fraction") > 0
        assert (row["forward_s"] == "") == (key[0] == "last_cached")


def test_counts_are_those_of_the_models(measured):
    rows = read_rows(measured)
    head = 192 * 100 + 100
    assert number(rows["bare", ""], "tuned_parameters") == head
    assert number(rows["deep", "5"], "tuned_parameters") == head + 12 * 5 * 192
    assert number(rows["shallow", "5"], "tuned_parameters") == head + 5 * 192
    assert number(rows["last_cached", "10"], "tuned_parameters") == head + 3 * 10 * 192
    assert rows["linear", ""]["forward_flops"] == rows["bare", ""]["forward_flops"] == rows["full", ""]["forward_flops"]
    assert 2.9 < number(rows["full", ""], "step_flops_vs_bare") < 3.1
    head_step = 2 * (2 * 2 * 192 * 100)  # forward and weight gradient of the head, two images
    frozen = number(rows["bare", ""], "forward_flops") - head_step / 2
    assert number(rows["bare", ""], "step_flops") == frozen + head_step


@pytest.mark.parametrize("variant", ["deep", "shallow"])
def test_fast_paths_are_compared_with_concat(measured, variant):
    rows = read_rows(measured)
    for num_tokens in ("2", "5"):
        fast, plain = rows[variant, num_tokens], rows[f"{variant}_concat", num_tokens]
        for column, ratio in (("forward_flops", "forward_flops_vs_concat"), ("step_flops", "step_flops_vs_concat")):
            assert number(fast, ratio) == pytest.approx(number(fast, column) / number(plain, column))
            assert number(fast, ratio) < 1
        assert number(fast, "step_saved_vs_concat") < 1
        assert plain["step_flops_vs_concat"] == ""
    cached = rows["last_cached", "10"]
    assert number(cached, "step_flops_vs_concat") < 0.35
    assert number(cached, "step_saved_vs_concat") < 1


def test_the_plot_and_the_record_are_written(measured):
    with Image.open(measured / "benchmark.png") as image:
        assert image.format == "PNG"
        assert image.width > 1000
    record = json.loads((measured / "benchmark.json").read_text())
    assert record["options"]["backbone"] == "vit_tiny_patch16_224"
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert [len(record["rounds"][0][kind]) for kind in ("forward_s", "step_s")] == [1, 1]


def test_prompted_subjects_share_one_frozen_vit_and_train_their_prompt_only():
    bare, full, deep, _, cached = build_subjects("only=deep,last_cached,full")
    vit = bare.training[0]
    assert deep.training.backbone.vit is deep.inferring.backbone.vit is cached.training.model.backbone.vit is vit
    assert full.training[0] is not vit
    tuned = [name for name, parameter in deep.training.named_parameters() if parameter.requires_grad]
    assert tuned == ["backbone.prompt.tokens", "head.weight", "head.bias"]
    assert not any(parameter.requires_grad for parameter in vit.parameters())


def test_bf16_holds_the_vit_in_bf16_and_the_prompt_in_float32(tmp_path, capsys):
    words = "only=deep,full,last_cached", "precision=bf16", f"output={tmp_path}"
    backbone = build_subjects(*words)[2].training.backbone
    assert {parameter.dtype for parameter in backbone.vit.parameters()} == {torch.bfloat16}
    assert backbone.prompt.tokens.dtype == torch.float32
    assert benchmark.benchmark(read_options(*words))
    assert "vit_tiny_patch16_224, batch 2, bf16" in capsys.readouterr().out


def test_empty_columns_and_plots_are_left_out(tmp_path, capsys):
    benchmark.benchmark(read_options("only=linear", f"output={tmp_path}"))
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark.csv", "benchmark.json"}
    text = capsys.readouterr().out
    assert "FLOPs/bare" in text
    assert not any(word in text for word in ("concat", "peak", "spread"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("bakbone=a", "did you mean backbone"),
        ("only=deep,dep_concat", "dep_concat"),
        ("precision=fp8", "must be one of fp32, bf16"),
        ("num_tokens=0", "num_tokens=0"),
        ("rounds=0", "rounds=0"),
        ("backbone=vit_tiny_patch16_225", "vit_tiny_patch16_224"),
        ("device=abacus", "device=abacus"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, argument, message):
    monkeypatch.chdir(tmp_path)
    words = [word for word in TINY[1:] if word.partition("=")[0] != argument.partition("=")[0]]
    assert call(monkeypatch, *words, argument) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_a_file_is_refused_before_measuring(monkeypatch, capsys, tmp_path):
    (tmp_path / "taken").touch()
    assert call(monkeypatch, *TINY, f"output={tmp_path / 'taken'}") == 2
    assert "taken" in capsys.readouterr().err


def test_without_peft_lora_is_skipped(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    benchmark.benchmark(read_options("only=lora", f"output={tmp_path}"))
    assert list(read_rows(tmp_path)) == [("bare", "")]
    assert "lora is skipped: peft is not installed; type uv pip install" in capsys.readouterr().out


@pytest.mark.parametrize("rounds", [0, 1])
def test_an_interrupted_run_writes_its_complete_rounds(monkeypatch, capsys, tmp_path, rounds):
    def interrupted(functions, *_):
        yield from [dict.fromkeys(functions, 0.5)] * rounds
        raise KeyboardInterrupt

    monkeypatch.setattr("vpt.engine.measure.time_rounds", interrupted)
    assert call(monkeypatch, *TINY, "only=linear", f"output={tmp_path}") == 130
    assert "error: interrupted" in capsys.readouterr().err
    assert (tmp_path / "benchmark.csv").exists() == (rounds > 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of peft are its own
def test_lora_trains_its_adapters_and_is_skipped_where_they_are_bypassed(capsys, tmp_path):
    benchmark.benchmark(read_options("only=lora", f"output={tmp_path}"))
    row = read_rows(tmp_path)["lora", ""]
    assert number(row, "tuned_parameters") == 192 * 100 + 100 + 12 * 8 * (192 + 3 * 192)
    assert number(row, "step_flops") > number(row, "forward_flops")
    eva = "backbone=eva02_tiny_patch14_224", "img_size=28", "batch_size=1", "only=lora"
    assert [subject.name for subject in build_subjects(*eva)] == ["bare"]
    assert "lora is skipped: this ViT bypasses" in capsys.readouterr().out

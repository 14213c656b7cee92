"""The benchmark as it is typed, on tiny models: counts, files, refusals. No test looks at a time."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vpt.benchmark import __main__ as benchmark
from vpt.config.command_line import parse_options

TINY = ["backbone=vit_tiny_patch16_224", "img_size=32", "batch_size=2", "rounds=1", "num_tokens=5,2", "device=cpu"]


def read_options(*arguments):
    return parse_options(benchmark.BenchmarkOptions, [*TINY, *arguments], benchmark.USAGE)


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        benchmark.main()
    return exit_info.value.code


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


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_the_fast_paths_are_compared_with_concat_of_the_same_number_of_tokens(measured, kind):
    rows = read_rows(measured)
    for num_tokens in ("2", "5"):
        fast, plain = rows[kind, num_tokens], rows[f"{kind}_concat", num_tokens]
        for column, ratio in (("forward_flops", "forward_flops_vs_concat"), ("step_flops", "step_flops_vs_concat")):
            assert number(fast, ratio) == pytest.approx(number(fast, column) / number(plain, column))
            assert number(fast, ratio) < 1
        assert number(fast, "step_saved_vs_concat") < 1
        assert plain["step_flops_vs_concat"] == ""


def test_a_step_from_cached_tokens_does_and_keeps_less(measured):
    cached = read_rows(measured)["last_cached", "10"]
    assert number(cached, "step_flops_vs_concat") < 0.35
    assert number(cached, "step_saved_vs_concat") < 1


def test_the_picture_opens_and_the_record_says_how_it_was_measured(measured):
    with Image.open(measured / "benchmark.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
    record = json.loads((measured / "benchmark.json").read_text())
    assert record["options"]["backbone"] == "vit_tiny_patch16_224"
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert [len(record["rounds"][0][kind]) for kind in ("forward_s", "step_s")] == [1, 1]


def test_prompted_subjects_share_one_frozen_vit_and_train_their_prompt_only():
    options = read_options("only=deep,last_cached,full")
    bare, full, deep, _, cached = benchmark._build_subjects(options, torch.device("cpu"))
    vit = bare.training[0]
    assert deep.training.backbone.vit is deep.inferring.backbone.vit is cached.training.model.backbone.vit is vit
    assert full.training[0] is not vit
    tuned = [name for name, parameter in deep.training.named_parameters() if parameter.requires_grad]
    assert tuned == ["backbone.prompt.tokens", "head.weight", "head.bias"]
    assert not any(parameter.requires_grad for parameter in vit.parameters())


def test_bf16_holds_the_vit_in_bf16_and_the_prompt_in_float32(tmp_path, capsys):
    options = read_options("only=deep,full,last_cached", "precision=bf16", f"output={tmp_path}")
    subjects = list(benchmark._build_subjects(options, torch.device("cpu")))
    assert {parameter.dtype for parameter in subjects[2].training.backbone.vit.parameters()} == {torch.bfloat16}
    assert subjects[2].training.backbone.prompt.tokens.dtype == torch.float32
    assert benchmark.benchmark(options)
    assert "vit_tiny_patch16_224, batch 2, bf16" in capsys.readouterr().out


def test_tables_leave_out_columns_without_a_value_and_no_picture_is_drawn_of_nothing(tmp_path, capsys):
    benchmark.benchmark(read_options("only=linear", f"output={tmp_path}"))
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark.csv", "benchmark.json"}
    text = capsys.readouterr().out
    assert "FLOPs/bare" in text
    assert not any(word in text for word in ("concat", "peak", "spread"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("bakbone=a", "bakbone=a: not an option of the form key=value; did you mean backbone?"),
        ("only=deep,dep_concat", "; did you mean deep_concat?"),
        ("precision=fp8", "precision=fp8: must be one of fp32, bf16"),
        ("num_tokens=1,0", "num_tokens=0 is out of range"),
        ("rounds=0", "rounds=0 is out of range: it must be at least 1"),
        ("backbone=vit_tiny_patch16_225", "did you mean vit_tiny_patch16_224?"),
        ("device=abacus", "device=abacus: "),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, argument, message):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *TINY[1:], argument) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_a_file_is_refused_before_anything_is_measured(monkeypatch, capsys, tmp_path):
    (tmp_path / "taken").touch()
    assert call(monkeypatch, *TINY, f"output={tmp_path / 'taken'}") == 2
    assert "taken" in capsys.readouterr().err


def test_without_peft_one_line_says_how_to_get_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    benchmark.benchmark(read_options("only=lora", f"output={tmp_path}"))
    assert list(read_rows(tmp_path)) == [("bare", "")]
    assert "lora is left out: peft is not installed; type uv pip install" in capsys.readouterr().out


def test_without_matplotlib_the_table_is_written_and_the_picture_is_not(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    benchmark.benchmark(read_options("only=deep", f"output={tmp_path}"))
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark.csv", "benchmark.json"}
    assert "there will be no picture: matplotlib is not installed; type uv pip install" in capsys.readouterr().out


@pytest.mark.parametrize("rounds", [0, 1])
def test_an_interrupted_run_keeps_its_whole_rounds(monkeypatch, capsys, tmp_path, rounds):
    def interrupted(functions, *_):
        yield from [dict.fromkeys(functions, 0.5)] * rounds
        raise KeyboardInterrupt

    monkeypatch.setattr("vpt.engine.measure.time_rounds", interrupted)
    assert call(monkeypatch, *TINY, "only=linear", f"output={tmp_path}") == 130
    assert "error: interrupted" in capsys.readouterr().err
    assert (tmp_path / "benchmark.csv").exists() == (rounds > 0)


def test_help_loads_nothing_heavy():
    heavy = "{'torch', 'timm', 'matplotlib', 'peft'}"
    code = f"import sys, vpt.benchmark; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[1]
    loaded = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert loaded.stdout == "[]\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of peft are its own
def test_lora_trains_its_adapters_and_is_left_out_where_they_would_be_passed_by(capsys, tmp_path):
    benchmark.benchmark(read_options("only=lora", f"output={tmp_path}"))
    row = read_rows(tmp_path)["lora", ""]
    assert number(row, "tuned_parameters") == 192 * 100 + 100 + 12 * 8 * (192 + 3 * 192)
    assert number(row, "step_flops") > number(row, "forward_flops")
    eva = benchmark.BenchmarkOptions(backbone="eva02_tiny_patch14_224", img_size=28, batch_size=1, only=("lora",))
    assert [subject.name for subject in benchmark._build_subjects(eva, torch.device("cpu"))] == ["bare"]
    assert (
        "lora is left out: this ViT reads the weights of its projections past the adapters" in capsys.readouterr().out
    )

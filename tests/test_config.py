import pytest
from omegaconf import OmegaConf

from vpt.build import build_adapters
from vpt.config.command_line import check_command_line, parse_options, quote_paths
from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.schema import Config, Mode, PromptName, schema_keys
from vpt.config.validation import to_config
from vpt.predict.__main__ import USAGE, PredictOptions


def test_the_defaults_compose_to_typed_objects():
    config = to_config(compose_config([]))
    assert isinstance(config, Config)
    assert config.prompt.variant is PromptName.deep
    assert config.mode is Mode.train
    assert config.optim.prompt_lr == 1e-2


def test_an_experiment_is_an_overlay_that_the_command_line_wins_over():
    config = to_config(compose_config(["+experiment=quickstart", "train.epochs=3", "prompt=shallow"]))
    assert config.run.name == "quickstart"
    assert config.train.epochs == 3
    assert config.prompt.variant is PromptName.shallow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompt.num_tokns=3"], r"unknown key prompt\.num_tokns; did you mean prompt\.num_tokens\?"),
        (["prompt.lenght=3"], r"unknown key prompt\.lenght; "),
        (["bacbone=vit_tiny"], r"unknown key bacbone; did you mean backbone\?"),
        (
            ["prompt=deeep"],
            r"prompt=deeep: no such choice; did you mean deep\? Choices: bilinear, deep, f",
        ),
        (["+experiment=quickstrat"], r"experiment=quickstrat: no such choice; did you mean quickstart\?"),
        (["experiment=quickstart"], r"type \+experiment=quickstart"),
        (["train.epochs=three"], r"train\.epochs: Value 'three' of type 'str' could not be converted to Integer"),
        (["optim.name=adam"], r"optim\.name: Invalid value 'adam', expected one of \[adamw, sgd\]"),
        (["prompt.num_tokens=-3"], r"prompt\.num_tokens=-3 is out of range: it must be at least 1 and at most 10000"),
        (["cache=of"], r"cache: Invalid value 'of', expected one of \[auto, off, ram, disk\]"),
        (["cache_gb=0"], r"cache_gb=0\.0 is out of range: it must be above 0"),
        (["optim.prompt_lr=0"], r"optim\.prompt_lr=0\.0 is out of range: it must be above 0"),
        (["train.ema=1.5"], r"train\.ema=1\.5 is out of range: it must be above 0 and at most 0\.99999"),
        (["dataset=folder"], r"dataset\.root is needed by dataset=folder: type dataset\.root=PATH"),
        (["dataset=csv"], r"dataset\.path is needed by dataset=csv: type dataset\.path=FILE"),
        (["dataset=torchvision"], r"dataset\.name is needed by dataset=torchvision"),
        (["train.epochs=[1"], "cannot read the command line"),
        (["nonsense"], "cannot read the command line"),
        (["seed=0,1"], "seed=0,1 is a sweep over several values: add -m"),
        (["~prompt"], "~prompt: keys cannot be removed"),
        (["optim.prompt_lr=inf"], r"optim\.prompt_lr=inf is out of range"),
        (["run.name=a/b"], r"run\.name=a/b: must be the name of a folder"),
        (["-m", "prompt=none,deeep"], r"prompt=deeep: no such choice; did you mean deep\?"),
        (["-m", "train.epochs=3,x"], "'x' of type 'str'"),
        (["-m", "seed=1,-1"], "seed=-1 is out of range"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line_that_helps(arguments, message):
    with pytest.raises(ConfigError, match=message) as raised:
        check_command_line(arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--cfg", "job", "+experiment=quickstart"],
        ["-m", "prompt=none,shallow,deep", "seed=0,1,2"],
        ["dataset=folder", "dataset.root=/photos of my cat", "prompt.blocks=last:3"],
        ["prompt.blocks=[0,2]", "backbone.img_size=112", "augment.transforms=[]", "hydra.verbose=true"],
    ],
)
def test_a_right_command_line_passes(arguments):
    check_command_line(arguments)


def test_a_typo_in_an_experiment_file_of_the_user_is_refused_with_the_key(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nprompt:\n  num_tokns: 3\n")
    with pytest.raises(ConfigError, match=r"unknown key prompt\.num_tokns; did you mean prompt\.num_tokens\?"):
        check_command_line(["--config-dir", str(tmp_path), "+experiment=mine"])
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nprompt:\n  num_tokens: 3\n")
    check_command_line([f"--config-dir={tmp_path}", "+experiment=mine"])


def test_options_of_small_commands_are_typed_and_checked(capsys):
    options = parse_options(PredictOptions, ["run=a", "input=b c", "output=d.csv", "top_k=2"], USAGE)
    assert (options.run, options.input, options.top_k) == ("a", "b c", 2)
    for arguments, message in [
        (["run=a", "inptu=b"], "inptu=b: not an option.*did you mean input"),
        (["run"], "run: not an option of the form key=value"),
        (["run=a", "input=b", "output=c", "top_k=x"], "top_k=x: must be a whole number"),
        (["run=a", "input=b", "output=c", "top_k=0"], "top_k=0 is out of range"),
        (["run=a", "input=b"], "output is needed: type output="),
    ]:
        with pytest.raises(ConfigError, match=message):
            parse_options(PredictOptions, arguments, USAGE)
    with pytest.raises(SystemExit) as stopped:
        parse_options(PredictOptions, ["--help"], USAGE)
    assert stopped.value.code == 0
    assert "top_k=5" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["IMG #1.jpg", "0123", "a: b.jpg", "[1].jpg", "${x}", "null", "a=b"])
def test_paths_of_small_commands_are_taken_as_they_are_typed(path):
    assert parse_options(PredictOptions, [f"input={path}", "run=r", "output=o.csv"], USAGE).input == path


@pytest.mark.parametrize("path", ["~/pets", "/my phötos (1)", "it's mine", "a b", "c:d", "{x}", "a[1]", "'quoted (1)'"])
def test_paths_on_the_train_command_line_need_no_quotes_of_hydra(path):
    (word,) = quote_paths([f"dataset.root={path}"])
    check_command_line(["dataset=folder", word])
    assert compose_config(["dataset=folder", word]).dataset.root == path.strip("'")


def test_other_arguments_and_sweeps_over_plain_paths_are_left_alone():
    arguments = ["-m", "dataset.root=a,b/c", "prompt.blocks=[0,1]", "+experiment=quickstart"]
    assert quote_paths(arguments) == arguments


def test_the_recipe_of_the_paper_sets_more_than_the_optimiser_and_can_be_overridden():
    config = to_config(compose_config(["optim=vpt_paper"]))
    assert (config.train.epochs, config.train.clip_norm, config.head.init.value) == (100, None, "paper")
    assert to_config(compose_config(["optim=vpt_paper", "train.epochs=7"])).train.epochs == 7


def test_every_key_of_the_schema_is_listed_once():
    keys = list(schema_keys())
    assert "prompt.num_tokens" in keys
    assert len(keys) == len(set(keys))


def test_the_title_of_a_run_says_data_and_prompt():
    run = to_config(compose_config(["prompt=shallow", "dataset=fruit"])).run
    assert (run.name, run.title) == (None, "fruit_shallow")


@pytest.mark.parametrize("name", ["../up", "/etc", ".hidden", "a b", "ü", "", "x" * 65, "nul\0"])
def test_a_name_that_is_no_plain_name_of_a_folder_is_refused(name):
    config = to_config(compose_config([]))
    config.run.name = name
    composed = OmegaConf.structured(config)
    with pytest.raises(ConfigError, match=r"run\.name=.*must be the name of a folder"):
        to_config(composed)


def test_a_value_that_yaml_reads_otherwise_is_refused_with_the_choices(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ncache: off\n")
    with pytest.raises(ConfigError, match=r"^cache: .*Invalid value 'False', expected one of \[auto, off, ram, disk\]"):
        compose_config(["+experiment=mine"], tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["tuning=lora", "tuning.options.r=4", "+tuning.options.use_dora=true"],
        ["tuning=lora", "+tuning.options.target_modules=[attn.qkv,mlp.fc1]"],
        ["tuning=adapter", "tuning.options.width=4"],
        ["tuning=peft", "tuning.adapters=loha", "tuning.options={r: 4}"],
    ],
    ids=" ".join,
)
def test_options_of_adapters_are_typed_on_the_command_line(arguments):
    check_command_line(arguments)
    tuning = to_config(compose_config(arguments)).tuning
    assert build_adapters(tuning).options == tuning.options

import inspect
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

import vpt
from tests.helpers import write_text
from vpt.build import KEYS, build_adapters
from vpt.config.command_line import (
    check_command_line,
    compose_run,
    parse_options,
    refuse_unread,
    split_options,
)
from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError, config_keys
from vpt.config.help import describe_options
from vpt.config.saved import load_config, to_plain
from vpt.config.schema import Config, Mode, PromptName, option, schema_options
from vpt.config.validation import to_config
from vpt.data.images import Decoding
from vpt.data.readers.box_checks import make_samples
from vpt.data.splits import divide
from vpt.data.transforms.boxes import DetectionTrainTransform
from vpt.models.parametrizations import Bilinear, Fourier


def config_of(*overrides):
    return to_config(compose_config(overrides))


def test_defaults_and_experiments_compose_to_typed_objects():
    config = config_of()
    assert isinstance(config, Config)
    assert (config.prompt.variant, config.mode, config.optim.prompt_lr) == (PromptName.deep, Mode.train, 1e-2)
    assert (config.run.name, config.run.title, config.task) == (None, "fruit_bilinear", "classification")
    config = config_of("+experiment=quickstart", "train.epochs=3", "prompt=shallow")
    assert (config.run.name, config.train.epochs, config.prompt.variant) == ("quickstart", 3, PromptName.shallow)
    assert config_of("prompt=shallow").run.title == "fruit_shallow"
    paper = config_of("optim=vpt_paper", "train.epochs=7")
    assert (paper.train.epochs, paper.train.clip_norm, paper.head.init.value) == (7, None, "paper")


def test_the_library_and_the_schema_have_the_same_defaults():
    for call, section, names in [
        (vpt.PromptedViT, "prompt", "blocks dropout impl init"),
        (vpt.tune, "tuning", "num_blocks"),
        (Bilinear, "prompt", "rank whiten"),
        (Fourier, "prompt", "fraction"),
        (vpt.Detector, "head", "channels strides num_convs"),
        (Decoding, "data", "max_pixels background"),
        (DetectionTrainTransform, "augment", "min_visibility"),
        (divide, "dataset", "val_fraction test_fraction group folds fold"),
        (make_samples, "dataset", "strict exif_boxes"),
    ]:
        parameters, defaults = inspect.signature(call).parameters, getattr(Config(), section)
        for name in names.split():
            assert parameters[name].default == getattr(defaults, name), (call, name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompt.num_tokns=3"], r"unknown key prompt\.num_tokns; did you mean prompt\.num_tokens\?"),
        (["prompt.lenght=3"], r"unknown key prompt\.lenght; "),
        (["num_tokens=5"], r"did you mean prompt\.num_tokens\?"),
        (["dataset.batch_size=5"], r"did you mean batch_size or train\.batch_size\?|train\.batch_size or batch_size\?"),
        (["model=vit_tiny"], r"did you mean backbone\?"),
        (["model.img_size=32"], r"did you mean backbone\.img_size\?"),
        (["optim.lr=1"], r"unknown key optim\.lr; did you mean lr\?"),
        (["data=folder"], r"data=folder: data is a section of keys; did you mean dataset=folder\?"),
        (["train=full"], r"train is a section of keys; type train\.KEY="),
        (["--config-dir", "nowhere", "+experiment=mine"], "--config-dir nowhere: no such folder"),
        (["--epochs", "3"], "--epochs: options are typed without dashes: epochs=3"),
        (["--epochs=3"], "typed without dashes: epochs=3"),
        (["bacbone=vit_tiny"], r"unknown key bacbone; did you mean backbone\?"),
        (["prompt=deeep"], r"prompt=deeep: no such choice; did you mean deep\? Choices: bilinear, deep, f"),
        (["+experiment=quickstrat"], r"experiment=quickstrat: no such choice; did you mean quickstart\?"),
        (["experiment=quickstart"], r"type \+experiment=quickstart"),
        (["train.epochs=three"], r"train\.epochs: Value 'three' of type 'str' could not be converted to Integer"),
        (["optim.name=adam"], r"optim\.name: Invalid value 'adam', expected one of \[adamw, sgd\]"),
        (["prompt.num_tokens=-3"], r"prompt\.num_tokens=-3 is out of range: it must be at least 1 and at most 10000"),
        (["optim.prompt_lr=0"], r"optim\.prompt_lr=0\.0 is out of range: it must be above 0"),
        (["optim.prompt_lr=inf"], r"optim\.prompt_lr=inf is out of range"),
        (["dataset=folder"], r"dataset\.root is needed: type dataset\.root="),
        (["dataset=coco"], r"dataset\.root is needed"),
        (["dataset=csv"], r"dataset\.path is needed"),
        (["dataset=torchvision"], r"dataset\.name is needed"),
        (["train.epochs=[1"], "cannot read the command line"),
        (["nonsense"], "cannot read the command line"),
        (["seed=0,1"], "seed=0,1 is a sweep over several values: add -m"),
        (["~prompt"], "~prompt: keys cannot be removed"),
        (["run.name=a/b"], r"run\.name=a/b: must be the name of a folder"),
        (["-m", "prompt=none,deeep"], r"prompt=deeep: no such choice; did you mean deep\?"),
        (["-m", "train.epochs=3,x"], "'x' of type 'str'"),
        (["-m", "seed=1,-1"], "seed=-1 is out of range"),
        (["prompt.kind=deep"], r"prompt\.kind was renamed: type prompt\.variant=deep"),
        (["head.taps=last"], r"head\.taps was renamed: type head\.out_indices=last"),
        (["lr=1", "optim.prompt_lr=1"], r"lr=1 and optim\.prompt_lr=1 set the same key"),
        (["train.epochs=1", "epochs=1"], "set the same key"),
        (["tuning=prompt_bias", "lr=1"], r"several parts are tuned; type optim\.prompt_lr=\.\.\. and tuning\.lr="),
        (["-m", "tuning=prompt,linear", "lr=1"], r"optim\.head_lr=\.\.\. and optim\.prompt_lr="),
        (["dataset=coco", "dataset.root=a", "dataset.annotations={train:1e3}"], r"annotations\.train=1000\.0.*quotes"),
        (["head=dense"], "head=dense is for detection, and dataset=fruit is for classification"),
        (["dataset=trees", "head=pyramid"], "head=pyramid is for segmentation, and dataset=trees is for detection"),
        (["head.channels=64"], r"head\.channels=64 is for detection and segmentation, and dataset=fruit"),
        (["dataset=trees", "train.class_weights=balanced"], r"train\.class_weights=balanced is for classification"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line_that_helps(arguments, message):
    with pytest.raises(ConfigError, match=message) as raised:
        check_command_line(arguments)
    assert "\n" not in str(raised.value)


def test_a_correct_command_line_passes_and_only_sweeps_and_options_of_hydra_need_its_application():
    for arguments, needs_hydra in [
        ([], False),
        (["dataset=folder", "dataset.root=/photos of my cat", "prompt.blocks=last:3"], False),
        (["prompt.blocks=[0,2]", "backbone.img_size=112", "augment.transforms=[]"], False),
        (["hydra.verbose=true"], True),
        (["--cfg", "job", "+experiment=quickstart"], True),
        (["-m", "prompt=none,shallow,deep", "seed=0,1,2"], True),
    ]:
        assert check_command_line(arguments).needs_hydra == needs_hydra, arguments


@pytest.mark.parametrize("option", [["--config-dir", "FOLDER"], ["-cd", "FOLDER"], ["--config-dir=FOLDER"]])
def test_experiments_in_a_folder_of_the_user_are_checked_as_well(tmp_path, option):
    words = [word.replace("FOLDER", str(tmp_path)) for word in [*option, "+experiment=mine"]]
    path = tmp_path / "experiment" / "mine.yaml"
    for text, message in [
        ("prompt: {num_tokns: 3}", r"unknown key prompt\.num_tokns; did you mean prompt\.num_tokens\?"),
        ("prompt: {kind: deep}", r"prompt\.kind was renamed: type prompt\.variant="),
        ("cache: ran", r"cache: .*Invalid value 'ran', expected one of \[auto, off, ram, disk\]; did you mean ram\?"),
        ("epochs: 3", r"unknown key epochs; did you mean train\.epochs\?"),
        ("train: {epochs: many}", r"train\.epochs: Value 'many'"),
        ("defaults: [override /promt: deep]", r"there is no group promt; did you mean prompt\?"),
        ("defaults: [override /prompt: deeep]", r"prompt=deeep: no such choice; did you mean deep\?"),
        ("train: {epochs: 3", "line 3: no YAML"),
    ]:
        write_text(path, f"# @package _global_\n{text}\n")
        with pytest.raises(ConfigError, match=rf"mine\.yaml.*{message}"):
            check_command_line(words)
    write_text(path, "train: {epochs: 3}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml.*first line must be: # @package _global_"):
        check_command_line(words)
    write_text(path, "# @package _global_\nprompt: {num_tokens: 3}\n")
    line = check_command_line(words)
    assert (line.config.prompt.num_tokens, line.needs_hydra) == (3, False)


def test_a_type_of_task_and_a_head_of_the_user_need_no_change_of_the_schema(tmp_path):
    write_text(tmp_path / "dataset" / "mine.yaml", "reader: depths\ntask: depth\ntitle: m")
    write_text(tmp_path / "head" / "mine.yaml", "name: up\ntask: depth")
    config = to_config(compose_config(["dataset=mine", "head=mine", "head.channels=64"], tmp_path))
    assert (config.task, config.head.name, config.head.channels) == ("depth", "up", 64)


@dataclass
class Options:
    """All types of options."""

    place: Path = option(about="a place", shown="FOLDER")
    text: str = option("a", "a text")
    choice: str = option("one", "a choice", choices=("one", "two"))
    count: int | None = option(None, "a count", low=1, high=9)
    rate: float = option(0.5, "a rate", above=0)
    flag: bool = option(False, "a flag")
    sizes: tuple[int, ...] = option((8, 5), "sizes", low=1)
    seeds: int | tuple[int, ...] = option(3, "how many, or which")
    shots: tuple[int | str, ...] = option((), "some", choices=("all",))
    define: dict[str, str] = option({}, "a definition")


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("text=b c", "text", "b c"),
        ("choice=two", "choice", "two"),
        ("count=3", "count", 3),
        ("rate=1e-2", "rate", 0.01),
        ("flag=true", "flag", True),
        ("sizes=2", "sizes", (2,)),
        ("sizes=8, 5", "sizes", (8, 5)),
        ("sizes=[8,5]", "sizes", (8, 5)),
        ("seeds=4", "seeds", 4),
        ("seeds=[4]", "seeds", (4,)),
        ("shots=1,all", "shots", (1, "all")),
        ("define.mine=prompt=deep x=3", "define", {"mine": "prompt=deep x=3"}),
        *((f"text={text}", "text", text) for text in ("IMG #1.jpg", "0123", "[1].jpg", "${x}", "null", "a=b")),
    ],
)
def test_options_of_commands_are_typed(word, name, value):
    assert getattr(parse_options(Options, ["place=p", word], ""), name) == value
    assert parse_options(Options, ["place=~/p"], "").place == Path.home() / "p"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "place is needed: type place="),
        (["plce=b"], "plce=b: not an option.*did you mean place"),
        (["place"], "place: not an option of the form key=value; type place="),
        (["--place", "p"], "--place: not an option of the form key=value; type place="),
        (["--text=p"], "--text=p: not an option of the form key=value; type text="),
        (["--help", "plce"], "unknown key plce; did you mean place"),
        (["place="], "place=: must be a path"),
        (["count=x"], "count=x: must be a whole number"),
        (["place=p", "count=10"], "count=10 is out of range: it must be at least 1 and at most 9"),
        (["place=p", "rate=nan"], "rate=nan is out of range"),
        (["flag=yes"], "flag=yes: must be true or false"),
        (["choice=tow"], r"choice=tow: must be one of one, two; did you mean two\?"),
        (["place=p", "sizes=2,0"], "sizes=0 is out of range"),
        (["sizes=2;3"], "sizes=2;3: must be a whole number"),
        (["sizes="], "sizes=: must be a whole number"),
        (["shots=1,al"], "shots=1,al: must be a whole number or one of all"),
        (["shots=[1"], r"shots=\[1: must be"),
        (["define=a"], r"type define\.NAME="),
        (["text.part=a"], "not an option"),
    ],
)
def test_a_wrong_option_of_a_command_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(Options, words, "")


def test_help_lists_the_options_after_the_first_paragraph(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_options(Options, ["--help"], "python -m x: a command.\n\nExample: python -m x")
    assert stopped.value.code == 0
    first, options, last = capsys.readouterr().out.strip().split("\n\n")
    assert (first, last) == ("python -m x: a command.", "Example: python -m x")
    assert options == describe_options(Options).strip("\n")
    for line in ("place=FOLDER", "a place; required", "flag=false", "sizes=8,5", "one, two", "above 0", "define.NAME="):
        assert line in options
    assert all(len(line) <= 120 for line in options.splitlines())


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["--version"], [f"vpt {vpt.__version__}"]),
        (["--help", "rate"], ["rate=0.5", "a rate; above 0"]),
        (["text", "-h"], ["text=a", "a text"]),
        (["--help", "prompt.rank"], ["prompt.rank=8", "with prompt.form=bilinear"]),
        (["--help", "optim"], ["optim.name=adamw", "the optimiser; adamw, sgd", "optim.momentum=0.9"]),
        (["--help", "prompt"], ["prompt=NAME", "bilinear, deep, fourier", "prompt.dropout=0.0"]),
        (["--help", "experiment"], ["experiment=NAME", "quickstart"]),
    ],
)
def test_the_version_and_the_meaning_of_a_key_are_printed(capsys, words, lines):
    with pytest.raises(SystemExit) as stopped:
        split_options(Options, words)
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert [line for line in lines if line not in printed] == []


def test_words_of_the_config_are_split_from_options_of_the_command():
    with pytest.raises(ConfigError, match="text is typed twice"):
        split_options(Options, ["text=a", "text=b"])
    words = ["text=a", "prompt.num_tokens=3", "define.x=y", "-h", "texts=b", "+experiment=a"]
    own, rest = ["text=a", "define.x=y", "-h"], ["prompt.num_tokens=3", "texts=b", "+experiment=a"]
    assert split_options(Options, words) == (own, rest)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (ValueError("num_tokens=0: must be 1"), ConfigError, "prompt.num_tokens=0: must be 1"),
        (TypeError("x=1: odd; use num_tokens=3"), ConfigError, "x=1: odd; use prompt.num_tokens=3"),
        (ValueError("options: r is unknown"), ConfigError, "tuning.options: r is unknown"),
        (FileNotFoundError("checkpoint=a: no such file"), FileNotFoundError, "backbone.checkpoint=a: no such file"),
        (ValueError("prompt.num_tokens=0, num_tokens_max=1"), ValueError, "prompt.num_tokens=0, num_tokens_max=1"),
        (RuntimeError("num_tokens=0"), RuntimeError, "num_tokens=0"),
    ],
)
def test_errors_of_the_library_name_keys_of_the_config(error, expected, message):
    with pytest.raises(expected) as raised, config_keys(**KEYS):
        raise error
    assert (type(raised.value), str(raised.value)) == (expected, message)


@pytest.mark.parametrize("text", ["~/pets", "/my phötos (1)", "it's mine", "a b", "c:d", "{x}", "a[1]", "C:\\x y\\"])
def test_paths_on_the_command_line_need_no_quotes_of_hydra(text):
    line = check_command_line(["dataset=folder", f"dataset.root={text}"])
    assert line.config.dataset.root == text
    assert check_command_line(line.arguments).config == line.config


@pytest.mark.parametrize(
    "text", ["2024_01", "1.50", "1e3", "007", "-5", ".5", "inf", "NaN", "TRUE", "Null", "off", "9:30"]
)
def test_paths_and_names_that_look_like_numbers_stay_text(tmp_path, text):
    content = f"defaults: [boxes]\nroot: {text}  # text\nannotations: {{train: {text}}}\n"
    write_text(tmp_path / "dataset" / f"{text}.yaml", content)
    words = ["--config-dir", str(tmp_path), f"dataset={text}", f"cache_dir={text}", f"backbone.name={text}"]
    config = check_command_line(words).config
    found = config.dataset.root, config.dataset.annotations["train"], config.cache_dir, config.backbone.name
    assert found == (text,) * 4
    write_text(tmp_path / "config.yaml", yaml.safe_dump(to_plain(config)))
    assert load_config(tmp_path / "config.yaml") == config


def test_null_stays_null_and_sweeps_over_texts_are_quoted_one_by_one():
    assert check_command_line(["run.name=null", "dataset.root=null"]).config.run.name is None
    words = ["-m", "backbone.checkpoint=1e3,b/c", "prompt.blocks=[0,1]", "+experiment=quickstart", "seed=choice(0,1)"]
    assert check_command_line(words).arguments == [words[0], "backbone.checkpoint='1e3',b/c", *words[2:]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tuning.lr=5", "tuning.lr=5 has no effect: tuning.method=prompt does not read it"),
        ("prompt.rank=3 prompt=deep", "it is for prompt.form=bilinear, and prompt.form=plain"),
        ("tuning=linear prompt.num_tokens=7", "there is no prompt with tuning=linear"),
        ("prompt=none optim.prompt_lr=1", "there is no prompt with prompt=none"),
        ("tuning=bias prompt=deep", "tuning=bias trains no prompt"),
        ("optim.momentum=0.5", "it is for optim.name=sgd"),
        ("dataset.root=photos", "dataset.reader=fruit does not read it"),
        ("cache=off cache_gb=9", "cache=off does not read it"),
        ("-m prompt=deep,shallow prompt.rank=3", "it is for prompt.form=bilinear"),
    ],
)
def test_a_key_that_the_run_does_not_read_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        compose_run(words.split()) if words[0] != "-" else refuse_unread(check_command_line(words.split()))


def test_a_key_that_one_run_of_a_sweep_reads_is_no_error():
    assert check_command_line(["-m", "prompt=none,deep,bilinear", "prompt.rank=3"]).unread == {}
    assert check_command_line(["-m", "prompt=none,deep", "tuning=bias,prompt", "prompt.num_tokens=3"]).unread == {}


def test_every_need_of_an_option_names_a_key_and_values_that_it_can_have():
    for _, entry in schema_options():
        name, _, values = entry.metadata.get("needs", "").replace("!", "").partition("=")
        found = attrgetter(name)(Config()) if values else None
        assert not isinstance(found, StrEnum) or set(values.split(",")) <= set(type(found))


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("", "optim.prompt_lr"),
        ("tuning=linear", "optim.head_lr"),
        ("prompt=none", "optim.head_lr"),
        ("tuning=lora", "tuning.lr"),
        ("tuning=full", "tuning.lr"),
    ],
)
def test_short_names_mean_the_key_that_matters(words, key):
    config, _ = compose_run([*words.split(), "lr=0.5", "epochs=3", "batch_size=4", "img_size=32"])
    assert attrgetter(key)(config) == 0.5
    assert (config.train.epochs, config.train.batch_size, config.backbone.img_size) == (3, 4, 32)


@pytest.mark.parametrize("name", ["../up", "/etc", ".hidden", "a b", "ü", "", "x" * 65, "nul\0"])
def test_a_run_name_that_is_not_a_plain_folder_name_is_refused(name):
    composed = compose_config([])
    composed.run.name = name
    with pytest.raises(ConfigError, match=r"run\.name=.*must be the name of a folder"):
        to_config(composed)


def test_options_of_adapters_are_typed_on_the_command_line():
    for arguments in [
        ["tuning=lora", "tuning.options.r=4", "+tuning.options.use_dora=true"],
        ["tuning=lora", "+tuning.options.target_modules=[attn.qkv,mlp.fc1]"],
        ["tuning=adapter", "tuning.options.width=4"],
        ["tuning=peft", "tuning.adapters=loha", "tuning.options={r: 4}"],
    ]:
        tuning = check_command_line(arguments).config.tuning
        assert build_adapters(tuning).options == tuning.options

import pytest

from vpt.config.command_line import check_command_line
from vpt.config.naming import run_title
from vpt.config.saved import conceal
from vpt.config.validation import RUN_NAME
from vpt.runs.folder import RunFolder


def named(words):
    line = check_command_line(words.split())
    shown = conceal(line.config, line.composed)
    line.config.run.title = shown.run.title = run_title(shown, line.arguments)
    return line.config, shown


@pytest.mark.parametrize(
    ("words", "title"),
    [
        ("", "fruit_vit_nano_bilinear_seed0"),
        ("dataset=folder dataset.root=/x/pets epochs=40 num_workers=0", "pets_vit_nano_bilinear_epochs40_seed0"),
        ("dataset=csv dataset.path=a/birds.csv backbone=mae_base tuning=lora seed=3", "birds_mae_base_lora_seed3"),
        ("dataset=coco dataset.root=2024_01/ head=retinanet", "2024_01_vit_nano_bilinear_retinanet_seed0"),
        ("dataset=folder dataset.root=/x/.été dataset.title=summer", "summer_vit_nano_bilinear_seed0"),
        ("dataset=torchvision dataset.name=CIFAR10 optim=vpt_paper", "CIFAR10_vit_nano_bilinear_vpt_paper_seed0"),
        (
            "backbone.name=vit_base_patch14_reg4_dinov2.lvd142m lr=0.1",
            "fruit_vit_base_reg4_dinov2_bilinear_prompt_lr0.1_seed0",
        ),
        ("dataset=folder dataset.root=${oc.env:SECRET}", "folder_vit_nano_bilinear_seed0"),
        ("run.title=mine train.epochs=3", "mine"),
    ],
)
def test_a_title_has_data_set_backbone_method_what_was_typed_and_seed(monkeypatch, words, title):
    monkeypatch.setenv("SECRET", "s3cret")
    assert named(words)[0].run.title == title


def test_a_long_title_is_cut_between_its_parts_and_is_the_name_of_a_folder():
    more = ["prompt.num_tokens=5", "optim.weight_decay=0.00001", "epochs=3"]
    line = check_command_line(["dataset=folder", f"dataset.root=/{'long name ' * 9}", *more])
    title = run_title(line.config, line.arguments)
    assert title == "long-name-long-name_vit_nano_bilinear_num_tokens5_epochs3_seed0"
    assert RUN_NAME.fullmatch(title)


def test_a_run_has_one_folder_however_it_is_typed_and_whatever_0_1_called_it(tmp_path):
    short, long = (f"run.root={tmp_path} {words}" for words in ("epochs=3", "train.epochs=3 train.batch_size=64"))
    path = RunFolder(*named(short)).path
    digest = path.name.rpartition("_")[2]
    assert path.name == f"fruit_vit_nano_bilinear_epochs3_seed0_{digest}"
    assert RunFolder(*named(long)).path.name == f"fruit_vit_nano_bilinear_epochs3_batch_size64_seed0_{digest}"
    path.mkdir()
    assert RunFolder(*named(long)).path == path
    assert RunFolder(*named(f"{long} run.title=mine")).path.name == f"mine_{digest}"
    assert RunFolder(*named(f"{short} seed=1")).path != path
    path = path.rename(tmp_path / f"fruit_bilinear_{digest}")
    assert RunFolder(*named(short)).path == path


def test_a_run_of_a_sweep_has_its_title_behind_the_name(tmp_path):
    config, shown = named(f"+experiment=quickstart run.root={tmp_path} seed=2")
    assert RunFolder(config, shown).path.name == "quickstart"
    assert RunFolder(config, shown, is_sweep=True).path.name.startswith("quickstart_fruit_vit_nano_deep")

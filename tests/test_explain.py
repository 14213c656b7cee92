"""python -m vpt.explain: files for both types of task, and refusals."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vpt
import vpt.explain.__main__
from tests.helpers import make_album, train_with
from vpt.data.images import read_image
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.models.inspection import inspect_attention
from vpt.models.task_file import read_task
from vpt.models.vit import load_vit

NANO = "vit_nano_patch8_64"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files on the embedded backbone: random prompts and heads."""
    folder = tmp_path_factory.mktemp("tasks")
    vit = load_vit(NANO)
    torch.manual_seed(0)

    def save(name, **options):
        model = vpt.create_model(vit, **options)
        for parameter in vpt.tuned_parameters(model).values():
            torch.nn.init.normal_(parameter, std=0.2)
        vpt.save_task(model, folder / f"{name}.safetensors", classes=[f"{name} {i}" for i in range(3)])

    save("deep", num_classes=3, prompt="deep", num_tokens=3)
    save("late", num_classes=3, prompt=vpt.VisualPrompt(14, vit.embed_dim, blocks=[3, 4], patch_size=(8, 8)))
    save("shallow", num_classes=3, prompt="shallow", num_tokens=2)
    save("single", num_classes=3, prompt="deep", num_tokens=1)
    save("kv", num_classes=3, prompt="kv", num_tokens=2)
    save("linear", num_classes=3, prompt=None)
    save("boxes", num_classes=3, task="detection", prompt="deep", num_tokens=2, channels=16, num_convs=1)
    return folder


@pytest.fixture
def album(tmp_path, monkeypatch):
    """In the current folder."""
    monkeypatch.chdir(tmp_path)
    return make_album(5)


@pytest.fixture
def explain(tasks, album, monkeypatch):
    """The command, called in this process, on the images of the album and a task by its name; returns its exit code."""

    def call(task, *arguments, of="album", output="out"):
        own = [f"task={tasks}/{task}.safetensors", f"input={of}", f"output={output}", "device=cpu"]
        return code_of(monkeypatch, *own, *arguments)

    return call


def code_of(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["vpt.explain", *arguments])
    try:
        vpt.explain.__main__.main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def numbers_of(folder):
    return json.loads((Path(folder) / "explain.json").read_text())


def pages_of(folder):
    return sorted(path.name for path in Path(folder).glob("*.png"))


def blocks_of(found):
    return [row["block"] for row in found]


PAGES = [f"image_{number:02d}.png" for number in range(5)]


def events_of(folder):
    events = EventAccumulator(str(folder)).Reload()
    return events, set(events.Tags()["scalars"]), set(events.Tags()["images"])


def test_a_task_with_a_deep_prompt_is_explained_by_pages_numbers_and_events(explain, album, capsys):
    assert explain("deep", "blocks=0,3") == 0
    assert "5 images" in capsys.readouterr().out
    nearest = ["nearest_block_00.png", "nearest_block_03.png"]
    assert pages_of("out") == [*PAGES, *nearest, "prompt.png", "similarity.png"]
    numbers = numbers_of("out")
    assert [image["path"] for image in numbers["images"]] == sorted(map(str, album.rglob("*.png")))
    assert blocks_of(numbers["attention_to_prompt"]) == blocks_of(numbers["nearest_patches"]) == [0, 1, 2, 3, 4]
    events, scalars, images = events_of("out")
    assert images == {f"explain/{Path(name).stem}" for name in pages_of("out")}
    of_tokens = {"prompt_tokens/mean_cosine", "prompt_tokens/effective_rank"}
    assert scalars - of_tokens == {
        f"attention_to_prompt/{name}" for name in ("cls", "patches", "uniform", "tokens_in_use")
    }
    assert of_tokens < scalars
    logged = [(event.step, event.value) for event in events.Scalars("attention_to_prompt/cls")]
    expected = [(found["block"], pytest.approx(found["cls"], rel=1e-6)) for found in numbers["attention_to_prompt"]]
    assert logged == expected


def test_the_numbers_are_those_of_the_functions_for_notebooks(explain, tasks):
    explain("deep")
    path = tasks / "deep.safetensors"
    model, metadata = vpt.load_task(path, NANO), read_task(path)
    transform = EvalTransform(Preprocessing.from_dict(metadata.preprocessing))
    numbers = numbers_of("out")
    images = torch.stack([transform(read_image(image["path"])) for image in numbers["images"]])
    with torch.no_grad():
        probabilities, labels = model(images).softmax(1).max(1)
    for image, probability, label in zip(numbers["images"], probabilities, labels, strict=True):
        assert image["class"] == metadata.classes[label]
        assert image["probability"] == pytest.approx(probability.item(), abs=1e-5)
    for found, attention in zip(numbers["attention_to_prompt"], inspect_attention(model.backbone, images), strict=True):
        assert (found["num_tokens"], found["uniform"]) == (3, pytest.approx(3 / 68))
        weights = attention.weights[..., :3].mean(1)
        assert found["cls_by_image"] == pytest.approx(weights[:, 0].sum(1).tolist(), abs=1e-5)
        assert found["cls"] == pytest.approx(weights[:, 0].sum(1).mean().item(), abs=1e-5)
        assert found["patches"] == pytest.approx(weights[:, 1:].sum(2).mean().item(), abs=1e-5)
        assert found["patches_over_uniform"] == pytest.approx(found["patches"] * 68 / 3)
        shares = weights.mean((0, 1)) / weights.mean((0, 1)).sum()
        assert found["tokens_in_use"] == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-4)
    tokens = model.backbone.prompt.tokens.detach()
    entering = list(model.backbone.entering_patches(images))
    for block, found in enumerate(numbers["nearest_patches"]):
        cosines = torch.nn.functional.cosine_similarity(tokens[block][:, None], entering[block].flatten(0, 1)[None], -1)
        for token, places in enumerate(found["tokens"]):
            expected = cosines[token].topk(8).values.tolist()
            assert [place["cosine"] for place in places] == pytest.approx(expected, abs=1e-5)
            image, patch = divmod(cosines[token].argmax().item(), 64)
            first = places[0]
            assert first["image"] == numbers["images"][image]["path"]
            assert (first["row"], first["column"]) == divmod(patch, 8)


@pytest.mark.slow
def test_a_prompt_in_the_last_blocks_gets_attention_there_only(explain):
    assert explain("late", "blocks=all") == 0
    assert blocks_of(numbers_of("out")["attention_to_prompt"]) == [3, 4]
    assert pages_of("out")[5:-2] == ["nearest_block_03.png", "nearest_block_04.png"]


def test_a_shallow_prompt_gets_attention_in_all_blocks_and_is_compared_where_it_enters(explain):
    assert explain("shallow", of="album/00.png") == 0
    numbers = numbers_of("out")
    assert blocks_of(numbers["attention_to_prompt"]) == [0, 1, 2, 3, 4]
    assert blocks_of(numbers["prompt_tokens"]) == blocks_of(numbers["nearest_patches"]) == [0]


def test_a_single_prompt_token_has_no_mean_cosine(explain):
    assert explain("single", of="album/00.png") == 0
    assert {found["mean_cosine"] for found in numbers_of("out")["prompt_tokens"]} == {None}
    assert "prompt_tokens/mean_cosine" not in events_of("out")[1]


def test_a_task_without_a_prompt_has_attention_maps_and_a_note(explain, capsys):
    assert explain("linear") == 0
    assert "note: the task has no prompt" in capsys.readouterr().out
    assert pages_of("out") == PAGES
    numbers = numbers_of("out")
    assert numbers["prompt"] is None
    assert numbers["attention_to_prompt"] == numbers["prompt_tokens"] == numbers["nearest_patches"] == []
    assert "no prompt" in numbers["note"]


def test_a_prompt_of_keys_and_values_has_shares_but_no_tokens_to_compare(explain, capsys):
    assert explain("kv", of="album/00.png") == 0
    assert "keys and values" in capsys.readouterr().out
    assert pages_of("out") == ["image_00.png", "prompt.png"]
    assert all(0 < found["cls"] < 1 for found in numbers_of("out")["attention_to_prompt"])


@pytest.mark.slow
def test_a_detector_is_explained_on_the_part_of_the_input_that_shows_the_image(explain):
    assert explain("boxes") == 0
    numbers = numbers_of("out")
    assert all(isinstance(image["boxes"], list) for image in numbers["images"])
    for place in (place for found in numbers["nearest_patches"] for places in found["tokens"] for place in places):
        height = 40 + 30 * int(Path(place["image"]).stem)  # and the width is 90
        assert place["row"] * 8 < min(64, math.ceil(64 * height / 90))
        assert place["column"] * 8 < min(64, math.ceil(64 * 90 / height))


@pytest.mark.slow
def test_a_run_is_explained_as_its_task_file(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["prompt.num_tokens=2", "train.epochs=1", "train.batch_size=8", "num_workers=0", "run.name=colours"]
    run = train_with("dataset=folder", f"dataset.root={photos}", *small)
    options = f"input={photos}/test/*/0.png", "device=cpu"
    assert code_of(monkeypatch, f"run={run}", "output=of_run", *options) == 0
    assert code_of(monkeypatch, f"task={run}/task.safetensors", "output=of_task", *options) == 0
    of_run, of_task = numbers_of("of_run"), numbers_of("of_task")
    assert (of_run.pop("task"), of_task.pop("task")) == (f"run={run}", f"task={run}/task.safetensors")
    assert of_run == of_task
    assert {image["class"] for image in of_run["images"]} <= {"blue sky", "grass", "rose"}
    metrics = (run / "metrics.jsonl").read_bytes()
    assert code_of(monkeypatch, f"run={run}", f"output={run}", *options) == 2  # it would be overwritten
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_at_most_max_images_are_taken_evenly_spread(explain, album, capsys):
    assert explain("linear", "max_images=3", of="album/**/*.png") == 0
    assert "3 of 5 images" in capsys.readouterr().out
    paths = sorted(map(str, album.rglob("*.png")))
    assert [image["path"] for image in numbers_of("out")["images"]] == paths[::2]


@pytest.mark.slow
def test_a_second_explanation_replaces_the_first(explain):
    explain("deep")
    Path("out/notes.txt").write_text("mine")
    assert explain("linear", of="album/00.png") == 0
    assert pages_of("out") == ["image_00.png"]
    assert Path("out/notes.txt").read_text() == "mine"
    assert len(list(Path("out").glob("events.*"))) == 1
    assert events_of("out")[1:] == (set(), {"explain/image_00"})


@pytest.mark.slow
def test_images_that_cannot_be_read_are_listed_and_the_others_explained(explain, capsys):
    Path("album/broken.jpg").write_bytes(Path("album/00.png").read_bytes()[:200])
    assert explain("deep") == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("skipped: album/broken.jpg")
    assert printed.err.count("\n") == 1
    assert "5 of 6 images" in printed.out
    assert len(numbers_of("out")["images"]) == 5
    assert explain("deep", of="album/broken.jpg", output="none") == 1
    assert "none of its images can be read" in capsys.readouterr().err
    assert not Path("none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["input=album"], "output"),
        (["input=album", "output=out"], "run=FOLDER"),
        (["run=nowhere", "input=album", "output=out"], "run=nowhere"),
        (["run=album", "task=DEEP", "input=album", "output=out"], "not both"),
        (["task=nowhere", "input=album", "output=out"], "task=nowhere"),
        (["task=DEEP,LATE", "input=album", "output=out"], "one task"),
        (["task=DEEP", "input=nowhere", "output=out"], "nowhere"),
        (["task=DEEP", "input=album/*.gif", "output=out"], "album/*.gif"),
        (["task=DEEP", "input=empty", "output=out"], "input=empty"),
        (["task=DEEP", "input=film.mp4", "output=out"], "film.mp4"),
        (["task=DEEP", "input=album", "output=album"], "output=album: has other files"),
        (["task=DEEP", "input=album", "output=album/00.png"], "album/00.png"),
        (["task=DEEP", "input=album", "output=out", "blocks=5"], "0 to 4"),
        (["task=DEEP", "input=album", "output=out", "blocks=some"], "first:k"),
        (["task=DEEP", "input=album", "output=out", "max_images=0"], "max_images=0"),
        (["task=DEEP", "input=album", "output=out", "max_image=4"], "max_images"),
        (["task=DEEP", "input=album", "output=out", "checkpoint=no.pth"], "no.pth"),
    ],
)
def test_misuse_is_refused_in_a_line(tasks, album, monkeypatch, capsys, arguments, message):
    Path("empty").mkdir()
    Path("film.mp4").write_bytes(b"film")
    for name in ("deep", "late"):
        arguments = [word.replace(name.upper(), f"{tasks}/{name}.safetensors") for word in arguments]
    assert code_of(monkeypatch, *arguments, "device=cpu") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert not Path("out").exists()

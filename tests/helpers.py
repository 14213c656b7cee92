"""What several test files share: tiny models, data on disk, short runs, commands."""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
import timm
import torch
from PIL import Image, features
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vpt
import vpt.compare.__main__
import vpt.serve.service
from vpt.config.composition import compose_config
from vpt.config.validation import to_config
from vpt.data.readers.box_checks import DataReport
from vpt.data.readers.coco import read_coco
from vpt.data.samples import DetectionSamples, Samples
from vpt.engine.checkpoint import Checkpoints
from vpt.engine.metrics.classification import ClassificationMetrics
from vpt.engine.metrics.detection import DetectionMetrics
from vpt.engine.monitor import Monitor
from vpt.engine.optim import MovingAverage, warmup_cosine
from vpt.engine.state import RunState
from vpt.engine.steps import Callbacks, FitData, FitSettings, Stepper
from vpt.engine.trainer import fit
from vpt.models.adapters import Adapters
from vpt.models.backbone import PromptedViT
from vpt.models.vit import load_vit
from vpt.serve.app import make_app
from vpt.serve.connections import make_server
from vpt.serve.service import Settings
from vpt.train.training import run

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
TINY_VITS = {
    "cls": ("vit_tiny_patch16_224", {}),
    "no_prefix": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "cls_and_4_registers": ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.1}),
    "rope_with_cls_and_4_registers": ("vit_small_patch16_dinov3", {}),
    "relative_position_bias": (
        "beit_base_patch16_224",
        {"global_pool": "token", "use_rel_pos_bias": True, "use_shared_rel_pos_bias": True},
    ),
}


def make_tiny_vit(kind: str = "cls", **options):
    """A random ViT of three blocks for 32 px images; every parameter is random, also those that timm starts at zero."""
    name, extra = TINY_VITS[kind]
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **{**TINY, **extra, **options}))


def randomise(vit):
    """The ViT in eval mode with all vectors, positions and biases random, also those that timm starts at zero."""
    for name, parameter in vit.named_parameters():
        if parameter.ndim in (1, 3) or "relative_position_bias" in name:
            parameter.data.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return vit.eval()


LOADING = ("pretrained", "checkpoint", "img_size", "dtype")
PROMPTING = ("num_tokens", "blocks", "dropout", "init", "form", "impl")


def build_model(backbone, *, num_classes, prompt="auto", tuning="prompt", num_blocks=1, adapters=None, **options):
    """A model with any option of loading, prompt and tuning, as `build.build_model` puts it together."""
    loading = {name: options.pop(name) for name in LOADING if name in options}
    prompting = {name: options.pop(name) for name in PROMPTING if name in options}
    vit = load_vit(backbone, **loading) if isinstance(backbone, str) else backbone
    if prompt == "auto":
        prompt = "deep" if tuning == "prompt" else None
    ready = PromptedViT(vit, prompt, **prompting)
    model = vpt.create_model(ready, num_classes=num_classes, **options)
    vpt.tune(model, tuning, num_blocks=num_blocks, adapters=adapters)
    return model


def make_album(num_photos):
    """A folder "album" in the current one, of photos of several shapes, some of them in a folder below."""
    Path("album/sub").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(num_photos):
        pixels = generator.integers(0, 255, (40 + 30 * (number % 5), 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path("album") / ("sub" if number % 2 else "") / f"{number:02d}.png")
    return Path("album")


def write_clip(path, codec="MJPG"):
    """Seven red frames of 64 x 48 pixels; the red of each is 30 more."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 10, (64, 48))
    for number in range(7):
        writer.write(np.full((48, 64, 3), (0, 0, 30 * number), np.uint8))  # OpenCV's order is blue, green, red
    writer.release()
    return path


def train_with(*overrides):
    """One training run as the command does it, in this process; returns its folder, None for mode=overfit."""
    return run(to_config(compose_config(overrides)))


OPTIONS = {  # what a method needs on so small a ViT
    "miss": {"r": 8},
    "road": {"group_size": 32},
    "waveft": {"n_frequency": 100},
    "fourierft": {"n_frequency": 100},
    "sequential": {"width": 4},
    "parallel": {"width": 4, "scale": 0.5},
}


def make_tuned_model(method, vit=None, **options):
    torch.manual_seed(1)
    adapters = Adapters(method, OPTIONS.get(method, {}))
    model = build_model(vit or make_tiny_vit(), num_classes=3, tuning="adapters", adapters=adapters, **options)
    torch.nn.init.normal_(model.head.weight)
    return model


def train_steps(model, images, num_steps=3):
    optimizer = torch.optim.SGD(vpt.tuned_parameters(model).values(), lr=0.1)
    model.train()
    for _ in range(num_steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    return model.eval()


TINY_PAIR = {**TINY, "depth": 2}
FAST = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_siglip_224": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_tiny_patch16_224 with qk-norm": {"qk_norm": True},
    "vit_tiny_patch16_224 with attention norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "eva02_tiny_patch14_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_tiny_patch16_224 with post-norm": {"block_fn": timm.models.vision_transformer.ResPostBlock},
    "vit_tiny_patch16_224 with registers": {"reg_tokens": 4},
    "vit_small_patch16_dinov3 with projections apart": {"qkv_fused": False},
    "beit_base_patch16_224": {"global_pool": "token"},
}
SLOW_PATH = {
    "vit_tiny_patch16_224 with parallel blocks": {"block_fn": timm.models.vision_transformer.ParallelScalingBlock},
    "vit_tiny_patch16_224 with two branches": {"block_fn": timm.models.vision_transformer.ParallelThingsBlock},
}


def make_pair(name, options, **prompt_options):
    """The same prompted ViT twice, computed the fast way and the plain way, with parameters that are all random."""
    torch.manual_seed(0)
    vit = timm.create_model(name.split(" ")[0], **TINY_PAIR, **options).double().eval()
    for parameter in vit.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(std=0.3).add_(0.5)
    try:
        vit(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    except RuntimeError:
        pytest.skip(f"timm {timm.__version__} cannot run {name} in float64")
    fast = PromptedViT(vit, "deep", num_tokens=5, **prompt_options).double()
    plain = PromptedViT(vit, "deep", num_tokens=5, impl="concat", **prompt_options).double()
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def read_one(root: Path, rows: list[dict], **options) -> tuple[DetectionSamples, DataReport]:
    """Train of one picture, 64 x 32, with the box (2, 2, 12, 12), and then these rows."""
    write_coco(root, {"train": {"a.png": ((64, 32), [("cat", (2, 2, 12, 12))])}})
    more = [{"image_id": 100, "category_id": 3} | row for row in rows]
    path = root / "annotations" / "instances_train2017.json"
    edit_json(path, lambda content: content["annotations"].extend(more))
    report = DataReport()
    return read_coco(root, val_fraction=0, report=report, **options)["train"], report


def draw_image(path: Path, size: tuple[int, int] = (4, 4), colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, colour, colour)).save(path)
    return path


def touch(path: Path, colour: int = 0) -> Path:
    return draw_image(path, colour=colour)


def make_folder(root: Path, counts: dict[str, int]) -> Path:
    """Write pictures: `{"train/cat": 3}` makes three of them in train/cat."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            touch(root / folder / f"{i}.png", colour=i)
    return root


def names_by_split(splits: dict[str, Samples]) -> dict[str, set[str]]:
    return {split: set(samples.names) for split, samples in splits.items()}


ROOT = Path(__file__).resolve().parents[1]


def call(*arguments, cwd, module="vpt.train"):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def exit_code_of(module, monkeypatch, *words):
    """The exit code of a command, run in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    try:
        return module.main() or 0
    except SystemExit as end:
        return end.code or 0


SMALL_COMPARISON = ["train.epochs=2", "train.batch_size=8", "num_workers=0", "device=cpu", "augment=none"]
TRUTH = {
    "train": {
        "a.png": ((64, 32), [("cat", (0, 0, 64, 32)), ("dog", (8, 4, 24, 28))]),
        "b.png": ((32, 64), [("dog", (1, 2, 3, 4))]),
        "c.png": ((64, 64), []),
    },
    "val": {"d.png": ((64, 32), [("cat", (30, 10, 50, 20))])},
    "test": {"e.png": ((128, 64), [("dog", (64, 0, 128, 64)), ("dog", (5, 6, 70, 8))])},
}
CLASSES = ("cat", "dog")
CATEGORY_IDS = {"cat": 3, "dog": 17}


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def coco_content(pictures: dict, categories: dict[str, int] = CATEGORY_IDS) -> dict:
    images, annotations = [], []
    for image_id, (name, ((width, height), boxes)) in enumerate(pictures.items(), start=100):
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for label, (x1, y1, x2, y2) in boxes:
            row = {"image_id": image_id, "category_id": categories[label], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            annotations.append({"id": len(annotations) + 1, "iscrowd": 0, **row})
    names = [{"id": category_id, "name": name} for name, category_id in reversed(categories.items())]
    return {"images": images, "annotations": annotations, "categories": names}


def write_coco(root: Path, truth: dict = TRUTH) -> Path:
    for split, pictures in truth.items():
        _write_coco(root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017", pictures)
    return root


def write_roboflow(root: Path) -> Path:
    for split, pictures in TRUTH.items():
        folder = root / {"val": "valid"}.get(split, split)
        _write_coco(folder / "_annotations.coco.json", folder, pictures)
    return root


def _write_coco(path: Path, folder: Path, pictures: dict) -> None:
    write_text(path, json.dumps(coco_content(pictures)))
    for name, (size, _) in pictures.items():
        draw_image(folder / name, size)


def write_yolo(root: Path, truth: dict = TRUTH) -> Path:
    for split, pictures in truth.items():
        for name, ((width, height), boxes) in pictures.items():
            draw_image(root / "images" / split / name, (width, height))
            rows = [
                f"{CLASSES.index(label)} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} "
                f"{(x2 - x1) / width} {(y2 - y1) / height}\n"
                for label, (x1, y1, x2, y2) in boxes
            ]
            if rows:
                write_text(root / "labels" / split / name.replace(".png", ".txt"), "".join(rows))
    entries = "".join(f"{split}: images/{split}\n" for split in truth)
    write_text(root / "data.yaml", f"{entries}nc: 2\nnames: [cat, dog]\n")
    return root


def voc_xml(size: tuple[int, int], boxes: list, difficult: int = 0) -> str:
    objects = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1 + 1}</xmin>"
        f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for label, (x1, y1, x2, y2) in boxes
    )
    width, height = size
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{objects}</annotation>"


def write_voc(root: Path, truth: dict = TRUTH) -> Path:
    for split, pictures in truth.items():
        stems = "".join(f"{Path(name).stem}\n" for name in pictures)
        write_text(root / "ImageSets" / "Main" / f"{split}.txt", stems)
        for name, (size, boxes) in pictures.items():
            draw_image(root / "JPEGImages" / name, size)
            write_text(root / "Annotations" / f"{Path(name).stem}.xml", voc_xml(size, boxes))
    return root


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def coco_evaluation(truth: dict, results: str | list[dict]) -> COCOeval:
    """The evaluation of pycocotools, of the content of an annotation file and the path or content of results."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def coco_metrics(evaluation: COCOeval) -> dict[str, float]:
    names = ("map", "map50", "map75", "map_small", "map_medium", "map_large", "ar1", "ar10", "ar100")
    return {name: float("nan") if value == -1 else value for name, value in zip(names, evaluation.stats, strict=False)}


HAS_AVIF = features.check("avif")


def encode(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def noise(width: int = 32, height: int = 24, channels: int = 3, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def entering(vit, images, block):
    """Plainly: the patch tokens that enter a block, by a hook on timm's own forward pass."""
    seen = []
    hook = vit.blocks[block].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        vit.forward_features(images)
    hook.remove()
    return seen[0][:, vit.num_prefix_tokens :]


def options_of(photos, *overrides):
    return [*SMALL_RUN, "dataset=folder", f"dataset.root={photos}", "train.batch_size=4", "num_workers=0", *overrides]


SMALL_RUN = [
    *("train.epochs=3", "train.log_every=1", "prompt.num_tokens=3"),
    *("device=cpu", "run.name=run", "run.save_minutes=1e-9"),
]
POINTS = {  # where a process kills itself -> (object, method), at a call of it that is drawn
    "in a step": (torch.optim.AdamW, "step"),
    "behind a step": (Stepper, "_rates"),
    "in validation": (ClassificationMetrics, "update"),
    "in validation of boxes": (DetectionMetrics, "update"),
    "while a file is synced": (os, "fsync"),
    "while a file is renamed": (Path, "replace"),
    "while a file is cut": (os, "truncate"),
}


def kill_at(owner, name, number):
    """Let this process die at the call `number` of a function, in the middle of whatever called it."""
    function, calls = getattr(owner, name), []

    def dying(*arguments, **options):
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(owner, name, dying)


def attempt_run(log, overrides, point=None, number=0):
    """Run the command in a process of its own, which may kill itself; its exit code. What it says goes to `log`."""

    def child():
        sys.stdout = sys.stderr = log.open("a")
        if point is not None:
            kill_at(*POINTS[point], number)
        train_with(*overrides)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


def fill_disk(disk):
    """Write a file that takes all space on a disk; its path."""
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(1024)):
            pass
    return disk / "filler"


def kept_files(root):
    """What must be the same, byte for byte."""
    return {name: (root / "run" / name).read_bytes() for name in ("metrics.jsonl", "task.safetensors")}


NANO = "vit_nano_patch8_64"
SLOW = 60.0  # seconds; far longer than anything here takes


@contextlib.contextmanager
def served(bank, **settings):
    """A client of the application of a bank."""
    with listening(make_app(bank, Settings(**settings))) as (client, _):
        yield client


@contextlib.contextmanager
def listening(app):
    """A client of a real server in a thread, and the server."""
    server = make_server(app, SLOW, log_level="error")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=SLOW) as client:
                yield client, server
        finally:
            server.should_exit = True
            thread.join(SLOW)
            assert not thread.is_alive()


def save_nano_task(path, seed, classes, **options):
    torch.manual_seed(seed)
    model = build_model(NANO, num_classes=len(classes), **options)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    preprocessing = options.pop("preprocessing", None)
    return vpt.save_task(model, path, classes=classes, preprocessing=preprocessing, metrics={"test": {"top1": 0.5}})


def png_bytes(seed=0, size=(90, 60), form="PNG", **options):
    """The bytes of an image file."""
    return encode(noise(*size, seed=seed), form, **options)


def make_detector(head="dense", prompt="deep", tuning="prompt", **options):
    torch.manual_seed(3)
    options = {"num_tokens": 2, "channels": 16, "num_convs": 1, **options}
    vit = make_tiny_vit(img_size=64)
    model = build_model(vit, task="detection", num_classes=3, head=head, prompt=prompt, tuning=tuning, **options)
    for parameter in model.head.parameters():
        parameter.data.normal_(std=0.1)
    return model


class Evaluator(ClassificationMetrics):
    """Metrics of the logits."""

    def __init__(self):
        super().__init__(3)

    def update(self, model, images, targets):
        super().update(model(images).float(), targets)


def cross_entropy(model, images, targets):
    return {"class": nn.functional.cross_entropy(model(images).float(), targets)}


class Separable(nn.Module):
    """A linear model on "images" (B, 3, 2, 2), with a frozen part that has dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(12, 3)
        self.modes = []

    def forward(self, images):
        self.modes.append(self.training)
        return self.head(images.flatten(1))


def make_loader(num=22, batch_size=5, seed=0):
    images = torch.randn(num, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    targets = images.flatten(1)[:, :3].argmax(dim=1)
    return DataLoader(TensorDataset(images, targets), batch_size=batch_size)


def metric_lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def fit_small(
    folder,
    model=None,
    train=None,
    val=None,
    losses=cross_entropy,
    evaluator=None,
    *,
    optimizer=torch.optim.SGD,
    lr=0.5,
    warmup=2,
    num_steps=None,
    ema=None,
    names_of=lambda epoch, first, end: (),
    callbacks=None,
    **settings,
):
    """Start a run of a small model in a folder, or resume it; its model, result and state."""
    model, train, val = model or Separable(), train or make_loader(), val or make_loader(seed=1)
    settings = FitSettings(**{"epochs": 4, "select": "top1", "log_every": 1, **settings})
    torch.manual_seed(0)
    optimizer = optimizer([{"params": model.parameters(), "lr": lr, "name": "head"}])
    num_steps = num_steps or settings.epochs * len(train)
    schedule = warmup_cosine(optimizer, num_steps=num_steps, num_warmup_steps=warmup)
    parameters = dict(model.named_parameters())
    state = RunState(parameters, optimizer, schedule, MovingAverage(parameters, ema) if ema else None)
    checkpoints = Checkpoints(folder)
    saved, resume_at = checkpoints.load(), None
    if saved is not None:
        state.load(saved.tensors, saved.numbers)
        resume_at = saved.numbers["metrics_bytes"], state.result.steps
    with Monitor(folder, resume_at=resume_at) as monitor:
        data = FitData(train, val, losses, evaluator or Evaluator(), names_of)
        result = fit(model, data, state, settings, Callbacks(monitor, checkpoints, **(callbacks or {})))
    return model, result, state

"""Train the bundled backbone vit_nano_patch8_64 by distillation from a ViT-Ti/16.

The student has the teacher's width (192) and five of its twelve blocks, so it starts from the teacher's own weights
(blocks 0, 3, 6, 9, 11; patch kernels summed 2 x 2, which is exact for an image enlarged twice). It reads 64 px images
in 8 px patches; the teacher reads the same crops enlarged to 128 px in 16 px patches, so both have an 8 x 8 grid and
every token of the student has a target. The loss has three parts: distance to the teacher's final tokens, divergence
from the teacher's class probabilities through the teacher's own frozen head, and cross-entropy with the label.

The teacher runs once: `--views` random crops of each image are drawn, and its tokens for them are held in memory.

Example:
    python scripts/distill_backbone.py --teacher vit_tiny_patch16_224_in1k.safetensors \
        --images tiny_imagenet --output vpt/models/weights/vit_nano_patch8_64.safetensors
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.nn import functional as F

STUDENT_BLOCKS = (0, 3, 6, 9, 11)
HELD_OUT_PER_CLASS = 10


def read_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Read `folder/wnid/*.JPEG`: images (num, 3, 64, 64) uint8, and their ImageNet-1k labels (num,)."""
    labels_of = {wnid: i for i, wnid in enumerate(ImageNetInfo().label_names())}
    paths = sorted(folder.glob("*/*.JPEG"))
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    labels = torch.tensor([labels_of[path.parent.name] for path in paths])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def split_held_out(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices for training and the first ten of each class, held out."""
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        held_out[(labels == label).nonzero()[:HELD_OUT_PER_CLASS, 0]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def random_views(images: Tensor, generator: torch.Generator) -> Tensor:
    """One random resized crop (area 0.3 to 1) and flip of each image, (num, 3, 64, 64) uint8."""
    views = torch.empty_like(images)
    for start in range(0, len(images), 1024):
        batch = images[start : start + 1024].float()
        num = len(batch)
        area = torch.empty(num).uniform_(0.3, 1.0, generator=generator)
        ratio = torch.empty(num).uniform_(math.log(3 / 4), math.log(4 / 3), generator=generator).exp()
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        x = (torch.rand(num, generator=generator) * 2 - 1) * (1 - width)
        y = (torch.rand(num, generator=generator) * 2 - 1) * (1 - height)
        width = width * torch.where(torch.rand(num, generator=generator) < 0.5, -1.0, 1.0)
        zero = torch.zeros(num)
        theta = torch.stack([torch.stack([width, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
        grid = F.affine_grid(theta, list(batch.shape), align_corners=False)
        view = F.grid_sample(batch, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
        views[start : start + 1024] = view.round().clamp(0, 255).to(torch.uint8)
    return views


def normalise(images: Tensor) -> Tensor:
    """To floats in [-1, 1]: mean = std = 0.5, the teacher's own."""
    return images.float().div(127.5).sub(1)


@torch.inference_mode()
def teacher_tokens(teacher: nn.Module, views: Tensor) -> Tensor:
    """The teacher's final tokens, (num, 65, 192) float16, for views enlarged to 128 px."""
    tokens = torch.empty(len(views), 65, 192, dtype=torch.float16)
    for start in range(0, len(views), 256):
        images = F.interpolate(normalise(views[start : start + 256]), size=128, mode="bicubic", antialias=False)
        with torch.autocast("cpu", torch.bfloat16):
            tokens[start : start + 256] = teacher.forward_features(images).half()
    return tokens


def make_student(teacher: nn.Module) -> nn.Module:
    """Five blocks of the teacher behind an 8 px patch embedding."""
    student = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, depth=len(STUDENT_BLOCKS), num_classes=0
    )
    state = {name: value for name, value in teacher.state_dict().items() if not name.startswith(("blocks.", "head."))}
    state["patch_embed.proj.weight"] = F.avg_pool2d(state["patch_embed.proj.weight"], 2) * 4
    student.load_state_dict(state, strict=False)
    for block, source in zip(student.blocks, STUDENT_BLOCKS, strict=True):
        block.load_state_dict(teacher.blocks[source].state_dict())
    return student


@torch.inference_mode()
def held_out_top1(student: nn.Module, head: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 among the classes that occur in `labels`."""
    classes = labels.unique()
    student.eval()
    num_correct = 0
    for start in range(0, len(images), 500):
        logits = head(student(normalise(images[start : start + 500])))[:, classes]
        num_correct += int((classes[logits.argmax(1)] == labels[start : start + 500]).sum())
    student.train()
    return num_correct / len(labels)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "images", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, help="weights of an earlier stage, in place of the teacher's blocks")
    for name, default in {"epochs": 24.0, "views": 4, "batch-size": 128, "lr": 7e-4, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    started = time.time()
    images, labels = read_images(args.images)
    train, held_out = split_held_out(labels)
    overlay = {"file": str(args.teacher)}
    teacher = timm.create_model("vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, img_size=128)
    teacher.eval().requires_grad_(False)
    views = torch.stack([random_views(images[train], generator) for _ in range(args.views)])
    targets = torch.stack([teacher_tokens(teacher, view) for view in views])
    print(f"{len(train)} images, {args.views} views each, teacher done after {time.time() - started:.0f} s", flush=True)
    student = make_student(teacher)
    if args.start_from is not None:
        student.load_state_dict(load_file(args.start_from))
    decay = [p for p in student.parameters() if p.ndim > 1]
    no_decay = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    steps_per_epoch = len(train) // args.batch_size
    num_steps = int(args.epochs * steps_per_epoch)
    warmup = steps_per_epoch // 2

    def lr_factor(step: int) -> float:
        progress = (step - warmup) / max(1, num_steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    for step in range(num_steps):
        epoch, batch = divmod(step, steps_per_epoch)
        if batch == 0:
            top1 = held_out_top1(student, teacher.head, images[held_out], labels[held_out])
            print(f"epoch {epoch} held-out top1 {top1:.4f} after {time.time() - started:.0f} s", flush=True)
            order = torch.randperm(len(train), generator=generator)
            save(student, args.output)
        rows = order[batch * args.batch_size :][: args.batch_size]
        view = torch.randint(args.views, (len(rows),), generator=generator)
        target = targets[view, rows].float()
        with torch.autocast("cpu", torch.bfloat16):
            tokens = student.forward_features(normalise(views[view, rows])).float()
        logits, wanted = teacher.head(tokens[:, 0]), teacher.head(target[:, 0])
        distance = F.smooth_l1_loss(tokens, target) + F.smooth_l1_loss(tokens[:, 0], target[:, 0])
        divergence = F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
        loss = distance + divergence + 0.5 * F.cross_entropy(logits, labels[train[rows]], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            parts = f"distance {distance:.4f} divergence {divergence:.4f}"
            print(f"step {step}/{num_steps} loss {loss:.4f} {parts}", flush=True)
    save(student, args.output)
    top1 = held_out_top1(student, teacher.head, images[held_out], labels[held_out])
    print(f"done: held-out top1 {top1:.4f}, {(time.time() - started) / 60:.1f} min", flush=True)


def save(student: nn.Module, path: Path) -> None:
    """Write the weights as safetensors, without a classifier: float16, the first matrix of each MLP float8 (e4m3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {
        name: value.to(torch.float8_e4m3fn if name.endswith("mlp.fc1.weight") else torch.float16).contiguous()
        for name, value in student.state_dict().items()
    }
    save_file(stored, path)


if __name__ == "__main__":
    main()

"""Measure how well the features of the bundled backbone transfer: linear probes, compared with random weights.

The images are in a folder with train/ and test/, each with a folder per class. A logistic regression is fitted by
L-BFGS on the standardised features of train; nothing is chosen on test.

Example:
    python scripts/probe_backbone.py --images flowers12
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.data.loaders import build_loader
from vpt.data.readers.folder import read_folder
from vpt.data.samples import ClassificationDataset, ClassificationSamples
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.models.vit import load_vit, preprocessing_of


@torch.inference_mode()
def features_of(vit: nn.Module, samples: ClassificationSamples, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Pooled features (num, D) and targets (num,)."""
    loader = build_loader(ClassificationDataset(samples, EvalTransform(preprocessing)), 64, shuffle=False)
    features, targets = zip(*((vit(images), targets) for images, targets in loader), strict=True)
    return torch.cat(features), torch.cat(targets)


def probe_top1(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], weight_decay: float = 1e-3) -> float:
    """Top-1 on test of a logistic regression fitted on train."""
    mean, std = train[0].mean(0), train[0].std(0).clamp(min=1e-6)
    x, y = ((part[0].clone() - mean) / std for part in (train, test))
    head = nn.Linear(x.shape[1], int(train[1].max()) + 1)
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), train[1].clone()) + weight_decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (head(y).argmax(1) == test[1]).float().mean().item()


def main() -> None:
    """Print top-1 with the pretrained weights and with three random initialisations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--backbone", default="vit_nano_patch8_64")
    args = parser.parse_args()
    splits = read_folder(args.images, val_fraction=0.0)
    for seed in (None, 0, 1, 2):
        torch.manual_seed(seed or 0)
        vit = load_vit(args.backbone, pretrained=seed is None)
        preprocessing = Preprocessing.from_dict(preprocessing_of(vit))
        train, test = (features_of(vit, splits[split], preprocessing) for split in ("train", "test"))
        what = "pretrained weights" if seed is None else f"random, seed {seed}"
        print(f"{what}: top-1 {probe_top1(train, test):.3f}")


if __name__ == "__main__":
    main()

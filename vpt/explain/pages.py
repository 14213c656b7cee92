"""The pages that show what a task looks at, and the folder that they are written to, with all numbers."""

import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt.engine.monitor import Monitor
from vpt.explain.numbers import Explanation, Look
from vpt.models.inspection import NearestPatches
from vpt.plots.attention import (
    Chart,
    Curve,
    MapRow,
    charts_picture,
    framed_patch,
    maps_page,
    matrices_page,
    patches_page,
)
from vpt.plots.boxes import class_colour
from vpt.plots.grid import INK, Colour
from vpt.storage.files import write_bytes, write_json

Picture = NDArray[np.uint8]

NUMBERS = "explain.json"
NUM_BESIDE = 4
MAX_TOKENS = 12  # on a page of nearest patches
BRIGHT = 0.95  # part of the values of a map that its colours tell apart: a few patches may draw many times the rest
CHARTS: Mapping[str, Sequence[str]] = {  # of TensorBoard, where the step is the block
    "attention to the prompt, by block": ["^attention_to_prompt/(cls|patches|uniform)$"],
    "prompt tokens that count, by block": ["^attention_to_prompt/tokens_in_use$", "^prompt_tokens/effective_rank$"],
    "mean cosine of prompt tokens, by block": ["^prompt_tokens/mean_cosine$"],
}
OWN = re.compile(
    rf"{NUMBERS}|(picture|nearest_block)_\d+\.png|(prompt|similarity)\.png|metrics\.jsonl|events\.out\.tfevents\..*"
)


def is_own_folder(folder: Path) -> bool:
    """Whether a folder may be written to: it is not there, or empty, or was written by `write_explanation`."""
    return not folder.exists() or not any(folder.iterdir()) or (folder / NUMBERS).is_file()


def write_explanation(explanation: Explanation, folder: Path) -> list[Path]:
    """Write numbers, pages and TensorBoard events, in the place of those of an earlier explanation.

    Returns:
        The pages.
    """
    for old in folder.iterdir() if folder.is_dir() else ():
        if OWN.fullmatch(old.name):
            old.unlink()
    write_json(folder / NUMBERS, explanation.to_dict())
    paths = []
    with Monitor(folder, layout=CHARTS) as monitor:
        for block in explanation.prompted:
            monitor.scalars(_scalars(explanation, block), step=block)
        for name, page in make_pages(explanation):
            monitor.images(f"explain/{name}", page, step=0)
            content = io.BytesIO()
            Image.fromarray(page).save(content, "png")
            paths.append(folder / f"{name}.png")
            write_bytes(paths[-1], content.getvalue())
    return paths


def make_pages(explanation: Explanation) -> Iterator[tuple[str, Picture]]:
    """Names and pages: one for each picture, then those of the prompt, if there is one."""
    for number in range(len(explanation.looks)):
        yield f"picture_{number:02d}", picture_page(explanation, number)
    if explanation.prompted:
        yield "prompt", prompt_page(explanation)
    if explanation.similarities:
        yield "similarity", similarity_page(explanation)
    for found in (found for found in explanation.nearest if found.block in explanation.blocks):
        yield f"nearest_block_{found.block:02d}", nearest_page(explanation, found)


def picture_page(explanation: Explanation, number: int) -> Picture:
    """What is looked at in the picture of a number, in the chosen blocks."""
    asker = "CLS" if "cls" in explanation.asking else "patches"
    look = explanation.looks[number]
    seen = look.seen
    height, width, _ = seen.pixels.shape
    lines = [
        f"picture {number:02d}: {'/'.join(Path(seen.name).parts[-2:])}",
        _describe(look),
        f"as the backbone sees it, {width} x {height} px",
        "dark patches are not looked at, bright ones most",
    ]
    if explanation.model.backbone.prompt is None:
        headings = [f"{asker} to patches; 1 is even"]
        rows = _bare_rows(look, explanation.blocks)
        lines.append(explanation.note)
    else:
        headings = [f"{asker} to patches, no prompt", f"{asker} to patches, with prompt", "patches to prompt"]
        rows = [_map_row(look, block) for block in explanation.blocks]
    size = seen.image.shape[1], seen.image.shape[2]
    return maps_page(seen.pixels, size, lines, headings, rows, _frames(look))


def prompt_page(explanation: Explanation) -> Picture:
    """Attention that goes to the prompt, and how many of its tokens count, over the blocks."""
    blocks, num_blocks = explanation.prompted, explanation.model.backbone.depth
    names = {"cls": "CLS", "patches": "patches, mean"}
    shares = [
        Curve("if all tokens were looked at alike", _by_block(explanation, "uniform"), INK, is_dashed=True),
        *(
            Curve(
                f"{names[asking]} (points: each picture)",
                _by_block(explanation, asking),
                class_colour(number),
                {block: [look.shares[block][asking] for look in explanation.looks] for block in blocks},
            )
            for number, asking in enumerate(explanation.asking)
        ),
    ]
    num_tokens = {block: float(len(explanation.looks[0].use[block])) for block in blocks}
    in_use = {block: explanation.tokens_in_use(block) for block in blocks}
    ranks = {found.block: found.effective_rank for found in explanation.similarities}
    counts = [
        Curve("prompt tokens", num_tokens, INK, is_dashed=True),
        Curve("that share the attention (exp of entropy)", in_use, class_colour(0)),
        *([Curve("directions that they span (effective rank)", ranks, class_colour(1))] if ranks else []),
    ]
    return charts_picture(
        [
            Chart("share of attention that goes to the prompt", shares, num_blocks, is_share=True),
            Chart("prompt tokens that count", counts, num_blocks),
        ]
    )


def similarity_page(explanation: Explanation) -> Picture:
    """The cosine of each prompt token with each, for each prompted block."""
    num_tokens = [len(found.cosines) for found in explanation.similarities]
    captions = [
        f"block {found.block}: mean cosine {found.mean_cosine:.2f}\neffective rank {found.effective_rank:.1f} of {num}"
        for found, num in zip(explanation.similarities, num_tokens, strict=True)
    ]
    return matrices_page([found.cosines.double().cpu().numpy() for found in explanation.similarities], captions)


def nearest_page(explanation: Explanation, found: NearestPatches) -> Picture:
    """The patches that are most like the prompt tokens of a block, each with what is around it."""
    num_tokens, num = found.cosines.shape
    shown = min(num_tokens, MAX_TOKENS)
    lines = [
        f"block {found.block}: patches that are most like its prompt tokens",
        f"{'the first ' if shown < num_tokens else ''}{shown} of {num_tokens} tokens, the nearest patch first; "
        "patches enter the block without a prompt",
        "below each patch: number of the picture, and the cosine",
    ]
    rows = []
    for token in range(shown):
        places = [(int(found.images[token, k]), float(found.cosines[token, k]), k) for k in range(num)]
        crops = [(_crop(explanation, found, token, k), f"{image:02d}: {cosine:.2f}") for image, cosine, k in places]
        rows.append((f"token {token}", crops))
    return patches_page(lines, rows)


def _crop(explanation: Explanation, found: NearestPatches, token: int, k: int) -> Picture:
    """A found patch with its surroundings."""
    seen = explanation.looks[int(found.images[token, k])].seen
    size = seen.image.shape[1], seen.image.shape[2]
    rows, columns = explanation.model.backbone.vit.patch_embed.dynamic_feat_size(size)
    height, width = size[0] // rows, size[1] // columns
    top, left = int(found.rows[token, k]) * height, int(found.columns[token, k]) * width
    return framed_patch(seen.pixels, (left, top, left + width, top + height))


def _map_row(look: Look, block: int) -> MapRow:
    """Maps of a block: with and without the prompt in one scale, and the share that goes to the prompt in its own."""
    inside = look.seen.is_picture(look.maps[block].shape)
    pair = [look.bare_maps[block], look.maps[block]]
    top = _upper_end(np.stack(pair)[:, inside])
    to_prompt = look.prompt_maps.get(block, np.zeros_like(pair[0]))
    highest = float(to_prompt[inside].max())
    maps = [*(values / top for values in pair), to_prompt / (highest or 1)]
    captions = [f"0 to {top:.1f} times even; most: {values[inside].max():.1f}" for values in pair]
    shares = look.shares.get(block)
    captions.append(f"0 to {highest:.0%}; even: {shares['uniform']:.0%}" if shares else "this block sees no prompt")
    return MapRow(f"block {block}", maps, captions)


def _bare_rows(look: Look, blocks: Sequence[int]) -> list[MapRow]:
    """Maps of blocks side by side, where there is no prompt to compare with."""
    rows = []
    for start in range(0, len(blocks), NUM_BESIDE):
        maps, captions = [], []
        for block in blocks[start : start + NUM_BESIDE]:
            inside = look.seen.is_picture(look.maps[block].shape)
            top = _upper_end(look.maps[block][inside])
            maps.append(look.maps[block] / top)
            captions.append(f"block {block}: 0 to {top:.1f}; most: {look.maps[block][inside].max():.1f}")
        rows.append(MapRow("", maps, captions))
    return rows


def _upper_end(values: NDArray[np.float64]) -> float:
    """The value that has the brightest colour."""
    return float(np.quantile(values, BRIGHT)) or 1.0


def _frames(look: Look) -> list[tuple[list[float], Colour]]:
    """What a detector finds, with the colour of each class."""
    boxes = look.found.get("boxes", [])
    names = sorted({box["class"] for box in boxes})
    return [(box["box"], class_colour(names.index(box["class"]))) for box in boxes]


def _describe(look: Look) -> str:
    """What the task says of a picture."""
    if "boxes" not in look.found:
        return f"predicted: {look.found['class']}, {look.found['probability']:.0%}"
    counts = Counter(box["class"] for box in look.found["boxes"])
    return "found: " + (", ".join(f"{counts[name]} {name}" for name in sorted(counts)) or "no boxes")


def _by_block(explanation: Explanation, asking: str) -> dict[int, float]:
    return {block: explanation.share(block, asking) for block in explanation.prompted}


def _scalars(explanation: Explanation, block: int) -> dict[str, float]:
    """Numbers of a block for TensorBoard."""
    values = {asking: explanation.share(block, asking) for asking in (*explanation.asking, "uniform")}
    values["tokens_in_use"] = explanation.tokens_in_use(block)
    scalars = {f"attention_to_prompt/{name}": value for name, value in values.items()}
    for found in explanation.similarities:
        if found.block == block:
            scalars["prompt_tokens/effective_rank"] = found.effective_rank
        if found.block == block and len(found.cosines) > 1:
            scalars["prompt_tokens/mean_cosine"] = found.mean_cosine
    return scalars

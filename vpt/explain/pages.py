"""Figures of an explanation, and the folder that they are written to with all numbers."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt.engine.monitor import Monitor
from vpt.explain.numbers import Explanation, ImageAttention
from vpt.models.inspection import NearestPatches
from vpt.plots.attention import Curve, attention_page, line_charts, patch_with_surroundings, similarity_matrices
from vpt.plots.boxes import class_colour, draw_boxes
from vpt.plots.figure import INK, Pixels
from vpt.plots.grid import image_grid
from vpt.storage.files import write_bytes, write_json
from vpt.task_types.base import task_type_named

NUMBERS = "explain.json"
MAX_TOKENS = 12  # on a page of nearest patches
BRIGHT = 0.95  # quantile of a map with the brightest colour: a few patches may get many times the attention of the rest
CHARTS: Mapping[str, Sequence[str]] = {  # of TensorBoard, where the step is the block
    "attention to the prompt, by block": ["^attention_to_prompt/(cls|patches|uniform)$"],
    "prompt tokens in use, by block": ["^attention_to_prompt/tokens_in_use$", "^prompt_tokens/effective_rank$"],
    "mean cosine of prompt tokens, by block": ["^prompt_tokens/mean_cosine$"],
}
OWN = re.compile(
    rf"{NUMBERS}|(image|nearest_block)_\d+\.png|(prompt|similarity)\.png|metrics\.jsonl|events\.out\.tfevents\..*"
)


def is_own_folder(folder: Path) -> bool:
    """Whether a folder may be written to: it does not exist, is empty, or was written by `write_explanation`."""
    return not folder.exists() or not any(folder.iterdir()) or (folder / NUMBERS).is_file()


def write_explanation(explanation: Explanation, folder: Path) -> list[Path]:
    """Write numbers, figures and TensorBoard events in place of earlier ones; returns the files of the figures."""
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


def make_pages(explanation: Explanation) -> Iterator[tuple[str, Pixels]]:
    """Names and figures: one for each image, then those of the prompt, if the task has one."""
    for number in range(len(explanation.images)):
        yield f"image_{number:02d}", image_page(explanation, number)
    if explanation.prompted:
        yield "prompt", prompt_page(explanation)
    if explanation.similarities:
        yield "similarity", similarity_page(explanation)
    for found in explanation.nearest:
        if found.block in explanation.blocks:
            yield f"nearest_block_{found.block:02d}", nearest_page(explanation, found)


def image_page(explanation: Explanation, number: int) -> Pixels:
    """Attention maps over one image, in the chosen blocks."""
    source, result = "CLS" if "cls" in explanation.sources else "patches", explanation.images[number]
    view, task_type = result.view, task_type_named(explanation.model.task_type)
    height, width, _ = view.pixels.shape
    title = [f"image {number:02d}: {'/'.join(Path(view.name).parts[-2:])}", task_type.caption(result.found)]
    is_bare = explanation.model.backbone.prompt is None
    maps = ", 1 is uniform; no prompt" if is_bare else " without and with the prompt, 1 is uniform; patches to prompt"
    title += [f"{source} to patches{maps}", f"{width} x {height} pixels; dark: 0, bright: upper end of the scale"]
    frames = task_type.frames(result.found)
    names = sorted({text for _, text in frames})
    labels = [names.index(text) for _, text in frames]
    image = draw_boxes(view.pixels, [box for box, _ in frames], labels, [""] * len(names))
    rows = [(f"block {block}", _maps(result, block)) for block in explanation.blocks]
    return attention_page(image, (view.image.shape[1], view.image.shape[2]), "\n".join(filter(None, title)), rows)


def prompt_page(explanation: Explanation) -> Pixels:
    """Attention to the prompt, and the number of prompt tokens in use, over the blocks."""
    blocks, images = explanation.prompted, explanation.images
    points = "(points: each image)"
    names = {"uniform": "uniform attention", "cls": f"CLS {points}", "patches": f"patches {points}"}
    shares = [
        Curve(
            names[source],
            {block: 100 * explanation.share(block, source) for block in blocks},
            INK if source == "uniform" else class_colour(number - 1),
            {block: [100 * image.shares[block][source] for image in images] for block in blocks},
            is_dashed=source == "uniform",
        )
        for number, source in enumerate(("uniform", *explanation.sources))
    ]
    num_tokens = {block: float(len(images[0].use[block])) for block in blocks}
    in_use = {block: explanation.tokens_in_use(block) for block in blocks}
    counts = [
        Curve("prompt tokens", num_tokens, INK, is_dashed=True),
        Curve("in use: exp of the entropy of their attention", in_use, class_colour(0)),
    ]
    if explanation.similarities:
        ranks = {found.block: found.effective_rank for found in explanation.similarities}
        counts.append(Curve("directions: effective rank", ranks, class_colour(1)))
    charts = {"attention to the prompt in percent": shares, "prompt tokens": counts}
    return line_charts(charts, explanation.model.backbone.depth)


def similarity_page(explanation: Explanation) -> Pixels:
    """The cosines of all pairs of prompt tokens, for each prompted block."""
    captions = [
        f"block {found.block}: mean cosine {found.mean_cosine:.2f}\n"
        f"effective rank {found.effective_rank:.1f} of {len(found.cosines)}"
        for found in explanation.similarities
    ]
    cosines = [found.cosines.double().cpu().numpy() for found in explanation.similarities]
    return similarity_matrices(cosines, captions, "cosines of prompt tokens\n1 is red, 0 white, -1 blue")


def nearest_page(explanation: Explanation, found: NearestPatches) -> Pixels:
    """The patches that are most similar to the prompt tokens of a block, each with its surroundings."""
    num_tokens, num = found.cosines.shape
    shown, patches, captions = min(num_tokens, MAX_TOKENS), [], []
    for token, k in np.ndindex(shown, num):
        image, row, column = (int(part[token, k]) for part in (found.images, found.rows, found.columns))
        view = explanation.images[image].view
        size = view.image.shape[1], view.image.shape[2]
        grid_size = explanation.model.backbone.vit.patch_embed.dynamic_feat_size(size)
        height, width = size[0] // grid_size[0], size[1] // grid_size[1]
        box = column * width, row * height, (column + 1) * width, (row + 1) * height
        patches.append(patch_with_surroundings(view.pixels, box))
        captions.append(f"token {token}\n{image:02d}: {found.cosines[token, k]:.2f}")
    title = (
        f"block {found.block}: patches most similar to {shown} of {num_tokens} prompt tokens, nearest first\n"
        "below each patch: number of the image and cosine; patches enter the block without a prompt"
    )
    return image_grid(np.stack(patches), captions, num, title=title, min_width=72)


def _maps(result: ImageAttention, block: int) -> list[tuple[NDArray[np.float64], str]]:
    """Maps of a block without and with the prompt, on one scale, and the share that goes to the prompt on its own."""
    inside = result.view.is_inside(result.maps[block].shape)
    maps = [result.bare_maps[block], result.maps[block]] if result.bare_maps else [result.maps[block]]
    top = float(np.quantile(np.stack(maps)[:, inside], BRIGHT)) or 1.0
    names = ("no prompt", "prompt") if result.bare_maps else ("",)
    cells = [
        (values / top, f"{name}\n0 to {top:.1f}; maximum {values[inside].max():.1f}".strip())
        for name, values in zip(names, maps, strict=True)
    ]
    if result.bare_maps and block in result.prompt_maps:
        to_prompt, uniform = result.prompt_maps[block], result.shares[block]["uniform"]
        highest = float(to_prompt[inside].max())
        cells.append((to_prompt / (highest or 1), f"patches to prompt\n0 to {highest:.0%}; uniform: {uniform:.0%}"))
    elif result.bare_maps:
        cells.append((np.zeros_like(maps[0]), "this block has no prompt"))
    return cells


def _scalars(explanation: Explanation, block: int) -> dict[str, float]:
    """Numbers of a block for TensorBoard."""
    sources = (*explanation.sources, "uniform")
    scalars = {f"attention_to_prompt/{source}": explanation.share(block, source) for source in sources}
    scalars["attention_to_prompt/tokens_in_use"] = explanation.tokens_in_use(block)
    for found in (found for found in explanation.similarities if found.block == block):
        scalars["prompt_tokens/effective_rank"] = found.effective_rank
        if len(found.cosines) > 1:
            scalars["prompt_tokens/mean_cosine"] = found.mean_cosine
    return scalars

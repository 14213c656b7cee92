"""Figures of metrics of K classes: a confusion matrix, precision-recall curves."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vpt.plots.boxes import class_colour
from vpt.plots.figure import INK, PALE, Pixels, legible_name, legible_names, new_figure, render

MAX_CELLS = 480  # a side of a confusion matrix, of two pixels each; more classes are counted in groups
_MAX_NAME = 24  # letters
_MAX_CURVES = 200  # without a name


def confusion_matrix(confusion: ArrayLike, classes: Sequence[str], group: int = 1) -> Pixels:
    """Draw a confusion matrix (K, K): rows are targets, columns are predictions, dark cells hold much of their row.

    The colour is the square root of a cell's share of its row, so that rare confusions stay visible. Counts are written
    up to 20 classes, names as long as they are legible; the figure has at most 1,250 pixels a side. Of more than 480
    classes, consecutive ones share a cell, as the axes say; `group` is the number that share one in the given counts.

    Raises:
        ValueError: The counts are not (K, K).
    """
    counts, K = np.asarray(confusion), len(classes)
    if K == 0 or counts.shape != (K, K):
        raise ValueError(f"a confusion matrix of {K} classes is ({K}, {K}), not {counts.shape}")
    if K > MAX_CELLS:
        num = -(-K // MAX_CELLS)
        starts = range(0, K, num)
        counts = np.add.reduceat(np.add.reduceat(counts, starts, axis=0), starts, axis=1)
        K, group, classes = len(counts), group * num, [""] * len(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cell = min(64, 960 / K)  # pixels
    names = legible_names(classes, _MAX_NAME) if cell >= 11 and group == 1 else []  # pixels for a legible name
    font = min(13, cell - 1)
    side = round(K * cell + 60 + 0.65 * font * max(map(len, names), default=0))
    figure = new_figure(max(160, side), max(160, side), layout="constrained")
    axes = figure.add_subplot()
    shared = "" if group == 1 else f", {group} classes a cell"
    axes.set_xlabel(f"prediction{shared}", fontsize=14)
    axes.set_ylabel(f"target{shared}", fontsize=14)
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=font)
    axes.set_yticks(range(len(names)), names, fontsize=font)
    axes.tick_params(length=0)
    size = min(14.0, cell / (0.7 * len(str(counts.max()))))
    for row, column in np.argwhere(counts) if K <= 20 else ():
        text, ink = str(counts[row, column]), "white" if shares[row, column] > 0.35 else INK
        axes.text(column, row, text, color=ink, fontsize=size, ha="center", va="center_baseline")
    return render(figure)


def precision_recall_curves(curves: NDArray[np.float64], classes: Sequence[str]) -> Pixels:
    """Draw precision over recall, a line for each class and one for their mean, with the average precision of each.

    Of more than 10 classes the 5 best and the 5 worst have colours and names; at most 200 others are grey. Curves are
    (K, R), at R equal steps of recall from 0 to 1; a row with nan (no true boxes) has no line.

    Raises:
        ValueError: There is not one curve for each class.
    """
    if curves.ndim != 2 or len(curves) != len(classes) or curves.shape[1] < 2:
        raise ValueError(f"curves of {len(classes)} classes are ({len(classes)}, R), not {curves.shape}")
    known = [label for label in range(len(classes)) if not np.isnan(curves[label]).any()]
    best = sorted(known, key=lambda label: -curves[label].mean())
    named = best if len(best) <= 10 else best[:5] + best[-5:]
    others = [label for label in best if label not in named]
    lines = [(curves[label], "", PALE, 1) for label in others[:: -(-len(others) // _MAX_CURVES) or 1]]
    lines += [
        (curves[label], legible_name(classes[label], label, _MAX_NAME), class_colour(label), 2) for label in named
    ]
    if known:
        lines.append((curves[known].mean(axis=0), f"mean of {len(known)} classes", INK, 3))
    figure = new_figure(860, 560, layout="constrained")
    axes = figure.add_subplot(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_xlabel("recall", fontsize=14)
    axes.set_ylabel("precision", fontsize=14)
    axes.grid(color=PALE, linewidth=0.5)
    for values, name, colour, width in lines:
        # A curve ends where it meets 0: a higher recall is not reached.
        end = int(np.argmax(values <= 0)) + 1 if (values <= 0).any() else len(values)
        # The number comes first: matplotlib hides labels that begin with an underscore.
        label = f"{values.mean():.2f}  {name}" if name else None
        axes.plot(np.linspace(0, 1, len(values))[:end], values[:end], color=colour, linewidth=width, label=label)
    if known:
        figure.legend(loc="outside right upper", frameon=False, title="AP at IoU 0.5", alignment="left", fontsize=12)
    return render(figure)

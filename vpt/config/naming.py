"""Readable names of runs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpt.config.command_line import key_of
from vpt.config.saved import PLACES, ROUNDING, WITHOUT_EFFECT, to_plain
from vpt.config.schema import Config

MAX_TITLE = 64  # characters
NAMED = ("dataset", "backbone", "prompt", "tuning", "head", "seed", "mode")  # by other parts of the title


def data_name(dataset: Mapping[str, Any]) -> str:
    """What a data set is called: its title, or for a title that names only the reader the last part of its path.

    Text from the environment, which may be a secret, is in no name.
    """
    title, places = str(dataset["title"]), [str(dataset[key]) for key in dataset["required"]]
    if title not in (dataset["reader"], dataset["format"]) or not places or "${" in places[-1]:
        return title
    return _clean(Path(places[-1]).expanduser().absolute().name.removesuffix(".csv"))[:20] or title


def run_title(shown: Config, words: Sequence[str]) -> str:
    """The title of a run: data set, backbone, method, what was typed beside them, and seed; at most 64 characters.

    `shown` is the config as it may be saved, and `words` are the typed overrides, such as `train.epochs=40`, of which
    those that do not fit are left out. A title that is not the default stays.
    """
    method = f"{shown.tuning.title}{shown.head.title}"
    if shown.run.title != f"{shown.dataset.title}_{method}":
        return shown.run.title
    typed = {key_of(word): word.partition("=")[2].strip("'\"") for word in words if "=" in word and word[0] != "-"}
    backbone = typed.get("backbone") or re.sub(r"_patch\d+|_\d+$", "", shown.backbone.name.partition(".")[0])
    end = f"_seed{shown.seed}"
    title = "_".join(map(_clean, (data_name(to_plain(shown)["dataset"]), backbone, method)))[: MAX_TITLE - len(end)]
    silent = {*WITHOUT_EFFECT, *ROUNDING, *PLACES, "title", "hydra"}
    for key, value in typed.items():
        section, _, name = key.rpartition(".")
        is_data = section == "dataset" and name in shown.dataset.required
        if key in NAMED or is_data or "${" in value or {*key.split(".")} & silent:
            continue
        part = "_" + _clean(f"{name if section else ''}{'' if value[:1].isdigit() else '-'}{value}")
        title += part if len(title) + len(part) + len(end) <= MAX_TITLE else ""
    return title + end


def _clean(text: str) -> str:
    """The text with hyphens in the place of what is not allowed in the name of a run."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")

"""The card of a task on the Hugging Face Hub: metadata for the hub, and text for its readers.

Texts from a task file are escaped: they cannot add markdown, HTML or YAML.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vpt.models.task_schema import DECODING, TaskMetadata
from vpt.task_types.base import task_type_named

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

MAX_LISTED = 50  # entries of a list from an untrusted file
MAX_RESULTS = 100  # metrics of all splits
MAX_LABEL = 100  # characters of a name in such a list

METRIC_TYPES = {"top1": "accuracy"}  # our metric -> the hub's, where its name differs
HUB_LICENCES = """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc-by-2.0
    cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gpl-2.0 gpl-3.0 isc lgpl-2.1
    lgpl-3.0 lgpl-lr lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail osl-3.0 pddl postgresql unlicense
    wtfpl zlib
"""
SPDX_TO_HUB = {"lgpllr": "lgpl-lr", "odbl-1.0": "odbl", "odc-by-1.0": "odc-by", "pddl-1.0": "pddl"}

# A character of markdown or HTML -> its escape; a pipe would end a cell of a table.
LITERAL = str.maketrans(
    {character: f"\\{character}" for character in string.punctuation if character not in ",;"}
    | {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}
)


def model_card(metadata: TaskMetadata, repo_id: str, tensors: Mapping[str, Tensor] | None = None) -> str:
    """The text of a repository's `README.md`, with the size of these tensors of its file; ValueError for a bad id."""
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    validate_repo_id(repo_id)
    usage = task_type_named(metadata.task_type).usage
    names = {"repo_id": json.dumps(repo_id), "backbone": json.dumps(metadata.backbone, ensure_ascii=False)}
    sections = [
        f"# {_text(repo_id.rpartition('/')[2])}",
        "A task for `vpt`: learned parameters for a pretrained vision transformer, without its weights, as in "
        "[Visual Prompt Tuning](https://arxiv.org/abs/2203.12119) (Jia et al., 2022).",
        _table(["", ""], list(_facts(metadata, tensors).items())),
        f"## Use\n\nWith the Python package `vpt`:\n\n```python\n{usage.format(**names)}```",
    ]
    if metadata.metrics:
        sections.append(f"## Results\n\n{_metrics_table(metadata)}")
    if metadata.classes is not None:
        rest = len(metadata.classes) - MAX_LISTED
        listed = ", ".join(_text(name) or "(no name)" for name in metadata.classes[:MAX_LISTED])
        sections.append(f"## Classes\n\n{listed}" + (f" and {rest} more" if rest > 0 else ""))
    if metadata.note:
        lines = [_text(line, len(line)) for line in metadata.note.splitlines()]
        sections.append("## Note\n\n" + "  \n".join(f"> {line}" for line in lines))
    return str(ModelCard(f"---\n{_card_data(metadata, repo_id).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _card_data(metadata: TaskMetadata, repo_id: str) -> "ModelCardData":
    from huggingface_hub import ModelCardData

    results, (licence, licence_name) = _results(metadata), _licence(metadata.licence)
    architecture, _, tag = metadata.backbone.partition(".")
    is_on_hub = tag not in ("", "vpt")  # weights without a tag were not timm's; vpt's ship with the package
    return ModelCardData(
        license=licence,
        license_name=licence_name,
        library_name="vpt",
        pipeline_tag=task_type_named(metadata.task_type).pipeline_tag,
        tags=["visual-prompt-tuning", "parameter-efficient"],
        base_model=f"timm/{architecture}.{tag}" if is_on_hub else None,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def _licence(licence: str) -> tuple[str | None, str | None]:
    """The hub's name of a licence; if it has none, "other" and a name."""
    if not licence.strip():
        return None, None
    name = re.sub(r"[^a-z0-9.+]+", "-", licence.lower()).strip("-.")[:MAX_LABEL]
    known = re.sub(r"(-only|-or-later|\+)$", "", name)
    known = SPDX_TO_HUB.get(known, known)
    return (known, None) if known in HUB_LICENCES.split() else ("other", name or "unnamed")


def _results(metadata: TaskMetadata) -> "list[EvalResult]":
    from huggingface_hub import EvalResult

    dataset = (metadata.config or {}).get("dataset")
    title = dataset.get("title") if isinstance(dataset, dict) else None
    pairs = ((split, *pair) for split, values in metadata.metrics.items() for pair in values.items())
    numbers = ((split, name, value) for split, name, value in pairs if value is not None)
    return [
        EvalResult(
            task_type=task_type_named(metadata.task_type).pipeline_tag,
            dataset_type="unknown",  # on the hub; the images may be private
            dataset_name=_label(title) if isinstance(title, str) else "unknown",
            dataset_split=_label(split),
            metric_type=METRIC_TYPES.get(name, _label(name)),
            metric_name=_label(name),
            metric_value=value,
        )
        for split, name, value in islice(numbers, MAX_RESULTS)
    ]


def _facts(metadata: TaskMetadata, tensors: Mapping[str, Tensor] | None) -> dict[str, str]:
    preprocessing, prompt, head = metadata.preprocessing, metadata.prompt, metadata.head
    (height, width), crop = preprocessing["size"], f"{preprocessing['crop_pct']:g}"
    facts = {
        "type": f"{metadata.task_type}, {metadata.num_classes} classes",
        "backbone": f"`{metadata.backbone}`, with the weights of fingerprint `{metadata.fingerprint}`",
        "prompt": "none",
        "head": "linear" if head is None else f"{_text(head['head'])}, strides {_numbers(head['strides'])}",
        "input": f"{height} x {width} px, {_text(preprocessing['interpolation'])}, crop {crop} "
        f"({_text(preprocessing['crop_mode'])}), mean {_numbers(preprocessing['mean'])}, "
        f"std {_numbers(preprocessing['std'])}",
    }
    if decoding := [f"{name} {_text(str(preprocessing[name]))}" for name in DECODING if name in preprocessing]:
        facts["input"] += ", " + ", ".join(decoding)
    if prompt is not None:
        facts["prompt"] = f"{prompt['kind']}, {prompt['num_tokens']} tokens in blocks {_numbers(prompt['blocks'])}"
    if metadata.tuned_backbone:
        facts["backbone"] += "; parameters of it were tuned, and are in the file"
    if tensors is not None:
        facts["size"] = _size(tensors)
    if metadata.versions:
        versions = islice(metadata.versions.items(), MAX_LISTED)
        facts["made with"] = ", ".join(f"{_text(name)} {_text(version)}" for name, version in versions)
    if metadata.licence:
        facts["licence"] = _text(metadata.licence, len(metadata.licence))
    return facts


def _size(tensors: Mapping[str, Tensor]) -> str:
    """Numbers in a task file, by part, and their bytes."""
    numbers: Counter[str] = Counter()
    for name, tensor in tensors.items():
        numbers[name.partition(".")[0]] += tensor.numel()
    kilobytes = sum(tensor.nbytes for tensor in tensors.values()) / 1000
    parts = ", ".join(f"{_text(part)} {number:,}" for part, number in numbers.items())
    return f"{numbers.total():,} numbers ({parts}), {kilobytes:,.0f} kB"


def _metrics_table(metadata: TaskMetadata) -> str:
    """A row for each metric, a column for each split."""
    splits = list(islice(metadata.metrics, MAX_LISTED))
    names = dict.fromkeys(name for split in splits for name in metadata.metrics[split])
    found = {name: [metadata.metrics[split].get(name) for split in splits] for name in islice(names, MAX_LISTED)}
    rows = [[_text(name), *("" if x is None else f"{x:.4g}" for x in values)] for name, values in found.items()]
    return _table(["", *map(_text, splits)], rows)


def _table(head: list[str], rows: list[Any]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _numbers(values: list[float]) -> str:
    more = ", ..." if len(values) > MAX_LISTED else ""
    return ", ".join(f"{value:g}" for value in values[:MAX_LISTED]) + more


def _text(text: str, limit: int = MAX_LABEL) -> str:
    """Untrusted text, escaped for markdown."""
    return plain(text, limit).translate(LITERAL)


def _label(text: str) -> str:
    """An untrusted name for the front matter: words and numbers only."""
    return " ".join(re.sub(r"[^\w.+-]+", " ", plain(text)).split()) or "unknown"


def plain(text: str, limit: int = MAX_LABEL) -> str:
    """One line of printable characters: no line breaks, control characters or halves of characters."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."

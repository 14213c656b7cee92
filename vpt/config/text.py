"""Paths and names stay the text that was typed, on the command line and in YAML, even if they look like numbers."""

import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import yaml
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from vpt.config.schema import schema_options

SWEEP = re.compile(r"(choice|glob|interval|range|shuffle|sort|tag)\(.*\)")  # functions of Hydra's grammar
NOT_TEXT = re.compile(r"[+-]?([\d.].*|inf|nan)|true|false|null", re.IGNORECASE)  # at least what Hydra reads as such


def _members(type_: Any) -> tuple[Any, ...]:
    return get_args(type_) if get_origin(type_) is UnionType else (type_,)


TEXT = {  # keys whose value is a text, and whether it may be null
    key: NoneType in _members(entry.type)
    for key, entry in schema_options()
    if any(isinstance(member, type) and issubclass(member, str) for member in _members(entry.type))
}
NAMES = {key.rpartition(".")[2] for key in TEXT} | {"annotations"}  # of keys in a file of any group


def keep_text(word: str, groups: frozenset[str] = frozenset()) -> str:
    """An override `key=value` with quotes of Hydra's grammar where a text, or the name of a choice, needs them.

    Values with commas are those of a sweep if they have no other special characters.

    Example:
        >>> keep_text("dataset.root=2024_01"), keep_text("run.name=my run"), keep_text("seed=1")
        ("dataset.root='2024_01'", "run.name='my run'", 'seed=1')
    """
    key, _, value = word.partition("=")
    name = key.lstrip("+")
    if (name not in TEXT and name not in groups) or value[:1] in ("'", '"') or SWEEP.fullmatch(value):
        return word
    if not re.fullmatch(r"[\w/.:+,*@-]*", value, re.ASCII):
        return f"{key}={_quoted(value)}"
    parts = value.split(",")
    is_null = TEXT.get(name, False)
    quoted = [
        _quoted(part) if NOT_TEXT.fullmatch(part) and not (part == "null" and is_null) else part for part in parts
    ]
    return f"{key}={','.join(quoted)}"


def _quoted(text: str) -> str:
    """The text between quotes; backslashes count in front of a quote only."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text) + "'"


def quote_text(text: str) -> str:
    """YAML of a config with quotes around texts, so that `root: 2024_01` and `cache: off` are what they look like."""
    found: set[tuple[int, int]] = set()

    def visit(node: yaml.Node, is_text: bool, is_nested: bool) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value != "options":  # of adapters: no keys of the config
                    visit(value, is_nested or key.value in NAMES, is_nested or key.value == "annotations")
        elif (
            isinstance(node, yaml.ScalarNode) and is_text and node.style is None and node.value not in ("", "~", "null")
        ):
            found.add((node.start_mark.index, node.end_mark.index))

    try:
        visit(yaml.compose(text, Loader=yaml.SafeLoader), False, False)
    except yaml.YAMLError:
        return text  # refused by whoever reads it
    for start, end in sorted(found, reverse=True):
        text = text[:start] + "'" + text[start:end].replace("'", "''") + "'" + text[end:]
    return text


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's reader of configuration files, which also keeps texts; of the same name, so that it is not replaced."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Load a file with its texts as they are written."""
        result = super().load_config(config_path)
        path = Path(self.path) / self._normalize_file_name(config_path)
        result.config = OmegaConf.create(quote_text(path.read_text(encoding="utf-8")))
        return result


def register_source() -> None:
    """Let Hydra read files with `FileConfigSource`."""
    Plugins.instance()  # registers its own
    SourcesRegistry.instance().types["file"] = FileConfigSource

"""Hook of mkdocs: the tables of the page of all keys, from the schema of the config."""

from typing import Any

from vpt.config.composition import group_choices
from vpt.config.help import meaning, shown_value
from vpt.config.schema import Config, schema_options


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables in the place of their marker."""
    return markdown.replace("<!-- tables of keys -->", key_tables())


def key_tables() -> str:
    """Markdown with a table for each section, and one for the keys outside of sections."""
    sections: dict[str, list[str]] = {"": []}
    for key, entry in schema_options():
        section = key.rpartition(".")[0]
        if "about" in entry.metadata:
            text = meaning(entry).replace("|", "\\|")
            sections[section].append(f"| `{key}` | `{shown_value(entry) or ' '}` | {text} |")
        else:
            choices = ", ".join(f"`{name}`" for name in group_choices(key))
            head = f"{entry.type.__doc__}{f' Group: `{key}=` {choices}.' if choices else ''}"
            sections[key] = [f"## {key}\n\n{head}\n\n| key | default | meaning |\n|---|---|---|"]
    rest = sections.pop("")
    rest.insert(0, f"## All others\n\n{Config.__doc__}\n\n| key | default | meaning |\n|---|---|---|")
    return "\n\n".join("\n".join(lines) for lines in [*sections.values(), rest])

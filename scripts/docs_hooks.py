"""MkDocs hooks: ```math blocks become MathML, and each page of a method is in the navigation."""

from pathlib import Path
from typing import Any

from latex2mathml.converter import convert


def formula(source: str, *_args: Any, **_kwargs: Any) -> str:
    """A LaTeX block as MathML, one line of it for each line of the source."""
    lines = (line.strip() for line in source.splitlines())
    return "\n".join(
        f'<div class="formula">{convert(line, display="block")}</div>' for line in lines if line
    )


def on_config(config: Any) -> Any:
    """Let superfences pass ```math blocks to `formula`; other code blocks stay as they are."""
    settings = config["mdx_configs"].setdefault("pymdownx.superfences", {})
    settings.setdefault("custom_fences", []).append(
        {"name": "math", "class": "formula", "format": formula}
    )
    add_methods(config)
    return config


def add_methods(config: Any) -> None:
    """Append the pages of docs/methods that mkdocs.yml does not name to the section Methods."""
    (section,) = (entry["Methods"] for entry in config["nav"] if "Methods" in entry)
    listed = {
        path
        for entry in section
        for path in ([entry] if isinstance(entry, str) else entry.values())
    }
    for page in sorted((Path(config["docs_dir"]) / "methods").glob("*.md")):
        path = f"methods/{page.name}"
        if path not in listed:
            section.append({page.stem: path})

"""MkDocs hook: ```math blocks become MathML at build time, so that pages need no script."""

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
    return config

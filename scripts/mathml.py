"""```math blocks of the documentation become MathML: `format` of a fence in mkdocs.yml."""

from latex2mathml.converter import convert


def formula(source: str, *_args: object, **_kwargs: object) -> str:
    """A LaTeX block as MathML, one line of it for each line of the source."""
    lines = (line.strip() for line in source.splitlines())
    return "\n".join(
        f'<div class="formula">{convert(line, display="block")}</div>' for line in lines if line
    )

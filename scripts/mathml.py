"""```math blocks of the documentation become MathML: `format` of a fence in mkdocs.yml."""

from latex2mathml.converter import convert

GAP = r"\qquad"  # between the equations of a line, which may stand below one another


def formula(source: str, *_args: object, **_kwargs: object) -> str:
    """A LaTeX block as MathML, one line of it for each line of the source."""
    lines = (line.strip() for line in source.splitlines())
    return "\n".join(
        f'<div class="formula">{"".join(equations(line))}</div>' for line in lines if line
    )


def equations(line: str) -> list[str]:
    """The equations of a line as MathML."""
    parts = line.split(GAP)
    # a gap inside of braces does not separate
    whole = parts if all(part.count("{") == part.count("}") for part in parts) else [line]
    return [convert(part, display="block") for part in whole]

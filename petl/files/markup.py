"""Names and sentences inside markdown and YAML."""

import html
import re
from typing import Any

import yaml

from petl.errors import printable

# what starts emphasis, code, a link, a formula, or another cell of a table; an underscore inside of
# a word, as in train.batch_size, starts nothing; and the parts of a bare address, which would be
# shown as a link
SPECIAL = re.compile(
    r"[\\`\[\]|~$]|(?<!\s)\*|\*(?=\S)|(?<![^\W_])_|_(?![^\W_])|(?<=\w):(?=//)|(?<=www)\.", re.I
)


def markdown(text: object) -> str:
    """Return text as a line of markdown that shows it as it is: no markup, HTML or link."""
    line = " ".join(printable(text).split())
    return html.escape(SPECIAL.sub(lambda found: f"\\{found[0]}", line), quote=False)


def front_matter(fields: dict[str, Any]) -> str:
    """Return the YAML block at the start of a markdown file, with its marks."""
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"

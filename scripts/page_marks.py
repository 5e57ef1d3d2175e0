"""Blocks that scripts write in markdown pages, between `<!-- NAME -->` and `<!-- end -->`."""

import re

from petl.errors import InputError


def filled(page: str, name: str, block: str) -> str:
    """Return a page with a block between the marks of this name.

    Raises:
        InputError: there are no such marks.
    """
    marks = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not marks.search(page):
        raise InputError(f"the page has no '<!-- {name} -->' with '<!-- end -->' after it")
    return marks.sub(lambda match: f"{match[1]}\n{block}\n\n{match[2]}", page)

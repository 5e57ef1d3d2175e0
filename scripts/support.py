"""Write what follows from the methods: docs/support.md, `petl methods`, petl/signatures.pyi."""

from pathlib import Path

import make_stubs

from petl.cli.catalog.listing import write_cache
from petl.cli.catalog.support import PAGE, page

if __name__ == "__main__":
    target = Path(__file__).parents[1] / PAGE
    target.write_text(page())
    print(f"written: {target}, {write_cache()} and {make_stubs.write()}")

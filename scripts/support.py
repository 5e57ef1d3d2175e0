"""Write what the code says of methods: docs/support.md, and what `petl methods` prints."""

from pathlib import Path

from petl.catalog.listing import keep
from petl.catalog.support import PAGE, page

if __name__ == "__main__":
    target = Path(__file__).parents[1] / PAGE
    target.write_text(page())
    print(f"written: {target} and {keep()}")

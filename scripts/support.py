"""Write docs/support.md and the tables of `petl methods` (petl/catalog/listing.json)."""

from pathlib import Path

from petl.catalog.listing import write_cache
from petl.catalog.support import PAGE, page

if __name__ == "__main__":
    target = Path(__file__).parents[1] / PAGE
    target.write_text(page())
    print(f"written: {target} and {write_cache()}")

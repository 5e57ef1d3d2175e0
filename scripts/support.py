"""Write docs/support.md: what each method goes together with, as the code says."""

from pathlib import Path

from petl.support import PAGE, page

if __name__ == "__main__":
    target = Path(__file__).parents[1] / PAGE
    target.write_text(page())
    print(f"written: {target}")

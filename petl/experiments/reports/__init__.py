"""Reports of runs and comparisons: tables on the terminal, HTML pages, charts."""

"""What the papers of the methods claim, tried on real data: see scripts/claims.py.

claim.py        what a claim is: statements, contenders, data
catalog.py      the claims, described in verbs.py and more.py; untried.py: those that are left
intervals.py    a mean difference over seeds and test rows: its interval, what would narrow it
verdicts.py     holds, does not hold, cannot be told
running.py      trains the contenders by `petl.sweeps.study`, compares their predictions
results.py      what was measured, as files
page.py         tables and sentences of docs/claims.md and of the methods' pages
pictures.py     the intervals as SVG files
"""

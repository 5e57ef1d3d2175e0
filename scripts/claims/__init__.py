"""What the papers of the methods claim, tried on real data: see scripts/claims.py.

claim.py        what a claim is: statements, contenders, data
claims.yaml     the claims, their data, and those that are left to try; read by catalog.py
measures.py     what is compared: accuracy, losses, time, memory, density; routers.py: agreement;
                neurons.py: neurons that a decoder needs
intervals.py    a mean difference over seeds and test rows: its interval, what would narrow it
verdicts.py     holds, does not hold, cannot be told
running.py      trains contenders by `petl.experiments.sweeps.study`, compares them by example
edits.py        contenders that are made of finished adapters; several.py: of those of several tasks
texts.py        files for a decoder; task_files.py: of several tasks; fashion.py: images, and ViTs
results.py      what was measured, as files
page.py         tables and sentences of docs/claims.md and of the methods' pages
pictures.py     the intervals as SVG files
"""

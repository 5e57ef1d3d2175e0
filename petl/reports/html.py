"""HTML pages that stand alone: style, pictures and all in one file."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment


def page(title: str, body: str, **values: Any) -> str:
    """A page with this title; `body` is a jinja2 template that is given `values`."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    inner = environment.from_string(body).render(title=title, **values)
    return environment.from_string(FRAME).render(title=title, style=STYLE, inner=inner)


def embedded(picture: Path) -> str:
    """A PNG file as the source of an image."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img, svg { max-width: 100%; height: auto; }
figure { margin: 0; break-inside: avoid; }
.charts figure { display: inline-block; max-width: 100%; margin: 0 .7rem 1rem 0; }
pre { font-size: 12px; line-height: 1.4; background: #f6f6f6; padding: .7rem; overflow-x: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; }
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
@media print {
  body { margin: 0; font-size: 10pt; }
  h2 { break-after: avoid; }
  .wide { overflow-x: visible; }
  .wide table { font-size: 8pt; }
  th, td { padding: .2rem .35rem; }
  th, td:first-child { white-space: normal; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  .charts { orphans: 1; widows: 1; }
  .charts figure { width: 47%; }
}
"""

FRAME = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
{{ style | safe }}</style>
</head>
<body>
<h1>{{ title }}</h1>
{{ inner | safe }}
</body>
</html>
"""

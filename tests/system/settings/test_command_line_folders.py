"""Configurations of the user's own, in ./configs and in the folder of --config-dir."""

import logging
import shutil

import pytest

from petl.cli.catalog.listing import listing
from petl.cli.catalog.method_page import page_of
from petl.cli.catalog.recipes import list_recipes
from petl.cli.main import main
from petl.errors import InputError
from petl.system.files import paths
from petl.system.settings import command_line
from petl.training.compose import compose

WIDE = "# MoLA with more experts. For wide models.\ndefaults: [mola, _self_]\nnum_experts: 8\n"
SHORT = "# @package _global_\ntrain:\n  steps: 4\n"


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Write configurations into a folder of the working directory, by their names in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "_added", [])

    def write(folder="configs", **files):
        for name, text in files.items():
            file = tmp_path / folder / f"{name.replace('__', '/')}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path / folder

    return write


def conflicts(caplog):
    caplog.set_level(logging.INFO, logger="petl")
    command_line.log_conflicts()
    return [record.getMessage() for record in caplog.records]


def test_files_of_the_working_directory_are_found_without_a_flag(work, caplog):
    work(method__wide=WIDE, experiment__short=SHORT, data__mine="defaults: [files, _self_]\n")
    cfg = compose(["+method=wide", "+experiment=short", "data=mine"])
    assert (cfg.method.name, cfg.method.num_experts, cfg.method.r) == ("mola", 8, 8)
    assert (cfg.train.steps, cfg.data.name) == (4, "files")
    assert "experiment" in command_line.groups()
    assert "wide" in command_line.options_of("method")
    with pytest.raises(InputError, match=r"'wid'.*'wide'"):
        compose(["+method=wid"])
    assert conflicts(caplog) == []


def test_of_equal_names_the_users_is_used_and_it_is_said(work, caplog):
    work(method__mola="name: mola\ntarget_modules: all-linear\nr: 3\n")
    assert compose(["+method=mola"]).method.r == 3
    assert conflicts(caplog) == [
        "used instead of petl's own of this name: ./configs/method/mola.yaml"
    ]


@pytest.mark.parametrize("option", ["--config-dir={}", "--config-dir {}", "-cd {}"])
def test_the_folder_of_the_option_comes_before_the_working_directory(work, option):
    work(method__mola="name: mola\nr: 3\n", method__wide=WIDE)
    other = work("other", method__mola="name: mola\nr: 4\n")
    assert not command_line.read_words([*option.format(other).split(), "+method=mola"])
    assert compose(["+method=mola"]).method.r == 4
    assert compose(["+method=wide"]).method.num_experts == 8
    assert command_line.config_dir_words() == ["--config-dir", str(work("other"))]


def test_another_programs_configs_replace_nothing(work, caplog):
    work(train="train: true\n", method__mola="r: 3\n", model__resnet="depth: 18\n")
    cfg = compose(["+method=mola"])
    assert (cfg.method.r, cfg.train.batch_size) == (8, 32)
    (line,) = conflicts(caplog)
    assert line.startswith("./configs has a train.yaml, which is not used")
    assert "--config-dir ./configs puts these first" in line


def test_petls_own_folder_is_not_the_users(monkeypatch, caplog):
    monkeypatch.chdir(command_line.config_dir().parent)
    monkeypatch.setattr(command_line, "_added", [])
    assert command_line.config_dirs() == [command_line.config_dir()]
    assert conflicts(caplog) == []


@pytest.mark.thorough
def test_recipes_and_variants_of_the_users_are_listed_and_shown(work):
    text = "# @package _global_\n# Lean. More.\ndefaults: [lora@method, _self_]\nmethod: {r: 3}\n"
    command_line.add_config_dir(work("other", method__lean=text))
    work(method__wide=WIDE, method__diag="name: diag\n")  # of a package that is not imported
    assert {"lean", "wide", "deft"} <= set(list_recipes())
    assert "diag" not in list_recipes()
    (recipes,) = [table for table in listing() if table.title.startswith("recipes")]
    usages = [row[1] for row in recipes.rows]
    assert {"+method=lean", "+method=wide", "+method=deft"} <= set(usages)
    page = page_of("wide")
    assert page.summary == "MoLA with more experts"
    assert page.file == "./configs/method/wide.yaml"
    assert page.field("method.num_experts").preset == "8"


def test_one_configuration_is_found_by_its_name(work):
    folder = work(method__wide=WIDE)
    assert command_line.file_named("method/wide") == folder / "method/wide.yaml"
    own = command_line.config_dir()
    assert command_line.file_named("sweep/lora.yaml") == own / "sweep/lora.yaml"
    assert command_line.file_named("train") == own / "train.yaml"
    with pytest.raises(InputError):
        command_line.file_named("method/wid")


@pytest.mark.parametrize("command", [["methods"], ["plan", "+method=broken"]])
@pytest.mark.parametrize("text", ["a: [1\n", "- 1\n"])
def test_a_file_that_is_no_configuration_ends_in_one_message(work, capsys, text, command):
    work(method__broken=text)
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "broken" in line or "method=[1] is not a group of settings" in line


def test_the_folder_inside_of_a_wheel_is_used_before_a_neighbor_of_the_package(
    tmp_path, monkeypatch
):
    package = tmp_path / "site-packages" / "petl"
    shutil.copytree(command_line.config_dir(), package / "configs")
    (tmp_path / "site-packages" / "configs").mkdir()  # another distribution's
    monkeypatch.setattr(paths, "__file__", str(package / "system/files/paths.py"))
    assert command_line.config_dir() == package / "configs"

"""An installation that mixes petl with the table ETL project of that name is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import petl
from petl.system.imports.peft_hook import refuse_mixed_install


def test_a_package_folder_of_this_project_alone_is_accepted():
    refuse_mixed_install(str(Path(petl.__file__).parent))


@pytest.mark.parametrize("subpackage", ["util", "io", "transform"])
def test_files_of_the_table_etl_project_are_refused(subpackage, tmp_path):
    (tmp_path / subpackage).mkdir()
    refuse_mixed_install(str(tmp_path))  # a folder that an uninstalled package left behind
    (tmp_path / subpackage / "__init__.py").touch()
    with pytest.raises(ImportError, match=f"petl/{subpackage} .*pip uninstall petl"):
        refuse_mixed_install(str(tmp_path))


def test_import_petl_checks_its_own_folder(tmp_path):
    folder = Path(petl.__file__).parent
    shutil.copytree(folder, tmp_path / "petl", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "petl" / "io").mkdir()
    (tmp_path / "petl" / "io" / "__init__.py").touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import petl"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "ImportError" in ran.stderr
    assert "mixes two distributions" in ran.stderr

"""Detect files of the other distribution that installs a package `petl` (table ETL)."""

import os.path  # not pathlib, which would slow down `import petl`

# Subpackages of the table ETL project, none of which this project has.
OTHER_SUBPACKAGES = ("util", "io", "transform")


def refuse_mixed_install(package: str) -> None:
    """Raise if the folder of the package `petl` holds subpackages of the table ETL project.

    Both distributions install files of the same names (`__init__.py`, `errors.py`, `version.py`),
    so that the one installed last has overwritten part of the other. Costs three `stat` calls.

    Raises:
        ImportError: there are such subpackages; the message says how to separate the two.
    """
    # `__init__.py`, since uninstalling leaves folders with only __pycache__ behind
    mixed = [
        name
        for name in OTHER_SUBPACKAGES
        if os.path.isfile(f"{package}/{name}/__init__.py")  # noqa: PTH113 - see the import
    ]
    if mixed:
        raise ImportError(
            f"{package} mixes two distributions: petl-peft (parameter-efficient fine-tuning) and "
            f"petl (table ETL), of which petl/{mixed[0]} is a part. Both install a package named "
            "petl, so use one environment for each; to keep petl-peft here, run: "
            "pip uninstall petl petl-peft && pip install petl-peft"
        )

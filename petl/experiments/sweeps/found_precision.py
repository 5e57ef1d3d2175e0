"""What `train.precision=auto` is for the runs of a study."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence

from petl.data.models.sources import ModelSource
from petl.errors import InputError
from petl.system.settings.command_line import config_dir_words
from petl.training.distributed.precision import automatic, width_to_try

COMMAND = (sys.executable, "-m", "petl.cli.precision")


def found_precision(
    model: ModelSource, overrides: Sequence[str], environment: Mapping[str, str]
) -> str:
    """Return what auto is for a model on this machine.

    A trial is made in a process of its own, which has the threads of a run, and whose end leaves
    the device to the runs.

    Args:
        overrides: those of a run with the model.
        environment: of the runs.

    Raises:
        InputError: it is not known, since the model is not available.
    """
    if width_to_try(model) is None:
        return automatic(model)
    done = subprocess.run(
        [*COMMAND, *config_dir_words()],
        env=environment,
        input=json.dumps([*overrides]),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InputError(f"train.precision=auto is not known for {model.name}, see above")
    return done.stdout.split()[-1]

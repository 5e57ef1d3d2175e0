"""What differs between the trackers of Accelerate: names, resuming, tables, pictures, files.

Accelerate starts a run, and logs its configuration and numbers; a `TrackerService` has the rest.
Tables and pictures go where the service shows them, else to its files.
"""

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from petl.core.types import Arguments
from petl.system.files.disk import write_atomic
from petl.training.tracking.base import TrackerTable

ServiceRun = Any  # the service's own object of a run


class TrackerService:
    """A tracker that is only known to Accelerate, and the base of the others.

    Attributes:
        key: its name in Accelerate.
        package: the module that must be installed; "" if the user's own code registers it.
        environment: variables that are set unless they are.
    """

    key: ClassVar[str] = ""
    package: ClassVar[str] = ""
    environment: ClassVar[dict[str, str]] = {}

    @property
    def module(self) -> ModuleType:
        """The package, imported."""
        return import_module(self.package)

    def arguments(self, folder: Path, name: str, known: str | None) -> Arguments:
        """Arguments of Accelerate's class: the name of a new run, or the id of a known one."""
        return {}

    def prepare(self, arguments: Arguments) -> None:
        """Make what must exist before a run starts with these arguments."""

    def began(self, run: ServiceRun, name: str) -> str | None:
        """Finish starting `run`, the service's own object; return its id, None if it has none."""

    def table(self, run: ServiceRun, name: str, table: TrackerTable, step: int) -> object:
        """Log a table; return NotImplemented if the service has none."""
        return NotImplemented

    def picture(self, run: ServiceRun, path: Path, step: int) -> object:
        """Log a PNG file; return NotImplemented if the service has none."""
        return NotImplemented

    def adapter(self, run: ServiceRun, folder: Path) -> object:
        """Log the folder of an adapter; return NotImplemented if the service keeps no files."""
        return NotImplemented

    def failed(self, run: ServiceRun) -> None:
        """Mark a run as failed before it is closed."""

    def closing(self, project: str, folder: Path) -> str:
        """How to view the run; "" if the service prints it."""
        return ""


class Mlflow(TrackerService):
    """MLflow: the server or store of MLFLOW_TRACKING_URI, else its default in this directory."""

    key = package = "mlflow"
    # its default of 7 doubles the delay each time: a run would stand still for minutes
    environment: ClassVar = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}

    def arguments(self, folder: Path, name: str, known: str | None) -> Arguments:
        # the id alone: a known run has its name already
        return {"run_id": known} if known else {"run_name": name}

    def began(self, run: ServiceRun, name: str) -> str:
        return run.info.run_id

    def table(self, run: ServiceRun, name: str, table: TrackerTable, step: int) -> object:
        # MLflow shows JSON files of this form as tables
        self.module.log_table(table.by_column(), f"{name}.json", run_id=run.info.run_id)

    def picture(self, run: ServiceRun, path: Path, step: int) -> object:
        self.module.log_artifact(str(path), "pictures")

    def adapter(self, run: ServiceRun, folder: Path) -> object:
        self.module.log_artifacts(str(folder), "adapter")

    def failed(self, run: ServiceRun) -> None:
        self.module.end_run("FAILED")  # before `finish`, which would mark it as finished

    def closing(self, project: str, folder: Path) -> str:
        store = self.module.get_tracking_uri()
        if store.startswith("http"):
            return f"on MLflow: {store}, experiment {project}"
        return f"to view the run: mlflow ui --backend-store-uri {store}"


class Comet(TrackerService):
    """Comet: online with an API key, or offline with +tracker.arguments.online=false."""

    key = package = "comet_ml"

    def arguments(self, folder: Path, name: str, known: str | None) -> Arguments:
        return {"experiment_key": known} if known else {}

    def began(self, run: ServiceRun, name: str) -> str:
        run.set_name(name)
        return run.get_key()

    def table(self, run: ServiceRun, name: str, table: TrackerTable, step: int) -> object:
        run.log_table(f"{name}.csv", table.rows, table.columns)  # the suffix decides the format

    def picture(self, run: ServiceRun, path: Path, step: int) -> object:
        run.log_image(str(path), path.stem, step=step)

    def adapter(self, run: ServiceRun, folder: Path) -> object:
        run.log_model("adapter", str(folder))


class Trackio(TrackerService):
    """Trackio: a store in TRACKIO_DIR, or a Space of the hub."""

    key = package = "trackio"

    def arguments(self, folder: Path, name: str, known: str | None) -> Arguments:
        # Trackio knows a run by its name, there is no other id
        return {"name": known or name, "resume": "allow"}

    def began(self, run: ServiceRun, name: str) -> str:
        return run.name

    def table(self, run: ServiceRun, name: str, table: TrackerTable, step: int) -> object:
        run.log({name: self.module.Table(dataframe=table.frame())}, step=step)

    def picture(self, run: ServiceRun, path: Path, step: int) -> object:
        run.log({f"pictures/{path.stem}": self.module.Image(str(path))}, step=step)

    def closing(self, project: str, folder: Path) -> str:
        return f"to view the run: trackio show --project {project}"


class Aim(TrackerService):
    """Aim: the repository .aim of this directory, or of +tracker.arguments.logging_dir=PATH."""

    key = package = "aim"

    def arguments(self, folder: Path, name: str, known: str | None) -> Arguments:
        # one repository for all runs: `aim up` shows a single one
        return {"logging_dir": "."} | ({"run_hash": known} if known else {})

    def prepare(self, arguments: Arguments) -> None:
        # creates it unless it exists, which a Run does not
        self.module.Repo.from_path(arguments["logging_dir"], init=True)

    def began(self, run: ServiceRun, name: str) -> str:
        run.name, run.experiment = name, run.name  # Accelerate's name is that of the project
        return run.hash

    def table(self, run: ServiceRun, name: str, table: TrackerTable, step: int) -> object:
        run.track(self.module.Text(table.markdown()), name=name, step=step)

    def picture(self, run: ServiceRun, path: Path, step: int) -> object:
        run.track(self.module.Image(str(path)), name=path.stem, step=step)

    def closing(self, project: str, folder: Path) -> str:
        return "to view the run: aim up"


class Clearml(TrackerService):
    """ClearML: the server of clearml.conf."""

    key = package = "clearml"

    def arguments(self, folder: Path, name: str, known: str | None) -> Arguments:
        # without it, ClearML may overwrite the last task of this name
        continued = {"continue_last_task": known} if known else {"reuse_last_task_id": False}
        return {"task_name": name, **continued}

    def began(self, run: ServiceRun, name: str) -> str:
        return run.id

    def table(self, run: ServiceRun, name: str, table: TrackerTable, step: int) -> object:
        run.get_logger().report_table(name, name, step, table_plot=table.frame())

    def picture(self, run: ServiceRun, path: Path, step: int) -> object:
        run.get_logger().report_image("pictures", path.stem, step, local_path=str(path))

    def adapter(self, run: ServiceRun, folder: Path) -> object:
        run.upload_artifact("adapter", str(folder))

    def failed(self, run: ServiceRun) -> None:
        run.mark_failed()


class Dvclive(TrackerService):
    """DVCLive: files in the folder of the run, in DVC's format; no commit of its own."""

    key = package = "dvclive"

    def arguments(self, folder: Path, name: str, known: str | None) -> Arguments:
        place = str(folder / "dvclive")
        # no experiment and no dvc.yaml, which DVCLive would add to the user's git repository
        return {"dir": place, "resume": known is not None, "save_dvc_exp": False, "dvcyaml": None}

    def began(self, run: ServiceRun, name: str) -> str:
        return run.dir  # in place of an id

    def table(self, run: ServiceRun, name: str, table: TrackerTable, step: int) -> object:
        write_atomic(Path(run.dir) / f"{name}.md", f"{table.markdown()}\n")

    def picture(self, run: ServiceRun, path: Path, step: int) -> object:
        run.log_image(path.name, str(path))

    def closing(self, project: str, folder: Path) -> str:
        return f"DVCLive: {folder / 'dvclive'}"


class Swanlab(TrackerService):
    """SwanLab: online with an API key, or +tracker.arguments.mode=offline."""

    key = package = "swanlab"

    def arguments(self, folder: Path, name: str, known: str | None) -> Arguments:
        place = {"log_dir": str(folder / "swanlab")}
        return place | ({"id": known, "resume": "allow"} if known else {"name": name})

    def began(self, run: ServiceRun, name: str) -> str:
        return run.id

    def table(self, run: ServiceRun, name: str, table: TrackerTable, step: int) -> object:
        shown = self.module.echarts.Table()
        shown.add(table.columns, table.rows)
        run.log({name: shown}, step=step)

    def picture(self, run: ServiceRun, path: Path, step: int) -> object:
        run.log({f"pictures/{path.stem}": self.module.Image(str(path))}, step=step)


class ServiceEntry(TrackerService):
    """A tracker of the user's own: `accelerate.tracking.register_tracker_class`."""

    def __init__(self, name: str) -> None:
        self.name = name


SERVICES: dict[str, TrackerService] = {
    "mlflow": Mlflow(),
    "comet": Comet(),
    "trackio": Trackio(),
    "aim": Aim(),
    "clearml": Clearml(),
    "dvclive": Dvclive(),
    "swanlab": Swanlab(),
}


def service_of(name: str) -> TrackerService:
    """The service of a tracker, its variables of the environment set."""
    # any other name was registered, or `package_of` would have refused it
    service = SERVICES.get(name) or ServiceEntry(name)
    for variable, value in service.environment.items():
        os.environ.setdefault(variable, value)  # the user's own value holds
    return service

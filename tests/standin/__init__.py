"""A device beside the CPU for machines without a GPU; see device.cpp. Needs a C++ compiler."""

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

NAME = "standin"
SOURCE = Path(__file__).with_name("device.cpp")
LACKING = {  # by what asks for it, a method of PEFT's or a check
    "c3a": "complex numbers",
    "shira": "sparse tensors",
    "layer_compiles_whole": "strides of results that a compiled graph counts on",
}


def register() -> Any:
    """Make PyTorch know the device, and Accelerate take it; returns what counts the waits."""
    compiled = _loaded(_built())
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    from accelerate.state import PartialState

    PartialState.default_device = property(lambda self: torch.device(NAME, 0))
    return compiled


def _built() -> Path:
    """The compiled device, made once for each version of PyTorch and of the source."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"petl-standin-{os.getuid()}")
    made = folder / f"device-{key}.so"
    if not made.exists():
        folder.mkdir(exist_ok=True)
        fresh = folder / f"{made.name}.{os.getpid()}"
        includes = [*include_paths(), sysconfig.get_paths()["include"]]
        command = ["c++", "-std=c++20", "-O1", "-w", "-fPIC", "-shared", SOURCE, "-o", fresh]
        command += [f"-DTORCH_EXTENSION_NAME={NAME}", *(f"-isystem{path}" for path in includes)]
        command += [f"-L{path}" for path in library_paths()]
        libraries = ("c10", "torch", "torch_cpu", "torch_python")
        subprocess.run([*command, *(f"-l{name}" for name in libraries)], check=True)
        fresh.rename(made)
    return made


def _loaded(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _module() -> Any:
    """What `torch.standin` offers, as `torch.cuda` does; it draws from the CPU's generator."""
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = module.synchronize = lambda device=None: None
    module._is_in_bad_fork = lambda: False
    module.manual_seed = module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.empty_cache = lambda: None
    module.device = _Device
    return module


class _Device:
    """The context of a device: there is one."""

    def __init__(self, device: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

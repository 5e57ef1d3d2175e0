"""What packages say of themselves while PEFT imports them, in which nobody can mend anything."""

import logging
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager

# by logger, how messages begin
SAID = {
    # torchao, of a way of its own to register what torch now knows by itself
    "torch.utils._pytree": "<enum .* is an Enum subclass and is now natively supported",
    # bitsandbytes, of a kernel that has no backward pass: petl leaves it off, see quantising.py
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}
# torchao, of kernels for GPUs: news where there is one
SAID_WITHOUT_GPU = {"torchao": r"Failed to load .*_C\w*\..*\.so"}


@contextmanager
def unsaid() -> Generator[None]:
    """Inside the block, these messages are dropped, and no others."""
    dropped = [
        *((name, Dropped(said)) for name, said in SAID.items()),
        *((name, DroppedWithoutGpu(said)) for name, said in SAID_WITHOUT_GPU.items()),
    ]
    for name, one in dropped:
        logging.getLogger(name).addFilter(one)
    try:
        yield
    finally:
        for name, one in dropped:
            logging.getLogger(name).removeFilter(one)


class Dropped(logging.Filter):
    """Lets pass what does not begin as `said`."""

    def __init__(self, said: str) -> None:
        super().__init__()
        self.said = re.compile(said)

    def filter(self, record: logging.LogRecord) -> bool:
        return self.said.match(record.getMessage()) is None


class DroppedWithoutGpu(Dropped):
    """The same on a machine without a GPU; anywhere else all passes."""

    def filter(self, record: logging.LogRecord) -> bool:
        torch = sys.modules["torch"]  # which whoever speaks of its kernels has imported
        return super().filter(record) or torch.cuda.is_available()

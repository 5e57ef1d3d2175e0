"""The process of a run by petl: `petl train` with the words on standard input, and a clock.

Reads one JSON object from standard input: `words`, and `out`, the file to write.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.jobs.child import Clock
from petl.system.imports.collector import rare_collections


def main() -> None:
    """Run `petl train`, as train.py does."""
    request = json.load(sys.stdin)
    with rare_collections():
        from petl.cli import start
        from petl.cli import train as command
        from petl.training.loop import Loop
        from petl.training.runs.records import read_log
    clock, fit, evaluate = Clock(), command.fit, Loop.evaluate

    def timed_fit(*arguments: Any) -> Any:
        clock.mark("before training")
        state = yield from fit(*arguments)
        clock.mark("after training")
        return state

    def timed_evaluate(loop: Loop) -> bool:
        began = time.process_time()
        improved = evaluate(loop)
        scores = read_log(loop.run.log.file)[-1]["validation"]
        clock.note(began, loop.state.step, scores)
        return improved

    command.fit, Loop.evaluate = timed_fit, timed_evaluate
    try:
        start.main(request["words"])
    finally:
        clock.write(Path(request["out"]))


if __name__ == "__main__":
    main()

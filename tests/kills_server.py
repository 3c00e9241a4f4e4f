"""The warm process that runs the stages of tests/kills_dvc.py: it has imported everything once, and forks for each.

    python tests/kills_server.py <socket> <folder with data/, models/, rationales/>     in the clone, with PYTHONPATH=<the clone>
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import sys
import traceback
from pathlib import Path

COPIED = {"pipeline.prepare": "data/{task}", "pipeline.base_model": "models/{model}", "pipeline.rationales": "rationales/{task}/{teacher}"}


def serve(address: str, tiny: Path) -> None:
    """Run the commands that clients ask for, each in a fork, until this process is ended."""
    mains = {name: importlib.import_module(name).main for name in ("pipeline.plan", "pipeline.train", "pipeline.report")}
    for module in ("pipeline.cell.run", "torch", "transformers", "peft", "optuna", "sklearn.metrics", "mlflow.store.tracking.sqlalchemy_store", "pandas"):
        importlib.import_module(module)
    from pipeline.core.settings import Task
    from pipeline.scoring import answers

    answers.preload(Task("any", "choice", metric="rouge_l"))
    here = socket.socket(socket.AF_UNIX)
    here.bind(f"{address}.new")
    here.listen()
    os.rename(f"{address}.new", address)
    here.settimeout(0.2)
    while True:
        try:
            there = here.accept()[0]
        except TimeoutError:
            _reap()
            continue
        if os.fork() == 0:
            here.close()
            _run(there, mains, tiny)
        there.close()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _run(there: socket.socket, mains: dict, tiny: Path) -> None:
    code = 1
    try:
        there.setblocking(True)
        asked, descriptors, _, _ = socket.recv_fds(there, 1 << 16, 2)
        group, name, words = json.loads(asked)
        os.setpgid(0, group)  # killed with the stage that asked
        for number, descriptor in enumerate(descriptors, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        if name in COPIED:
            to = COPIED[name].format_map(dict(word.split("=", 1) for word in words))
            shutil.copytree(tiny / to, to)
            code = 0
        else:
            code = mains[name](words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        there.sendall(str(code).encode())
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))

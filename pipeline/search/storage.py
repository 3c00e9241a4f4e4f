"""Where a study's trials are kept: a SQLite file of one search, or a database that several searches share by its URL.

Those that share one take turns for what must happen once (an advisory lock of PostgreSQL's, a file lock beside a SQLite file), and each says with
heartbeats that its trials are alive. A password is no part of a URL: results keep their whole config. PGPASSWORD or ~/.pgpass has it.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core import locks
from pipeline.core.files import UserError, atomic_path

GRACE = 3
"""Heartbeats that a trial may miss before it counts as dead."""
DRIVERS = {"postgresql": "postgresql+psycopg"}
NO_DRIVER = "PostgreSQL needs its driver; pip install 'alignscope[postgresql]'"


@dataclass(frozen=True)
class Storage:
    """rdb: Optuna's storage. shared: whether other processes may search the same study at the same time."""

    rdb: Any
    shared: bool
    heartbeat_s: int

    @contextlib.contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Hold what only one process may do at a time with the study; one that is killed here lets go of it."""
        if not self.shared:
            yield
        elif self.rdb.engine.dialect.name == "postgresql":
            import sqlalchemy

            with self.rdb.engine.connect() as connection:
                connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _key(name)})
                yield
        else:
            with locks.in_turn(Path(f"{self.rdb.engine.url.database}.lock")):
                yield

    def beat(self, trial_ids: Collection[int]) -> None:
        """Say that these trials are alive."""
        for trial_id in trial_ids if self.shared else ():
            self.rdb.record_heartbeat(trial_id)

    def dead(self, study: Any) -> list[int]:
        """The numbers of trials that are marked as running and run nowhere. Call it in a turn: a trial gets its first heartbeat in the turn that begins it."""
        running = {t._trial_id: t.number for t in study.get_trials(deepcopy=False) if t.state.name == "RUNNING"}
        if not self.shared:
            return list(running.values())
        stale = set(self.rdb._get_stale_trial_ids(study._study_id))
        return [number for trial_id, number in running.items() if trial_id in stale or not self._has_heartbeat(trial_id)]

    def _has_heartbeat(self, trial_id: int) -> bool:
        import sqlalchemy

        with self.rdb.engine.connect() as connection:
            found = connection.execute(sqlalchemy.text("SELECT 1 FROM trial_heartbeats WHERE trial_id = :id"), {"id": trial_id}).first()
        return found is not None


def _key(name: str) -> int:
    """A lock's number: what PostgreSQL takes, 64 bits with a sign."""
    return int.from_bytes(hashlib.sha256(f"alignscope {name}".encode()).digest()[:8], "big", signed=True)


def check(url: str, key: str) -> None:
    """Raise UserError for a URL that is none of a database that searches can share, or that holds a password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise UserError(f"{key} is {url!r}, no URL of a database; write postgresql://user@host/name or sqlite:///path") from error
    if parsed.password:
        raise UserError(f"{key} holds a password, which every result would keep; leave it out and set PGPASSWORD, or use ~/.pgpass")
    if parsed.get_backend_name() not in ("postgresql", "sqlite"):
        raise UserError(f"{key} is of {parsed.get_backend_name()}; searches share a postgresql:// or a sqlite:/// database")


def own(path: Path) -> Storage:
    """The storage of one search, in a file that is made if need be."""
    import optuna

    _create(path)
    return Storage(optuna.storages.RDBStorage(f"sqlite:///{path}"), False, 0)


def shared(url: str, heartbeat_s: int) -> Storage:
    """A storage that several searches share, its tables made if need be, once. Raises UserError where the driver is missing."""
    import sqlalchemy
    from optuna.storages import RDBStorage
    from sqlalchemy.engine import make_url

    warnings.filterwarnings("ignore", r"Heartbeat of storage|Argument ``heartbeat_interval``")  # beats come from `Trials.beat`, not from Study.optimize
    parsed = make_url(url)
    driver = DRIVERS.get(parsed.drivername, parsed.drivername)
    plain = parsed.set(drivername=driver).render_as_string(hide_password=False)

    def opened() -> Storage:
        return Storage(RDBStorage(plain, {"pool_pre_ping": True}, heartbeat_interval=heartbeat_s, grace_period=GRACE * heartbeat_s), True, heartbeat_s)

    try:
        if parsed.get_backend_name() == "sqlite":
            with locks.in_turn(Path(f"{parsed.database}.lock")):
                return opened()
        engine = sqlalchemy.create_engine(plain)
        try:
            with engine.connect() as connection:
                connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _key("tables")})
                return opened()
        finally:
            engine.dispose()
    except ImportError as error:
        raise UserError(NO_DRIVER) from error


def _create(path: Path) -> None:
    """Make an empty database of Optuna's, whole or not at all.

    Raises:
        UserError: a symbolic link is there. sqlite3.DatabaseError: a file that is no database of Optuna's, which is left as it is.
    """
    import optuna

    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, through which nothing is written; remove it, or set paths.sweeps to another folder")
    if not path.exists():
        with atomic_path(path) as beside:
            optuna.storages.RDBStorage(f"sqlite:///{beside}").engine.dispose()
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'studies'").fetchall():
            raise sqlite3.DatabaseError("it has no table of studies")

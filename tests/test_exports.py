"""What transformers reads at its import: read once, and not again by a later process while nothing of it has changed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from test_imports import python

from pipeline.core import exports

FOUND = {"one": {frozenset({"torch"}): {"modeling_one": {"One", "Other"}}, frozenset(): {"configuration_one": {"OneConfig"}}}, frozenset(): {}}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of whoever reads the models' files, which lie beside its folder."""
    (tmp_path / "utils").mkdir()
    (tmp_path / "models/one").mkdir(parents=True)
    for name in ("utils/import_utils.py", "models/__init__.py", "models/one/modeling_one.py"):
        (tmp_path / name).write_text("X = 1\n")
    monkeypatch.setattr(exports, "_place", lambda name: tmp_path / "note")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    return tmp_path / "utils/import_utils.py"


def asked(reader: Path, path: Any) -> tuple[Any, list[Any]]:
    """(what comes, what had to be read for it)."""
    read: list[Any] = []
    return exports._exports(lambda given: (read.append(given), FOUND)[1], reader, path), read


def test_what_no_file_contradicts_is_not_read_again(reader, tmp_path):
    models = tmp_path / "models"
    assert asked(reader, models) == (FOUND, [str(models)])
    assert asked(reader, models) == asked(reader, str(models / "__init__.py")) == (FOUND, [])
    changes = [lambda: (models / "one/modeling_one.py").write_text("X = 12\n"), lambda: (models / "two.py").touch(), lambda: os.remove(models / "two.py"),
               lambda: os.utime(reader, ns=(1, 1)), lambda: os.utime(models / "one/modeling_one.py", ns=(1, 1))]
    for change in changes:
        change()
        assert asked(reader, models) == (FOUND, [str(models)])
        assert asked(reader, models) == (FOUND, [])


def test_other_folders_are_read_as_ever(reader, tmp_path):
    assert asked(reader, tmp_path / "models/one") == (FOUND, [tmp_path / "models/one"])
    assert not (tmp_path / "note").exists()


@pytest.mark.parametrize("damage", [b"", b"x", b"\xe9\x05\x00\x00\x00", b"N"])
def test_a_damaged_note_is_none(reader, tmp_path, damage):
    (tmp_path / "note").write_bytes(damage)
    assert asked(reader, tmp_path / "models") == (FOUND, [str(tmp_path / "models")])
    assert asked(reader, tmp_path / "models") == (FOUND, [])


def test_what_is_installed_anew_or_removed_is_looked_for_again(reader, tmp_path, monkeypatch):
    place = tmp_path / "site-packages"
    described, read = place / "one-1.0.dist-info", iter(range(9))
    described.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "none"), "", str(place)])
    ask = lambda: exports._distributions(lambda: next(read))  # noqa: E731
    assert [ask(), ask()] == [0, 0]
    (place / "module.py").touch()
    monkeypatch.chdir(tmp_path)
    assert ask() == 0
    changes = [lambda: (described / "RECORD").touch(), lambda: (place / "two.egg-info").touch(), lambda: os.remove(place / "two.egg-info"),
               lambda: sys.path.append(str(reader))]
    for number, change in enumerate(changes, 1):
        change()
        assert [ask(), ask()] == [number, number]


def test_nothing_is_kept_where_python_keeps_nothing(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert asked(reader, tmp_path / "models")[1] and asked(reader, tmp_path / "models")[1]


@pytest.mark.slow
def test_transformers_exports_what_it_does_without_a_note_and_reads_for_itself_afterwards(tmp_path):
    assert python(f"""
import sys
from pathlib import Path
from pipeline.core import exports
sys.dont_write_bytecode = False
place = Path({str(tmp_path)!r}) / "note"
exports._place = place.with_name
with exports.remembered():
    import transformers
    import transformers.models
from importlib import metadata
read = metadata.packages_distributions
assert not hasattr(read, "func") and exports._distributions(read) == exports._distributions(None) == read() and read()["PIL"] == ["pillow"]
from transformers.utils import import_utils as reader
folder = Path(transformers.__file__).parent / "models"
read = reader.create_import_structure_from_path
assert not hasattr(read, "func") and not any(finder is exports._Finder for finder in sys.meta_path)
nothing = lambda path: 1 / 0
print(exports._exports(nothing, Path(reader.__file__), folder) == read(folder), read.cache_info().misses > 100, hasattr(transformers, "Qwen2ForCausalLM"))
""").split() == ["True", "True", "True"]

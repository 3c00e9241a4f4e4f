"""Files are whole or absent, and every refusal names the file and the fix."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import subprocess
from pathlib import Path

import pytest

from pipeline.core import files
from pipeline.core.files import UserError, atomic_folder, atomic_path, folder_bytes, read_json, read_jsonl, sha256, write_json, write_jsonl, write_text


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_written_whole_and_its_folders_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "text.txt", "one\n")
    assert (tmp_path / "a" / "b" / "text.txt").read_text() == "one\n"
    assert names(tmp_path / "a" / "b") == ["text.txt"]


def test_a_folder_replaces_the_one_before_it(tmp_path):
    for name in ("old", "new"):
        with atomic_folder(tmp_path / "artefact", "artefact.json", "cell") as beside:
            beside.mkdir()
            (beside / name).touch()
            write_json(beside / "artefact.json", {"cell": name})
    assert names(tmp_path / "artefact") == ["artefact.json", "new"] and names(tmp_path) == ["artefact"]


def test_weights_that_their_owner_alone_may_read_are_shared_as_the_folder_is(tmp_path):
    """safetensors writes 0600 files whatever the umask says."""
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "of", "a.json") as beside:
            (beside / "deep").mkdir(parents=True)
            for name in ("a.json", "deep/model.safetensors"):
                (beside / name).write_text("{}")
                (beside / name).chmod(0o600)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "of").rglob("*") if p.is_file()} == {0o640}


def test_who_is_killed_while_a_folder_is_replaced_leaves_no_half_of_one(tmp_path, monkeypatch):
    for name in ("old", "new"):
        with contextlib.suppress(KeyboardInterrupt), atomic_folder(tmp_path / "artefact", "artefact.json") as beside:
            beside.mkdir()
            (beside / name).touch()
            write_json(beside / "artefact.json", {})
            if name == "new":
                monkeypatch.setattr(files.shutil, "rmtree", lambda folder, **_: (folder / "artefact.json").unlink() or (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.undo()
    assert names(tmp_path / "artefact") == ["artefact.json", "new"]
    with atomic_folder(tmp_path / "artefact", "artefact.json") as beside:
        beside.mkdir()
    assert names(tmp_path) == ["artefact"] and names(tmp_path / "artefact") == []


def test_what_is_renamed_is_on_the_disk_before_and_its_name_after(tmp_path, monkeypatch):
    """A loss of power then leaves the old one or the new one."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda number: (calls.append(Path(os.readlink(f"/proc/self/fd/{number}")).name), fsync(number)))
    monkeypatch.setattr(files.os, "replace", lambda *names: (calls.append("rename"), replace(*names)))
    with atomic_path(tmp_path / "file") as beside:
        beside.write_bytes(b"weights")
    assert calls == [f".file.{os.getpid()}.partial", "rename", tmp_path.name]
    calls.clear()
    with atomic_folder(tmp_path / "artefact", "artefact.json", "cell") as beside:
        (beside / "deep").mkdir(parents=True)
        (beside / "deep/weights").touch()
    assert sorted(calls[:3]) == sorted(["deep", "weights", f".artefact.{os.getpid()}.partial"]) and calls[3:] == ["rename", tmp_path.name]


@pytest.mark.parametrize("waited_for", [True, False])
def test_what_a_killed_process_left_is_removed_by_the_next_writer(tmp_path, waited_for):
    ended = subprocess.Popen(["true"])
    if waited_for:
        ended.wait()
    else:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    for name in ("file", "file-journal", "other"):
        stem, _, journal = name.partition("-")
        (tmp_path / f".{stem}.{ended.pid}.partial{'-' + journal if journal else ''}").write_text("half")
    (tmp_path / f".folder.{ended.pid}.partial").mkdir()
    (tmp_path / f".folder.{ended.pid}.partial/weights").touch()
    alive = f".file.{os.getppid()}.partial"
    (tmp_path / alive).touch()
    write_text(tmp_path / "file", "whole")
    with atomic_folder(tmp_path / "folder", "artefact.json") as beside:
        beside.mkdir()
    assert names(tmp_path) == sorted([alive, f".other.{ended.pid}.partial", "file", "folder"]), "another file's is its own writer's to remove"


@pytest.mark.parametrize("held", [{}, {"artefact.json": "[]"}, {"artefact.json": '{"task": 1}'}, {"artefact.json": "{"}, {"other.json": '{"cell": 1}'}])
def test_a_folder_of_somebody_else_s_is_not_replaced(tmp_path, held):
    (tmp_path / "artefact").mkdir()
    for name, text in {"thesis.tex": "years of work", **held}.items():
        (tmp_path / "artefact" / name).write_text(text)
    refused = pytest.raises(UserError, match="artefact is there and was not written by this command")
    with refused, atomic_folder(tmp_path / "artefact", "artefact.json", "cell"):
        pytest.fail("it is refused before anything is made")
    assert (tmp_path / "artefact/thesis.tex").read_text() == "years of work" and len(names(tmp_path)) == 1


def test_a_folder_that_appears_meanwhile_is_not_replaced_either(tmp_path):
    with pytest.raises(UserError, match="was not written by this command"), atomic_folder(tmp_path / "artefact", "artefact.json", "cell") as beside:
        beside.mkdir()
        (tmp_path / "artefact").mkdir()
        (tmp_path / "artefact/thesis.tex").touch()
    assert names(tmp_path) == ["artefact"] and names(tmp_path / "artefact") == ["thesis.tex"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("folder", [False, True])
def test_an_error_leaves_what_was_there_and_nothing_half_written(tmp_path, error, folder):
    target = tmp_path / "held"
    target.mkdir() if folder else target.write_text("before")
    with pytest.raises(type(error)), atomic_path(target) as beside:
        if folder:
            beside.mkdir()
        (beside / "part" if folder else beside).write_text("half")
        raise error
    assert names(tmp_path) == ["held"]
    assert folder or target.read_text() == "before"


def test_a_full_disk_at_the_write_is_one_sentence(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "result.json"
    target.write_text("before")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*result\.json: No space left on device; free space") as caught:
        write_json(target, {"a": 1})
    assert "\n" not in str(caught.value)
    assert target.read_text() == "before" and names(tmp_path) == ["result.json"]


@pytest.mark.parametrize("writer", ["text", "safetensors", "torch"])
def test_a_disk_that_is_really_full_is_one_sentence_whatever_library_writes(small_disk, writer):
    import torch
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(1 << 18)}
    with pytest.raises(UserError, match=r"cannot write .*target.*; free space") as caught:
        if writer == "text":
            write_text(small_disk / "target", "x" * (1 << 20))
        with atomic_path(small_disk / "target") as beside:
            save_file(tensors, beside) if writer == "safetensors" else torch.save(tensors, beside)
    assert "\n" not in str(caught.value)
    assert names(small_disk) == []


def test_an_error_of_a_library_with_space_left_stays_itself(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), atomic_path(tmp_path / "x") as beside:
        beside.write_text("half")
        raise RuntimeError("shapes differ")
    assert names(tmp_path) == []


@pytest.mark.parametrize("target", ["file/below.json", "file/deep/below.json", "folder"])
def test_something_in_the_way_is_named(tmp_path, target):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/{target}: .*fix the path"):
        write_json(tmp_path / target, 1)
    assert names(tmp_path) == ["file", "folder"] and (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("write", [write_json, lambda path, value: write_jsonl(path, iter([{"a": value}]))])
def test_a_number_that_is_none_is_not_written(tmp_path, write):
    with pytest.raises(ValueError):
        write(tmp_path / "x", float("nan"))
    assert names(tmp_path) == []


def test_rows_come_back_as_they_were(tmp_path):
    rows: list[dict] = [{"text": "näïve\u2028 „quoted“\n", "n": 1}, {"text": None, "n": [1.5, True]}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    (tmp_path / "blank.jsonl").write_text('\n{"a": 1}\n  \n{"a": 2}')
    assert read_jsonl(tmp_path / "blank.jsonl") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(("content", "sentence"), [
    (b'{"a": 1}\n{"a": 2\n', r"rows\.jsonl line 2 is not JSON .*; fix or remove that line"),
    (b'{"a": 1}\n\n[1, 2]\n', r"rows\.jsonl line 3 is not a JSON object; write one object"),
    (b'{"a": "\xe9"}\n', r"rows\.jsonl is not UTF-8 .*at byte 7.*; save it as UTF-8"),
])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, content, sentence):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_jsonl(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(("content", "sentence"), [
    (None, r"value\.json does not exist; run the stage"),
    (b'{"a": 1,\n "b" 2}', r"value\.json is not JSON .*line 2.*; delete it and run its stage again"),
    (b'{"a": "\xe9"}', r"value\.json is not UTF-8.*; delete it and run its stage again"),
])
def test_a_bad_json_file_is_named(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "value.json").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_json(tmp_path / "value.json")


def test_a_missing_rows_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl does not exist; run the stage that writes it, or fix the path"):
        read_jsonl(tmp_path / "gone.jsonl")


def test_sha256_of_a_file_is_the_standard_one(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    large = os.urandom((1 << 20) + 17)
    (tmp_path / "large").write_bytes(large)
    assert sha256(tmp_path / "large") == hashlib.sha256(large).hexdigest()


def test_sha256_of_a_folder_depends_on_names_and_contents_alone(tmp_path):
    def made(name: str, members: dict[str, str]) -> str:
        for member, text in members.items():
            write_text(tmp_path / name / member, text)
        return sha256(tmp_path / name)

    first = made("a", {"x": "1", "deep/y": "2"})
    assert made("b", {"deep/y": "2", "x": "1"}) == first
    assert made("c", {"x": "1", "deep/z": "2"}) != first
    assert made("d", {"x": "1", "deep/y": "3"}) != first


def test_folder_bytes_counts_files_at_any_depth(tmp_path):
    write_text(tmp_path / "a", "12345")
    write_text(tmp_path / "b" / "c", "678")
    assert folder_bytes(tmp_path) == 8 and folder_bytes(tmp_path / "gone") == 0

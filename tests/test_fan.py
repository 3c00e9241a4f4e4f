"""pipeline.fanout: what is handed out and tried again; Ray's workers, killed or not, leave what `pipeline.cells` leaves; Slurm's jobs by submitit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cell import grid, identity
from pipeline.core.compose import ROOT, compose
from pipeline.fan import jobs, parcels, run
from pipeline.fan.jobs import BAD_INPUT, BUSY, LOST, Job, Queue
from pipeline.records.results import read

SHORT = ["technique=lora", "precision=fp32", "experiment=tried", "train_rows=16", "train.batch_size=8", "train.steps=2", "evaluate.test_rows=8"]
RAY = ["ray.dashboard=false", "ray.cpus=1"]


@pytest.fixture
def words(overrides: list[str], imports: None) -> list[str]:
    return [*overrides, *SHORT, *RAY]


def cells(words: list[str], count: int = 3, *more: str) -> list:
    return [compose([*words, f"seed={seed}", *more]) for seed in range(count)]


def fan(every: list) -> int:
    return run.run(every, lambda missing: None, lambda cfg: 1)


def serial(words: list[str], tmp_path: Path, count: int = 3) -> Path:
    other = [*words, f"paths.results={tmp_path}/serial", f"paths.work={tmp_path}/serial_work"]
    assert grid.run_cells(cells(other, count)) == 0
    return tmp_path / "serial/tried"


def same(here: Path, there: Path) -> None:
    """The same files with the same answers, by everything but times."""
    assert {p.relative_to(here) for p in here.rglob("*") if p.is_file()} == {p.relative_to(there) for p in there.rglob("*") if p.is_file()}
    for folder in here.iterdir():
        assert (folder / "predictions.jsonl").read_bytes() == (there / folder.name / "predictions.jsonl").read_bytes()
        one, other = read(folder), read(there / folder.name)
        assert one.provenance["identity"] == other.provenance["identity"] and one.provenance["code"] == other.provenance["code"]
        assert one.scores == other.scores and [p["loss"] for p in one.history] == [p["loss"] for p in other.history]


# what is left


def queue(count: int = 3, retries: int = 1, **needs: str) -> Queue:
    return Queue([Job(f"c{i}", "m:f", [], frozenset(filter(None, [needs.get(f"c{i}")]))) for i in range(count)], retries)


def test_a_job_that_lost_its_worker_is_tried_again_a_bounded_number_of_times_and_not_on_that_node():
    left = queue(1)
    job = left.take()
    assert left.ended(job, LOST, "node-a") == "again" and left.take() is job and job.avoid == {"node-a"}
    assert left.ended(job, LOST, "node-b") == "failed" and left.take() is None and left.failed == {"c0": LOST} and left.left == 0


def test_bad_input_is_not_tried_again():
    left = queue(1)
    assert left.ended(left.take(), BAD_INPUT) == "failed" and not left.left


def test_a_job_waits_for_the_one_that_it_needs_and_is_not_started_after_its_failure():
    left = queue(3, c0="c1", c1="c2")
    last = left.take()
    assert last.name == "c2" and left.take() is None and left.left == 2
    assert left.ended(last, 0) == "done"
    middle = left.take()
    assert middle.name == "c1" and left.take() is None
    assert left.ended(middle, BAD_INPUT) == "failed"
    assert left.failed == {"c1": BAD_INPUT, "c0": BAD_INPUT} and left.left == 0


def test_what_another_process_computes_comes_back_last():
    left = queue(2)
    assert left.ended(left.take(), BUSY) == "elsewhere" and left.left == 2
    assert left.take().name == "c1" and left.take() is None
    left.look_again()
    assert left.take().name == "c0"


@pytest.mark.parametrize(("settings", "device", "share", "gpus", "wanted"), [
    ({}, "auto", False, 0, 0), ({}, "cpu", False, 2, 0), ({}, "auto", False, 2, 1), ({}, "cuda", False, 0, 1), ({}, "auto", True, 2, 0.25),
    ({"gpus": 0.5}, "auto", False, 2, 0.5),
])
def test_less_than_a_whole_gpu_is_declared_only_where_the_config_says_so(words, settings, device, share, gpus, wanted):
    cfg = compose([*words, f"device={device}", f"share={share}"])
    assert run.gpu_share(cfg, jobs.Ray(**settings), gpus, lambda _: 4) == wanted


# by content


def test_a_folder_sent_in_pieces_arrives_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(parcels, "PIECE", 4)
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_bytes(b"123456789")
    (source / "deep/b.txt").write_bytes(b"")
    kept: dict[int, bytes] = {}
    sent = parcels.packed(source, lambda piece: kept.setdefault(len(kept), piece) and len(kept) - 1 if piece else kept.update({len(kept): piece}) or len(kept) - 1)
    view = parcels.view(tmp_path / "cache", {"data/task": sent}, kept.__getitem__)
    assert (view / "data/task/a.txt").read_bytes() == b"123456789" and (view / "data/task/deep/b.txt").read_bytes() == b""
    kept[0] = b"9999"
    with pytest.raises(Exception, match="not what was sent"):
        parcels.view(tmp_path / "other", {"data/task": sent}, kept.__getitem__)
    assert not (tmp_path / "other" / sent.sha256).exists()
    with pytest.raises(Exception, match="outside"):
        parcels.unpack([("../x", b"1")], tmp_path / "in", "0")


def test_a_result_takes_its_place_only_when_all_of_it_is_there(tmp_path):
    made = tmp_path / "made"
    (made / "artefact").mkdir(parents=True)
    for name, text in (("result.json", '{"a": 1}'), ("predictions.jsonl", "x"), ("artefact/artefact.json", '{"cell": "c"}')):
        (made / name).write_text(text)
    pieces, digest = list(parcels.pieces(made)), parcels.sha256(made)
    folder = tmp_path / "results/e/c"
    (folder / "artefact").mkdir(parents=True)
    (folder / "artefact/artefact.json").write_text('{"cell": "older"}')
    (folder / "result.json").write_text("older")
    with pytest.raises(Exception, match="not what was sent"):
        parcels.take_in(pieces[:-1], folder, digest)
    assert (folder / "result.json").read_text() == "older" and [p.name for p in folder.parent.iterdir()] == ["c"]
    parcels.take_in(pieces, folder, digest)
    assert parcels.sha256(folder) == digest and [p.name for p in folder.parent.iterdir()] == ["c"]


# Ray


def test_ray_leaves_what_a_serial_run_leaves(words, tmp_path):
    """The small one among the tests on Ray; the others are slow."""
    assert fan(cells(words, 2)) == 0
    same(tmp_path / "results/tried", serial(words, tmp_path, 2))
    assert not grid.to_run(cells(words, 2)) and not list(tmp_path.rglob("*.partial*"))

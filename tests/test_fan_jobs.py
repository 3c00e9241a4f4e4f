"""pipeline.fanout's jobs: in what order they are handed out and tried again, and which share of a GPU each declares."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import report_cells

from pipeline.cell import record
from pipeline.cell.inputs import Shared
from pipeline.cell.room import AtOnce
from pipeline.core.compose import compose
from pipeline.fan import host, jobs, run
from pipeline.fan.host import Kept
from pipeline.fan.jobs import BAD_INPUT, BUSY, LOST, Job, Queue
from pipeline.records.finished import Cell
from pipeline.records.results import Neighbours, read


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


HOLDS = AtOnce(4, {"lora-s0-n200": 10, "full-s0-n200": 45}, 90)


@pytest.mark.parametrize(("settings", "device", "technique", "gpus", "at_once", "wanted"), [
    ({}, "auto", "lora", 0, HOLDS, 0), ({}, "cpu", "lora", 2, HOLDS, 0), ({}, "cuda", "lora", 0, HOLDS, 0.25), ({}, "auto", "lora", 2, AtOnce(), 1),
    ({}, "auto", "lora", 2, HOLDS, 0.25), ({}, "auto", "full", 2, HOLDS, 0.5),
    ({}, "auto", "dora", 2, HOLDS, 1), ({"gpus": 0.2}, "auto", "full", 2, HOLDS, 0.2),
])
def test_a_cell_declares_the_share_of_a_gpu_that_its_forecast_asks_for(overrides, settings, device, technique, gpus, at_once, wanted):
    cfg = compose([*overrides, f"device={device}", f"technique={technique}", "seed=0", "train_rows=200"])
    assert run.gpu_share(cfg, jobs.Ray(**settings), gpus, at_once) == wanted


def test_a_cell_that_ran_out_of_memory_beside_others_has_a_gpu_alone_the_next_time():
    left = jobs.Queue([jobs.Job("c", "m:f", [], gpus=0.25, extra={"at_once": 4})], 0)
    job = left.take()
    assert left.ended(job, jobs.CROWDED) == "again"
    again = left.take()
    assert again.gpus == 1 and again.extra["at_once"] == 1 and left.ended(again, 0) == "done"


def test_times_of_cells_that_shared_a_gpu_are_marked(tmp_path):
    def timing(gpus, device, beside=None):
        result = report_cells.result("lora", config={"ray": {"gpus": gpus}}, hardware={"device": device}, neighbours=beside)
        return Cell(result, tmp_path, "lora", "200").timing

    assert timing(0.25, "cuda") == "shared" and timing(1.0, "cuda") == timing(None, "cuda") == timing(0.0, "cpu") == ""
    assert timing(0.25, "cuda", Neighbours(4, True, 1.0)) == "" and timing(0.25, "cuda", Neighbours(4, False, None)) == "shared"


def test_a_result_says_that_its_neighbours_kernels_ran_at_once_with_its_own(monkeypatch):
    def mps(device):
        return record.neighbours(Shared(at_once=12), SimpleNamespace(device=device, waited_s=0.0)).mps

    gpu, cpu = SimpleNamespace(type="cuda"), SimpleNamespace(type="cpu")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    assert not mps(gpu)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/tmp/lease/fill.mps")
    assert mps(gpu) and not mps(cpu) and not mps(None)
    assert record.neighbours(Shared(), SimpleNamespace(device=gpu)) is None


def test_a_job_that_shares_a_gpu_takes_turns_on_it(overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(host.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    cfg = compose([*overrides, "technique=zero_shot", "precision=fp32", "seed=0", "experiment=tried", "train_rows=16",
                   "evaluate.test_rows=8", "evaluate.forgetting=false"])
    assert host.run_one([cfg], {"at_once": 2, "threads": 1}, Kept()) == 0
    result = read(Path(cfg.paths.results) / "tried" / "zero_shot-s0-n16")
    assert result.neighbours == Neighbours(2, True, result.neighbours.waited_s, result.neighbours.alone_s)
    assert [folder.name for folder in tmp_path.glob("alignscope-turns-*/*")] == ["1"]

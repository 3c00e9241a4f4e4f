"""Clocks and memory counters against fakes with known answers, an outside clock and an independent reading."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pipeline.core.compose import ROOT
from pipeline.measure import clock as measure_clock
from pipeline.measure import energy, machine
from pipeline.measure import memory as measure_memory
from pipeline.measure.clock import PHASES, Meter, Phases
from pipeline.records.results import read

MIB = 2**20


class Clock:
    """time.perf_counter and time.time, moved by hand."""

    def __init__(self) -> None:
        self.at = 1000.0

    def perf_counter(self) -> float:
        return self.at

    def time(self) -> float:
        return self.at + 5e8

    def pass_(self, seconds: float) -> None:
        self.at += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(measure_clock, "time", fake)
    monkeypatch.setattr(energy, "time", fake)
    return fake


def parts(phases: Phases) -> float:
    return sum(v for k, v in dataclasses.asdict(phases).items() if k != "wall_s")


def test_nested_phases_are_disjoint_and_add_up(clock):
    meter = Meter(started=clock.time() - 7)
    with meter.phase("startup"):
        clock.pass_(1)
    clock.pass_(0.25)
    with meter.phase("train"):
        clock.pass_(10)
        with meter.phase("validate"):
            clock.pass_(3)
            with meter.phase("save"):
                clock.pass_(0.5)
            clock.pass_(2)
        clock.pass_(20)
        with meter.phase("validate"):
            clock.pass_(4)
    found = meter.phases()
    assert found == Phases(
        wall_s=47.75, startup_s=8, load_s=0, warmup_s=0, train_s=30, validate_s=9, save_s=0.5, evaluate_s=0, other_s=0.25
    )
    assert parts(found) == found.wall_s


def test_a_phase_is_booked_when_it_ends_in_an_error(clock):
    meter = Meter()
    with pytest.raises(ValueError), meter.phase("load"):
        clock.pass_(2)
        raise ValueError
    clock.pass_(1)
    assert (meter.seconds("load"), meter.seconds("other")) == (2, 1)


def test_seconds_of_a_running_phase_can_be_read(clock):
    meter = Meter()
    with meter.phase("train"):
        clock.pass_(2)
        assert meter.seconds("train") == 2
        clock.pass_(1)
    assert meter.phases().train_s == 3


def test_seconds_of_an_earlier_process_count_as_phase_and_as_wall_clock(clock):
    meter = Meter()
    meter.add("train", 100)
    with meter.phase("train"):
        clock.pass_(5)
    found = meter.phases()
    assert (found.train_s, found.wall_s) == (105, 105) == (parts(found), 105)


def test_every_phase_is_a_field_of_the_result():
    assert {f"{name}_s" for name in (*PHASES, "other", "wall")} == {f.name for f in dataclasses.fields(Phases)}


def test_an_unknown_phase_is_refused():
    with pytest.raises(AssertionError), Meter().phase("trian"):
        pass


def test_latency_is_the_median_of_single_calls_after_a_warm_up(clock):
    seconds = iter([100.0, 3.0, 1.0, 20.0, 2.0])
    seen = []

    def call(item: str) -> None:
        seen.append(item)
        clock.pass_(next(seconds))

    assert measure_clock.latency_s(call, ["a", "b", "c", "d"], "cpu") == 2.5
    assert seen == ["a", "a", "b", "c", "d"]


def test_a_gpu_has_had_each_request_before_it_is_timed_and_what_takes_long_is_not_repeated(clock, monkeypatch):
    seen = []
    monkeypatch.setattr(measure_clock, "synchronise", lambda device: None)

    def call(item: str) -> None:
        seen.append(item)
        clock.pass_(1.0 if seen.count(item) > 1 else 9.0)

    assert measure_clock.latency_s(call, ["a", "b", "a"], "cuda") == 1.0
    assert seen == ["a", "b", "a", "b", "a"]
    del seen[:]
    assert measure_clock.latency_s(call, ["a"] * 4, "cuda", enough_s=1.5) == 1.0
    assert len(seen) == 3


def test_what_makes_requests_warm_and_what_times_them_have_contexts_of_their_own(clock):
    seen: list[str] = []

    @contextlib.contextmanager
    def noted(name: str) -> Iterator[None]:
        seen.append(name)
        yield
        seen.append(f"end of {name}")

    measure_clock.latency_s(seen.append, ["a", "b"], "cpu", untimed=lambda: noted("warm"), timed=lambda: noted("timed"))
    assert seen == ["warm", "a", "end of warm", "timed", "a", "b", "end of timed"]


def test_latency_without_items_is_null():
    assert measure_clock.latency_s(lambda _: None, [], "cpu") is None


def test_a_stopwatch_gives_laps(clock):
    watch = measure_clock.Stopwatch()
    clock.pass_(2)
    assert watch.peek() == 2 and watch.lap() == 2
    clock.pass_(1)
    assert watch.lap() == 1 and watch.peek() == 0


def test_a_process_knows_when_it_started():
    before = time.time()
    code = "import time; from pipeline.measure.clock import process_start; print(process_start(), time.time())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    started, later = map(float, done.stdout.split())
    assert before - 0.02 <= started < later - 0.01, "inside the time that the parent saw, and before the child's first line"


PEAK = """
import mmap, sys
from pipeline.measure.memory import PeakMemory

def hold(mib):
    held = mmap.mmap(-1, mib << 20)
    for at in range(0, mib << 20, 4096):
        held[at] = 1
    return held

before = hold(400)
before.close()                # freed before: no part of the peak
peak = PeakMemory("cpu")
base = hold(50)
peak.start()
first = hold(300)
print("at the peak", flush=True); sys.stdin.readline()
first.close()
peak.pause()
spike = hold(700)             # validation: kept out
spike.close()
peak.resume()
second = hold(100)
print(__import__("json").dumps(vars(peak.stop())), flush=True)
"""


def test_peak_memory_agrees_with_an_independent_reading_and_leaves_validation_out():
    with subprocess.Popen([sys.executable, "-c", PEAK], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin and child.stdout
        assert child.stdout.readline() == "at the peak\n"
        resident = psutil.Process(child.pid).memory_info().rss
        child.stdin.write("\n")
        child.stdin.flush()
        found = json.loads(child.stdout.readline())
    if found["peak_bytes"] is None:
        pytest.skip("this system does not let a process reset its peak")
    assert found["kind"] == "cpu_rss"
    assert found["peak_bytes"] == pytest.approx(resident, rel=0.02)
    assert found["peak_bytes"] - found["baseline_bytes"] == pytest.approx(300 * MIB, rel=0.02)


def test_a_peak_that_cannot_be_reset_is_null_not_wrong(monkeypatch):
    monkeypatch.setattr(measure_memory, "_reset_peak_rss", lambda: False)
    peak = measure_memory.PeakMemory("cpu")
    peak.start()
    assert peak.stop().peak_bytes is None


def test_the_gpus_peak_is_the_highest_of_the_stretches_between_pauses(monkeypatch):
    import torch

    reserved, allocated = iter([500, 900, 700]), iter([400, 800, 600])
    resets: list = []
    fake = SimpleNamespace(
        synchronize=lambda _: None, empty_cache=lambda: None, reset_peak_memory_stats=resets.append, memory_reserved=lambda _: 100,
        max_memory_reserved=lambda _: next(reserved), max_memory_allocated=lambda _: next(allocated),
    )
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(measure_memory, "_nvml_used", lambda _: 1234)
    peak = measure_memory.PeakMemory(SimpleNamespace(type="cuda"))
    peak.start()
    peak.pause()
    peak.resume()
    peak.pause()
    peak.resume()
    found = peak.stop()
    assert (found.kind, found.peak_bytes, found.peak_allocated_bytes) == ("gpu_reserved", 900, 800)
    assert (found.baseline_bytes, found.device_used_bytes, len(resets)) == (100, 1234, 3)


def test_resident_bytes_of_another_process():
    assert measure_memory.child_rss(os.getpid()) == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    assert measure_memory.child_rss(gone.pid) is None


def test_hardware_and_provenance_name_the_machine_and_the_code():
    hardware, about = machine.hardware("cpu"), machine.provenance()
    assert hardware["device"] == "cpu" and hardware["gpu"] is None
    assert hardware["cpu_count"] == len(os.sched_getaffinity(0)) and hardware["memory_bytes"] == psutil.virtual_memory().total
    assert hardware == machine.hardware("cpu"), "it is a key: two readings agree"
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert about["git_commit"] == (head or None)
    assert {"torch", "transformers", "peft"} <= set(about["packages"]) and about["started"].endswith("+00:00")


def test_what_decides_the_order_of_sums_is_told(monkeypatch):
    import torch

    threads = torch.get_num_threads()
    found = machine.arithmetic()
    assert found["threads"] == threads and found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert all(found.values()), "torch names its matrix products, and Linux the processor"
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert machine.arithmetic()["blas"] == f"{found['blas']} MKL_CBWR=COMPATIBLE"


def test_provenance_outside_a_repository_is_null(monkeypatch):
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert machine.provenance()["git_commit"] is None and machine.provenance()["git_dirty"] is None


@pytest.mark.slow
def test_the_phases_of_a_real_run_add_up_to_its_wall_clock(overrides, tmp_path):
    command = [sys.executable, "-m", "pipeline.train", *overrides, "technique=lora", "train_rows=32"]
    began = time.time()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    outside = time.time() - began
    assert done.returncode == 0, done.stderr
    (path,) = Path(tmp_path / "results").rglob("result.json")
    phases = read(path).phases
    assert phases is not None
    assert parts(phases) == pytest.approx(phases.wall_s, abs=0.001)
    assert phases.other_s <= 0.01 * phases.wall_s
    assert min(phases.startup_s, phases.load_s, phases.train_s, phases.validate_s, phases.save_s, phases.evaluate_s) > 0
    assert abs(phases.wall_s - outside) <= max(0.5, 0.1 * outside)

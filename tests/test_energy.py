"""Energy against counters with known answers at the libraries' boundary: NVML, zeus and RAPL's files."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from report_cells import result

from pipeline.cell import run as cell_run
from pipeline.core.compose import compose
from pipeline.core.files import UserError, read_json, write_json
from pipeline.core.settings import read as read_settings
from pipeline.measure import clock as measure_clock
from pipeline.measure import energy as measure_energy
from pipeline.measure import machine as measure_machine
from pipeline.measure import memory as measure_memory
from pipeline.records import results
from pipeline.records.results import read, write

GPU = SimpleNamespace(type="cuda")
RANGE_UJ = 262_143_328_850


class Zone:
    """A RAPL zone's file, as the kernel shows it and zeus finds it."""

    def __init__(self, folder: Path, name: str, microjoules: int) -> None:
        self.energy_uj_path, self.max_energy_range_uj = str(folder / name), float(RANGE_UJ)
        self.set(microjoules)

    def set(self, microjoules: int) -> None:
        Path(self.energy_uj_path).write_text(f"{microjoules}\n")


class Machine:
    """Two CPU packages, one with a memory counter, and a GPU."""

    def __init__(self, folder: Path) -> None:
        self.package, self.memory, self.other = (Zone(folder, n, at) for n, at in (("package", 1_000_000), ("memory", 500_000), ("other", 7_000_000)))
        self.cpus = [SimpleNamespace(rapl_file=self.package, dram=self.memory), SimpleNamespace(rapl_file=self.other, dram=None)]
        self.gpu_mj = 5_000_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        return self.gpu_mj


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    fake = Machine(tmp_path)
    monkeypatch.setattr(measure_energy, "RAPL", (str(tmp_path),))
    monkeypatch.setattr(measure_clock, "synchronise", lambda device: None)
    monkeypatch.setattr(measure_energy, "synchronise", lambda device: None)
    monkeypatch.setattr(measure_memory, "synchronise", lambda device: None)
    monkeypatch.setattr(measure_machine, "nvml", lambda device: (fake, "handle"))
    monkeypatch.setattr(measure_energy, "nvml", lambda device: (fake, "handle"))
    monkeypatch.setattr(measure_memory, "nvml", lambda device: (fake, "handle"))
    monkeypatch.setitem(sys.modules, "zeus", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "zeus.device", SimpleNamespace(get_cpus=lambda: SimpleNamespace(cpus=fake.cpus)))
    return fake


def test_the_cpu_s_joules_are_those_of_its_packages_and_their_memory(machine):
    energy = measure_energy.Energy("cpu")
    energy.start()
    machine.package.set(4_000_000)
    machine.memory.set(1_500_000)
    machine.other.set(7_250_000)
    energy.stop()
    assert energy.joules() == {"energy_j": 4.25, "host_energy_j": None} and energy.note is None


def test_what_happens_in_a_pause_is_kept_out(machine):
    energy = measure_energy.Energy(GPU)
    energy.start()
    machine.gpu_mj += 2_000
    machine.package.set(3_000_000)
    energy.pause()
    machine.gpu_mj += 900_000
    machine.package.set(90_000_000)
    energy.resume()
    machine.gpu_mj += 500
    energy.stop()
    energy.stop()
    assert energy.joules() == {"energy_j": 2.5, "host_energy_j": 2.0}


def test_a_counter_that_begins_anew_is_followed_by_its_range(machine):
    machine.package.set(RANGE_UJ - 1_000_000)
    energy = measure_energy.Energy("cpu")
    energy.start()
    machine.package.set(2_000_000)
    energy.stop()
    assert energy.joules()["energy_j"] == 3.0


def test_a_counter_that_goes_back_and_has_no_range_gives_null(machine):
    energy = measure_energy.Energy(GPU)
    energy.start()
    machine.gpu_mj = 10
    energy.stop()
    assert energy.joules() == {"energy_j": None, "host_energy_j": 0.0}
    assert energy.note == "GPU energy was not measured: a counter went back, and its range is not known"


def test_counters_are_read_now_and_then_so_that_none_goes_round_unseen(machine, monkeypatch):
    clock = SimpleNamespace(at=0.0)
    monkeypatch.setattr(measure_clock, "time", SimpleNamespace(perf_counter=lambda: clock.at))
    monkeypatch.setattr(measure_energy, "time", SimpleNamespace(perf_counter=lambda: clock.at))
    energy = measure_energy.Energy("cpu")
    energy.start()
    for _ in range(3):  # three quarters of the range a minute: more than twice round in all
        clock.at += measure_energy.READ_COUNTERS_EVERY_S
        machine.package.set((int(Path(machine.package.energy_uj_path).read_text()) + RANGE_UJ * 3 // 4) % RANGE_UJ)
        energy.tick()
    energy.stop()
    assert energy.joules()["energy_j"] == pytest.approx(3 * (RANGE_UJ * 3 // 4) / 1e6)


def test_a_resumed_training_adds_what_was_spent_before(machine):
    energy, unknown = measure_energy.Energy(GPU), measure_energy.Energy(GPU)
    for one, before in ((energy, 40.0), (unknown, None)):
        one.add(before, 1.0)
        one.start()
        machine.gpu_mj += 1_000
        one.stop()
    assert energy.joules() == {"energy_j": 41.0, "host_energy_j": 1.0}
    assert unknown.joules()["energy_j"] is None and "before it was resumed was not measured" in unknown.note


def refused() -> None:
    raise PermissionError("RAPL requires root privileges")


@pytest.mark.parametrize(("patch", "note"), [
    (lambda m: m.setattr(measure_energy, "RAPL", ("/nowhere",)), "CPU energy was not measured: this machine shows no RAPL counter"),
    (lambda m: m.setitem(sys.modules, "zeus.device", None), "zeus, which reads RAPL counters, is not installed"),
    (lambda m: m.setitem(sys.modules, "zeus.device", SimpleNamespace(get_cpus=refused)), "CPU energy was not measured: RAPL requires root privileges"),
])
def test_what_cannot_be_read_is_null_with_its_reason(machine, monkeypatch, patch, note):
    patch(monkeypatch)
    energy = measure_energy.Energy("cpu")
    energy.start()
    energy.tick()
    energy.stop()
    assert energy.joules() == {"energy_j": None, "host_energy_j": None} and note in energy.note


def test_a_counter_that_can_no_longer_be_read_gives_null(machine):
    energy = measure_energy.Energy("cpu")
    energy.start()
    Path(machine.memory.energy_uj_path).unlink()
    energy.stop()
    assert energy.joules()["energy_j"] is None and "No such file" in energy.note


def test_a_gpu_without_a_driver_or_counter_gives_null_and_the_host_s_stay(machine, monkeypatch):
    monkeypatch.setattr(measure_machine, "nvml", lambda device: None)
    monkeypatch.setattr(measure_energy, "nvml", lambda device: None)
    monkeypatch.setattr(measure_memory, "nvml", lambda device: None)
    energy = measure_energy.Energy(GPU)
    energy.start()
    machine.other.set(8_000_000)
    energy.stop()
    assert energy.joules() == {"energy_j": None, "host_energy_j": 1.0} and energy.note == "GPU energy was not measured: no NVML driver answers for this GPU"


def test_the_real_library_is_asked_by_these_names():
    rapl = pytest.importorskip("zeus.device.cpu.rapl")
    assert rapl.RAPL_DIR in measure_energy.RAPL and rapl.CONTAINER_RAPL_DIR in measure_energy.RAPL
    assert {"rapl_file", "dram"} <= set(rapl.RAPLCPU._get_powerzone.__code__.co_names)
    assert {"energy_uj_path", "max_energy_range_uj"} <= set(rapl.RAPLFile.__init__.__code__.co_names)


def test_a_cell_s_energy_leaves_validation_out_and_its_cost_follows_from_the_price(overrides, machine, monkeypatch, imports):
    """Every training step costs 2 J, a validation 1,000 J."""
    from pipeline.training import stepping

    step, validate = stepping.Eager.step, cell_run.validate

    def spend(joules: int) -> None:
        machine.other.set(int(Path(machine.other.energy_uj_path).read_text()) + joules * 1_000_000)

    monkeypatch.setattr(stepping.Eager, "step", lambda self, *a: (spend(2), step(self, *a))[1])
    monkeypatch.setattr(cell_run, "validate", lambda *a: (spend(1000), validate(*a))[1])
    words = ["technique=full", "experiment=tried", "train_rows=32", "train.batch_size=8", "train.steps=5", "train.validations=2"]
    result = cell_run.run(compose([*overrides, *words, "price_per_hour=3600", "currency=EUR"]), splits=("validation",))
    assert (result.work.steps, result.work.energy_j, result.work.energy_note) == (5, 10.0, None)
    assert result.cost.amount == pytest.approx(result.phases.wall_s) and (result.cost.currency, result.cost.per_hour) == ("EUR", 3600.0)


@pytest.mark.parametrize(("words", "message"), [
    (["price_per_hour=2.5"], "price_per_hour and currency go together"),
    (["price_per_hour=-1", "currency=EUR"], "price_per_hour' is -1"),
    (["price_per_hour=cheap", "currency=EUR"], "price_per_hour' is 'cheap'; it takes float or null"),
])
def test_a_price_is_never_guessed(words, message):
    with pytest.raises(UserError, match=message):
        read_settings(compose(words))
    assert results.price(compose([]), 10) is None


def test_a_result_of_before_these_fields_is_still_read(tmp_path):
    write(tmp_path, result("lora"))
    raw = read_json(tmp_path / "result.json")
    for part, names in ((raw, ("tuning", "cost")), (raw["work"], ("host_energy_j", "energy_note"))):
        assert all(part.pop(name) is None for name in names)
    write_json(tmp_path / "result.json", raw)
    assert read(tmp_path) == result("lora")

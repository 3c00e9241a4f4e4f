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
from conftest import write_model, write_rationales, write_task
from test_dvc import Clone

from pipeline.cell import grid, identity
from pipeline.cell.child import run_in_child
from pipeline.cell.room import AtOnce
from pipeline.core.compose import ROOT, compose
from pipeline.fan import jobs, parcels, run, slurm
from pipeline.fan.cluster import LARGEST_FILE, left_out
from pipeline.fan.jobs import BAD_INPUT, Job, Queue
from pipeline.records.results import read

SHORT = ["technique=lora", "precision=fp32", "experiment=tried", "train_rows=16", "train.batch_size=8", "train.steps=2", "evaluate.test_rows=8"]
RAY = ["ray.dashboard=false", "ray.cpus=1"]


@pytest.fixture
def words(overrides: list[str], imports: None) -> list[str]:
    return [*overrides, *SHORT, *RAY]


def cells(words: list[str], count: int = 3, *more: str) -> list:
    return [compose([*words, f"seed={seed}", *more]) for seed in range(count)]


def fan(every: list) -> int:
    return run.run(every, lambda missing: AtOnce())


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


def test_cells_composed_once_for_all_seeds_are_those_composed_one_by_one(words):
    every = [[*words, f"technique={t}", f"seed={seed}"] for t in ("lora", "full") for seed in (0, 1, 7)]
    assert grid.compose_cells(every) == [grid.compose_cell(w) for w in every]


# by content


def test_a_folder_sent_in_pieces_arrives_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(parcels, "PIECE", 4)
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_bytes(b"123456789")
    (source / "deep/b.txt").write_bytes(b"")
    kept: list[bytes] = []

    def put(piece: bytes) -> int:
        kept.append(piece)
        return len(kept) - 1

    sent = parcels.packed(source, put)
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


@pytest.mark.slow
def test_jobs_run_on_ray_in_processes_of_their_own(tmp_path, monkeypatch, capfd):
    """The small one among the tests on Ray, with work that loads nothing: the others are slow."""
    monkeypatch.chdir(tmp_path)
    ended: list[tuple[str, int]] = []

    def dispatch() -> int:
        from pipeline.fan.cluster import dispatch

        every = [Job(f"job-{i}", "benchmarks.scale:nothing", [], extra={"code": code}) for i, code in enumerate((0, 0, 2))]
        code = dispatch([lambda cpus, gpus: Queue(every, 1)], jobs.Ray(dashboard=False), tmp_path / "work",
                        lambda job, code, value: ended.append((job.name, value)))
        print(json.dumps(sorted(ended)))
        return code

    assert run_in_child(dispatch).code == 2
    out, err = capfd.readouterr()
    told = json.loads(next(line for line in out.splitlines() if line.startswith("[[")))
    assert [name for name, _ in told] == ["job-0", "job-1", "job-2"] and "3 of 3" not in out and "2 of 3 done" in out and "job-2 failed" in err
    assert os.getpid() not in {pid for _, pid in told}


@pytest.mark.slow
@pytest.mark.parametrize("store", ["shared", "objects"])
def test_ray_leaves_what_a_serial_run_leaves(words, tmp_path, store):
    more = [f"ray.store={store}", f"ray.cache={tmp_path}/cache"]
    assert fan(cells(words, 3, *more)) == 0
    same(tmp_path / "results/tried", serial(words, tmp_path))
    assert not grid.to_run(cells(words, 3)) and not list(tmp_path.rglob("*.partial*"))
    configs = [read(folder).config for folder in (tmp_path / "results/tried").iterdir()]
    assert {c["paths"]["results"] for c in configs} == {f"{tmp_path}/results"} and {c["ray"]["gpus"] for c in configs} == {0.0}
    assert store == "shared" or not list((tmp_path / "cache/runs").iterdir())


@pytest.mark.slow
def test_a_cell_that_begins_at_another_comes_after_it_and_packed_seeds_go_to_one_worker(words, tmp_path):
    first = compose([*words, "technique=full", "seed=0"])
    after = compose([*words, "technique=lora", "seed=0", "start=full"])
    pack = [compose([*words, "pack=true", f"seed={seed}", "precision=fp32"]) for seed in (1, 2)]
    assert fan([after, first, *pack]) == 0
    assert read(identity.folder_of(after)).start == "full"
    assert all(read(identity.folder_of(cfg)).packed for cfg in pack)
    logs = sorted(p.name for p in (tmp_path / "work/fanout").glob("*.log"))
    assert logs == ["full-s0-n16.log", "lora-s0-n16.log", "lora-s1-n16-and-1-more.log"]


@pytest.mark.slow
def test_a_start_is_sent_too(words, tmp_path, monkeypatch):
    more = ["ray.store=objects", f"ray.cache={tmp_path}/cache"]
    every = [compose([*words, "technique=full", "seed=0", *more]), compose([*words, "seed=0", "start=full", *more])]
    assert fan(every) == 0 and read(identity.folder_of(every[1])).start == "full"


@pytest.mark.slow
def test_a_cell_out_of_memory_is_a_row_and_one_of_bad_input_does_not_stop_the_others(words, tmp_path, capfd):
    good, over = compose([*words, "seed=0"]), compose([*words, "seed=1", "memory_limit_gb=0.05"])
    bad = compose([*words, "seed=2", "train.max_length=8"])  # which only the cell itself can see
    assert fan([bad, over, good]) == BAD_INPUT
    assert read(identity.folder_of(good)).status == "ok" and read(identity.folder_of(over)).status == "oom"
    assert not (identity.folder_of(bad) / "result.json").exists() and "longer than 8 tokens" in capfd.readouterr().err


def test_code_that_is_sent_is_the_folders_of_code_and_small_files_whatever_else_lies_there(tmp_path):
    for folder in ("pipeline", "conf", "big model"):
        (tmp_path / folder).mkdir()
    (tmp_path / "metric.py").write_text("def mine(): ...")
    (tmp_path / "weights.bin").write_bytes(bytes(LARGEST_FILE + 1))
    assert left_out(tmp_path) == ["/big model", "/weights.bin"]


@pytest.mark.slow
def test_the_checks_come_first_and_stop_all(words, capfd):
    on = [w for w in words if w != "preflight=false"]
    assert fan(cells(on, 2, "+task.separator=''", "task.prompt='{text}'")) in (0, BAD_INPUT)
    assert "preflight" in capfd.readouterr().out


DRIVER = """
import sys
from pipeline.cell.room import AtOnce
from pipeline.core.compose import compose
from pipeline.fan import run

if __name__ == "__main__":
    words = sys.argv[2:]
    every = [compose([*words, f"seed={seed}"]) for seed in range(int(sys.argv[1]))]
    sys.exit(run.run(every, lambda missing: AtOnce()))
"""
SLOW = ["train.steps=40", "train.checkpoint_every_s=0.5"]


class Fanout:
    """pipeline.fanout over so many seeds in a process of its own."""

    def __init__(self, words: list[str], tmp_path: Path, count: int = 4, driver: str = DRIVER, **environment: str) -> None:
        self.root, self.log = tmp_path / "results/tried", tmp_path / "fanout.log"
        (tmp_path / "driver.py").write_text(driver)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        with open(self.log, "a") as out:
            self.process = subprocess.Popen([sys.executable, tmp_path / "driver.py", str(count), *words, *SLOW], env=environment, cwd=tmp_path,
                                            stdout=out, stderr=subprocess.STDOUT)

    def results(self) -> dict[str, int]:
        return {p.parent.name: p.stat().st_mtime_ns for p in self.root.glob("*/result.json")}

    def below(self, word: str) -> list[int]:
        """Processes of this run whose command line has the word, but for Ray's agents, by whose death a whole node goes."""
        import psutil

        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if word in (line := " ".join(process.cmdline())) and "Agent" not in line:
                    found.append(process.pid)
            except psutil.NoSuchProcess:
                continue
        return found

    def until(self, condition, limit_s: float = 300) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def wait(self) -> str:
        try:
            code = self.process.wait(timeout=500)
        finally:
            self.process.kill()
        assert code == 0, self.log.read_text()
        return self.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", ["a cell", "pipeline.fan.host", "ray::"])
def test_a_worker_that_is_killed_loses_its_own_cell_alone(words, tmp_path, victim):
    """Killed is the cell's process, that which forked it, or Ray's worker."""
    import psutil

    started = Fanout(words, tmp_path)
    started.until(lambda: started.results())
    if victim == "a cell":
        hosts = [pid for pid in started.below("pipeline.fan.host") if psutil.Process(pid).ppid() not in started.below("pipeline.fan.host")]
        started.until(lambda: any(psutil.Process(pid).children() for pid in hosts))
        os.kill(next(child.pid for pid in hosts for child in psutil.Process(pid).children()), signal.SIGKILL)
    else:
        started.until(lambda: started.below(victim))
        os.kill(started.below(victim)[0], signal.SIGKILL)
    said = started.wait()
    assert len(started.results()) == 4 and said.count("try 2 of 3") <= 1 and "failed:" not in said
    same(started.root, serial([*words, *SLOW], tmp_path, 4))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_is_killed_and_started_again(words, tmp_path):
    import psutil

    first = Fanout(words, tmp_path)
    first.until(lambda: len(first.results()) >= 2)
    processes = psutil.Process(first.process.pid).children(recursive=True)
    first.process.kill()
    first.process.wait()
    done = first.results()
    psutil.wait_procs(processes, timeout=60)
    left = [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not [p for p in left if not p.name().endswith("Agent")], "Ray's agents alone take their time to see that they are alone"
    again = Fanout(words, tmp_path)
    again.wait()
    assert len(again.results()) == 4 and done.items() <= again.results().items()
    same(again.root, serial([*words, *SLOW], tmp_path, 4))


@pytest.fixture
def cluster():
    """The address of a cluster of two nodes with a CPU each, on this machine, and the process id of the second one's raylet."""
    script = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)
print(cluster.address, second.all_processes["raylet"][0].process.pid, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdin and process.stdout
        address, raylet = next(line for line in process.stdout if line.startswith("127.") or line[0].isdigit()).split()
        yield address, int(raylet)
        process.stdin.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("store", ["shared", "objects"])
def test_a_machine_of_a_cluster_is_lost(words, tmp_path, cluster, store):
    """Its cell is computed on the other one."""
    address, raylet = cluster
    started = Fanout([*words, f"ray.address={address}", f"ray.store={store}", f"ray.cache={tmp_path}/cache"], tmp_path)
    started.until(lambda: started.results())
    os.kill(raylet, signal.SIGKILL)
    said = started.wait()
    assert len(started.results()) == 4 and "failed:" not in said
    same(started.root, serial([*words, *SLOW], tmp_path, 4))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_head_is_killed(words, tmp_path):
    """Ray waits 20 s for its head to come back, in which a quiet machine has computed all of four cells: here it waits 2 s, and there are more."""
    started = Fanout(words, tmp_path, 12, RAY_gcs_rpc_server_reconnect_timeout_s="2")
    started.until(lambda: started.results())
    os.kill(started.below("gcs_server")[0], signal.SIGKILL)
    said = started.wait()
    assert "the Ray cluster was lost" in said and len(started.results()) == 12
    same(started.root, serial([*words, *SLOW], tmp_path, 12))


# DVC

TINY = """
tracking: {enabled: false}
ray: {dashboard: false}
device: cpu
preflight: false
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dvc_is_left_as_by_a_serial_run(tmp_path):
    """After what `make adopt` does, `dvc status` of the cells is clean, and `dvc repro` runs none of them."""
    clone = Clone(tmp_path / "clone")
    for name in ("experiments/a.yaml", "experiments/a/params.yaml"):
        path = clone.root / name
        text = path.read_text().replace("vader_movies_5", "vader_movies").replace("epochs: 1", "steps: 2").replace("test_rows: 200", "test_rows: 8")
        path.write_text(text + (TINY if name == "experiments/a.yaml" else ""))
    write_task(clone.root / "data/vader_movies", train=320)
    write_rationales(clone.root / "rationales/vader_movies/lexicon", clone.root / "data/vader_movies")
    write_model(clone.root / "models/smollm2_135m")
    environment = {**clone.environment(), "PYTHONPATH": str(clone.root)}
    for command in ("fanout", "plan"):
        more = [] if command == "fanout" else ["adopt=true"]
        if command == "plan":
            assert clone.dvc("repro", "--quiet", "experiments/a/dvc.yaml:plan")[0] == 0
        words = [sys.executable, "-m", f"pipeline.{command}", "experiments=a", *more]
        done = subprocess.run(words, cwd=clone.root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert clone.dvc("commit", "--force", "--quiet", "experiments/a/dvc.yaml:train")[0] == 0
    code, out, err = clone.dvc("status", "experiments/a/dvc.yaml:train", "experiments/a/dvc.yaml:plan")
    assert code == 0 and "up to date" in out, out + err
    assert clone.repro("--single-item", "experiments/a/dvc.yaml:train") == []


# Slurm


def test_cells_are_dealt_out_evenly_and_those_that_read_others_stay_behind_them(words):
    first, after = compose([*words, "technique=full"]), compose([*words, "start=full"])
    others = cells(words, 6)[1:]
    dealt = slurm.sets([first, *others, after], 3)
    names = [[grid.cell_name(cfg) for cfg in one] for one in dealt]
    assert sorted(map(len, names)) == [2, 2, 3]
    [both] = [one for one in names if "full-s0-n16" in one]
    assert both.index("full-s0-n16") < both.index("lora-s0-n16")


@pytest.mark.slow
def test_slurm_jobs_leave_what_a_serial_run_leaves(words, tmp_path):
    """By submitit's local executor, in a process of its own; one job is ended from outside, and its cells are submitted again."""
    local = [*words, "launcher=local"]
    said = Fanout(local, tmp_path, driver=DRIVER.replace("    sys.exit", DYING)).wait()
    assert "were left missing" in said
    same(tmp_path / "results/tried", serial([*local, *SLOW], tmp_path, 4))


DYING = """
    import psutil
    from pipeline.fan import slurm

    waited, killed = slurm._wait, []

    def dying(handed, *rest):
        if not killed:
            killed.append(handed[0])
            job = psutil.Process(handed[0]._process.pid)
            for one in [job, *job.children(recursive=True)]:  # what the job has started works on without it
                one.kill()
        return waited(handed, *rest)

    slurm._wait = dying
    sys.exit"""

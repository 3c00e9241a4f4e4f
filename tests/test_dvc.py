"""The DVC graph with real `dvc` in a temporary clone: what runs, and when. tests/test_plan.py reads the files without running.

The stages' commands are stand-ins that write their outputs at once; `python -m pipeline.plan` is the real one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from pipeline.core.compose import ROOT

STAND_IN = '''#!{python}
"""python on PATH: `-m pipeline.plan` is the real one, any other stage writes its outputs at once."""
import os, sys, time
from collections.abc import Sequence
from pathlib import Path

stage = sys.argv[2].removeprefix("pipeline.")
if stage == "plan":
    os.execv("{python}", ["{python}", *sys.argv[1:]])
given = dict(a.split("=", 1) for a in sys.argv[3:])
cell = "{{technique}}-s{{seed}}-n{{train_rows}}".format_map(given) if stage == "train" else ""
folder = Path({{
    "prepare": "data/{{task}}", "base_model": "models/{{model}}", "rationales": "rationales/{{task}}/{{teacher}}",
    "synthesize": "synthetic/{{task}}/{{synthetic}}",
    "train": "results/{{experiments}}/" + cell, "report": "report/{{experiments}}",
}}[stage].format_map(given))
with open(".work/ran.txt", "a") as log:
    print(stage, cell or "-".join(given.values()), file=log)
time.sleep(float(os.environ.get("STAND_IN_SECONDS", 0)))
(folder / "artefact").mkdir(parents=True)
(folder / "artefact" / "of.txt").write_text(str(folder))
(folder / "predictions.jsonl").write_text("{{}}")
(folder / "result.json").write_text("{{}}")
if stage == "report":
    (folder / "metrics").mkdir()
    (folder / "charts").mkdir()
    for chart in ("intervals", "complexity", "against_training_time", "against_peak_memory", "against_trainable_parameters", "times"):
        (folder / "charts" / (chart + ".png")).write_bytes(b"")
    (folder / "metrics/lora-s0-n200.json").write_text('{{"test": %s}}' % os.environ.get("STAND_IN_TEST", 0.5))
(folder / "history.csv").write_text("cell,step,loss\\nlora,1,2.0\\nlora,2,1.0\\n")
(folder / "table.csv").write_text("name,test\\nlora,0.5\\n")
'''


class Clone:
    """A copy of the project with the experiments a and b, whose stages' commands are replaced."""

    def __init__(self, root: Path) -> None:
        self.root, self.ran = root, root / ".work/ran.txt"
        listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, listed.stdout.split("\0")):
            wanted = name.startswith(("conf/", "pipeline/", "tuning/", ".dvc/", "experiments/shared/")) or name in ("dvc.yaml", ".dvcignore", ".gitignore")
            if wanted and not name.endswith("dvc.lock") and (ROOT / name).exists():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, root / name)
        for folder in (".bin", ".work"):
            (root / folder).mkdir()
        (root / ".bin/python").write_text(STAND_IN.format(python=sys.executable))
        (root / ".bin/python").chmod(0o755)
        self.experiment("a", ["zero_shot", "lora"])
        self.experiment("b", ["zero_shot"])
        self.choose("a")
        subprocess.run(["git", "init", "-q"], cwd=root, check=True)

    def experiment(self, name: str, techniques: list[str], after: Sequence[str] = (), synthetic: Sequence[str] = ()) -> None:
        """Lay down quick under another name and with another grid."""
        folder = self.root / "experiments" / name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "experiments/quick/dvc.yaml", folder / "dvc.yaml")
        known = yaml.safe_load((ROOT / "experiments/quick/params.yaml").read_text())
        ones = [dict(zip(("technique", "first"), one.split(" after "), strict=True)) for one in after]
        grid = {"techniques": techniques, "after": ones, "synthetic": list(synthetic), "seeds": [0], "train_rows": [200]}
        known |= {"experiment": name, "grid": grid, "synthetic": "labels" if synthetic else None}
        (folder / "params.yaml").write_text(yaml.safe_dump(known))
        text = (ROOT / "experiments/quick.yaml").read_text().replace("experiment: quick", f"experiment: {name}")
        (folder.parent / f"{name}.yaml").write_text(text)

    def choose(self, name: str) -> None:
        (self.root / "params.yaml").write_text(f"experiment: {name}\n")

    def edit(self, path: str, old: str, new: str) -> None:
        text = (self.root / path).read_text()
        assert old in text
        (self.root / path).write_text(text.replace(old, new))

    def environment(self) -> dict[str, str]:
        own = {f"DVC_{k}_DIR": str(self.root / f".work/{k}") for k in ("SITE_CACHE", "GLOBAL_CONFIG", "SYSTEM_CONFIG")}
        own |= {"PATH": f"{self.root}/.bin{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
        return {k: v for k, v in os.environ.items() if k != "ALIGNSCOPE_ROOT"} | own

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dvc", *words]
        return subprocess.Popen(command, cwd=self.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment() | environment)

    def dvc(self, *words: str, **environment: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of a dvc command."""
        process = self.start(*words, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def repro(self, *words: str) -> list[str]:
        """What `dvc repro` ran (the plan apart)."""
        self.ran.unlink(missing_ok=True)
        code, _, err = self.dvc("repro", *words)
        assert code == 0, err
        return self.ran.read_text().splitlines() if self.ran.exists() else []


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path / "clone")


KNOWN = yaml.safe_load((ROOT / "experiments/quick/params.yaml").read_text())
RATIONALES = f"{KNOWN['task']}-{KNOWN['teacher']}"
SHARED = {f"prepare {KNOWN['task']}", f"base_model {KNOWN['model']}", f"rationales {RATIONALES}"}


@pytest.mark.slow
def test_a_technique_added_to_the_grid_runs_its_own_cell_alone(clone):
    assert set(clone.repro()) == SHARED | {"train zero_shot-s0-n200", "train lora-s0-n200", "report a"}, (
        "plain repro runs the chosen experiment and the one task, model and teacher that it reads"
    )
    clone.experiment("a", ["full", "zero_shot", "lora"])
    assert clone.repro() == ["train full-s0-n200", "report a"]


@pytest.mark.slow
def test_a_cell_that_reads_another_one_runs_after_it_and_with_it(clone):
    clone.experiment("a", ["lora", "full"], ["rlhf_rloo after reward_model", "reward_model after full"])
    ran = clone.repro()
    order = [ran.index(f"train {name}-s0-n200") for name in ("full", "reward_model", "rlhf_rloo")]
    assert order == sorted(order) and ran[-1] == "report a"
    clone.edit("conf/technique/full.yaml", "reference_lr: 1.0e-4", "lr: 6.0e-5")
    assert clone.repro() == ["train full-s0-n200"], "its artefact is the same, so what begins there is as it was"


@pytest.mark.slow
def test_synthetic_rows_are_written_for_the_cells_that_train_on_them_alone(clone):
    clone.experiment("a", ["lora"], synthetic=["lora+labels"])
    ran = clone.repro()
    wrote = next(i for i, line in enumerate(ran) if line.startswith(f"synthesize {KNOWN['task']}-labels"))
    assert wrote < ran.index("train lora+labels-s0-n200") and "train lora-s0-n200" in ran and ran[-1] == "report a"
    clone.edit("conf/synthetic/labels.yaml", "shots: 3", "shots: 2")
    assert [line.split("-")[0] for line in clone.repro()] == [f"synthesize {KNOWN['task']}"], "the stand-in's rows are the same, so no cell runs"


@pytest.mark.slow
def test_one_word_switches_experiments_and_switching_back_reruns_nothing(clone):
    clone.repro()
    first = (clone.root / "results/a/lora-s0-n200/result.json").read_bytes()
    clone.choose("b")
    assert clone.repro() == ["train zero_shot-s0-n200", "report b"]
    clone.choose("a")
    start = time.monotonic()
    assert clone.repro() == []
    assert time.monotonic() - start < 10
    assert (clone.root / "results/a/lora-s0-n200/result.json").read_bytes() == first
    assert (clone.root / "results/b/zero_shot-s0-n200/result.json").exists()


@pytest.mark.slow
def test_a_change_reaches_the_cells_that_are_made_of_it_and_no_others(clone):
    clone.repro()
    with open(clone.root / "conf/method/lora.yaml", "a") as file:
        file.write("# a comment\n")
    assert clone.repro() == []
    clone.edit("conf/method/lora.yaml", "r: 8", "r: 4")
    assert clone.repro() == ["train lora-s0-n200"]
    for path in ("pipeline/methods/none.py", "pipeline/engine/ops.py", "pipeline/cell/run.py"):
        clone.edit(path, "from __future__", "# a comment\nfrom __future__")
        text = (clone.root / path).read_text()
        (clone.root / path).write_text(text.replace('"""', '"""More words. ', 1))
    assert clone.repro() == [], "a comment and a docstring are no code"
    clone.edit("pipeline/methods/none.py", "from __future__ import annotations\n", "from __future__ import annotations\n\nCHANGED = 1\n")
    assert clone.repro() == ["train zero_shot-s0-n200"]
    before = (clone.root / "plans/a/code.json").read_text()
    clone.edit("pipeline/engine/ops.py", "from __future__ import annotations\n", "from __future__ import annotations\n\nCHANGED = 1\n")
    assert sorted(clone.repro()) == ["report a", "train lora-s0-n200", "train zero_shot-s0-n200"]
    after = (clone.root / "plans/a/code.json").read_text()
    changed = [a.split('"')[1] for a, b in zip(after.splitlines(), before.splitlines(), strict=True) if a != b]
    assert changed == ["pipeline/engine/ops.py"], "code.json says why"
    clone.edit("conf/evaluate/default.yaml", "batch_tokens: 4096", "batch_tokens: 2048")
    assert sorted(clone.repro()) == ["train lora-s0-n200", "train zero_shot-s0-n200"]
    clone.edit("conf/tracking/mlflow.yaml", "artifacts: mlartifacts", "artifacts: elsewhere")
    assert clone.repro() == []
    shutil.copyfile(clone.root / "pipeline/methods/none.py", clone.root / "pipeline/methods/another.py")
    assert clone.repro() == [], "a new method is nobody's until a technique names it"


@pytest.mark.slow
def test_a_second_repro_at_the_same_time_says_who_is_first_and_does_no_harm(clone):
    first = clone.start("repro", STAND_IN_SECONDS="2")
    deadline = time.monotonic() + 60
    while not clone.ran.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    code, _, err = clone.dvc("repro")
    assert code != 0 and (("is busy" in err and str(first.pid) in err) or "Unable to acquire lock" in err), err
    _, err = first.communicate(timeout=120)
    assert first.returncode == 0, err
    assert clone.repro() == []


@pytest.mark.slow
def test_params_that_disagree_with_the_experiment_are_refused_before_any_training(clone):
    clone.edit("experiments/a/params.yaml", f"task: {KNOWN['task']}", "task: trec_hub")
    clone.edit("experiments/a/params.yaml", f"teacher: {KNOWN['teacher']}", "teacher: none")
    code, _, err = clone.dvc("repro")
    assert code != 0
    assert f"params.yaml has task: trec_hub, but its cells compose {KNOWN['task']}" in err
    assert not (clone.root / "results").exists()


@pytest.mark.slow
def test_metrics_and_plots_are_those_of_the_chosen_experiment(clone):
    clone.repro()
    subprocess.run("git add -A && git -c user.name=a -c user.email=a@b commit -qm first", shell=True, cwd=clone.root, check=True)
    code, out, err = clone.dvc("metrics", "show")
    assert code == 0 and not err
    assert [line.split() for line in out.splitlines()] == [["Path", "test"], ["report/a/metrics/lora-s0-n200.json", "0.5"]]
    assert clone.dvc("repro", "--force", "--single-item", "experiments/a/dvc.yaml:report", STAND_IN_TEST="0.75")[0] == 0
    code, out, _ = clone.dvc("metrics", "diff")
    assert code == 0 and out.split()[-5:] == ["report/a/metrics/lora-s0-n200.json", "test", "0.5", "0.75", "0.25"]
    code, _, err = clone.dvc("plots", "show")
    assert code == 0 and not err
    page = (clone.root / "dvc_plots/index.html").read_text()
    assert all(text in page for text in ("Headline metric on test, a", "Training loss, a", '"cell": "lora"'))


@pytest.mark.slow
def test_results_made_without_dvc_are_adopted(clone):
    made = clone.root / "results/a"
    clone.repro(f"experiments/shared/dvc.yaml:rationales@{RATIONALES}", f"experiments/shared/dvc.yaml:model@{KNOWN['model']}")
    for technique in ("zero_shot", "lora"):
        words = [f"technique={technique}", "experiments=a", "seed=0", "train_rows=200"]
        subprocess.run([clone.root / ".bin/python", "-m", "pipeline.train", *words], cwd=clone.root, check=True)
    before = {p: p.read_bytes() for p in made.rglob("*.json")}
    assert clone.repro("experiments/a/dvc.yaml:plan") == []
    assert clone.dvc("commit", "--force", "experiments/a/dvc.yaml:train")[0] == 0
    assert clone.repro() == ["report a"]
    assert {p: p.read_bytes() for p in made.rglob("*.json")} == before

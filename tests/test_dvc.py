"""The DVC graph with real `dvc` in a temporary clone: what runs when, and that a cell depends on all that it is made of.

The stages' commands are stand-ins that write their outputs at once; `python -m pipeline.plan` is the real one.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.cells import grid, grid_overrides
from pipeline.config import CONF, ROOT, compose
from pipeline.plan import plan

EXPERIMENTS = sorted(p.parent.name for p in ROOT.glob("experiments/*/params.yaml"))
STAND_IN = '''#!{python}
"""python on PATH: `-m pipeline.plan` is the real one, any other stage writes its outputs at once."""
import os, sys, time
from pathlib import Path

stage = sys.argv[2].removeprefix("pipeline.")
if stage == "plan":
    os.execv("{python}", ["{python}", *sys.argv[1:]])
given = dict(a.split("=", 1) for a in sys.argv[3:])
cell = "{{technique}}-s{{seed}}-n{{train_rows}}".format_map(given) if stage == "train" else ""
folder = Path({{
    "prepare": "data/{{task}}", "base_model": "models/{{model}}", "rationales": "rationales/{{task}}/{{teacher}}",
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
    (folder / "metrics/lora-s0-n200.json").write_text('{{"test": %s}}' % os.environ.get("STAND_IN_TEST", 0.5))
(folder / "history.csv").write_text("step,loss\\n1,2.0\\n2,1.0\\n")
(folder / "table.csv").write_text("name,test\\nlora,0.5\\n")
'''


class Clone:
    """A copy of the project with the experiments a and b, whose stages' commands are replaced."""

    def __init__(self, root: Path) -> None:
        self.root, self.ran = root, root / ".work/ran.txt"
        listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, listed.stdout.split("\0")):
            wanted = name.startswith(("conf/", "pipeline/", ".dvc/")) or name in ("dvc.yaml", ".dvcignore", ".gitignore")
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

    def experiment(self, name: str, techniques: list[str]) -> None:
        """Lay down quick under another name and with another grid."""
        folder = self.root / "experiments" / name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "experiments/quick/dvc.yaml", folder / "dvc.yaml")
        known = yaml.safe_load((ROOT / "experiments/quick/params.yaml").read_text())
        known |= {"experiment": name, "grid": {"techniques": techniques, "seeds": [0], "train_rows": [200]}}
        (folder / "params.yaml").write_text(yaml.safe_dump(known))
        text = (ROOT / "experiments/quick.yaml").read_text().replace("experiment: quick", f"experiment: {name}")
        (folder.parent / f"{name}.yaml").write_text(text)

    def choose(self, name: str) -> None:
        (self.root / "params.yaml").write_text(f"experiment: {name}\n")

    def edit(self, path: str, old: str, new: str) -> None:
        text = (self.root / path).read_text()
        assert old in text
        (self.root / path).write_text(text.replace(old, new))

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        own = {f"DVC_{k}_DIR": str(self.root / f".work/{k}") for k in ("SITE_CACHE", "GLOBAL_CONFIG", "SYSTEM_CONFIG")}
        own |= {"PATH": f"{self.root}/.bin{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1", **environment}
        kept = {k: v for k, v in os.environ.items() if k != "ALIGNSCOPE_ROOT"}
        command = [sys.executable, "-m", "dvc", *words]
        return subprocess.Popen(command, cwd=self.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=kept | own)

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


FIRST = {
    "prepare vader_movies_5",
    "base_model smollm2_135m",
    "rationales vader_movies_5-lexicon",
    "train zero_shot-s0-n200",
    "train lora-s0-n200",
    "report a",
}


def test_a_technique_added_to_the_grid_runs_its_own_cell_alone(clone):
    assert set(clone.repro()) == FIRST, "plain repro runs the chosen experiment and the one task, model and teacher that it reads"
    clone.experiment("a", ["full", "zero_shot", "lora"])
    assert clone.repro() == ["train full-s0-n200", "report a"]


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
    clone.edit("pipeline/methods/none.py", "from __future__", "# changed\nfrom __future__")
    assert clone.repro() == ["train zero_shot-s0-n200"]
    clone.edit("conf/evaluate/default.yaml", "latency_rows: 16", "latency_rows: 8")
    assert sorted(clone.repro()) == ["train lora-s0-n200", "train zero_shot-s0-n200"]
    clone.edit("conf/tracking/mlflow.yaml", "artifacts: mlartifacts", "artifacts: elsewhere")
    assert clone.repro() == []
    shutil.copyfile(clone.root / "pipeline/methods/none.py", clone.root / "pipeline/methods/another.py")
    assert clone.repro() == [], "a new method is nobody's until a technique names it"


@pytest.mark.slow
def test_a_second_repro_at_the_same_time_says_who_is_first_and_does_no_harm(clone):
    first = clone.start("repro", STAND_IN_SECONDS="3")
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
    clone.edit("experiments/a/params.yaml", "vader_movies_5", "vader_movies")
    code, _, err = clone.dvc("repro")
    assert code != 0
    assert "params.yaml has task: vader_movies, but its cells compose vader_movies_5" in err
    assert "train" not in clone.ran.read_text()


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
    assert clone.dvc("plots", "show")[0] == 0
    page = (clone.root / "dvc_plots/index.html").read_text()
    assert "Headline metric on test, a" in page and "results/a/lora-s0-n200/history.csv" in page


@pytest.mark.slow
def test_results_made_without_dvc_are_adopted(clone):
    made = clone.root / "results/a"
    clone.repro("pipeline/dvc.yaml:rationales@vader_movies_5-lexicon", "pipeline/dvc.yaml:model@smollm2_135m")
    for technique in ("zero_shot", "lora"):
        words = [f"technique={technique}", "experiments=a", "seed=0", "train_rows=200"]
        subprocess.run([clone.root / ".bin/python", "-m", "pipeline.train", *words], cwd=clone.root, check=True)
    before = {p: p.read_bytes() for p in made.rglob("*.json")}
    assert clone.repro("experiments/a/dvc.yaml:plan") == []
    assert clone.dvc("commit", "--force", "experiments/a/dvc.yaml:train")[0] == 0
    assert clone.repro() == ["report a"]
    assert {p: p.read_bytes() for p in made.rglob("*.json")} == before


# what the files say, without running dvc


def stages(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text())["stages"]


def one_cell_a_technique(name: str) -> list[list[str]]:
    return grid_overrides([f"experiments={name}", "seed=0", f"train_rows={grid(name)['grid']['train_rows'][0]}"])


def test_there_is_one_dvc_yaml_for_all_experiments():
    assert len({(ROOT / f"experiments/{name}/dvc.yaml").read_text() for name in EXPERIMENTS}) == 1
    assert {p.stem for p in ROOT.glob("experiments/*.yaml")} == set(EXPERIMENTS)
    assert yaml.safe_load((ROOT / "params.yaml").read_text()) == {"experiment": "quick"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_params_say_what_the_experiment_composes(name):
    known = grid(name)
    cells = [compose(overrides) for overrides in one_cell_a_technique(name)]
    assert known["experiment"] == name == {c.experiment for c in cells}.pop()
    for key in ("task", "model", "teacher"):
        assert {c[key].name for c in cells} == {known[key]}
    assert all(type(n) is int for n in known["grid"]["train_rows"]), "DVC names a cell by its rows"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_file_that_a_cell_composes_is_tracked(name):
    """The plan stage depends on it, and the cell on its plan."""
    deps = stages(f"experiments/{name}/dvc.yaml")["plan"]["deps"]
    tracked = [ROOT / d.replace("${experiment}", name) for d in deps]
    for overrides in one_cell_a_technique(name):
        choices = compose(overrides, hydra_config=True).hydra.runtime.choices
        files = [CONF / "config.yaml"]
        for group, option in choices.items():
            if not group.startswith("hydra/"):
                files.append((ROOT if group == "experiments" else CONF) / group / f"{option}.yaml")
        for file in files:
            file = file if file.name != f"{name}.yaml" else ROOT / f"experiments/{name}.yaml"
            assert file.exists() and any(file.is_relative_to(t) for t in tracked), file


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "task.prompt=x",
        "model.note=x",
        "teacher.batch_size=1",
        "method.config.r=3",
        "+objective.new=1",
        "precision=fp32",
        "train.lr=9",
        "evaluate.test_rows=7",
        "technique.family=x",
        "device=cpu",
        "memory_limit_gb=3",
    ],
)
def test_a_value_of_any_group_is_in_the_plan(change):
    cell = ["experiments=quick", "technique=lora", "train_rows=200"]
    assert plan(compose([*cell, change])) != plan(compose(cell))


@pytest.mark.parametrize(
    "change", ["tracking=none", "sweep=rank_memory", "paths.results=x", "train.progress=false", "train.checkpoint_every_s=1"]
)
def test_what_does_not_decide_an_outcome_is_not_in_the_plan(change):
    cell = ["experiments=quick", "technique=lora", "train_rows=200"]
    assert plan(compose([*cell, change])) == plan(compose(cell))


def test_the_plan_has_the_code_of_the_cell_s_own_method_and_objective():
    code = plan(compose(["experiments=quick", "technique=step_by_step", "method=lora", "train_rows=200"]))["code"]
    assert set(code) == {"pipeline/methods/peft_adapter.py", "pipeline/objectives/step_by_step.py"}


def imported(start: str) -> set[str]:
    """The project's files that a file imports, directly or not."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            files = (f"{n.replace('.', '/')}.py" for n in names if n.startswith("pipeline."))
            todo += [f for f in files if (ROOT / f).exists()]
    return seen


UNLISTED = {
    "pipeline/config.py": "composes what the plan holds",
    "pipeline/files.py": "words errors, writes bytes as they are",
    "pipeline/supervise.py": "starts the cell's process",
    "pipeline/tracking.py": "mirrors results",
    "pipeline/runs.py": "mirrors results",
}


def test_a_cell_depends_on_the_code_that_it_runs_file_by_file():
    deps = {d for d in stages("experiments/quick/dvc.yaml")["train"]["deps"] if d.startswith("pipeline/")}
    read = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("pipeline/metrics/*/*.py")} | {"pipeline/news.txt"}
    assert deps == (imported("pipeline/train.py") | read) - set(UNLISTED)
    assert not any((ROOT / d).is_dir() for d in deps), "a new file in a folder would rerun every cell"


def test_the_report_depends_on_all_of_its_files():
    deps = {d for d in stages("experiments/quick/dvc.yaml")["report"]["deps"] if d.startswith("pipeline/")}
    assert deps == {p.relative_to(ROOT).as_posix() for p in ROOT.glob("pipeline/report*.py")} | {"pipeline/templates"}


@pytest.mark.parametrize("stage", ["prepare", "base_model", "rationales"])
def test_shared_stages_depend_on_their_own_code(stage):
    every = stages("pipeline/dvc.yaml")
    deps = set(every["model" if stage == "base_model" else stage]["do"]["deps"])
    assert {d for d in deps if d.startswith("pipeline/") and "$" not in d} <= {
        *imported(f"pipeline/{stage}.py"),
        "pipeline/model_sources.py",
        "pipeline/registry.py",
        "pipeline/sources.py",
    }
    assert f"pipeline/{stage}.py" in deps


def options(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def test_every_task_has_its_lines():
    every = stages("pipeline/dvc.yaml")
    lines = every["prepare"]["foreach"]
    assert sorted(lines) == options("task"), "a task in conf/task/ is a line of prepare in pipeline/dvc.yaml"
    for task, line in lines.items():
        source = yaml.safe_load((CONF / f"task/{task}.yaml").read_text())["source"]
        local = source.get("folder") or source.get("files") if source["_target_"].endswith("Files") else f"conf/task/{task}.yaml"
        assert line["reads"] == local
    pairs = every["rationales"]["foreach"]
    assert {p["task"] for p in pairs.values() if p["teacher"] == "none"} == set(lines), "every task can do without a teacher"
    code = {t: yaml.safe_load((CONF / f"teacher/{t}.yaml").read_text())["_target_"].split(".")[-2] for t in options("teacher")}
    assert {name: pair["code"] for name, pair in pairs.items()} == {
        f"{p['task']}-{p['teacher']}": code[p["teacher"]] for p in pairs.values()
    }


def test_every_ready_model_has_its_line():
    lines = stages("pipeline/dvc.yaml")["model"]["foreach"]
    assert sorted(lines) == [m for m in options("model") if m not in ("hub", "local")], "hub and local are models once they have a name"
    for model, line in lines.items():
        built_upon = [d for d in yaml.safe_load((CONF / f"model/{model}.yaml").read_text()).get("defaults", []) if d != "_self_"]
        assert built_upon in ([], [line["extends"]]) and (built_upon or line["extends"] == model)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_an_experiment_reads_has_a_stage(name):
    known, every = grid(name), stages("pipeline/dvc.yaml")
    assert known["task"] in every["prepare"]["foreach"]
    assert known["model"] in every["model"]["foreach"]
    assert f"{known['task']}-{known['teacher']}" in every["rationales"]["foreach"]

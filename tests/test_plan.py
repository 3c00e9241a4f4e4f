"""What a cell depends on: its plan, and what the dvc.yaml files list. tests/test_dvc.py runs them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from test_tune import example

from pipeline import plan as entry
from pipeline.cell import grid as cell_grid
from pipeline.cell.grid import entries, grid, grid_overrides, own_grid
from pipeline.cell.identity import plan, reads
from pipeline.core import settings
from pipeline.core.compose import CONF, ROOT, SUFFIX, build, by_key, compose
from pipeline.core.files import read_json
from pipeline.records import tuned
from pipeline.records.finished import name as cell_name
from pipeline.search.space import at, declared

EXPERIMENTS = sorted(p.parent.name for p in ROOT.glob("experiments/*/params.yaml"))
ONE_FILE = sorted(p.stem for p in ROOT.glob("experiments/*.yaml") if own_grid(p.stem))
"""Experiments whose grid stands in their own file: DVC does not know them."""
LORA = ["experiments=quick", "technique=lora", "train_rows=200"]


@pytest.fixture(scope="module")
def unchanged() -> dict:
    return plan(compose(LORA))


def stages(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text())["stages"]


def one_cell_a_technique(name: str) -> list[list[str]]:
    return grid_overrides([f"experiments={name}", "seed=0", f"train_rows={grid(name)['grid']['train_rows'][0]}"])


def test_plan_and_report_depend_on_the_tuned_files_and_a_cell_on_its_plan():
    known = stages("experiments/quick/dvc.yaml")
    assert "tuning" in known["plan"]["deps"] and "tuning" in known["report"]["deps"] and (ROOT / "tuning").is_dir()
    assert "plans/${experiment}/${item.technique}-s${item.seed}-n${item.rows}.json" in known["train"]["deps"]


def test_there_is_one_dvc_yaml_for_all_experiments():
    assert len({(ROOT / f"experiments/{name}/dvc.yaml").read_text() for name in EXPERIMENTS}) == 1
    assert {p.stem for p in ROOT.glob("experiments/*.yaml")} == {*EXPERIMENTS, *ONE_FILE}
    assert yaml.safe_load((ROOT / "params.yaml").read_text()) == {"experiment": "quick"}


@pytest.mark.parametrize("name", [n if n == "nf4" else pytest.param(n, marks=pytest.mark.slow) for n in ONE_FILE])
def test_every_technique_and_variant_of_a_one_file_grid_composes_and_what_it_tunes_is_searched(name):
    known = grid(name)
    rows = f"train_rows={known['grid']['train_rows'][0]}"
    for words in entries(known["grid"], {}):
        cfg = compose([f"experiments={name}", words[0].removesuffix(SUFFIX), *words[1:], rows])
        settings.read(cfg)
        assert (cfg.experiment, cfg.task.name, cfg.model.name, cfg.teacher.name) == (name, known["task"], known["model"], known["teacher"])
        assert build(cfg.method, "method") is not None and build(cfg.objective, "objective") is not None
        here = at(cfg, {"train.lr": cfg.train.lr or cfg.train.reference_lr})  # whatever lies under models/ here
        assert declared(here).searched or not words[0].endswith(SUFFIX), words


QUICK_TO_COMPOSE = [pytest.param(e, marks=pytest.mark.slow) if e != "quick" else e for e in EXPERIMENTS]


@pytest.mark.parametrize("name", QUICK_TO_COMPOSE)
def test_params_say_what_the_experiment_composes(name):
    known = grid(name)
    cells = [compose(overrides) for overrides in one_cell_a_technique(name)]
    assert known["experiment"] == name == {c.experiment for c in cells}.pop()
    for key in ("task", "model", "teacher"):
        assert {c[key].name for c in cells} == {known[key]}
    assert all(type(n) is int for n in known["grid"]["train_rows"]), "DVC names a cell by its rows"


@pytest.mark.parametrize("name", QUICK_TO_COMPOSE)
def test_every_file_that_a_cell_composes_is_tracked(name):
    """The plan stage depends on it, and the cell on its plan."""
    deps = stages(f"experiments/{name}/dvc.yaml")["plan"]["deps"]
    tracked = [ROOT / d.replace("${experiment}", name) for d in deps]
    for overrides in one_cell_a_technique(name):
        choices = compose(overrides, hydra_config=True).hydra.runtime.choices
        files = [CONF / "config.yaml"]
        for group, option in choices.items():
            if option and not group.startswith("hydra/"):
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
def test_a_value_of_any_group_is_in_the_plan(change, unchanged):
    assert plan(compose([*LORA, change])) != unchanged


@pytest.mark.parametrize("change", ["tracking=none", "sweep=rank_memory", "paths.results=x", "train.progress=false", "train.checkpoint_every_s=1"])
def test_what_does_not_decide_an_outcome_is_not_in_the_plan(change, unchanged):
    assert plan(compose([*LORA, change])) == unchanged


def test_the_plan_has_the_code_of_the_cell_s_own_method_and_objective():
    code = plan(compose(["experiments=quick", "technique=step_by_step", "method=lora", "train_rows=200"]))["code"]
    adapter = {"pipeline/models/kinds.py", "pipeline/models/imports.py", *(f"pipeline/methods/peft_{name}.py" for name in ("adapter", "options", "start"))}
    assert set(code) == {*adapter, "pipeline/objectives/step_by_step.py"}


def test_no_stage_lists_code():
    for path in ("dvc.yaml", "experiments/shared/dvc.yaml", "experiments/quick/dvc.yaml"):
        text = (ROOT / path).read_text()
        assert not [line for line in text.splitlines() if re.match(r" *- pipeline/", line)], path
    assert len((ROOT / "experiments/quick/dvc.yaml").read_text().splitlines()) <= 100


@pytest.mark.slow
def test_what_reads_another_cell_comes_after_it():
    first, after = (stages("experiments/quick/dvc.yaml")[name] for name in ("train", "train_after"))
    further = "results/${experiment}/${item.cell.first}-s${item.seed}-n${item.rows}/artefact"
    after = yaml.safe_load(yaml.safe_dump(after, width=500).replace("item.cell.technique", "item.technique"))
    assert sorted([*first["deps"], further]) == sorted(after["deps"])
    assert {k: v for k, v in first.items() if k not in ("deps", "matrix")} == {k: v for k, v in after.items() if k not in ("deps", "matrix")}
    mixed = stages("experiments/quick/dvc.yaml")["train_synthetic"]
    assert sorted([*first["deps"], "synthetic/${task}/${synthetic}"]) == sorted(mixed["deps"])
    assert mixed | {"deps": 0, "matrix": 0} == first | {"deps": 0, "matrix": 0}
    firsts = {one["technique"]: one["first"] for one in grid("techniques")["grid"]["after"]}
    for cfg in map(compose, one_cell_a_technique("techniques")):
        waited, name = set(), cfg.technique.name
        while name in firsts:  # what it waits for has waited, too
            name = firsts[name]
            waited.add(cell_name(cfg, name))
        read = {path.parent.name for path in reads(cfg)}
        assert read <= waited and (cell_name(cfg, firsts.get(cfg.technique.name, "none")) in read) == bool(waited), cfg.technique.name


def test_every_shared_stage_depends_on_its_command_s_code(tmp_path):
    assert entry.main([f"paths.plans={tmp_path}"]) == 0
    written = {p.stem: set(read_json(p)) for p in (tmp_path / "code").iterdir()}
    wanted = {"report"} | {d for stage in stages("experiments/shared/dvc.yaml").values() for d in stage.get("do", {}).get("deps", []) if d.startswith("plans/")}
    names = {Path(w).stem.replace("${item.teacher}", t) for w in wanted for t in options("teacher")}
    assert names <= set(written)
    for name, files in written.items():
        assert f"pipeline/{name.partition('-')[0]}.py" in files and not any(f.startswith("pipeline/core/") for f in files)
    assert "pipeline/data/sources.py" in written["prepare"] and "pipeline/models/sources.py" in written["base_model"]
    assert "pipeline/teachers/lexicon.py" in written["rationales-lexicon"] and "pipeline/teachers/lexicon.py" not in written["rationales-none"]
    assert "pipeline/teachers/local_writer.py" in written["rationales-local"] & written["synthesize"]
    assert "pipeline/reporting/templates/report.html" in written["report"]


def options(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def test_every_task_has_its_lines():
    every = stages("experiments/shared/dvc.yaml")
    lines = every["prepare"]["foreach"]
    assert sorted(lines) == [t for t in options("task") if t != "table"], "a task in conf/task/ is a line of prepare in experiments/shared/dvc.yaml"
    for task, line in lines.items():
        source = yaml.safe_load((CONF / f"task/{task}.yaml").read_text())["source"]
        local = source.get("folder") or source.get("files") if source["type"] == "files" else f"conf/task/{task}.yaml"
        assert line["reads"] == local
    pairs = every["rationales"]["foreach"]
    assert {p["task"] for p in pairs.values() if p["teacher"] == "none"} == set(lines), "every task can do without a teacher"
    assert set(pairs) == {f"{p['task']}-{p['teacher']}" for p in pairs.values()} and {p["teacher"] for p in pairs.values()} <= set(options("teacher"))


def test_every_ready_model_has_its_line():
    lines = stages("experiments/shared/dvc.yaml")["model"]["foreach"]
    assert sorted(lines) == [m for m in options("model") if m not in ("hub", "local")], "hub and local are models once they have a name"
    for model, line in lines.items():
        built_upon = [d for d in yaml.safe_load((CONF / f"model/{model}.yaml").read_text()).get("defaults", []) if d != "_self_"]
        assert built_upon in ([], [line["extends"]]) and (built_upon or line["extends"] == model)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_an_experiment_reads_has_a_stage(name):
    known, every = grid(name), stages("experiments/shared/dvc.yaml")
    assert known["task"] in every["prepare"]["foreach"]
    assert known["model"] in every["model"]["foreach"]
    local = known["teacher"] == "local" and known["task"] in every["rationales_local"]["foreach"]
    assert local or f"{known['task']}-{known['teacher']}" in every["rationales"]["foreach"]
    assert bool(known["synthetic"]) == bool(known["grid"]["synthetic"])
    assert not known["synthetic"] or f"{known['task']}-{known['synthetic']}" in every["synthetic"]["foreach"]


def test_the_stage_of_synthetic_rows_serves_the_cells_of_the_experiment():
    stage = stages("experiments/shared/dvc.yaml")["synthetic"]
    known, line = grid("synthetic"), stage["foreach"]["vader_movies_5-labels"]
    assert line["train_rows"] == min(known["grid"]["train_rows"]) and line["rows"] >= max(known["grid"]["train_rows"])
    assert yaml.safe_load(line["row_seeds"]) == known["grid"]["seeds"]


def test_a_set_that_params_do_not_name_is_refused(tmp_path, capsys):
    assert entry.main(["experiments=quick", "technique=lora+labels", f"paths.plans={tmp_path}"]) == 2
    assert "params.yaml has synthetic: None, but its cells train on labels; name that set there" in capsys.readouterr().err


def test_the_entry_writes_a_file_a_cell(tmp_path):
    assert entry.main(["experiments=quick", f"paths.plans={tmp_path}"]) == 0
    names = {p.stem for p in (tmp_path / "quick").iterdir()} - {"code"}
    assert names == {f"{technique}-s0-n{grid('quick')['grid']['train_rows'][0]}" for technique in grid("quick")["grid"]["techniques"]}
    written = read_json(tmp_path / "quick" / f"{sorted(names)[0]}.json")
    assert set(written) == {"config", "code"}
    assert {"pipeline/cell/run.py", "pipeline/engine/ops.py", "pipeline/scoring/news.txt"} <= set(read_json(tmp_path / "quick/code.json"))


def test_tuned_cells_of_what_is_tuned_run_and_the_others_are_named(tmp_path, monkeypatch, capsys):
    tuned.write(tmp_path / "quick/lora-n160.yaml", example())
    axes = {"techniques": ["few_shot", "lora"], "seeds": [0, 1], "train_rows": [160]}
    monkeypatch.setattr(cell_grid, "grid", lambda name: {"grid": axes})
    words = ["experiments=quick", "tuned=true", f"paths.tuning={tmp_path}"]
    assert [(by_key(w)["technique"], by_key(w)["seed"]) for w in cell_grid.tuned_already(grid_overrides(words))] == [("lora", "0"), ("lora", "1")]
    assert "not tuned yet, and left out: few_shot-n160; python -m pipeline.tune experiments=quick" in capsys.readouterr().out
    assert len(cell_grid.tuned_already(grid_overrides([*words, "technique=few_shot"]))) == 2, "none is tuned: they say so when they are composed"


@pytest.mark.parametrize(("params", "said"), [
    (None, "alignscope try mine --plan writes experiments/mine/dvc.yaml"), ("experiment: quick", "set experiment: mine there"), ("experiment: mine # so", ""),
])
def test_make_says_what_to_fix_where_dvc_says_to_remove_a_stage(tmp_path, params, said):
    folder = tmp_path / "experiments/mine"
    if params is not None:
        folder.mkdir(parents=True)
        (folder / "dvc.yaml").write_text("")
        (folder / "params.yaml").write_text(f"{params}\n")
    words = ["make", "-f", str(ROOT / "Makefile"), "-C", str(tmp_path), "-o", ".venv/requirements.lock", "repro", "EXPERIMENT=mine", "OWN_LOCKS=false"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode and said in done.stderr and done.stderr.count("error: ") == bool(said)


def test_params_that_name_another_task_are_refused(tmp_path, capsys):
    assert entry.main(["experiments=quick", "technique=lora", f"paths.plans={tmp_path}", "task=trec"]) == 2
    assert f"params.yaml has task: {grid('quick')['task']}, but its cells compose trec; make" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

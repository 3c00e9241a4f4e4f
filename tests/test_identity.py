"""Which cell is which: what of config, inputs and code makes two cells the same, and what the commands do with one that is not."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml

from pipeline import cells, peft_configs, plan, train
from pipeline.cell import grid, identity
from pipeline.core import settings
from pipeline.core.compose import CONF, ROOT, compose
from pipeline.core.files import UserError, read_json, write_json
from pipeline.core.names import TABLE
from pipeline.data.recipe import Recipe
from pipeline.records import finished

LORA = ["experiments=quick", "technique=lora", "train_rows=200"]


# The config


def test_every_key_of_the_config_is_said_to_decide_or_not():
    top = yaml.safe_load((CONF / "config.yaml").read_text())
    groups = {name.removeprefix("override ") for entry in top["defaults"] if isinstance(entry, dict) for name in entry}
    aside = {
        "experiment", "cell", "split", "requests", "to", "variant", "suite", "suite_path", "suite_rows", "overwrite", "stale", "adopt", "budget", "grid",
        "judge", "pack", "preflight", "merged", "memory_limit_gb", "price_per_hour", "currency", "launcher", "share", "at_once", "latency", "ray", "slurm",
        "race", "budget_hours", "within", "error", "tuned", "tune", "forecast", "report", "paths", "writer", "sweep", "search", "tracking", "experiments",
        "hydra", "defaults", "hydra/job_logging",
    }
    assert set(top) | groups == set(settings.DECIDING) | aside, "a new key at the top decides a cell's outcome (settings.DECIDING), or it does not (here)"


@pytest.mark.parametrize("change", [
    "report.target=0.6", "paths.models=elsewhere", "tracking=none", "sweep=rank_memory", "train.progress=false", "train.checkpoint_every_s=1", "pack=true",
    "share=true", "at_once=2", "latency=measure",
    "memory_limit_gb=64", "tune.trials=3", "forecast.length=7", "experiment=another", "+report.new=1", "stale=keep", "overwrite=true",
    "evaluate.probe_pairs=7", "+synthetic.rows=9", "train.parallel=ddp", "train.gpus=2",
])
def test_what_decides_no_outcome_is_no_part(change):
    assert identity.decides(compose([*LORA, change])) == identity.decides(compose(LORA))


@pytest.mark.parametrize("change", [
    "seed=1", "train_rows=100", "task.prompt=x", "+task.separator=x", "model.note=x", "method.config.r=3", "method.merge=true", "precision=fp32",
    "train.lr=9",
    "evaluate.test_rows=7", "technique.family=x", "device=cpu", "start=full", "evaluate.forgetting=true", "teacher.column=other", "objective=step_by_step",
])
def test_what_decides_is_a_part(change):
    assert identity.decides(compose([*LORA, change])) != identity.decides(compose(LORA))


def test_a_new_key_with_a_default_makes_no_cell_stale(monkeypatch):
    before = identity.decides(compose(LORA))

    @dataclasses.dataclass(frozen=True)
    class Train(settings.Train):
        label_smoothing: float = 0.0

    monkeypatch.setattr(settings, "Train", Train)
    assert identity.decides(compose([*LORA, "+train.label_smoothing=0.0"])) == before
    assert identity.decides(compose([*LORA, "+train.label_smoothing=0.1"])) != before


ABSENT = {
    "Recipe": {"metric": "accuracy", "tolerance": 0.0, "format": "plain", "separator": " ", "length_normalised": False, "max_new_tokens": 32, "stop": None,
               "answer_pattern": None, "messages": None, "prompt": "", "answer": None, "system": None, "tools": None,
               "transfer": (), "columns": {}, "choices": None, "split": {}, "leakage": "error", "licence": "not stated"},
    "Model": {"source": None, "init": "pretrained", "init_seed": 0, "trust_remote_code": False, "allow_pickle": False, "licence": None, "note": None},
    "Evaluate": {"test_rows": None, "validation_share": 0.2, "transfer_rows": None, "forgetting": False, "probe_pairs": 500, "probe_texts": 100,
                 "probe_lambada": 0, "latency_rows": 16, "adapters": ()},
    "Precision": {"compute": "auto", "double_quantisation": True},
    "Technique": {"path": None},
    "Train": {"reference_lr": None, "lr_power": 0.0, "steps": None, "min_steps": None, "engine": "auto", "padding_free": "auto",
              "parallel": "none", "gpus": None, "optimizer": "adamw",
              "schedule": "cosine", "warmup_share": 0.1,
              "weight_decay": 0.0, "max_grad_norm": 1.0, "validations": 1, "max_length": 512, "too_long": "error", "checkpointing": False,
              "checkpoint_every_s": 120.0, "progress": True},
}


@pytest.mark.parametrize("kind", [Recipe, settings.Model, settings.Train, settings.Evaluate, settings.Precision, settings.Technique])
def test_what_the_absence_of_a_key_means_never_changes(kind):
    """Else results made before would silently count as made with the new default. Another default for users goes into conf/; a new key is a line here."""
    actual = {}
    for field in dataclasses.fields(kind):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if default is not dataclasses.MISSING:
            actual[field.name] = default
    assert actual == ABSENT[kind.__name__]


def test_dotted_paths_of_before_are_the_same_cell():
    from pipeline.core.compose import plain

    values = plain(compose(LORA))
    old = json.loads(json.dumps(values))
    old["method"] = {"_target_": "pipeline.methods.peft_adapter.PeftAdapter", **{k: v for k, v in old["method"].items() if k != "type"}}
    old["method"]["config"] = {"_target_": "peft.LoraConfig", **{k: v for k, v in old["method"]["config"].items() if k != "type"}}
    old["objective"] = {"_target_": "pipeline.objectives.labels.Labels"}
    assert identity.deciding(old) == identity.deciding(values)


# The code


def test_a_comment_or_a_docstring_is_no_part_of_the_code(tmp_path):
    source = (ROOT / "pipeline/engine/ops.py").read_text()
    digests = []
    for number, text in enumerate((source, f"# a comment\n\n{source}\n# another\n", source.replace('"""', '"""More words. ', 1), source + "\nX = 1\n")):
        (tmp_path / f"{number}.py").write_text(text)
        digests.append(identity.digest(tmp_path / f"{number}.py"))
    assert digests[0] == digests[1] == digests[2] != digests[3]


def test_every_operation_is_a_part_of_the_code(tmp_path):
    """Swap each of a file's binary operators, one at a time."""
    tree = ast.parse((ROOT / "pipeline/engine/ops.py").read_text())
    seen = set()
    places = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)]
    assert len(places) > 3
    for number, node in enumerate(places):
        node.op = ast.Add()
        (tmp_path / f"{number}.py").write_text(ast.unparse(tree))
        seen.add(identity.digest(tmp_path / f"{number}.py"))
        node.op = ast.Mult()
    assert len(seen) == len(places)


def test_the_code_is_what_the_cell_imports_and_its_own_method_and_objective():
    names = set(identity.common_code())
    assert {"pipeline/cell/run.py", "pipeline/engine/ops.py", "pipeline/training/loop.py", "pipeline/scoring/metrics/accuracy/accuracy.py"} <= names
    assert not any(n.startswith(("pipeline/core/", "pipeline/reporting/", "pipeline/search/", "pipeline/forecasting/")) for n in names)
    others = {p.relative_to(ROOT).as_posix() for family in ("methods", "objectives") for p in (ROOT / f"pipeline/{family}").glob("*.py")}
    assert names & others <= {"pipeline/methods/base.py", "pipeline/objectives/base.py"}, "a changed method is its own cells' alone"
    own = identity.own_code(identity.decides(compose(["experiments=quick", "technique=adapter_houlsby"])))
    assert {"pipeline/methods/bottleneck.py", "pipeline/methods/modules/adapters.py"} <= set(own) and "pipeline/methods/full.py" not in own


@pytest.mark.parametrize(("method", "files"), [
    ("peft_adapter", {"peft_adapter"}), ("lora_plus", {"peft_adapter", "peft_lora"}), ("ada_lora", {"peft_adapter", "peft_adalora"}),
    ("from_file", {"peft_adapter", "peft_adalora", "peft_from_file", "peft_lora", "peft_prompts", "peft_shadow"}), ("ipt", {"peft_adapter", "soft_prompts"}),
])
def test_a_change_of_one_adapter_of_peft_concerns_no_other(method, files):
    actual = {path.stem for path in identity.closure(TABLE["method"][method].rpartition(".")[0]) if path.parent.name == "methods"}
    assert actual - {"base", "__init__"} == files | {"peft_options", "peft_start"}


def test_every_cell_of_a_method_has_its_code():
    for technique in ("lora", "full", "few_shot", "qlora", "dpo", "ladder"):
        cfg = compose(["experiments=quick", f"technique={technique}"])
        assert len(identity.own_code(identity.decides(cfg))) >= 2, technique


# A cell that stands where another one would be written


@pytest.fixture
def done(overrides, imports) -> list[str]:
    words = [*overrides, "technique=zero_shot", "train_rows=16", "evaluate.test_rows=4", "evaluate.latency_rows=0"]
    assert train.main(words) == 0
    return words


def result_of(words: list[str]) -> Path:
    return identity.folder_of(compose(words)) / "result.json"


@pytest.mark.parametrize(("change", "said"), [
    ("evaluate.test_rows=5", "evaluate.test_rows 4 -> 5"), ("precision=bf16", "precision.name auto -> bf16"),
    ("+task.separator=x", "task.separator its default -> x"),
])
def test_another_cell_is_not_replaced(done, change, said, capsys):
    before = result_of(done).read_bytes()
    assert train.main([*done, change]) == 2
    error = capsys.readouterr().err
    assert f"holds another cell ({said}); add overwrite=true to replace it, or keep both with experiment=<another name>" in error
    assert result_of(done).read_bytes() == before
    assert train.main([*done, change, "overwrite=true"]) == 0 and result_of(done).read_bytes() != before


def test_another_task_or_model_is_not_replaced(done, tiny, tmp_path, capsys):
    shutil.copytree(tiny / "models/smollm2_135m", tmp_path / "models/other")
    assert train.main([*done, "model.name=other", f"paths.models={tmp_path}/models"]) == 2
    assert "holds another cell (model.name smollm2_135m -> other)" in capsys.readouterr().err
    shutil.copytree(tiny / "data/vader_movies", tmp_path / "data/vader_movies")
    path = tmp_path / "data/vader_movies/manifest.json"
    write_json(path, {**read_json(path), "changed": True})
    assert train.main([*done, f"paths.data={tmp_path}/data"]) == 2
    assert "holds another cell (other data)" in capsys.readouterr().err


def test_a_base_with_the_same_weights_is_the_same_wherever_it_came_from(done, tiny, tmp_path):
    """A lent machine made it from a local file; every cell of before counted as another one's and stopped the command."""
    shutil.copytree(tiny / "models", tmp_path / "models")
    path = tmp_path / "models/smollm2_135m/manifest.json"
    about = read_json(path)
    elsewhere = compose([*done, f"paths.models={tmp_path}/models"])
    write_json(path, {**about, "source": {"type": "local", "path": "elsewhere.gguf"}})
    assert grid.is_done(elsewhere)
    write_json(path, {**about, "sha256": "0" * 64})
    assert identity.standing(elsewhere)[1].inputs == ["model"]


def test_the_same_cell_is_run_again_and_elsewhere_is_the_same(done, tiny, tmp_path):
    assert train.main(done) == 0
    shutil.copytree(tiny / "data", tmp_path / "moved")
    assert grid.is_done(compose([*done, f"paths.data={tmp_path}/moved", "report.target=0.7"]))


@pytest.mark.parametrize("stale", ["run", "keep"])
def test_a_cell_of_older_code_is_named_and_run_again_or_kept(done, stale, capsys, monkeypatch):
    path = result_of(done)
    raw = read_json(path)
    raw["provenance"]["code"]["pipeline/engine/ops.py"] = "0" * 16
    write_json(path, raw)
    cfg = compose([*done, f"stale={stale}"])
    assert not grid.is_done(cfg), "what it measured is not what this code would"
    assert grid.to_run([cfg]) == ([cfg] if stale == "run" else [])
    saved = "they are kept (stale=keep)" if stale == "keep" else "they run again (stale=keep keeps them)"
    assert f"1 of 1 cells are of older code (pipeline/engine/ops.py): zero_shot-s0-n16; {saved}\n" == capsys.readouterr().out


def test_a_result_of_schema_1_is_of_older_code(done, capsys):
    path = result_of(done)
    raw = read_json(path)
    raw["schema"] = 1
    for key in ("identity", "inputs", "code"):
        raw["provenance"].pop(key)
    for key in ("kind", "start", "takes_rows", "labelled_rows", "shared_process"):
        raw.pop(key)
    write_json(path, raw)
    assert grid.to_run([compose(done)]) and "of older code (all)" in capsys.readouterr().out


def test_cells_refuse_before_anything_runs(overrides, tmp_path, capsys, monkeypatch):
    cell = [*overrides, "experiments=quick", "technique=zero_shot", "seed=0", "train_rows=160"]
    folder = identity.folder_of(compose(cell))
    shutil.copytree(ROOT / "tests/data/schema1/results/quick/zero_shot-s0-n32", folder)
    monkeypatch.setattr(grid, "run_cell", lambda *_: pytest.fail("nothing runs"))
    assert cells.main(["experiments=quick", *(w for w in cell if not w.startswith(("experiments", "technique", "seed", "train_rows")))]) == 2
    assert "holds another cell (" in capsys.readouterr().err


@pytest.mark.parametrize("held", [b"", b'{"schema": 2, "cell', b"\xff\xfe"])
def test_a_damaged_result_is_named_and_its_cell_runs_again(done, capsys, monkeypatch, held):
    path = result_of(done)
    path.write_bytes(held)
    monkeypatch.setattr(finished, "_named", set())
    capsys.readouterr()
    cfg = compose(done)
    assert grid.to_run([cfg]) == [cfg] and not grid.is_done(cfg)
    assert capsys.readouterr().err.count(f"warning: {path} is not ") == 1
    assert train.main(done) == 0 and grid.is_done(cfg)


# Adopting


def test_what_is_not_of_today_s_config_data_or_code_is_not_adopted(done):
    cfg = compose(done)
    identity.check_adoptable([cfg])
    with pytest.raises(UserError, match=r"1 cells have no result \(lora-s0-n16\); run python -m pipeline\.cells"):
        identity.check_adoptable([cfg, compose([*done, "technique=lora"])])
    with pytest.raises(UserError, match=r"1 results are not of today's cells \(zero_shot-s0-n16: evaluate\.test_rows 4 -> 5\)"):
        identity.check_adoptable([compose([*done, "evaluate.test_rows=5"])])
    path = result_of(done)
    raw = read_json(path)
    raw["provenance"]["code"]["pipeline/engine/ops.py"] = "0"
    raw["provenance"]["inputs"]["data"] = "0"
    write_json(path, raw)
    with pytest.raises(UserError, match=r"zero_shot-s0-n16: other data; older code \(pipeline/engine/ops\.py\)"):
        identity.check_adoptable([cfg])


def test_plan_adopts_the_grid_or_says_what_is_missing(tmp_path, capsys):
    assert plan.main(["experiments=quick", f"paths.plans={tmp_path}", f"paths.results={tmp_path}/results", "adopt=true"]) == 2
    assert "8 cells have no result (teacher-s0-n160, zero_shot-s0-n160, few_shot-s0-n160 and 5 more)" in capsys.readouterr().err
    assert not (tmp_path / "quick").exists()
    assert peft_configs.main([]) == 2

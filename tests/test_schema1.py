"""Results of the last schema go on being read: tests/data/schema1 holds cells as that version wrote them, over the tiny model of conftest.py."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cell import record
from pipeline.core import settings
from pipeline.core.compose import CONF, build, compose
from pipeline.core.files import UserError
from pipeline.records import results
from pipeline.records.finished import cell_config, select
from pipeline.reporting.page import page
from pipeline.reporting.rows import make_rows
from pipeline.reporting.text import markdown
from pipeline.search.study import numbers

OLD = Path(__file__).parent / "data" / "schema1" / "results" / "quick"
DIVERGED = OLD / "ln_tuning+diverged-s0-n32"
GRID = {"techniques": ["zero_shot", "few_shot", "teacher", "prompt_tuning", "lora", "ln_tuning"], "seeds": [0], "train_rows": [32]}

TUNING = {"file": "f", "searched": 1, "trials": 2, "device_s": 1.0, "validation": 0.5, "seed": 0}
SYNTHETIC = {"name": "n", "rows": 9, "share": 0.5, "teacher": "t", "seconds": None, "examples": 5}
GIVEN = {"peft_config": ["technique.path=tests/data/peft/lora/rank4/adapter_config.json"], "retrieval_documents": ["method.documents=docs"]}
"""What a user gives beside the technique's name."""


def read(tmp_path: Path, **changes: Any) -> results.Result:
    """The old LoRA cell, read with top-level fields changed."""
    raw = json.loads((OLD / "lora-s0-n32" / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(raw | changes))
    return results.read(tmp_path)


def test_facts_that_stood_in_notes_are_fields():
    old = {p.name.partition("-")[0]: results.read(p) for p in sorted(OLD.iterdir())}
    assert {name: (r.kind, r.labelled_rows, r.takes_rows, r.shared_process) for name, r in old.items()} == {
        "zero_shot": ("base", 0, False, True), "few_shot": ("untrained", 4, False, True), "teacher": ("teacher", 0, False, True),
        "prompt_tuning": ("trained", 38, True, True), "lora": ("trained", 38, True, True), "ln_tuning+diverged": ("trained", 38, True, False),
    }
    work = {name: r.work for name, r in old.items() if r.work}
    assert {name: (w.engine, w.engine_reason, w.widths, w.streams, w.diverged_at) for name, w in work.items()} == {
        **dict.fromkeys(["zero_shot", "few_shot", "teacher"], (None, None, None, False, None)),
        "prompt_tuning": ("eager", None, None, False, None), "lora": ("handwritten", None, [16], False, None),
        "ln_tuning+diverged": ("eager", "activations are checkpointed", None, False, 2),
    }
    assert all(r.schema == results.SCHEMA and r.start is None for r in old.values())
    assert [r.notes for r in old.values() if r.notes] == [["training diverged: the loss was not finite at step 2 of 8"]]


@pytest.mark.parametrize(("note", "expected"), [
    ("engine: autograd, because IA3 has no hand-written step, captured in CUDA graphs; widths 16, 64",
     ("captured", "IA3 has no hand-written step", [16, 64], False)),
    ("engine: hand-written step, captured in CUDA graphs; rows packed into streams of tokens 512", ("handwritten", None, [512], True)),
    ("engine: eager, because the capture failed (an error; with, marks)", ("eager", "the capture failed (an error; with, marks)", None, False)),
    ("trained by TRL's GRPO loop; tokens are those of prompts and sampled answers", ("trl", None, None, False)),
])
def test_every_old_sentence_about_the_engine(tmp_path, note, expected):
    work = read(tmp_path, notes=[note]).work
    assert work and (work.engine, work.engine_reason, work.widths, work.streams) == expected


def test_an_old_packed_cell_and_one_that_ran_out_of_memory(tmp_path):
    packed = read(tmp_path, notes=[], packed=True)
    assert packed.work and packed.work.engine == "handwritten"
    lost = read(tmp_path, status="oom", work=None)
    assert (lost.labelled_rows, lost.kind, lost.work) == (None, "trained", None)


@pytest.mark.parametrize(("changes", "labelled"), [
    ({"objective": "task_distillation", "hyperparameters": {"lr": 1.0, "labels_from": "validation"}}, 6),
    ({"objective": "none", "hyperparameters": {"calibration_rows": 64}}, 32), ({"objective": "none", "hyperparameters": {"calibration_rows": 8}}, 8),
    ({"objective": "none", "hyperparameters": {"calibration_rows": 8, "start": "full"}}, 38),
    ({"objective": "none", "hyperparameters": {"k": 4}, "tuning": TUNING}, 38),
    ({"synthetic": SYNTHETIC}, 43),
])
def test_labelled_rows_are_those_that_the_old_report_counted(tmp_path, changes, labelled):
    assert read(tmp_path, **changes).labelled_rows == labelled


@pytest.mark.parametrize("note", [
    "engine: eager; widths ,", f"engine: eager; widths {'9' * 5000}", f"training diverged: the loss was not finite at step {'9' * 5000} of 8",
])
def test_a_note_like_one_of_the_old_sentences_is_a_note(tmp_path, note):
    actual = read(tmp_path, notes=[note])
    assert actual.notes == [note] and actual.work and actual.work.widths is None and actual.work.diverged_at is None


def test_a_count_that_is_none_is_named(tmp_path):
    for key in ("k", "calibration_rows"):
        with pytest.raises(UserError, match=f"result.json: hyperparameters.{key} is 'many', not a whole number"):
            read(tmp_path, objective="none", hyperparameters={key: "many"})


NEWER = ("best_of_n", "reward_model", "reward_model_shuffled", "rlhf_", "sft_dpo", "on_policy_distillation", "step_by_step_prefixed")
"""Techniques of which no result has that schema, beside PEFT's further tuners (conf/technique/*.yaml, whose family line names experiments/tuners)."""


def _techniques() -> list[str]:
    every = {p.stem: p.read_text() for p in (CONF / "technique").glob("*.yaml")}
    return sorted(name for name, text in every.items() if not name.startswith(NEWER) and "experiments/tuners" not in text)


def _first_of_a_kind() -> list[Any]:
    """The others, of a class of method and objective that one before them has, are slow."""
    seen: set[tuple[str, ...]] = set()
    marked: list[Any] = []
    for name in _techniques():
        parts = re.findall(r"override /(method|objective): (\w+)", (CONF / f"technique/{name}.yaml").read_text())
        kind = tuple(re.findall(r"^type: (\w+)", "".join((CONF / group / f"{part}.yaml").read_text() for group, part in parts), re.M))
        marked.append(pytest.param(name, marks=pytest.mark.slow) if kind in seen else name)
        seen.add(kind)
    return marked


@pytest.mark.parametrize("name", _first_of_a_kind())
def test_methods_say_what_the_old_report_read_off_their_settings(name):
    """Of every technique: rows and kind as a new cell writes them are those that are made of an old one."""
    cfg = compose([f"technique={name}", "start=null", *GIVEN.get(name, [])])
    method, objective = build(cfg.method, "method"), build(cfg.objective, "objective")
    new = record.bare_result(cfg, status="ok", precision="fp32")
    raw = {**dataclasses.asdict(new), "train_rows": 200, "validation_rows": 40, "notes": [], "work": None}
    old = results._from_schema_1({k: v for k, v in raw.items() if k not in ("kind", "takes_rows", "labelled_rows", "start")}, Path("result.json"))
    assert (new.kind, new.takes_rows) == (old["kind"], old["takes_rows"])
    assert record.labelled_rows(method, objective, 200, 40, seen=False) == old["labelled_rows"]


def test_a_search_or_another_cell_has_seen_all_rows_and_a_taxonomy_s_examples_are_labelled():
    cfg = compose(["technique=few_shot"])
    method, objective = build(cfg.method, "method"), build(cfg.objective, "objective")
    parts: Any = SimpleNamespace(method=method, objective=objective, cfg=cfg)
    read: Any = SimpleNamespace(labelled=32, rows=SimpleNamespace(validation=[{}] * 6), synthetic=SimpleNamespace(examples=5))
    assert [record.labels_used(parts, read, tuned) for tuned in (False, True)] == [method.k + 5, 43]
    parts.cfg = SimpleNamespace(start="full")
    assert record.labels_used(parts, read, False) == 43
    unlabelled = compose(["technique=task_distillation"])
    parts = SimpleNamespace(method=build(unlabelled.method, "method"), objective=build(unlabelled.objective, "objective"), cfg=unlabelled)
    assert record.labels_used(parts, read, True) == 6 + 5, "no trial of its search has read a training row's label"


def test_a_report_over_old_results(tmp_path):
    shutil.copytree(OLD, tmp_path / "quick")
    cells, missing = select(tmp_path / "quick", GRID)
    rows = {r.technique: r for r in make_rows(cells)}
    assert missing == ["ln_tuning-s0-n32"] and [r.technique for r in rows.values() if r.teacher] == ["teacher"]
    assert (rows["lora"].engine, rows["lora"].diverged, rows["ln_tuning+diverged"].diverged) == ("handwritten", 0, 1)
    text, html = markdown("quick", list(rows.values()), missing), page("quick", list(rows.values()), missing)
    assert "- lora: engine: hand-written step\n" in text and "- ln_tuning+diverged: engine: eager, because activations are checkpointed\n" in text
    assert "hand-written step; widths 16" in html and "imports and base model were read once" not in text + html


def test_a_note_is_no_fact():
    output = results.read(DIVERGED)
    assert output.work and numbers(output)["diverged"] is True
    free = dataclasses.replace(output, status="ok", work=dataclasses.replace(output.work, diverged_at=None, engine="eager", engine_reason=None))
    assert free.notes and numbers(free)["diverged"] is False


def test_an_old_config_has_todays_keys(tmp_path):
    """What serves, evaluates or forecasts a finished cell composes its config again, and a key by its old name would be refused."""
    raw = json.loads((OLD / "lora-s0-n32" / "result.json").read_text())["config"]["train"]
    result = read(tmp_path, config={"train": {**raw, "packing": "never"}})
    assert result.config["train"]["padding_free"] == "never" and "packing" not in result.config["train"]
    assert settings.read(cell_config(results.read(OLD / "lora-s0-n32"), compose())).train.padding_free == "auto"


def test_an_old_result_that_is_written_again_stays_the_same(tmp_path):
    for path in sorted(OLD.iterdir()):
        results.write(tmp_path, results.read(path))
        assert results.read(tmp_path) == results.read(path)

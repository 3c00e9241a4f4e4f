"""A grid's variants, and tuning of chosen keys at one number of rows: which words, names and cells come of them."""

from __future__ import annotations

import pytest
from report_cells import result

from pipeline.cell import grid
from pipeline.core.compose import compose
from pipeline.core.files import UserError
from pipeline.records.finished import select
from pipeline.records.results import write
from pipeline.search import tuning as search_tuning
from pipeline.search.space import Space, at, declared

VARIANTS = {"techniques": ["zero_shot", "full+tuned"], "seeds": [0, 1], "train_rows": [40, 160],
            "variants": [{"technique": "lora+tuned", "variant": f"r{r}", "words": [f"method.config.r={r}"]} for r in (1, 2)]}


def test_a_grid_s_variants_come_after_its_techniques_and_are_tuned_and_run_with_their_words(monkeypatch):
    monkeypatch.setattr(grid, "grid", lambda name: {"grid": VARIANTS})
    first = grid.grid_overrides(["experiments=quick", "seed=0", "train_rows=40"])
    assert first[1:3] == [["experiments=quick", "technique=full+tuned", "seed=0", "train_rows=40"],
                          ["experiments=quick", "technique=lora+tuned", "variant=r1", "method.config.r=1", "seed=0", "train_rows=40"]]
    assert len(grid.grid_overrides(["experiments=quick"])) == 4 * 4
    assert grid.grid_overrides(["experiments=quick", "technique=lora", "variant=r2", "seed=0", "train_rows=40"]) == [
        ["experiments=quick", "technique=lora+tuned", "variant=r2", "method.config.r=2", "seed=0", "train_rows=40"]]
    assert grid.grid_overrides(["experiments=quick", "technique=lora", "seed=0", "train_rows=40"]) == [
        ["experiments=quick", "technique=lora", "seed=0", "train_rows=40"]], "a technique by itself is not its variants"
    assert grid.grid_overrides(["experiments=quick", "variant=x", "seed=0", "train_rows=40"])[0] == [
        "experiments=quick", "technique=zero_shot", "variant=x", "seed=0", "train_rows=40"]
    tunings = search_tuning.each_technique(compose(["experiments=quick", "tune.rows=160"]), ["experiments=quick"])
    assert tunings == [["experiments=quick", *entry, "seed=0", "train_rows=160"] for entry in (
        ["technique=zero_shot"], ["technique=full"], ["technique=lora", "variant=r1", "method.config.r=1"],
        ["technique=lora", "variant=r2", "method.config.r=2"])]
    actual = grid.grid_overrides(["experiments=quick", "tuned=true", "seed=0", "train_rows=40"])
    assert [words[3:5] for words in actual][1:] == [["variant=r1", "method.config.r=1"], ["variant=r2", "method.config.r=2"]]


def space(technique: str, only: str) -> Space:
    cfg = compose([f"technique={technique}", f"tune.only={only}"])
    return declared(at(cfg, {"train.lr": cfg.train.lr or cfg.train.reference_lr}))


def test_of_what_is_declared_tune_only_names_what_is_searched():
    assert list(space("step_by_step_lora", "[train.lr,objective.rationale_weight]").parameters) == ["train.lr", "objective.rationale_weight"]
    assert list(space("lora", "[method.config.r]").parameters) == ["method.config.r", "method.config.lora_alpha"], "what is linked comes along"
    assert space("few_shot", "[train.lr]").searched == {}
    with pytest.raises(UserError, match=r"tune.only is 'train.lr'; write a list"):
        space("lora", "train.lr")


def test_a_report_reads_variants_and_names_those_that_lack_a_cell(tmp_path):
    for label in ("lora+r1-tuned", "lora+r9-tuned", "dora+r1-tuned"):
        write(tmp_path / f"{label}-s0-n160", result(label.partition("+")[0], rows=160))
    axes = {**VARIANTS, "seeds": [0], "train_rows": [160]}
    cells, missing = select(tmp_path, axes)
    assert [cell.label for cell in cells] == ["lora+r1-tuned", "lora+r9-tuned"], "any variant of the grid's techniques comes along"
    assert missing == ["zero_shot-s0-n160", "full+tuned-s0-n160", "lora+r2-tuned-s0-n160"]

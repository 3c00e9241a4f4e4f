"""Cells that begin at another one: which cell a word means, and that training goes on from exactly what that cell serves."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.cell import identity, inputs, packing
from pipeline.cell import run as cell_run
from pipeline.cell.identity import fingerprint
from pipeline.core.compose import compose
from pipeline.core.files import UserError, read_jsonl
from pipeline.engine.parts import Unsupported
from pipeline.records import results
from pipeline.records.finished import cell_at, name, needed
from pipeline.records.results import write
from pipeline.serving import artefact as evaluate

SHORT = ["train.epochs=2", "train.batch_size=8", "train.validations=0", "train_rows=64", "experiment=mine"]


def run(overrides: list[str], *more: str) -> results.Result:
    cfg = compose([*overrides, *SHORT, *more])
    return cell_run.run(cfg, folder=identity.folder_of(cfg))


def test_a_word_is_a_technique_or_a_folder(overrides, tmp_path):
    cfg = compose([*overrides, "experiment=mine", "technique=lora", "seed=3", "variant=best"])
    assert name(cfg) == "lora+best-s3-nall" and name(cfg, "full") == "full-s3-nall"
    assert cell_at("full", cfg) == tmp_path / "results/mine/full-s3-nall"
    assert cell_at("elsewhere/full-s0-n8", cfg).as_posix() == "elsewhere/full-s0-n8"
    with pytest.raises(UserError, match="start=full, but .*full-s3-nall holds no finished cell; run it first: .*technique=full seed=3 train_rows=null"):
        needed("full", cfg, "start")
    with pytest.raises(UserError, match="run that cell first"):
        needed("elsewhere/full-s0-n8", cfg, "start")
    with pytest.raises(UserError, match="is this very cell"):
        needed("full", compose([*overrides, "experiment=mine", "technique=full"]), "start")


def test_a_cell_begins_at_what_another_one_serves(overrides, tmp_path):
    """Full from LoRA without a step: the same answers; LoRA from that: its artefact serves with the start, the fingerprint knows both."""
    lora = run(overrides, "technique=lora", "train.lr=1e-2")
    same = run(overrides, "technique=full", "start=lora", "train.steps=0")
    assert same.test.nll == pytest.approx(lora.test.nll, abs=1e-5) and same.hyperparameters["start"] == "lora"
    assert any("begins at mine/lora-s0-n64, whose" in note for note in same.notes)
    more = compose([*overrides, *SHORT, "technique=lora", "variant=more", f"start={tmp_path}/results/mine/full-s0-n64", "train.lr=1e-2"])
    actual = cell_run.run(more, folder=identity.folder_of(more))
    assert actual.history[0]["loss"] < lora.history[0]["loss"] and actual.size.trainable == lora.size.trainable
    again, score = evaluate.score_artefact(more, identity.folder_of(more) / "artefact", "test")
    assert [p["prediction"] for p in again] == [p["prediction"] for p in read_jsonl(identity.folder_of(more) / "predictions.jsonl") if p["split"] == "test"]
    assert score.nll == pytest.approx(actual.test.nll, abs=1e-5)
    before = fingerprint(more)
    write(tmp_path / "results/mine/full-s0-n64", dataclasses.replace(same, phases=None))
    assert fingerprint(more) == before, "a second run of it that took another time is the same"
    (tmp_path / "results/mine/full-s0-n64/predictions.jsonl").write_text("{}")
    assert fingerprint(more) != before
    with pytest.raises(Unsupported, match="begins at another cell"):
        packing.Packing([more], inputs.Shared())


@pytest.mark.parametrize(("technique", "more"), [("few_shot", ["method.k=2"]), ("prompt_tuning", ["train.steps=1"])])
def test_what_leaves_no_weights_is_no_start(overrides, technique, more):
    run(overrides, f"technique={technique}", *more)
    with pytest.raises(UserError, match=f"start={technique} is a cell of {technique}, which leaves no weights"):
        run(overrides, "technique=full", f"start={technique}")


def test_a_quantised_base_has_no_start(overrides):
    with pytest.raises(UserError, match="start=full begins at that cell's plain weights, and nf4 ones are rounded"):
        run(overrides, "technique=qlora", "start=full")


def test_without_a_start_the_fingerprint_is_as_it_was(overrides):
    cfg = compose([*overrides, "technique=lora"])
    assert "start" not in identity.decides(cfg)
    assert identity.decides(compose([*overrides, "technique=lora", "start=full"]))["start"] == "full"

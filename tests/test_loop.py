"""The training loop: exact resume, schedule, accumulation, divergence."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest
import torch

from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import ROOT, compose
from pipeline.core.settings import Train
from pipeline.records.finished import name as cell_name
from pipeline.records.results import read
from pipeline.training.loop import lr_factor, total_steps
from pipeline.training.stepping import Eager

DROPOUT = ["technique=lora", "method.config.lora_dropout=0.1", "train.epochs=3", "train.batch_size=8", "train.checkpoint_every_s=0", "train.lr=1e-2"]
RELATIVE = ["technique=prefix_tuning", "method.relative=true", *DROPOUT[2:]]


def weights(folder: Path) -> bytes:
    return (folder / "artefact" / "adapter_model.safetensors").read_bytes()


def stamps(folder: Path) -> list[int]:
    """When the checkpoints below were written, nanoseconds."""
    return [p.stat().st_mtime_ns for p in folder.rglob("*.pt")]


def finished(cfg, folder: Path) -> bytes:
    assert cell_run.run(cfg, folder=folder).status == "ok"
    return weights(folder)


@pytest.mark.parametrize(("words", "stop_at"), [(DROPOUT, 13), (RELATIVE, 13), *(pytest.param(DROPOUT, n, marks=pytest.mark.slow) for n in (1, 23))])
def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(overrides, tmp_path, monkeypatch, words, stop_at):
    """SIGTERM after some step of 24, with validations in between, and dropout drawing random numbers or weights over a size that is computed again: bitwise
    equal."""
    cfg = compose([*overrides, *words, "train.validations=3"])
    whole = finished(cfg, tmp_path / "whole")
    step = Eager.step

    def stopping(self, number, factor):
        if number + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, factor)

    monkeypatch.setattr(Eager, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        cell_run.run(cfg, folder=tmp_path / "parted")
    assert not (tmp_path / "parted" / "result.json").exists()
    monkeypatch.setattr(Eager, "step", step)
    assert finished(cfg, tmp_path / "parted") == whole
    result = read(tmp_path / "parted")
    assert result.work.resumed and len(result.history) == 24
    assert result.history == read(tmp_path / "whole").history


@pytest.mark.parametrize("damage", [lambda held: held[: len(held) // 2], lambda held: b"", lambda held: bytes(len(held)), lambda held: held[:3]],
                         ids=["truncated", "empty", "zeros", "three bytes"])
def test_a_damaged_checkpoint_is_set_aside_and_the_training_begins_anew(overrides, tmp_path, capsys, damage):
    cfg = compose([*overrides, *DROPOUT, "train.steps=3", "train.validations=1"])
    whole = finished(cfg, tmp_path / "whole")
    path = identity.checkpoint_of(cfg)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weights": torch.zeros(2000)}, path)
    path.write_bytes(damage(path.read_bytes()))
    capsys.readouterr()
    assert finished(cfg, tmp_path / "again") == whole
    [warning] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert f"{path} is damaged (" in warning and "begins anew" in warning
    assert [p.name for p in path.parent.iterdir()] == [f"{path.name}.damaged"] and not read(tmp_path / "again").work.resumed


@pytest.mark.slow
def test_a_killed_process_goes_on_and_ends_alike(overrides, tmp_path):
    """SIGKILL to a real `python -m pipeline.train`, twice, then once to the end: the weights of an undisturbed run."""
    cfg = compose([*overrides, *DROPOUT, "experiment=kill"])
    whole = finished(cfg, tmp_path / "whole")
    command = [sys.executable, "-m", "pipeline.train", *overrides, *DROPOUT, "experiment=kill"]
    for _ in range(2):
        before = stamps(tmp_path)
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        while process.poll() is None and stamps(tmp_path) == before:
            threading.Event().wait(0.005)
        assert process.poll() is None, "the run ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (Path(cfg.paths.results) / "kill" / cell_name(cfg) / "result.json").exists()
    subprocess.run(command, cwd=ROOT, check=True)
    assert weights(Path(cfg.paths.results) / "kill" / cell_name(cfg)) == whole


def test_accumulation_does_not_change_the_step(overrides, tmp_path):
    """The same run in one micro-batch a step and in many: equal losses up to the order of fp32 sums."""
    losses = []
    for tokens in (4096, 16):
        result = cell_run.run(compose([*overrides, "technique=step_by_step", "train.lr=1e-3", "train.steps=6", f"train.micro_batch_tokens={tokens}"]))
        losses.append([h["loss"] for h in result.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != losses[1], "micro-batching took no effect"


def test_schedule_known_answers():
    assert [lr_factor(s, 10, "linear", 0.2) for s in (0, 1, 2, 6)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])
    assert lr_factor(6, 10, "cosine", 0.2) == pytest.approx(0.5)
    assert lr_factor(9, 10, "constant", 0.0) == 1.0


def test_a_diverged_run_says_so(overrides, tmp_path):
    """Nothing of it can be scored, which is a result: every row wrong, no figure made up, the files written."""
    wild = ["technique=full", "train.lr=1e30", "train.steps=12", "train.max_grad_norm=1e30", "train.warmup_share=0", "train.validations=0"]
    result = cell_run.run(compose([*overrides, *wild]), folder=tmp_path / "cell")
    assert result.work.diverged_at == result.work.steps < 12
    assert f"training diverged: the loss was not finite at step {result.work.steps} of 12" in result.notes
    assert read(tmp_path / "cell").test.unanswered == 48 and result.test.accuracy == 0 and result.test.nll is None
    assert read(tmp_path / "cell") == result and (result.status, result.error) == ("diverged", f"training diverged at step {result.work.steps}")
    assert [p.name for p in (tmp_path / "cell" / "artefact").iterdir()] == ["artefact.json"] and result.size.artefact_bytes == 0


PROBED = ["evaluate.forgetting=true", "evaluate.probe_texts=5", "evaluate.probe_pairs=20"]


@pytest.mark.parametrize("technique", ["full", "lora"])
def test_what_a_diverged_model_forgot_was_not_measured(overrides, tmp_path, technique):
    lambada = tmp_path / "lambada.jsonl"
    lambada.write_text('{"text": "the cast of the film was fine"}\n')
    wild = [*PROBED, "evaluate.probe_lambada=1", f"paths.lambada={lambada}", "train.lr=1e30", "train.steps=8", "train.warmup_share=0", "train.validations=2"]
    result = cell_run.run(compose([*overrides, f"technique={technique}", *wild]), folder=tmp_path / "cell")
    assert read(tmp_path / "cell") == result and result.status == "diverged"
    assert (result.forgetting.perplexity, result.forgetting.pairs, result.forgetting.lambada) == (None, None, None)
    assert result.forgetting.perplexity_base > 0


@pytest.mark.parametrize("scoring", ["choice", "generate"])
def test_divergence_in_the_last_step_is_told_and_no_figure_is_made_up(overrides, tmp_path, scoring):
    wild = ["technique=lora", f"task.scoring={scoring}", "train.lr=1e30", "train.steps=1", "train.warmup_share=0", "train.validations=1"]
    result = cell_run.run(compose([*overrides, *wild]), folder=tmp_path / "cell")
    assert read(tmp_path / "cell") == result and result.status == "diverged" and result.error
    assert result.history[0]["validation_nll"] is None and (tmp_path / "cell" / "history.csv").read_text().endswith(",\n")


def test_weights_that_are_not_finite_after_the_last_step_are_a_divergence(overrides, monkeypatch):
    step = Eager.step

    def poisoned(self, number, factor):
        taken = step(self, number, factor)
        with torch.no_grad():
            self.trained[0].fill_(math.nan)
        return taken

    monkeypatch.setattr(Eager, "step", poisoned)
    result = cell_run.run(compose([*overrides, "technique=full", "train.steps=1", "train.validations=0"]))
    assert result.status == "diverged" and result.work.diverged_at == 1
    assert "training diverged: the weights were not finite after step 1 of 1" in result.notes


@pytest.mark.parametrize("scoring", ["choice", "generate"])
def test_a_model_that_is_no_better_than_a_uniform_guess_is_noted(overrides, scoring):
    words = [*overrides, "technique=full", f"task.scoring={scoring}", "train.steps=4", "train.warmup_share=0", "train.validations=0"]
    sentence = "no more than a uniform guess over its vocabulary"
    ruined = cell_run.run(compose([*words, "train.lr=1e6"]))
    assert ruined.status == "ok" and any(sentence in note for note in ruined.notes)
    assert not any(sentence in note for note in cell_run.run(compose([*words, "train.lr=3e-3"])).notes)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_without_a_limit_the_gradients_are_as_they_are(overrides, tmp_path, engine):
    """inf trains as a limit that is never reached, other than one that is, and its result is written."""
    def losses(limit: str) -> list[float]:
        cfg = compose([*overrides, "technique=lora", "train.steps=4", f"train.engine={engine}", f"train.max_grad_norm={limit}", f"seed={2**63 - 1}"])
        return [h["loss"] for h in cell_run.run(cfg, folder=tmp_path / limit).history]

    assert losses("inf") == losses("null") == losses("1e9") != losses("1e-3")
    assert read(tmp_path / "inf").config["train"]["max_grad_norm"] is None


def test_same_seed_same_weights_other_seed_others(overrides, tmp_path):
    def trained(seed: int, where: str) -> bytes:
        return finished(compose([*overrides, "technique=lora", "train.steps=3", f"seed={seed}"]), tmp_path / where)

    assert trained(1, "a") == trained(1, "b") != trained(2, "c")


@pytest.mark.parametrize(
    ("rows", "steps"),
    [(16, {}), (16, {"min_steps": 60}), (320, {"min_steps": 60}), (1600, {"min_steps": 60})],
)
def test_few_rows_are_gone_through_until_there_are_enough_steps(rows, steps):
    expected = {(16, 1): 3, (16, 60): 60, (320, 60): 60, (1600, 60): 300}[rows, steps.get("min_steps", 1)]
    common = {"lr": 1e-3, "batch_size": 16, "micro_batch_tokens": 64, **steps}
    assert total_steps(Train(**common, epochs=3), rows) == expected
    assert total_steps(Train(**common, epochs=3, steps=5), rows) == 5 and total_steps(Train(**common, epochs=0), rows) == 0


def test_an_unset_floor_of_steps_leaves_the_cells_that_were_run_done():
    plain, floor = compose(["technique=lora"]), compose(["technique=lora", "train.min_steps=60"])
    assert "min_steps" not in identity.decides(plain)["train"] and identity.decides(floor)["train"]["min_steps"] == 60


def test_a_cell_s_backward_pass_is_four_calls_away(overrides, monkeypatch):
    """run, train, Loop.train, Eager.step (CONTRIBUTING.md); what only forwards a call shows here."""
    calls: list[list[str]] = []
    backward = torch.Tensor.backward

    def looking(self: torch.Tensor) -> None:
        calls.append([f"{Path(f.filename).stem}.{f.name}" for f in traceback.extract_stack() if "pipeline" in Path(f.filename).parts])
        backward(self)

    monkeypatch.setattr(torch.Tensor, "backward", looking)
    cell_run.run(compose([*overrides, "technique=lora", "train.steps=1"]), splits=())
    assert calls[0] == ["run.run", "run.train", "loop.train", "stepping.step"]

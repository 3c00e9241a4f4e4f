"""AdaLoRA: the budget of ranks, its penalty, and runs that are short or stopped."""

from __future__ import annotations

import signal

import pytest
import torch

from pipeline.cell import run as cell_run
from pipeline.core.compose import build, compose
from pipeline.core.files import read_json
from pipeline.core.settings import Precision
from pipeline.models.base import load_model

MODULES = 14  # linear layers of conftest's tiny Llama
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def test_adalora_ends_at_its_budget_of_ranks(overrides, tmp_path):
    cfg = compose([*overrides, "technique=adalora", "train.lr=3e-2", "train.epochs=6", "train.batch_size=8", "train.validations=0"])
    cell_run.run(cfg, folder=tmp_path / "cell")
    ranks = read_json(tmp_path / "cell" / "artefact" / "adapter_config.json")["rank_pattern"]
    counts = [sum(saved) for saved in ranks.values()]
    assert len(counts) == MODULES and sum(counts) == 8 * MODULES and len(set(counts)) > 1
    assert all(len(saved) == 12 for saved in ranks.values())


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_adalora_of_few_steps_still_comes_to_its_budget(overrides, tmp_path, steps):
    cell_run.run(compose([*overrides, "technique=adalora", f"train.steps={steps}", "train.validations=0"]), folder=tmp_path / "cell")
    ranks = read_json(tmp_path / "cell" / "artefact" / "adapter_config.json")["rank_pattern"]
    assert sum(sum(saved) for saved in ranks.values()) <= 8 * MODULES


@pytest.mark.slow
def test_adalora_goes_on_from_a_checkpoint(overrides, tmp_path, monkeypatch):
    """Stopped before, at and after the step that fixes the ranks (step 7 of 10)."""
    from pipeline.training.stepping import Eager

    step = Eager.step
    for stop_at in (5, 6, 8):
        cfg = compose([*overrides, "technique=adalora", "train.steps=10", "train.checkpoint_every_s=0", "train.validations=0"])

        def stopping(self, number, factor, stop_at=stop_at):
            if number + 1 == stop_at:
                signal.raise_signal(signal.SIGTERM)
            return step(self, number, factor)

        monkeypatch.setattr(Eager, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            cell_run.run(cfg, folder=tmp_path / str(stop_at))
        monkeypatch.setattr(Eager, "step", step)
        assert cell_run.run(cfg, folder=tmp_path / str(stop_at)).work.resumed


def test_adalora_s_penalty_is_peft_s_and_comes_once_a_step(tiny):
    made = build(compose(["technique=adalora"]).method, "method")
    model = made.wrap(load_model(tiny / "models" / "smollm2_135m", Precision("fp32"), torch.device("cpu")))
    model.train()
    labelled = model(input_ids=IDS, labels=IDS)
    bare = torch.nn.functional.cross_entropy(labelled.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert float(made.penalty(model)) == pytest.approx(float(labelled.loss - bare), rel=1e-4)
    made.before_training(model, 10)
    for _ in range(3):  # micro-batches of one step
        model(input_ids=IDS)
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    made.penalty(model).backward()
    assert got and all(torch.equal(p.grad, got[n]) for n, p in model.named_parameters() if p.grad is not None)

"""Packed runs against single runs, on the CPU: the same losses, weights and answers; no slot reaches another."""

from __future__ import annotations

import pytest

from pipeline.cell import inputs
from pipeline.cell import run as cell_run
from pipeline.cell.packing import Packing
from pipeline.core.compose import compose
from pipeline.records.finished import name as cell_name
from pipeline.search.space import at

SHORT = ["technique=lora", "precision=fp32", "train.batch_size=8", "train_rows=48", "train.epochs=2", "train.validations=2"]
R, ALPHA, LR = "method.config.r", "method.config.lora_alpha", "train.lr"


def pack(cfgs, slots, keep=False, **options):
    """What every config's run left, in their order."""
    packing = Packing(cfgs, inputs.Shared())
    jobs = [packing.job(cfg, number) for number, cfg in enumerate(cfgs)]
    ended = {}

    def take(free):
        taken, jobs[:] = jobs[:free], jobs[free:]
        return taken

    opened = packing.open(slots, len(cfgs), keep=keep, **options)
    opened.run(take, lambda run: ended.__setitem__(run.job.name.tag, run))
    opened.close()
    return [ended[number] for number in range(len(cfgs))]


def alone(cfg, tmp_path, engine="eager"):
    """(result, validation predictions) of the same run as a cell of its own."""
    import json

    result = cell_run.run(at(cfg, {"train.engine": engine}), splits=("validation",), folder=tmp_path / f"{engine}-{cell_name(cfg)}")
    lines = (tmp_path / f"{engine}-{cell_name(cfg)}" / "predictions.jsonl").read_text().splitlines()
    return result, [json.loads(line) for line in lines]


def same(run, solo, predictions):
    assert [h["loss"] for h in run.history[:20]] == pytest.approx([h["loss"] for h in solo.history[:20]], rel=1e-4)
    assert [h["lr"] for h in run.history] == [h["lr"] for h in solo.history]
    score, mine = run.scores
    agreed = sum(a["prediction"] == b["prediction"] and a["id"] == b["id"] for a, b in zip(mine, predictions, strict=True))
    assert agreed >= 0.995 * len(predictions)
    assert score.nll == pytest.approx(solo.scores["validation"].nll, rel=1e-3)
    assert run.tokens == solo.work.tokens and run.step == solo.work.steps


def settings(*points):
    return [dict(zip((R, ALPHA, LR, "seed"), point, strict=False)) for point in points]


def test_runs_of_different_ranks_seeds_rates_lengths_and_modules_equal_their_solo_cells(overrides, tmp_path):
    """Five runs in three slots: two of them take a slot that another has left."""
    base = compose([*overrides, *SHORT])
    points = settings((2, 4, 1e-2, 0), (4, 16, 2e-2, 1), (8, 8, 5e-3, 2), (4, 8, 1e-2, 0), (1, 2, 3e-2, 3))
    points[1] |= {"train.schedule": "linear", "train.steps": 7, "train.batch_size": 5, "variant": "b"}
    points[2] |= {"method.config.target_modules": r".*layers\.1\..*(q|v|down)_proj", "train.weight_decay": 0.1, "train.max_grad_norm": 0.1, "variant": "c"}
    points[3] |= {"train_rows": 32, "train.validations": 0, "method.config.use_rslora": True, "variant": "d"}
    cfgs = [at(base, point) for point in points]
    for cfg, run in zip(cfgs, pack(cfgs, 3), strict=True):
        same(run, *alone(cfg, tmp_path))
    same(pack(cfgs[:1], 1)[0], *alone(cfgs[0], tmp_path, "fast"))


@pytest.mark.parametrize("technique", ["lora", "prompt_tuning"])
def test_choices_under_several_adapters_score_as_under_each_alone(overrides, technique):
    import torch
    from scoring_models import CPU, items_of

    from pipeline.scoring.scorer import choice_log_likelihoods

    base = compose([*overrides, *SHORT, f"technique={technique}"])
    cfgs = [at(base, {LR: 1e-2, "seed": seed}) for seed in range(3)]
    packing = Packing(cfgs, inputs.Shared())
    opened = packing.open(3, 3)
    opened._fill(lambda _: [packing.job(cfg) for cfg in cfgs])
    opened.bound.buffer.master.add_(0.1 * torch.randn(opened.bound.buffer.master.shape, generator=torch.Generator().manual_seed(7)))
    opened.bound.buffer.sync()
    running, items = list(opened.active.values()), items_of(12)
    weights = [opened.adapters.take(run.slot, run.init.weights) for run in running]
    scores = {(chosen, tokens): opened.choice_log_likelihoods([running[i] for i in chosen], items, tokens)
             for chosen in ((0, 1, 2), (2, 0), (1,)) for tokens in (1, 300, 9999)}
    opened.close()
    expected = []
    for run, adapter in zip(running, weights, strict=True):
        with packing.initializer.wrapped(run.job.name.method, adapter) as model:
            expected.append(choice_log_likelihoods(model, items, 512, packing.encoder.pad_id, CPU, torch.float32))
    assert expected[0][0] != pytest.approx(expected[1][0], abs=1e-2)
    for (chosen, _), mine in scores.items():
        for i, values in zip(chosen, mine, strict=True):
            for one, other in zip(values, expected[i], strict=True):
                assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("more", "points"), [
    (["technique=prompt_tuning"], [{LR: 3e-2}, {LR: 1e-2, "seed": 1}]),
    (["technique=qlora", "precision=nf4"], settings((4, 8, 1e-2, 0), (2, 4, 2e-2, 1))),
    (["train.micro_batch_tokens=40"], settings((4, 8, 1e-2, 0), (2, 4, 2e-2, 1))),
    (["technique=step_by_step", "method=lora"], settings((4, 8, 1e-2, 0), (2, 4, 2e-2, 1))),
    (["task.scoring=generate", "+task.max_new_tokens=3"], settings((4, 8, 1e-2, 0), (2, 4, 2e-2, 1))),
    (["+method.config.init_lora_weights=gaussian"], settings((4, 8, 1e-2, 0), (2, 4, 2e-2, 1))),
])
def test_kinds_of_runs(overrides, tmp_path, more, points):
    base = compose([*overrides, *SHORT, "train.epochs=1", *more])
    cfgs = [at(base, point) for point in points]
    for cfg, run in zip(cfgs, pack(cfgs, 2), strict=True):
        solo, predictions = alone(cfg, tmp_path)
        if base.task.scoring == "generate":
            assert [p["output"] for p in run.scores[1]] == [p["output"] for p in predictions]
            continue
        same(run, solo, predictions)


@pytest.mark.slow
def test_dropout_is_the_runs_own(overrides, tmp_path):
    base = compose([*overrides, *SHORT, "train.epochs=1"])
    cfgs = [at(base, {LR: 1e-2, "seed": seed, "method.config.lora_dropout": p}) for seed, p in ((0, 0.3), (1, 0.0), (1, 0.3))]
    for cfg, run in zip(cfgs, pack(cfgs, 3), strict=True):
        same(run, *alone(cfg, tmp_path, "fast"))


def bitwise(one, other):
    import torch

    assert one.history == other.history
    assert one.weights and all(torch.equal(w, other.weights[n]) for n, w in one.weights.items())


def test_a_run_that_diverges_leaves_its_neighbours_as_they_are(overrides):
    base = compose([*overrides, *SHORT])
    calm, wild = ([at(base, {R: 4, LR: lr, "seed": seed}) for seed, lr in enumerate((1e-2, rate, 2e-2))] for rate in (1e-2, 1e38))
    plain, disturbed = pack(calm, 3, keep=True), pack(wild, 3, keep=True)
    bitwise(plain[0], disturbed[0])
    bitwise(plain[2], disturbed[2])
    assert disturbed[1].diverged_at and "diverged" in disturbed[1].notes[0] and disturbed[1].step < plain[1].step


def test_who_leaves_and_who_follows_leave_the_neighbours_as_they_are(overrides, tmp_path):
    base = compose([*overrides, *SHORT])
    first, short, next_, other = (at(base, {R: r, LR: 1e-2, "seed": seed, "train.steps": steps})
                                  for seed, (r, steps) in enumerate(((4, 12), (2, 3), (8, 5), (8, 12))))
    changing, steady = pack([first, short, next_], 2, keep=True), pack([first, other], 2, keep=True)
    bitwise(changing[0], steady[0])
    same(changing[2], *alone(next_, tmp_path))
    assert pack([first, short, next_], 2, keep=True)[2].history == changing[2].history


def test_what_cannot_be_packed_is_said(overrides):
    from pipeline.engine.parts import Unsupported

    def reason(more, *points):
        base = compose([*overrides, *SHORT, *more])
        with pytest.raises(Unsupported) as caught:
            packing = Packing([at(base, point) for point in points or [{}]], inputs.Shared())
            packing.open(2, 2)
        return str(caught.value)

    assert "use_dora" in reason(["method.config.use_dora=true"])
    assert "differ in train.optimizer" in reason([], {"train.optimizer": "adamw"}, {"train.optimizer": "paged_adamw"})
    assert "trains the base itself" in reason(["technique=full"])
    assert "served" in reason(["method.merge=true"])
    assert "optimizer groups" in reason(["technique=lora_plus"])
    assert "trains nothing" in reason(["technique=zero_shot"])
    assert "pissa changes the base" in reason(["technique=pissa"])


def test_open_shapes_hold_whatever_rows_come():
    import random

    import torch

    from pipeline.data.rows import Encoded
    from pipeline.engine.layout import OpenShapes, labels
    from pipeline.engine.steps import Static

    draw = random.Random(1)
    rows = []
    for _ in range(40):
        n = draw.randint(3, 50)
        rows.append([Encoded(tuple(range(n)), draw.randint(1, n - 1), group) for group in ("label", "rationale")[: draw.randint(1, 2)]])
    shapes = OpenShapes(rows, 3, 6, 256, 3)
    assert len(shapes.widths) == 3 and shapes.accumulates
    for _ in range(50):
        parts = [[e for row in draw.sample(rows, draw.randint(0, 6)) for e in row] for _ in range(3)]
        fed = [0, 0, 0]
        for micro in shapes.micro_batches(parts):
            static = Static(micro.shape, 3, 0, 0, torch.device("cpu"))
            static.fill(micro)
            for slot, (examples, _) in enumerate(micro.parts):
                fed[slot] += len(examples)
                assert (static.weights[slot * micro.shape.labels : (slot + 1) * micro.shape.labels] > 0).sum() == sum(map(labels, examples))
        assert fed == [len(part) for part in parts]
    assert OpenShapes([[Encoded(tuple(range(9)), 1)]] * 4, 2, 4, 1000, 2).all()[0].dense


def test_a_failed_capture_is_a_reason_and_lack_of_memory_is_not(overrides, monkeypatch):
    from pipeline.engine.parts import Unsupported
    from pipeline.engine.steps import Stepper

    def failing(message):
        def warm(self):
            raise RuntimeError(message)

        return warm

    cfg = compose([*overrides, *SHORT])
    monkeypatch.setattr(Stepper, "warm", failing("operation not permitted when stream is capturing\nmore"))
    with pytest.raises(Unsupported, match=r"the capture failed \(operation not permitted when stream is capturing\)"):
        pack([cfg], 1)
    monkeypatch.setattr(Stepper, "warm", failing("CUDA out of memory. Tried"))
    with pytest.raises(RuntimeError, match="out of memory"):
        pack([cfg], 1)

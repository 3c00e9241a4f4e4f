"""One training over several ranks (train.parallel), on the CPU with gloo: the losses and weights of one process, resume on another number, failures."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from pipeline import train
from pipeline.cell import identity, launch
from pipeline.cell.inputs import check_ahead
from pipeline.core.compose import ROOT, compose
from pipeline.core.files import UserError
from pipeline.core.settings import Train
from pipeline.data.rows import Encoded, step_batches
from pipeline.fan import run as fan
from pipeline.fan.jobs import Ray
from pipeline.records.results import read
from pipeline.training.checkpoint import shards_of
from pipeline.training.ranks import Ranks
from pipeline.training.stepping import Eager, Fast

SHORT = ["train.epochs=1", "train.batch_size=6", "train_rows=32", "train.validations=2", "precision=fp32", "evaluate.latency_rows=0"]
DDP, FSDP = (["train.parallel=ddp", "train.gpus=2"], ["train.parallel=fsdp", "train.gpus=2"])
LORA, FULL = ["technique=lora", "train.lr=1e-2"], ["technique=full", "train.lr=1e-3"]
WIDE = [*FULL, "train.batch_size=8", "train_rows=48"]
"""As many rows in a step as there are ranks at most."""
pytestmark = pytest.mark.usefixtures("imports")


def trained(overrides, name, *more):
    """The result of a cell that `pipeline.train` ran, and its weights."""
    words = [*overrides, *SHORT, *more, f"experiment={name}"]
    assert train.main(words) == 0
    folder = identity.folder_of(compose(words))
    files = sorted((folder / "artefact").glob("*.safetensors"))
    return read(folder), {key: value for file in files for key, value in load_file(file).items()}


def same(one, other, rtol=1e-3):
    assert [h["loss"] for h in one[0].history] == pytest.approx([h["loss"] for h in other[0].history], rel=1e-4)
    assert one[1].keys() == other[1].keys() and one[1]
    for name, weight in one[1].items():
        torch.testing.assert_close(weight, other[1][name], rtol=rtol, atol=1e-4)
    assert one[0].work.tokens == other[0].work.tokens and one[0].work.steps == other[0].work.steps
    assert one[0].scores["test"].nll == pytest.approx(other[0].scores["test"].nll, rel=1e-3)


@pytest.mark.parametrize(("technique", "way"), [
    ([*LORA, "train.engine=fast"], DDP),
    (FULL, FSDP),
    pytest.param([*LORA, "train.engine=fast", "train.padding_free=always", "train.micro_batch_tokens=40", "train.weight_decay=0.1"], DDP,
                 marks=pytest.mark.slow),
    pytest.param([*LORA, "train.engine=eager"], DDP, marks=pytest.mark.slow),
    pytest.param([*LORA, "train.engine=fast", "method.config.use_dora=true"], DDP, marks=pytest.mark.slow),
    pytest.param([*FULL, "train.engine=fast"], DDP, marks=pytest.mark.slow),
    pytest.param([*FULL, "train.engine=fast", "train.micro_batch_tokens=40", "train.weight_decay=0.1"], DDP, marks=pytest.mark.slow),
    pytest.param([*FULL, "train.engine=eager"], DDP, marks=pytest.mark.slow),
    pytest.param(["technique=qlora", "precision=nf4", "train.lr=1e-2", "train.engine=fast"], DDP, marks=pytest.mark.slow),
    pytest.param(["technique=qlora", "precision=nf4", "train.lr=1e-2", "train.engine=eager"], DDP, marks=pytest.mark.slow),
    pytest.param(["technique=prompt_tuning", "train.lr=1e-2", "train.engine=fast"], DDP, marks=pytest.mark.slow),
    pytest.param(["technique=prompt_tuning", "train.lr=1e-2", "train.engine=eager"], DDP, marks=pytest.mark.slow),
    pytest.param(["technique=step_by_step", "train.lr=1e-3"], FSDP, marks=pytest.mark.slow),
    pytest.param([*FULL, "train.micro_batch_tokens=24", "train.checkpointing=true"], FSDP, marks=pytest.mark.slow),
])
def test_two_ranks_train_what_one_process_does(overrides, technique, way):
    one, two = trained(overrides, "one", *technique), trained(overrides, "two", *technique, *way)
    same(one, two)
    work, shared = two[0].work, two[0].work.parallel
    assert [f"train.parallel={shared.way}", f"train.gpus={shared.gpus}"] == way and len(shared.peak_bytes) == 2
    assert shared.tokens_per_s == pytest.approx(work.tokens_per_s / 2)
    assert (one[0].work.engine, one[0].work.engine_reason) == (work.engine, work.engine_reason)
    assert one[0].work.parallel is None and two[0].memory.peak_bytes == max(shared.peak_bytes)


@pytest.mark.slow
def test_three_ranks_of_which_some_have_no_row_in_the_last_step(overrides):
    """32 rows in steps of 10: the last has 2."""
    uneven = ["train.batch_size=10", "train.validations=0"]
    one = trained(overrides, "one", *FULL, *uneven)
    for way, technique in (("ddp", [*FULL, "train.engine=eager"]), ("ddp", [*FULL, "train.engine=fast"]), ("fsdp", FULL)):
        same(one, trained(overrides, f"{way}{len(technique)}{technique[-1][-4:]}", *technique, *uneven, f"train.parallel={way}", "train.gpus=3"))


def stopping(monkeypatch, at, number=signal.SIGTERM, rank=1):
    """The rank sends itself a signal in the step `at`; one process by itself does, too."""
    made = {kind: kind.step for kind in (Eager, Fast)}

    def stops(self, index, factor):
        if index == at and self.run.ranks.rank == min(rank, self.run.ranks.count - 1):
            os.kill(os.getpid(), number)
        return made[Eager if isinstance(self, Eager) else Fast](self, index, factor)

    for kind in made:
        monkeypatch.setattr(kind, "step", stops)
    return lambda: [monkeypatch.setattr(kind, "step", step) for kind, step in made.items()]


@pytest.mark.parametrize(("technique", "first", "then"), [
    (FULL, FSDP, ["train.parallel=fsdp", "train.gpus=1"]),
    pytest.param(FULL, ["train.parallel=fsdp", "train.gpus=1"], FSDP, marks=pytest.mark.slow),
    pytest.param(FULL, FSDP, ["train.parallel=fsdp", "train.gpus=3"], marks=pytest.mark.slow),
    pytest.param(WIDE, [FSDP[0], "train.gpus=4"], FSDP, marks=pytest.mark.slow),
    pytest.param(WIDE, [FSDP[0], "train.gpus=4"], [FSDP[0], "train.gpus=8"], marks=pytest.mark.slow),
    pytest.param(LORA, DDP, [], marks=pytest.mark.slow),
    pytest.param([*FULL, "train.engine=fast"], DDP, [], marks=pytest.mark.slow),
    pytest.param(LORA, [], DDP, marks=pytest.mark.slow),
])
def test_a_stopped_training_goes_on_with_another_number_of_ranks(overrides, monkeypatch, technique, first, then):
    """Stopped after validation, so that the best weights so far are in the checkpoint, too: the order of rows, losses and weights of one that was not."""
    words = [*technique, "train.validations=3"]
    whole = trained(overrides, "whole", *words)
    again = stopping(monkeypatch, 3)
    command = [*overrides, *SHORT, *words, "experiment=parted"]
    assert train.main([*command, *first]) == 130
    checkpoint = identity.checkpoint_of(compose(command))
    assert (shards_of(checkpoint).is_dir(), checkpoint.exists()) == (first[:1] == ["train.parallel=fsdp"], first[:1] != ["train.parallel=fsdp"])
    again()
    parted = trained(overrides, "parted", *words, *then)
    same(whole, parted)
    assert parted[0].work.resumed and len(parted[0].history) == 6 and not list(checkpoint.parent.iterdir())
    validated = [[h["validation_nll"] for h in result.history if "validation_nll" in h] for result, _ in (whole, parted)]
    assert len(validated[0]) == 3 and validated[0] == pytest.approx(validated[1], rel=1e-3)


def test_a_sharded_checkpoint_is_not_passed_over_in_silence(overrides, monkeypatch, capfd):
    again = stopping(monkeypatch, 2)
    command = [*overrides, *SHORT, *FULL, "experiment=other"]
    assert train.main([*command, "train.parallel=fsdp", "train.gpus=1"]) == 130
    again()
    assert train.main(command) == 2
    [error] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "is the checkpoint of this cell's training, begun another way; go on with train.parallel=fsdp" in error


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_run_with_one_sentence(overrides, monkeypatch, capfd, rank):
    again = stopping(monkeypatch, 3, signal.SIGKILL, rank)
    command = [*overrides, *SHORT, *LORA, *DDP, "experiment=killed", "train.checkpoint_every_s=0"]
    assert train.main(command) == 2
    said = capfd.readouterr().err
    assert [line for line in said.splitlines() if "resuming" not in line] == [
        f"error: cell lora-s0-n32 gave up: rank {rank} of 2 was ended by signal 9, and the others with it; run the same command again, "
        "it resumes from its last checkpoint"]
    assert not (identity.folder_of(compose(command)) / "result.json").exists()
    again()
    assert trained(overrides, "killed", *LORA, *DDP, "train.checkpoint_every_s=0")[0].work.resumed


def failing(monkeypatch, error, rank=1):
    step = Eager.step

    def fails(self, index, factor):
        if index == 2 and self.run.ranks.rank == rank:
            raise error
        return step(self, index, factor)

    monkeypatch.setattr(Eager, "step", fails)


def test_a_rank_without_memory_makes_the_cell_a_row(overrides, monkeypatch):
    failing(monkeypatch, RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    command = [*overrides, *SHORT, *LORA, *DDP, "experiment=oom"]
    assert train.main(command) == 0
    result = read(identity.folder_of(compose(command)))
    assert (result.status, result.error) == ("oom", "rank 1 of 2: CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.slow
def test_an_error_of_a_rank_shows_its_trace_once_and_bad_input_its_sentence(overrides, monkeypatch, capfd):
    command = [*overrides, *SHORT, *LORA, *DDP, "experiment=fails"]
    failing(monkeypatch, ZeroDivisionError("by nothing"))
    assert train.main(command) == 1
    said = capfd.readouterr().err
    assert said.count("Traceback") == 1 and "ZeroDivisionError: by nothing" in said and "rank 1 of 2 failed; the others were ended" in said
    monkeypatch.undo()
    failing(monkeypatch, UserError("a sentence"))
    assert train.main(command) == 2
    assert capfd.readouterr().err == "error: a sentence\n"


@pytest.mark.slow
def test_torchrun_starts_the_ranks_as_well(overrides, tmp_path):
    one = trained(overrides, "one", *LORA)
    words = [*overrides, *SHORT, *LORA, "experiment=torchrun", "train.parallel=ddp"]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", "-m", "pipeline.train", *words]
    subprocess.run(run, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    folder = identity.folder_of(compose(words))
    same(one, (read(folder), load_file(folder / "artefact" / "adapter_model.safetensors")))
    assert read(folder).work.parallel.gpus == 2


@pytest.mark.parametrize(("words", "sentence"), [
    (["technique=lora", *FSDP], r"train.parallel=fsdp shards full fine-tuning, and lora trains less than all weights; choose train.parallel=ddp"),
    (["technique=logit_distillation", *DDP], "the objective of logit_distillation makes batches of its own; choose train.parallel=none"),
    (["technique=grpo", *DDP], "the objective of grpo makes batches of its own"),
    (["technique=adalora", *DDP], "adalora adds a penalty to each"),
    (["technique=lora", *DDP, "pack=true"], "pack=true one GPU several trainings"),
    (["technique=lora", *DDP, "memory_limit_gb=1"], "memory_limit_gb watches one process"),
    (["technique=lora", "train.parallel=ddp", "train.gpus=7"], "train.gpus=7 is more than train.batch_size=6, the rows of a step"),
    (["technique=lora", "train.gpus=2"], "train.gpus=2 says on how many GPUs one training runs, and train.parallel is none"),
    (["technique=lora", "train.parallel=zero"], "'train.parallel' is 'zero'; choose one of none, ddp, fsdp"),
])
def test_what_does_not_go_together_is_refused_by_name_before_training(overrides, words, sentence):
    with pytest.raises(UserError, match=sentence):
        check_ahead(compose([*overrides, *SHORT, *words]))


def test_how_many_ranks_a_cell_has(overrides, monkeypatch):
    def ranks(*words):
        return launch.ranks_of(compose([*overrides, *SHORT, *words]))

    assert [ranks("technique=lora"), ranks("technique=zero_shot", *DDP), ranks("technique=lora", *DDP), ranks("technique=full", *FSDP)] == [0, 0, 2, 2]
    with pytest.raises(UserError, match="on the CPU needs the number of processes; add train.gpus=2"):
        ranks("technique=lora", "train.parallel=ddp")
    monkeypatch.setattr("pipeline.measure.machine.visible_gpus", lambda: 4)
    gpus = ["device=cuda", "technique=lora", "train.parallel=ddp"]
    assert [ranks(*gpus), ranks(*gpus, "train.gpus=2"), ranks(*gpus, "train.gpus=1")] == [4, 2, 0]
    with pytest.raises(UserError, match="train.gpus=5, but 4 GPUs are visible here"):
        ranks(*gpus, "train.gpus=5")
    with pytest.raises(UserError, match="train.batch_size=3 is fewer rows a step than the 4 GPUs"):
        ranks(*gpus, "train.batch_size=3")


def test_a_cell_that_several_gpus_train_declares_them_to_ray(overrides):
    cfg = compose([*overrides, "technique=lora", "train.parallel=ddp", "train.gpus=2", "device=auto"])
    [job] = fan.cell_jobs([cfg], Ray(gpus=0.5), 32, 4, lambda _: 4)
    assert (job.gpus, job.cpus) == (2, 16) and job.cells[0].ray.gpus == 2
    assert Ray().gpus is None and fan.gpu_share(cfg, Ray(), 0, lambda _: 1) == 0
    [on_cpus] = fan.cell_jobs([cfg], Ray(), 32, 0, lambda _: 4)
    assert (on_cpus.gpus, on_cpus.cpus) == (0, 2)
    cfg.train.gpus = None
    with pytest.raises(UserError, match="train.parallel=ddp on workers needs the number of GPUs that a cell is given; add train.gpus=2"):
        fan.cell_jobs([cfg], Ray(), 32, 4, lambda _: 4)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_a_step_s_rows_are_dealt_out_whole_and_weighted_over_all(count):
    rng = random.Random(count)
    step = [Encoded(tuple(range(n)), n - 2, rng.choice(["label", "rationale"])) for n in (rng.randint(4, 40) for _ in range(21))]
    settings = Train(0.1, 1, 21, 90)
    shares = [Ranks(rank, count).share(step) for rank in range(count)]
    assert sorted(map(id, step)) == sorted(id(e) for share in shares for e in share)
    tokens = [sum(len(e.ids) for e in share) for share in shares]
    assert max(tokens) - min(tokens) <= 40 and max(map(len, shares)) - min(map(len, shares)) <= 1
    batches = [list(Ranks(rank, count).batches(step, settings, 0)) for rank in range(count)]
    assert len({len(mine) for mine in batches}) == 1, "a rank with fewer passes would leave the others waiting"
    alone = list(step_batches(step, settings, 0))
    for total in (lambda b: float(b.weights.sum()), lambda b: b.tokens, lambda b: float((b.weights * b.targets).sum())):
        assert sum(total(b) for mine in batches for b in mine) == pytest.approx(sum(map(total, alone)))


@pytest.mark.gpu
@pytest.mark.parametrize(("technique", "way"), [(LORA, "ddp"), (["technique=qlora", "train.lr=1e-2"], "ddp"), (FULL, "ddp"), (FULL, "fsdp")])
def test_two_gpus_train_what_one_does(overrides, technique, way):
    """In processes of their own, because this one may have used a GPU."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    results = []
    for more in ([], [f"train.parallel={way}", "train.gpus=2"]):
        rest = [w for w in [*overrides, *SHORT] if w not in ("device=cpu", "precision=fp32")]
        words = [*rest, "device=cuda", *technique, *more, f"experiment=gpu{len(more)}"]
        subprocess.run([sys.executable, "-m", "pipeline.train", *words], cwd=ROOT, check=True)
        results.append(read(identity.folder_of(compose(words))))
    one, two = results
    assert [h["loss"] for h in two.history] == pytest.approx([h["loss"] for h in one.history], rel=5e-2)
    assert two.work.parallel.gpus == 2 and all(two.work.parallel.peak_bytes) and two.work.tokens == one.work.tokens

"""One GPU, busy: figures of requests are taken over where nothing that they depend on differs, cells are under way at once, and share a device."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import throughput
from pipeline.cell import grid, identity, requests
from pipeline.cell import run as cell_run
from pipeline.cell.child import Ended, Watcher
from pipeline.cell.inputs import Shared
from pipeline.cell.pool import Pool
from pipeline.cell.room import AtOnce
from pipeline.core.compose import ROOT, compose
from pipeline.forecasting import sharing
from pipeline.forecasting.cell import Card
from pipeline.measure import machine
from pipeline.records import finished
from pipeline.records.results import Neighbours, Result, read
from pipeline.scoring.sharing import copied

SHORT = ["technique=lora", "precision=fp32", "experiment=busy", "train_rows=16", "train.batch_size=8", "train.steps=2", "evaluate.test_rows=8",
         "evaluate.adapters=[1,2]", "train.validations=0"]


@pytest.fixture
def words(overrides: list[str], imports: None) -> list[str]:
    return [*(w for w in overrides if not w.startswith("evaluate.adapters")), *SHORT]


def seeds(words: list[str], count: int = 2, *more: str) -> list[Any]:
    return [compose([*words, *more, f"seed={seed}"]) for seed in range(count)]


def result_of(cfg: Any) -> Result:
    return read(identity.folder_of(cfg))


def two(_: Any) -> AtOnce:
    return AtOnce(2)


# figures of requests


def figures(cfg: Any) -> dict[str, Any]:
    inference = result_of(cfg).inference
    assert inference is not None and inference.latency_s and inference.merged_latency_s and inference.adapters
    return {name: getattr(inference, name) for name in requests.FIELDS}


def taken_from(cfg: Any) -> str | None:
    inference = result_of(cfg).inference
    assert inference is not None and inference.requests_key
    return inference.requests_from


def test_another_seed_takes_the_figures_over_and_says_from_whom(words):
    cells = [*seeds(words), *seeds(words, 1, "latency=measure", "variant=anew"), *seeds(words, 1, "method.config.r=2", "variant=narrow")]
    assert grid.run_cells(cells) == 0
    first, second, anew, narrow = cells
    assert taken_from(first) is None and taken_from(second) == "lora-s0-n16" and figures(first) == figures(second)
    assert taken_from(anew) is taken_from(narrow) is None
    keys = [result_of(cfg).inference.requests_key for cfg in cells]
    assert keys[0] == keys[1] == keys[2] != keys[3], "a lower rank has requests of its own"
    assert figures(anew)["latency_s"] != figures(first)["latency_s"]
    shutil.rmtree(identity.folder_of(first))
    shutil.rmtree(identity.folder_of(second))
    assert grid.run_cells([second]) == 0 and taken_from(second) is None, "figures of a cell that is no more are nobody's"


@pytest.mark.slow
def test_the_key_holds_all_that_the_figures_depend_on(words, monkeypatch):
    asked: list[tuple[str | None, str]] = []

    def keyed(what: str, cfg: Any) -> str | None:
        found: list[str | None] = []
        measure = requests.measure

        def seen(parts: Any, scorer: Any, rows: Any, inference: Any, *more: Any) -> Any:
            found.append(requests.key(parts, scorer, rows[:2]))
            return inference

        monkeypatch.setattr(requests, "measure", seen)
        cell_run.run(cfg)
        monkeypatch.setattr(requests, "measure", measure)
        asked.append((found[0], what))
        return found[0]

    plain = keyed("plain", *seeds(words, 1))
    assert keyed("another seed and rate", *seeds(words, 1, "train.lr=0.01", "seed=0")) == plain is not None
    assert keyed("another objective", *seeds(words, 1, "technique=step_by_step_lora")) == plain
    others = {
        "precision": ["precision=bf16"], "modules": ["method.config.target_modules=[q_proj]"],
        "what is measured": ["evaluate.adapters=[1]"], "batches": ["evaluate.batch_tokens=99"],
    }
    for what, more in others.items():
        keyed(what, *seeds(words, 1, *more))
    with monkeypatch.context() as patch:
        patch.setattr(identity, "request_code", lambda _: {"engine/ops.py": "another"})
        keyed("code", *seeds(words, 1))
    with monkeypatch.context() as patch:
        patch.setattr(requests, "manifest", lambda _: {"sha256": "another"})
        keyed("model", *seeds(words, 1))
    with monkeypatch.context() as patch:
        patch.setattr(requests.machine, "hardware", lambda _: {"gpu": "another"})
        keyed("device", *seeds(words, 1))
    values = [value for value, what in asked if not what.startswith("another ")]
    assert len(set(values)) == len(values), asked


def test_an_answer_that_is_generated_ends_where_the_model_says(words):
    cfg = compose([*words, "task.scoring=generate", "task.max_new_tokens=2", "evaluate.test_rows=2", "seed=0"])
    result = cell_run.run(cfg, folder=identity.folder_of(cfg))
    assert result.inference is not None and result.inference.latency_s and result.inference.requests_key is None


@pytest.mark.parametrize("option", [{}, {"modules_to_save": ["lm_head"]}])
def test_copies_of_an_adapter_answer_as_it_does_with_weights_of_their_own_and_leave_nothing(base, option):
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **option)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    keys, ids = list(model.state_dict()), torch.randint(0, 20, (3, 6))
    with torch.no_grad(), copied(model, 3) as names:
        assert names == ["default", "copy1", "copy2"]
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert len({layer.lora_A[name].weight.data_ptr() for name in names}) == 3
        layer.lora_B["copy2"].weight.zero_()
        own, mixed = model(input_ids=ids).logits, None
        if not option:
            mixed = model(input_ids=ids, adapter_names=names).logits
            assert torch.allclose(own[:2], mixed[:2], atol=1e-5) and not torch.allclose(own[2], mixed[2], atol=1e-3)
        model.set_adapter("copy1")
        assert torch.allclose(model(input_ids=ids).logits, own, atol=1e-5)
        model.set_adapter("default")
    assert list(model.state_dict()) == keys and list(model.peft_config) == ["default"]


# under way at once


def test_cells_under_way_at_once_have_the_results_of_cells_one_after_another(words):
    alone, beside = seeds(words, 3), seeds(words, 3, "experiment=beside")
    assert grid.run_cells(alone) == 0 and grid.run_cells(beside, limit=two) == 0
    for one, other in zip(map(result_of, alone), map(result_of, beside), strict=True):
        assert one.scores == other.scores and one.history == other.history and one.neighbours is None
        assert other.neighbours == Neighbours(2, True, other.neighbours.waited_s, other.neighbours.alone_s) and other.neighbours.waited_s >= 0
        assert other.phases.train_s <= other.neighbours.alone_s <= other.phases.wall_s, "it trained alone"
        assert other.phases.wall_s == pytest.approx(sum(v for k, v in vars(other.phases).items() if k != "wall_s"), abs=0.01)


def test_the_timed_parts_of_two_cells_do_not_overlap(words, tmp_path, monkeypatch):
    from pipeline.measure.turns import Turns

    take, give, spans = Turns._take, Turns._give, tmp_path / "spans"

    def taken(self: Turns) -> None:
        take(self)
        self.begun = time.monotonic()

    def given(self: Turns) -> None:
        with open(spans, "a") as file:
            print(self.begun, time.monotonic(), os.getpid(), file=file)
        give(self)

    monkeypatch.setattr(Turns, "_take", taken)
    monkeypatch.setattr(Turns, "_give", given)
    assert grid.run_cells(seeds(words, 2), limit=two) == 0
    times = sorted(tuple(map(float, line.split())) for line in spans.read_text().splitlines())
    assert len({pid for _, _, pid in times}) == 2 and len(times) >= 5
    assert all(one[1] <= other[0] or one[2] == other[2] for one, other in zip(times, times[1:], strict=False))


def test_while_requests_get_warm_and_adapters_are_copied_or_merged_another_cell_may_be_timed(words, tmp_path, monkeypatch):
    from pipeline.measure import turns
    from pipeline.methods.peft_adapter import PeftAdapter
    from pipeline.scoring import sharing as served

    alone: dict[str, list[bool]] = {"_answer": [], "_copy": [], "merged": []}

    def noted(name: str, real: Any) -> Any:
        def call(*given: Any) -> Any:
            assert turns._turns is not None
            alone[name].append(turns._turns._is_alone)
            return real(*given)

        return call

    for place, name in ((served, "_answer"), (served, "_copy"), (PeftAdapter, "merged")):
        monkeypatch.setattr(place, name, noted(name, getattr(place, name)))
    result = cell_run.run(*seeds(words, 1), shared=Shared(at_once=2, turns=tmp_path))
    assert result.inference.adapters and result.inference.merged_latency_s
    assert not any(alone["_copy"]) and alone["_copy"] and alone["merged"] == [False]
    timed = alone["_answer"]
    assert timed[:2] == [False, True] and timed.count(False) == 4, "the first of each of two batches, by one adapter and by several"


def test_the_device_is_had_alone_for_nothing_but_what_is_timed(words, tmp_path, monkeypatch):
    """Each time the others stop first, for a third of a second on an H200."""
    from pipeline.measure.turns import Turns
    from pipeline.scoring.scorer import Scorer
    from pipeline.training.stepping import Eager

    done: list[str] = []

    def noted(place: Any, name: str) -> None:
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *given, **more: (done.append(name), real(*given, **more))[1])

    for place, name in ((Turns, "_take"), (Turns, "_give"), (Eager, "step"), (Scorer, "log_likelihoods")):
        noted(place, name)
    cell_run.run(*seeds(words, 1, "train.validations=2", "evaluate.adapters=[1, 2]"), shared=Shared(at_once=2, turns=tmp_path))
    begun = [at for at, what in enumerate(done) if what == "_take"]
    assert all(done[at + 1] in ("step", "log_likelihoods") for at in begun)
    assert len(begun) == 2 + 1 + 1 + 4 + 1, "training until its first validation and after it, test rows, requests, two counts of adapters of each kind, merged"


def test_a_cell_that_runs_out_of_memory_beside_others_is_run_again_by_itself(words, monkeypatch, capfd):
    def crowded(parts: Any, *rest: Any, **more: Any) -> Any:
        from pipeline.measure import turns

        if turns.shared() and parts.cfg.seed == 0:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return train(parts, *rest, **more)

    train = cell_run.train
    monkeypatch.setattr(cell_run, "train", crowded)
    cells = seeds(words, 2)
    assert grid.run_cells(cells, limit=two) == 0
    assert "lora-s0-n16 ran out of memory beside other cells, and is run again by itself" in capfd.readouterr().out
    assert [result_of(cfg).status for cfg in cells] == ["ok", "ok"]
    assert result_of(cells[0]).neighbours is None and result_of(cells[1]).neighbours is not None


def test_a_cell_without_memory_loses_itself_alone(words):
    cells = [*seeds(words, 1, "memory_limit_gb=0.01"), *seeds(words, 1, "variant=other")]
    assert grid.run_cells(cells, limit=two) == 0
    assert [result_of(cfg).status for cfg in cells] == ["oom", "ok"]


def test_a_killed_cell_ends_the_others_which_begin_anew(words, monkeypatch):
    real = cell_run.train

    def killed(parts: Any, *rest: Any, **more: Any) -> Any:
        if parts.cfg.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(parts, *rest, **more)

    cells = seeds(words, 2)
    with monkeypatch.context() as patch, pytest.raises(Ended, match="cell lora-s1-n16 was ended by signal 9"):
        patch.setattr(cell_run, "train", killed)
        grid.run_cells(cells, limit=two)
    assert grid.run_cells(cells, limit=two) == 0 and result_of(cells[1]).status == "ok"


def test_a_cell_that_begins_at_another_waits_for_it(words):
    second = compose([*words, "seed=0", "variant=on", "start=lora"])
    assert grid.run_cells([*seeds(words, 1), second], limit=two) == 0 and result_of(second).start == "lora"


def test_cells_that_need_more_than_there_is_room_for_run_one_after_another(words):
    cells = seeds(words, 2)
    needs = {"lora-s0-n16": 60, "lora-s1-n16": 60}
    assert grid.run_cells(cells, limit=lambda _: AtOnce(2, needs, 100)) == 0
    began = datetime.fromisoformat(result_of(cells[1]).provenance["started"]).timestamp()
    assert began > (identity.folder_of(cells[0]) / "result.json").stat().st_mtime - 0.01


def test_a_training_without_a_forecast_is_taken_for_half_as_much_again_as_the_largest_known(words, monkeypatch):
    cells = [*seeds(words, 2), *seeds(words, 1, "technique=ia3"), *seeds(words, 1, "technique=full")]
    known = {"lora": 10, "full": 40}
    monkeypatch.setattr(sharing, "card_at_hand", lambda cfg: Card(True, "a card", 1000))
    monkeypatch.setattr(sharing, "_need", lambda cfg, card: known.get(cfg.technique.name))
    needs = sharing.limit(cells).needs
    assert [needs[finished.name(cfg)] for cfg in cells] == [10, 10, 60, 40]
    known.clear()
    assert sharing.limit(cells).needs == {}, "each has the device alone"


@pytest.mark.parametrize(("cpus", "gpus", "cells"), [(2, 1, 4), (4, 1, 4), (8, 1, 4), (12, 1, 6), (16, 1, 8), (32, 2, 8), (16, 2, 4), (128, 8, 8), (128, 1, 8)])
def test_as_many_cells_take_turns_as_a_gpu_has_cpus_for(words, cpus, gpus, cells, monkeypatch):
    """Four at least: one is timed while the others load and capture. What is asked for stands, and share=true has its own number."""
    monkeypatch.setattr(sharing, "card_at_hand", lambda cfg: Card(True, "a card", 1000))
    monkeypatch.setattr(sharing, "_need", lambda cfg, card: 1)
    monkeypatch.setattr(machine, "cpu_count", lambda: cpus)
    monkeypatch.setattr(machine, "visible_gpus", lambda: gpus)
    assert sharing.limit(seeds(words, 1)).cells == cells
    assert sharing.limit(seeds(words, 1, "at_once=3")).cells == 3 and sharing.limit(seeds(words, 1, "share=true")).cells == 8


def test_a_training_over_several_gpus_has_nobody_beside_it(words):
    """Its ranks would wait for each other's turns."""
    plain, several = seeds(words, 1)[0], compose([*words, "seed=1", "train.parallel=ddp", "train.gpus=2"])
    pool = Pool([plain, several], Shared(), Watcher(), AtOnce(4), grid.is_done, lambda _: None)
    assert pool._fits(several)
    pool.running = [SimpleNamespace(cfg=plain)]
    assert not pool._fits(several) and pool._fits(plain)
    pool.running = [SimpleNamespace(cfg=several)]
    assert not pool._fits(plain)


# cells that share a device


def test_shared_cells_say_so_and_seeds_of_one_adapter_are_packed(words, capfd):
    cells = [*seeds(words, 2, "share=true"), *seeds(words, 1, "technique=ia3", "share=true")]
    assert grid.run_cells(cells, limit=two) == 0
    results = [result_of(cfg) for cfg in cells]
    assert [r.neighbours for r in results] == [Neighbours(2, False, None)] * 3
    assert [(r.packed, r.slots) for r in results] == [(True, 2), (True, 2), (False, None)]
    assert all(r.inference.requests_from is None and r.inference.requests_key is None for r in results), "their seconds are nobody else's"
    assert "2 at once" in capfd.readouterr().out


def test_packs_and_turns_are_not_the_default_of_a_cell_by_itself(words):
    cfg = compose(words)
    assert cfg.pack is None and cfg.at_once is None and cfg.share is False
    assert dataclasses.asdict(AtOnce()) == {"cells": 1, "needs": {}, "room": None}


# the benchmark


def test_some_of_a_sets_cells_are_spread_over_its_techniques_and_sizes():
    every, some = throughput.cells_of("data_size", None), throughput.cells_of("data_size", 12)
    assert len(every) == 108 and len(throughput.cells_of("eleven", None)) == 11 and all(cell in every for cell in some)
    counts = [Counter(cell[key] for cell in some).values() for key in ("technique", "train_rows")]
    assert [set(each) for each in counts] == [{2}, {2}]


def test_a_table_sums_what_was_cut_off_and_says_how_many_times_the_others_it_is():
    common = {"set": "data_size", "of": 108, "busy_share": 0.5, "options": []}
    ours = {**common, "stack": "ours", "name": "ours", "cells": 54, "start_s": 10.0}
    rows = [{**ours, "wall_s": 100.0}, {**ours, "wall_s": 126.0},
            {**common, "stack": "plain", "name": "plain", "cells": 6, "wall_s": 120.0, "start_s": 0.0}]
    assert throughput.table(rows)[2:] == ["| data_size | ours | 108 | 226 | 1800 | 50% |  | 10.0x |",
                                          "| data_size | plain | 6 of 108, extrapolated | 120 | 180 | 50% |  |  |"]


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["ours", "plain"])
def test_a_stack_runs_its_cells_and_does_not_run_them_again(stack, tiny, tmp_path, monkeypatch):
    cells = [{"technique": technique, "train_rows": 16, "seed": 0} for technique in ("zero_shot", "lora", "step_by_step")]
    monkeypatch.setattr(throughput, "cells_of", lambda *_: cells)
    words = ["task=vader_movies", "teacher=lexicon", "model=smollm2_135m", "device=cpu", "evaluate.test_rows=8", "train.batch_size=8",
             "evaluate.forgetting=false", "evaluate.adapters=[]", "evaluate.transfer_rows=0", "preflight=false"]
    places = [f"{key}={tiny}/{key}" for key in ("data", "models", "rationales")]
    command = [stack, *places, f"work={tmp_path}/work", f"out={tmp_path}/out.jsonl", "--", *words]
    assert throughput.main(command) == 0 and throughput.main(command) == 0
    first, again = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (first["ended"], first["cells"], first["resumed"]) == ("done", 3, False), (tmp_path / "work").rglob("log.txt")
    assert (again["ended"], again["cells"], again["resumed"]) == ("done", 0, True) and first["phases_s"]["train_s"] > 0
    if stack == "ours":
        timeline = [json.loads(line) for path in (tmp_path / "work").rglob("timeline.jsonl") for line in path.read_text().splitlines()]
        assert {"phase train", "phase evaluate"} <= {what for _, what, *_ in timeline} and all(begun <= ended for *_, begun, ended in timeline)


# imports


@pytest.mark.slow
def test_peft_without_bitsandbytes_still_rounds_and_asks_for_no_gpu(overrides, tmp_path):
    """A process of its own: this one has imported both."""
    code = f"""
import sys, torch
asked = []
for name in ("is_available", "device_count", "get_device_capability", "get_device_properties", "_lazy_init"):
    setattr(torch.cuda, name, lambda *_, name=name, real=getattr(torch.cuda, name): (asked.append(name), real(*_))[1])
from pipeline.cell import inputs
from pipeline.cell.run import run
from pipeline.core.compose import ROOT, compose
from pipeline.core.settings import Task
inputs._import_all(Task("any", "choice"))
assert "peft" in sys.modules and "bitsandbytes" not in sys.modules and not asked, asked
words = {overrides!r} + ["train_rows=16", "train.batch_size=8", "train.steps=1", "evaluate.test_rows=4", "seed=0"]
for technique in ("lora", "qlora"):
    result = run(compose([*words, "technique=" + technique]))
    assert result.status == "ok" and (result.size.quantised_share == 1.0) == (technique == "qlora"), result
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

"""What only a CUDA device shows: python -m pytest -m gpu tests/test_gpu.py"""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline import serve
from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import ROOT, compose
from pipeline.core.files import read_jsonl, write_jsonl
from pipeline.records.finished import name as cell_name

pytestmark = pytest.mark.gpu


def on_gpu(overrides: list[str], *more: str) -> list[str]:
    return [*(o for o in overrides if o != "device=cpu"), "device=cuda", *more]


@pytest.mark.parametrize("technique", ["full", "lora", "qlora", "prompt_tuning", "step_by_step"])
def test_a_technique_trains_on_the_gpu(overrides, tmp_path, technique):
    result = cell_run.run(compose(on_gpu(overrides, f"technique={technique}", "train.steps=12")), folder=tmp_path / "cell")
    assert result.status == "ok"
    assert result.precision == ("nf4" if technique == "qlora" else "bf16")
    assert result.memory.kind == "gpu_reserved" and result.memory.peak_bytes >= result.memory.peak_allocated_bytes > 0
    assert result.hardware["gpu"] and len(result.history) == 12
    assert not any("plain AdamW" in note for note in result.notes), "the paged optimiser runs on a GPU"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_model_moves_with_its_values_and_its_ties_to_the_gpu(tiny, precision):
    import torch

    from pipeline.core.settings import Precision
    from pipeline.models.base import load_model

    here, there = (load_model(tiny / "models" / "smollm2_135m", Precision(precision), torch.device(device)) for device in ("cpu", "cuda"))
    assert {t.device.type for t in [*there.parameters(), *there.buffers()]} == {"cuda"}
    assert all(torch.equal(a, b.cpu()) for a, b in zip([*here.parameters(), *here.buffers()], [*there.parameters(), *there.buffers()], strict=True))
    assert len([*here.parameters()]) == len([*there.parameters()])


def test_a_real_out_of_memory_is_a_row(overrides, tmp_path):
    import torch

    torch.cuda.set_per_process_memory_fraction(0.0005)
    try:
        result = cell_run.run(compose(on_gpu(overrides, "technique=full", "train.batch_size=64", "train.micro_batch_tokens=1000000")), folder=tmp_path / "cell")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.status == "oom" and "out of memory" in result.error
    assert result.hardware["gpu_memory_bytes"]


def test_an_untrained_lora_is_the_base_on_the_gpu(overrides, tmp_path):
    write_jsonl(tmp_path / "lambada.jsonl", [{"text": "the cast of the film was fine"}, {"text": "the story with the plot was awful"}])
    probing = ["evaluate.forgetting=true", "evaluate.probe_pairs=20", "evaluate.probe_texts=5", "evaluate.probe_lambada=2",
               f"paths.lambada={tmp_path}/lambada.jsonl"]
    base, lora = (cell_run.run(compose(on_gpu(overrides, *words, *probing)), folder=tmp_path / words[0])
                  for words in (["technique=zero_shot"], ["technique=lora", "train.steps=0"]))
    assert lora.forgetting == base.forgetting
    for probe in ("perplexity", "pairs", "lambada", "lambada_perplexity"):
        assert getattr(lora.forgetting, probe) == getattr(lora.forgetting, f"{probe}_base") is not None


@pytest.mark.parametrize("technique", ["lora", "qlora", "prompt_tuning"])
def test_customers_share_a_base_on_the_gpu(overrides, tiny, tmp_path, technique):
    """Two artefacts and the base itself answer one list of requests, each as it answered in its cell; and what that costs is measured."""
    words, rows = [f"technique={technique}", "train.steps=12", "evaluate.adapters=[1,4]"], read_jsonl(tiny / "data" / "vader_movies" / "test.jsonl")
    alone = {}
    for seed in (0, 1):
        cfg = compose(on_gpu(overrides, *words, f"seed={seed}"))
        result = cell_run.run(cfg, folder=identity.folder_of(cfg))
        assert result.inference.adapters_mixed is (technique != "prompt_tuning") and list(result.inference.adapters) == ["1", "4"]
        assert result.inference.request_peak_bytes > 0 and (result.inference.merged_request_peak_bytes is None) is (technique == "prompt_tuning")
        own = read_jsonl(identity.folder_of(cfg) / "predictions.jsonl")
        alone |= {(cell_name(cfg), p["id"]): p for p in own if p["split"] == "test"}
    names = sorted({name for name, _ in alone})
    write_jsonl(tmp_path / "requests.jsonl", [{"adapter": names[i % 2], "prompt": r["prompt"], "row": r["id"]} for i, r in enumerate(rows)])
    assert serve.main([*on_gpu(overrides), f"requests={tmp_path}/requests.jsonl", f"to={tmp_path}/answers.jsonl"]) == 0
    for answer in read_jsonl(tmp_path / "answers.jsonl"):
        assert answer["scores"] == pytest.approx(alone[answer["adapter"], answer["row"]]["scores"], abs=0.15)  # bf16, other batches


@pytest.mark.parametrize(("technique", "way"), [
    ("full", "handwritten"), ("lora", "handwritten"), ("qlora", "handwritten"), ("step_by_step", "handwritten"),
    ("prompt_tuning precision=fp32", "handwritten"),  # in bf16 the first steps' signs are rounding's
    ("lora train.padding_free=always", "streams"), ("full train.padding_free=always", "streams"),
    ("qlora train.padding_free=always train.micro_batch_tokens=256", "streams"),
    ("lora method.config.use_dora=true", "handwritten"), ("qlora method.config.use_dora=true", "handwritten"),
    ("ia3", "captured"), ("lora method.config.lora_dropout=0.1", "handwritten"),
    ("dpo", "handwritten"), ("kto", "handwritten"), ("orpo train.padding_free=always", "streams"), ("dpo method.config.use_dora=true", "handwritten"),
    ("lora method.config.use_dora=true train.padding_free=always", "streams"), ("dpo method=ia3", "captured"),
])
def test_captured_steps_are_the_eager_ones(overrides, tmp_path, technique, way):
    name, *more = technique.split()
    words = [f"technique={name}", *more, "train.batch_size=8", "train.steps=16", "train.validations=2"]
    eager, fast = (cell_run.run(compose(on_gpu(overrides, *words, f"train.engine={engine}")), folder=tmp_path / engine) for engine in ("eager", "auto"))
    assert fast.work.streams if way == "streams" else fast.work.engine == way, fast.work
    losses = [[h["loss"] for h in result.history] for result in (eager, fast)]
    tolerance = 0.3 if "dropout" in technique else 0.03  # other noise
    assert losses[1] == pytest.approx(losses[0], rel=tolerance, abs=tolerance)
    assert fast.phases.warmup_s > 0 and fast.memory.peak_bytes > 0


def test_a_packed_sweep_agrees_with_one_trial_after_another(overrides, tmp_path):
    """In bf16: validation within what another order of sums moves, and no slot without an answer."""
    import csv

    words = [*on_gpu(overrides, "technique=lora", "experiment=tried", "train_rows=64", "train.batch_size=8", "train.epochs=6", "train.lr=0.01"),
             "precision=bf16", "sweep.space={method.config.r: {choices: [1, 2, 4, 8]}}", "sweep.confirm=false"]
    actual = {}
    for executor in ("packed", "sequential"):
        # a process of its own: the sweep forks, which a process that has used the GPU cannot
        command = [sys.executable, "-m", "pipeline.sweep", *words, f"sweep.executor={executor}", "sweep.slots=3", f"paths.sweeps={tmp_path}/{executor}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with open(tmp_path / executor / "tried/lora/trials.csv", newline="") as lines:
            actual[executor] = {row["method.config.r"]: row for row in csv.DictReader(lines)}
    assert {row["packed"] for row in actual["packed"].values()} == {"True"} and {row["slots"] for row in actual["packed"].values()} == {"3"}
    for rank, row in actual["packed"].items():
        assert float(row["validation"]) == pytest.approx(float(actual["sequential"][rank]["validation"]), abs=0.1), rank


def on_device(tiny, precision: str, lora: bool):
    """(model, dtype of the arithmetic) on the GPU."""
    import torch
    from scoring_models import with_lora

    from pipeline.core.settings import Precision
    from pipeline.models.base import load_model, resolve

    device, (name, _, compute) = torch.device("cuda"), precision.partition("/")
    wanted = Precision(name, compute or "auto")
    model = load_model(tiny / "models" / "smollm2_135m", wanted, device)
    return with_lora(model) if lora else model, resolve(wanted, device)[1]


@pytest.fixture
def captures(monkeypatch):
    """The name of every work that was captured (the work itself would keep its memory)."""
    from pipeline.engine.graphs import Graphs

    made, record = [], Graphs.capture

    def capture(self, work):
        made.append(work.__qualname__)
        return record(self, work)

    monkeypatch.setattr(Graphs, "capture", capture)
    return made


@pytest.mark.parametrize(("precision", "lora"), [("fp32", False), ("fp32", True), ("bf16", False), ("nf4", False), ("nf4/fp32", False)])
@pytest.mark.parametrize(("demonstrations", "single"), [(0, False), (40, False), (0, True)])
def test_captured_scores_are_the_eager_ones(tiny, monkeypatch, captures, precision, lora, demonstrations, single):
    import torch
    from scoring_models import PAD, items_of

    from pipeline.engine import answering
    from pipeline.scoring.scorer import choice_log_likelihoods

    model, dtype = on_device(tiny, precision, lora)
    notes: list[str] = []
    items = [(prompt, [[3], [4], [5]] if single else choices) for prompt, choices in items_of(200, demonstrations)]
    run = lambda: choice_log_likelihoods(model, items, 256, PAD, torch.device("cuda"), dtype, notes)  # noqa: E731
    fast = run()
    assert captures and not notes, notes
    monkeypatch.setattr(answering, "STATIC", ())
    captures.clear()
    eager = run()
    assert not captures
    for one, other in zip(fast, eager, strict=True):
        assert one == pytest.approx(other, abs=1e-3 if dtype == torch.float32 else 0.25)


@pytest.mark.parametrize(("precision", "lora"), [("fp32", False), ("fp32", True), ("nf4/fp32", False), ("bf16", False)])
def test_captured_decoding_writes_the_eager_texts(tiny, monkeypatch, captures, precision, lora):
    import torch
    from scoring_models import PAD, items_of

    from pipeline.engine import answering, decode
    from pipeline.models.base import load_tokenizer
    from pipeline.scoring.scorer import generate

    model, dtype = on_device(tiny, precision, lora)
    notes: list[str] = []
    tokenizer, prompts = load_tokenizer(tiny / "models" / "smollm2_135m"), [prompt for prompt, _ in items_of(120)]
    run = lambda: generate(model, prompts, 16, 512, tokenizer, PAD, torch.device("cuda"), dtype, notes)  # noqa: E731
    fast = run()
    assert len(captures) >= 2 and not notes, notes
    monkeypatch.setattr(answering, "STATIC", ())
    eager = run()
    monkeypatch.setattr(decode, "unsuited", lambda *_: "compared with the model's own generate")
    own = run()
    least = 0.97 if dtype == torch.float32 else 0.8  # bf16 rounds, and a text goes another way from there on
    for other in (eager, own):
        assert sum(a == b for a, b in zip(fast, other, strict=True)) >= least * len(prompts)


def test_weights_changed_in_place_change_the_next_scores_and_memory_is_given_back(tiny, captures):
    import torch
    from scoring_models import PAD, items_of

    from pipeline.scoring.scorer import choice_log_likelihoods

    (model, dtype), items = on_device(tiny, "bf16", True), items_of(200)
    run = lambda: choice_log_likelihoods(model, items, 256, PAD, torch.device("cuda"), dtype)  # noqa: E731
    stored = []
    for _ in range(6):
        run()
        torch.cuda.empty_cache()
        stored.append(torch.cuda.memory_reserved())
    assert len(captures) >= 6 and stored[-1] - stored[1] <= 2**26, stored
    before = run()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert run() != before


def test_a_failed_capture_leaves_the_process_as_it_was():
    """Its stream is not current, random numbers come, memory can be had and given back, and the next capture succeeds."""
    import torch

    from pipeline.engine.graphs import Graphs

    here, graphs = torch.cuda.current_stream(), Graphs(torch.device("cuda"))
    x = torch.ones(8, device="cuda")
    with pytest.raises(RuntimeError):
        graphs.capture(lambda: float(torch.rand(8, device="cuda").sum()))
    assert torch.cuda.current_stream() == here and not torch.cuda.is_current_stream_capturing()
    torch.manual_seed(0)
    drawn = torch.rand(4, device="cuda")
    torch.manual_seed(0)
    assert torch.equal(torch.rand(4, device="cuda"), drawn) and float(drawn.std()) > 0
    stored = torch.cuda.memory_reserved()
    block = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    del block
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= stored
    replay = graphs.capture(lambda: x.add_(1))
    x.zero_()
    replay()
    replay()
    assert x.tolist() == [2.0] * 8
    graphs.close()


@pytest.mark.parametrize("technique", ["prompt_tuning", "prompt_tuning_text", "prefix_tuning", "ipt"])
def test_answers_over_soft_prompts_are_captured(overrides, tmp_path, technique):
    result = cell_run.run(compose(on_gpu(overrides, f"technique={technique}", "train.steps=2")), folder=tmp_path / "cell")
    assert not any("capture failed" in note for note in result.notes), result.notes


def test_an_experiment_goes_on_beside_its_finished_cells(overrides, tmp_path):
    """Looking at what is done does not start CUDA in the process that forks the cells."""
    words = [*on_gpu(overrides), "experiments=standard", "technique=zero_shot", "train_rows=16", "evaluate.forgetting=false", "evaluate.transfer_rows=0"]
    for more in (["seed=0"], []):
        # a process of its own: this one has used the GPU
        done = subprocess.run([sys.executable, "-m", "pipeline.cells", *words, *more], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "results" / "standard").glob("*/result.json"))) == 3


@pytest.mark.parametrize("technique", ["top_layers", "head_only", "frozen_embeddings", "lora_plus", "dora", "lora"])
def test_a_validation_changes_no_captured_step_after_it(overrides, technique):
    """Answers bind the model, and a captured step reads its weights where they were."""
    from test_cell import run

    words = [f"technique={technique}", "train.engine=fast", "train.epochs=3", "evaluate.latency_rows=0", "evaluate.forgetting=false"]
    words += ["method.top_layers=1"] if technique == "top_layers" else []
    unseen, seen = ([row["loss"] for row in run(overrides, *words, f"train.validations={n}").history] for n in (1, 6))
    assert seen == pytest.approx(unseen, rel=0.01) and len(seen) == 12


@pytest.mark.parametrize("technique", ["rlhf_rloo", "rlhf_grpo", "grpo"])
def test_drawn_texts_are_trained_on_by_hand_on_the_gpu(overrides, technique):
    """Captured decoding, a reward model's pass and the KL's, beside the hand-written step, in bf16."""
    short = ["experiment=mine", "train_rows=64", "train.batch_size=8", "train.validations=0"]
    firsts = (["technique=full", "train.lr=1e-3"], ["technique=reward_model", "train.lr=1e-2", "train.epochs=3"])
    for words in firsts if technique != "grpo" else firsts[:1]:
        cfg = compose(on_gpu(overrides, *short, *words))
        cell_run.run(cfg, folder=identity.folder_of(cfg))
    more = ["train.lr=5e-3", "train.epochs=4", "objective.beta=0.05"] + (["objective.unproven=use"] if technique != "grpo" else [])
    result = cell_run.run(compose(on_gpu(overrides, *short, f"technique={technique}", *more)))
    assert (result.status, result.work.engine) == ("ok", "handwritten"), result.work.engine_reason
    assert not any("capture failed" in note for note in result.notes)
    gold = [point["gold_reward"] for point in result.history]
    assert sum(gold[-8:]) > sum(gold[:8]) and max(point["sampling_gap"] for point in result.history) < 0.25

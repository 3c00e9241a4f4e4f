"""Many artefacts over one base, and exported models: the same answers as each artefact alone; refusals by name."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

from pipeline import export, serve
from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import build, compose
from pipeline.core.files import read_json, read_jsonl, write_jsonl
from pipeline.records.results import read
from pipeline.scoring.scorer import WHOLE
from pipeline.serving.artefact import Artefact, Base, Multiplexer
from pipeline.training.loop import Loop
from pipeline.training.stepping import Eager, Run

CELLS = {
    "zero_shot": [], "few_shot": ["method.k=2"], "retrieval": ["method.k=2"], "lora": ["train.lr=1e-2"],
    "lora+wide": ["train.lr=2e-2", "method.config.r=4", "variant=wide"], "ia3": ["train.lr=1e-1"], "prompt_tuning": ["train.lr=1e-1"],
    "full": ["train.lr=3e-3"],
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory) -> tuple[list[str], Path]:
    """Overrides, and results/scratch with a cell of each of CELLS; treat as read-only."""
    root = tmp_path_factory.mktemp("serving")
    given = [
        f"paths.data={tiny}/data", f"paths.models={tiny}/models", f"paths.rationales={tiny}/rationales", f"paths.results={root}/results",
        f"paths.work={root}/work", "task=vader_movies", "device=cpu", "tracking=none", "train.progress=false", "evaluate.forgetting=false",
        "evaluate.latency_rows=0", "evaluate.transfer_rows=0", "model.note=null",
    ]  # fmt: skip
    for name, more in CELLS.items():
        training = ["train.steps=6", "train.batch_size=8", "train.validations=0"]
        cfg = compose([*given, f"technique={name.partition('+')[0]}", "train_rows=32", *training, *more])
        cell_run.run(cfg, folder=identity.folder_of(cfg))
    return given, root / "results" / "scratch"


def named(name: str) -> str:
    return f"{name}-s0-n32"


def own(home: tuple[list[str], Path], name: str) -> dict[str, dict]:
    """A cell's own predictions of test rows by the row's id."""
    return {p["id"]: p for p in read_jsonl(home[1] / named(name) / "predictions.jsonl") if p["split"] == "test"}


def test_rows(home: tuple[list[str], Path], tiny: Path) -> list[dict]:
    return read_jsonl(tiny / "data" / "vader_movies" / "test.jsonl")


test_rows.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.slow
def test_requests_of_many_customers_get_each_ones_own_answers(home, tiny, tmp_path, capsys):
    shared = [n for n in CELLS if n != "full"]
    rows = test_rows(home, tiny)
    requests = [{"adapter": named(shared[i % len(shared)]), "prompt": r["prompt"], "row": r["id"]} for i, r in enumerate(rows)]
    write_jsonl(tmp_path / "requests.jsonl", requests)
    assert serve.main([*home[0], f"requests={tmp_path}/requests.jsonl", f"to={tmp_path}/answers.jsonl"]) == 0
    answers = read_jsonl(tmp_path / "answers.jsonl")
    assert [{k: a[k] for k in ("adapter", "prompt", "row")} for a in answers] == requests
    for i, answer in enumerate(answers):
        alone = own(home, shared[i % len(shared)])[answer["row"]]
        assert answer["answer"] == alone["prediction"]
        assert answer["scores"] == pytest.approx(alone["scores"], abs=2e-5)
    output = capsys.readouterr().err
    assert "in one batch of 5 artefacts" in output and "prompt_tuning cannot share a batch" in output and "ia3 cannot share a batch" in output


def test_the_artefacts_differ(home):
    """Else the test above would pass whoever answers."""
    scores = [tuple(round(p["scores"]["positive"], 3) for p in own(home, name).values()) for name in CELLS]
    assert len(set(scores)) == len(CELLS)


def test_one_row_of_a_mixed_batch_does_not_reach_another(home, tiny):
    """The other rows' adapters may change, a row's numbers do not; and `__base__` is the base."""
    cfg = compose(home[0])
    base = Base.of(cfg)
    artefacts = [Artefact.at(n, home[1] / named(n) / "artefact", compose([*home[0], "technique=lora", *CELLS[n]])) for n in ("lora", "lora+wide")]
    multiplexer = Multiplexer(base, artefacts)
    scorer = artefacts[0].scorer(base, base.model, None)
    items = scorer.items(test_rows(home, tiny)[:4])
    bare = scorer.log_likelihoods(items, WHOLE)
    scorer.model = multiplexer._attached({"lora": "a", "lora+wide": "b"})
    mixed = scorer.log_likelihoods(items, ["a", "b", "__base__", "a"])
    other = scorer.log_likelihoods(items, ["b", "b", "__base__", "a"])
    assert mixed[1:] == other[1:] and mixed[0] != other[0]
    assert mixed[2] == pytest.approx(bare[2], abs=1e-6) and mixed[1] != pytest.approx(bare[1], abs=1e-3)


@pytest.mark.slow
def test_the_base_is_bare_again_when_the_multiplexer_closes(home, tiny):
    cfg = compose(home[0])
    base = Base.of(cfg)
    before = {n: p.clone() for n, p in base.model.state_dict().items()}
    artefacts = [Artefact.at(named(n), home[1] / named(n) / "artefact", compose([*home[0], f"technique={n}"])) for n in ("lora", "ia3", "prompt_tuning")]
    Multiplexer(base, artefacts).answer([{"adapter": a.name, "prompt": "Review: fine\nSentiment:", "choices": ["negative", "positive"]} for a in artefacts])
    after = base.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.slow
@pytest.mark.parametrize("technique", [
    "dora", "adalora", "loha", "lokr", "vera", "oft", "ln_tuning", "prefix_tuning", "p_tuning", "multitask_prompt", "rslora", "lora_plus",
])
def test_every_adapter_that_shares_a_base_answers_as_in_its_cell_and_is_taken_off_again(home, tiny, tmp_path, technique):
    more = ["train_rows=32", "train.steps=4", "train.lr=1e-2", "train.validations=0", "evaluate.latency_rows=1", "evaluate.adapters=[1,2]"]
    cfg = compose([*home[0], f"technique={technique}", *more])
    result = cell_run.run(cfg, folder=tmp_path / technique)
    assert list(result.inference.adapters) == ["1", "2"]
    base = Base.of(cfg)
    before = {n: p.clone() for n, p in base.model.state_dict().items()}
    rows = test_rows(home, tiny)[:6]
    answers = Multiplexer(base, [Artefact.at("it", tmp_path / technique / "artefact", cfg)]).answer([{**row, "adapter": "it"} for row in rows])
    alone = {p["id"]: p for p in read_jsonl(tmp_path / technique / "predictions.jsonl") if p["split"] == "test"}
    for row, answer in zip(rows, answers, strict=True):
        assert answer["scores"] == pytest.approx(alone[row["id"]]["scores"], abs=2e-5)
    after = base.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert not hasattr(base.model, "peft_config")


@pytest.mark.slow
def test_generated_answers_of_a_mixed_batch(home, tiny, tmp_path):
    """The same artefacts, asked to write: as each writes alone."""
    more = ["task.scoring=generate", "+task.max_new_tokens=3"]
    artefacts = [Artefact.at(n, home[1] / named(n) / "artefact", compose([*home[0], f"technique={n.partition('+')[0]}", *CELLS[n], *more]))
                 for n in ("lora", "lora+wide", "zero_shot")]
    base = Base.of(artefacts[0].cfg)
    rows = test_rows(home, tiny)[:9]
    together = Multiplexer(base, artefacts).answer([{**r, "adapter": artefacts[i % 3].name} for i, r in enumerate(rows)])
    for i, answer in enumerate(together):
        assert Multiplexer(base, artefacts).answer([{**rows[i], "adapter": artefacts[i % 3].name}]) == [answer]


@pytest.mark.parametrize(
    ("request_line", "said"),
    [
        ({"adapter": "full-s0-n32", "prompt": "x"}, "full-s0-n32 cannot share a base: full is a model of its own"),
        ({"adapter": "lora", "prompt": "x"}, "has no cell 'lora' to answer with; there are: few_shot-s0-n32, full-s0-n32"),
        ({"adapter": "../scratch/lora-s0-n32", "prompt": "x"}, "has no cell '../scratch/lora-s0-n32'"),
        ({"adapter": "lora-s0-n32"}, "request 1 of .* has no text 'prompt'"),
        ({"prompt": "x"}, "request 1 of .* has no text 'adapter'"),
        ({"adapter": "lora-s0-n32", "prompt": "x", "choices": ["one"]}, "request 1: the task of lora-s0-n32 chooses among"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_answered_says_why(home, tmp_path, capsys, request_line, said):
    import re

    write_jsonl(tmp_path / "requests.jsonl", [request_line])
    assert serve.main([*home[0], f"requests={tmp_path}/requests.jsonl"]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_an_artefact_of_pickled_weights_is_refused(home, tmp_path, capsys):
    import shutil

    import torch

    shutil.copytree(home[1] / named("lora"), tmp_path / "scratch" / named("lora"))
    artefact = tmp_path / "scratch" / named("lora") / "artefact"
    (artefact / "adapter_model.safetensors").unlink()
    torch.save({"a": Path("x")}, artefact / "adapter_model.bin")
    write_jsonl(tmp_path / "requests.jsonl", [{"adapter": named("lora"), "prompt": "x"}])
    assert serve.main([*home[0], f"paths.results={tmp_path}", f"requests={tmp_path}/requests.jsonl"]) == 2
    assert f"{artefact} has pickle weights only (adapter_model.bin), which can run code and no cell writes" in capsys.readouterr().err


def test_without_requests_it_says_what_to_add(home, tmp_path, capsys):
    assert serve.main(home[0]) == 2
    assert "add requests=" in capsys.readouterr().err
    (tmp_path / "none.jsonl").write_text("")
    assert serve.main([*home[0], f"requests={tmp_path}/none.jsonl"]) == 2


def exported(home: tuple[list[str], Path], name: str, to: Path, *more: str) -> int:
    return export.main([*home[0], f"cell={home[1] / named(name)}", f"to={to}", *more])


@pytest.mark.parametrize("name", ["lora", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ia3", "full"))])
def test_an_exported_model_answers_as_the_artefact(home, tiny, tmp_path, name):
    """Loaded with nothing but transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert exported(home, name, tmp_path / "out") == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    about = read_json(tmp_path / "out" / "export.json")
    assert about["cell"] == f"scratch/{named(name)}" and about["prompt"] == "Review: {text}\nSentiment:"
    for row in test_rows(home, tiny)[:12]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        with torch.no_grad():
            nats = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        scores = {c: float(nats[tokenizer(about["separator"] + c, add_special_tokens=False)["input_ids"][0]]) for c in row["choices"]}
        assert scores == pytest.approx(own(home, name)[row["id"]]["scores"], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("prompt_tuning", "prompt_tuning cannot be exported: its soft prompt comes before every request"),
        ("few_shot", "few_shot cannot be exported: what it does is in the request"),
        ("zero_shot", "zero_shot cannot be exported: it is the untouched base"),
    ],
)
def test_what_no_weights_can_hold_is_refused(home, tmp_path, capsys, name, said):
    assert exported(home, name, tmp_path / "out") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_with_parts_of_its_own_is_refused_and_a_head_of_its_own_is_not(home, tmp_path, capsys):
    """Added biases have no place in a plain model; an output layer that was tied and is not any more has."""
    for technique in ("bitfit_added", "head_only"):
        cfg = compose([*home[0], f"technique={technique}", "train_rows=32", "train.steps=2", "train.lr=1e-2", "train.validations=0"])
        cell_run.run(cfg, folder=identity.folder_of(cfg))
    assert exported(home, "bitfit_added", tmp_path / "biases") == 2
    assert "bitfit_added cannot be exported: a plain LlamaForCausalLM has no place for model.layers.0." in capsys.readouterr().err
    assert not (tmp_path / "biases").exists()
    assert exported(home, "head_only", tmp_path / "head") == 0
    assert json.loads((tmp_path / "head" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_folder_that_is_no_export_is_not_overwritten(home, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    assert exported(home, "lora", tmp_path / "mine") == 2
    assert "was not written by this command" in capsys.readouterr().err and (tmp_path / "mine/thesis.tex").exists()
    assert export.main(home[0]) == 2


# what a cell measures


@pytest.mark.parametrize(("technique", "mixed"), [
    ("lora", True), *(pytest.param(*p, marks=pytest.mark.slow) for p in (("prompt_tuning", False), ("few_shot", True), ("full", None))),
])
def test_what_many_adapters_cost(home, tmp_path, technique, mixed):
    more = ["train_rows=32", "train.steps=1", "train.validations=0", "evaluate.latency_rows=3", "evaluate.adapters=[1,4]", "evaluate.test_rows=8"]
    result = cell_run.run(compose([*home[0], f"technique={technique}", *more]), folder=tmp_path / technique)
    actual = read(tmp_path / technique).inference
    assert actual == result.inference and actual.request_peak_bytes > 0
    assert actual.adapters_mixed is mixed
    if mixed is None:
        assert actual.adapters is actual.one_adapter is None
    else:
        assert list(actual.adapters) == list(actual.one_adapter) == ["1", "4"] and min([*actual.adapters.values(), *actual.one_adapter.values()]) > 0
    assert (actual.merged_latency_s is not None) == (actual.merged_request_peak_bytes is not None) == (technique == "lora")


@pytest.mark.slow
def test_copies_of_an_adapter_leave_no_trace(home, tmp_path):
    """Predictions after the measurement are those before it: the artefact is the same file."""
    files = []
    for more in ("evaluate.adapters=[]", "evaluate.adapters=[1,3]"):
        cfg = compose([*home[0], "technique=lora", "train_rows=32", "train.steps=3", "train.validations=0", "evaluate.latency_rows=1", more])
        cell_run.run(cfg, folder=tmp_path / more)
        files.append([(tmp_path / more / p).read_bytes() for p in ("artefact/adapter_model.safetensors", "predictions.jsonl")])
    assert files[0] == files[1]


@pytest.mark.slow
def test_the_optimiser_is_gone_when_the_cell_is_evaluated(home, tmp_path, monkeypatch):
    """Else its state would stand in the memory that inference is said to take. No collection of garbage is waited for."""
    alive, evaluate = [], cell_run.evaluate

    def looking(*parts):
        alive.append([o for o in gc.get_objects() if isinstance(o, Loop | Run | Eager | torch.optim.Optimizer)])
        return evaluate(*parts)

    monkeypatch.setattr(cell_run, "evaluate", looking)
    gc.collect()
    gc.disable()
    try:
        cell_run.run(compose([*home[0], "technique=full", "train_rows=32", "train.steps=1", "train.validations=0"]), folder=tmp_path / "full")
    finally:
        gc.enable()
    assert alive == [[]]


@pytest.mark.slow
def test_methods_say_how_they_share(home):
    kinds = {"zero_shot": "together", "few_shot": "together", "retrieval": "together", "lora": "together",
             "dora": "in_turn", "adalora": "in_turn", "ia3": "in_turn", "full": "no", "pissa": "no"}
    assert {t: build(compose([*home[0], f"technique={t}"]).method, "method").sharing for t in kinds} == kinds

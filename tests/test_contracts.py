"""What methods and objectives do is declared on their classes: declaration and override go together, and the declaration alone decides."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest

import pipeline.methods
import pipeline.objectives
from pipeline.cell import inputs
from pipeline.cell import run as cell_run
from pipeline.cell.packing import Packing
from pipeline.core.compose import ROOT, compose
from pipeline.core.names import TABLE, class_of
from pipeline.engine.parts import Unsupported
from pipeline.forecasting import cell as forecasting
from pipeline.methods.base import Method
from pipeline.methods.peft_adapter import PeftAdapter
from pipeline.objectives.base import Objective
from pipeline.objectives.labels import Labels
from pipeline.records import tuned
from pipeline.serving import export
from pipeline.serving.artefact import Artefact

DECLARED: dict[type, dict[str, str]] = {
    Method: {
        "answers": "answers_without_model", "prepare": "prepares", "choose": "chooses", "prompt": "own_prompt", "before_training": "plans_training",
        "optimizer_groups": "own_optimizer_groups", "after_step": "acts_between_steps", "served": "changes_when_served", "merged": "merges",
    },
    PeftAdapter: {"load": "own_load"},
    Objective: {"loss": "own_loss", "batches": "own_batches", "rows": "own_rows", "prepared": "prepares", "sequence_loss": "of_sequences"},
}
"""By base class: a hook, and what its override is declared by."""


def kinds(base: type) -> list[type]:
    """Its subclasses in the project, theirs too."""
    for package in (pipeline.methods, pipeline.objectives):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    return [k for child in base.__subclasses__() if child.__module__.startswith("pipeline.") for k in (child, *kinds(child))]


def other(kind: type, base: type, name: str) -> bool:
    return getattr(kind, name) is not getattr(base, name)


PAIRS = [pytest.param(base, kind, id=f"{base.__name__}-{kind.__name__}") for base in DECLARED for kind in kinds(base)]


@pytest.mark.parametrize(("base", "kind"), PAIRS)
def test_what_is_overridden_is_declared_and_the_other_way_round(base, kind):
    assert [hook for hook in DECLARED[base] if other(kind, base, hook)] == [hook for hook, name in DECLARED[base].items() if other(kind, base, name)]


@pytest.mark.parametrize("kind", kinds(Method))
def test_what_trains_says_what_of_the_model(kind):
    assert not kind.trains or other(kind, Method, "wrap")


def test_no_code_asks_what_a_class_overrides():
    asks = re.compile(r"type\([^()]*\)\.\w+ is\b|getattr\(type\(|\bis (not )?(Method|Objective|PeftAdapter)\.\w")
    files = [path for folder in ("pipeline", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100 and [p.name for p in files if asks.search(p.read_text(encoding="utf-8"))] == []


def logged(kind: type) -> type:
    """A subclass of the same name, each of whose hooks and properties writes a log line and does what it did."""

    def through(name: str) -> Any:
        def call(self: Any, *args: Any, **more: Any) -> Any:
            logging.getLogger(__name__).info("%s", name)
            actual = getattr(super(made, self), name)
            return actual(*args, **more) if callable(getattr(kind, name)) else actual

        return call if callable(getattr(kind, name)) else property(call)

    names = [n for n, value in inspect.getmembers(kind) if not n.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))]
    made: type = dataclasses.dataclass(frozen=True)(type(kind.__name__, (kind,), {"__module__": __name__, **{n: through(n) for n in names}}))
    return made


LoggedAdapter, LoggedLabels = logged(PeftAdapter), logged(Labels)
LOGGED = ["method.type=logged_adapter", "objective.type=logged_labels"]
SHORT = ["technique=lora", "train.steps=3", "train.batch_size=6", "train_rows=32", "train.validations=0", "train.lr=1e-2", "precision=fp32"]


@pytest.fixture(autouse=True)
def logged_ones_in_the_table(monkeypatch) -> None:
    monkeypatch.setitem(TABLE["method"], "logged_adapter", "test_contracts.LoggedAdapter")
    monkeypatch.setitem(TABLE["objective"], "logged_labels", "test_contracts.LoggedLabels")


@pytest.fixture
def both(overrides) -> Iterator[Any]:
    """A cell as it is and with a log line in every hook, its config changed further by `more`."""
    return lambda *more: (compose([*overrides, *SHORT, *more]), compose([*overrides, *SHORT, *LOGGED, *more]))


def test_a_log_line_in_every_hook_leaves_the_engine_as_it_is(both, tmp_path, caplog):
    plain, noisy = both("train.engine=fast")
    caplog.set_level(logging.INFO, logger=__name__)
    actual = cell_run.run(noisy, folder=tmp_path / "noisy")
    assert {"wrap", "optimizer_groups", "served", "prompt", "prepare", "prepared", "rows", "reasoning"} <= {r.message for r in caplog.records}
    assert actual.work.engine == "handwritten"
    expected = cell_run.run(plain, folder=tmp_path / "plain")
    assert (actual.notes, actual.history, actual.scores) == (expected.notes, expected.history, expected.scores)


def test_a_log_line_in_every_hook_leaves_the_pack_as_it_is(both):
    Packing([both()[1]], inputs.Shared())
    for cfg in both("method.merge=true"):
        with pytest.raises(Unsupported, match="PeftAdapter is changed when it is served"):
            Packing([cfg], inputs.Shared())


def test_a_log_line_in_every_hook_leaves_forecast_and_search_as_they_are(both):
    plain, noisy = both("forecast.length=40")
    assert forecasting.prepare(noisy, gpu=True).plan == forecasting.prepare(plain, gpu=True).plan
    assert [key for key in tuned.searches(noisy) if key.startswith("train.")]


def test_a_log_line_in_every_hook_leaves_serving_and_export_as_they_are(both, tmp_path):
    (tmp_path / "artefact.json").touch()
    for cfg in both():
        artefact = Artefact.at("one", tmp_path, cfg)
        assert artefact.method.sharing == "together" and export.refusal(artefact) is None


def test_a_function_that_makes_a_method_declares_what_the_method_does():
    assert class_of({"type": "from_file"}, "method") is PeftAdapter


@pytest.mark.parametrize(("technique", "reason"), [("ipt", "its soft prompt comes before"), ("few_shot", "is in the request"), ("adalora", "None")])
def test_export_refuses_by_what_is_declared(overrides, tmp_path, technique, reason):
    (tmp_path / "artefact.json").touch()
    assert reason in str(export.refusal(Artefact.at("one", tmp_path, compose([*overrides, f"technique={technique}"]))))

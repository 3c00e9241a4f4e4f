"""pipeline.tune: spaces, edges, the budget and its parts, the expected maximum, tuned files and the cells that are composed of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from report_cells import result
from test_tune_edges import LR, parameter

from pipeline import tune
from pipeline.cell import grid, identity, inputs, record
from pipeline.cell.grid import compose_cell
from pipeline.cell.identity import fingerprint
from pipeline.core.compose import compose, spelled_out
from pipeline.core.files import UserError
from pipeline.records import tuned
from pipeline.records.finished import Cell
from pipeline.records.finished import name as cell_name
from pipeline.records.results import Score, Work
from pipeline.records.tuned import Edge, Tuned, applied, effort, expected_best
from pipeline.reporting import tuning as report_tuning
from pipeline.reporting.rows import make_rows
from pipeline.search import trials as search_trials
from pipeline.search import tuning as search_tuning
from pipeline.search.space import Parameter, Space, at, declared
from pipeline.search.study import Sweep

QUICK = ["experiments=quick", "train_rows=160"]


# what is searched


@functools.cache
def composed(*words: str) -> DictConfig:
    return compose([*QUICK, *words])


def config(technique: str, **changes: Any) -> DictConfig:  # a double underscore is a dot
    return at(composed(f"technique={technique}"), {key.replace("__", "."): value for key, value in changes.items()})


def space(technique: str, **changes: Any) -> Space:
    return declared(on_reference(config(technique, **changes)))


def on_reference(cfg: DictConfig) -> DictConfig:  # whatever lies under models/ here
    return at(cfg, {"train.lr": cfg.train.lr or cfg.train.reference_lr})


def test_a_technique_that_names_nothing_searches_its_learning_rate_around_its_own():
    actual = space("full", train__lr=2e-4)
    assert actual.parameters == {"train.lr": Parameter(low=2e-5, high=2e-3, log=True)}


def test_a_technique_searches_what_its_yaml_chooses_and_links():
    actual = space("lora")
    assert list(actual.searched) == ["train.lr", "method.config.r"] and actual.keys == [*actual.searched, "method.config.lora_alpha"]
    assert actual.parameters["method.config.lora_alpha"] == Parameter(times=2, of="method.config.r")
    assert list(space("step_by_step").searched) == ["train.lr", "objective.rationale_weight"]
    assert list(space("few_shot").searched) == ["method.k"], "what trains nothing has no learning rate"
    assert space("zero_shot").searched == {}


def test_a_space_written_in_the_config_is_enough_and_stands_over_the_group_s():
    own = "+search={method.config.lora_dropout: {low: 0.0, high: 0.2, most: 0.5}, train.lr: {low: 1e-5, high: 1e-3, log: true}}"
    actual = declared(composed("technique=lora", own))
    assert actual.parameters["method.config.lora_dropout"] == Parameter(low=0.0, high=0.2, most=0.5)
    assert actual.entries["method.config.lora_dropout"] == {"low": 0.0, "high": 0.2}, "as it is written to studies and tuned files"
    assert actual.entries["train.lr"] == {"low": 1e-5, "high": 1e-3, "log": True} and "method.config.r" in actual.searched


@pytest.mark.parametrize(("entry", "message"), [
    ({"train.lr": 3}, "technique lora: search 'train.lr' is 3; write"),
    ({"train.lr": {"factor": 0.5}}, "has factor 0.5; write a factor above 1"),
    ({"method.config.q": {"choices": [1, 2]}}, "technique lora: search names 'method.config.q', which a cell of technique 'lora' does not have"),
    ({"train.lr": {"low": 3, "high": 1}}, "low <= high"),
])
def test_a_bad_space_is_one_sentence_before_anything_is_searched(entry, message):
    with pytest.raises(UserError, match=re.escape(message)):
        search_tuning.check(config("lora", search=entry), 12)


def test_a_bad_setting_of_the_trials_is_named_as_it_was_given():
    with pytest.raises(UserError, match=r"config key 'tune.slots' is 'many'"):
        search_tuning.check(config("lora", tune__slots="many"), 12)


@pytest.mark.parametrize(("words", "message"), [
    ({"tune__trials": 1}, "tune.trials is 1; it is a whole number of at least 2"),
    ({"tuned": True}, "leave out tuned=true"),
    ({"tune__techniques": ["lora"]}, "add experiments=<name>"),
])
def test_a_bad_setting_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        tune.run(config("lora", **words), [])


# draws


def drawn(trials: int, seed: int = 0, **more: dict) -> list[dict]:
    points = Sweep("random", Space({key: parameter(entry) for key, entry in {"lr": LR, **more}.items()}), n_trials=trials, seed=seed).points
    assert points is not None
    return points


def test_draws_are_a_function_of_the_seed_and_more_of_them_go_on_with_the_same():
    ranks = {"r": {"choices": [1, 2, 4]}}
    assert drawn(9, **ranks)[:5] == drawn(5, **ranks) and drawn(5, seed=1, **ranks) != drawn(5, **ranks)
    values = [math.log10(p["lr"]) for p in drawn(400)]
    assert min(values) >= -4 and max(values) <= -2 and abs(sum(values) / 400 + 3) < 0.1


@pytest.mark.parametrize(("technique", "rate", "points"), [
    ("lora", 1e-3, [(0.0012520653814999472, 2, 4), (0.0007501954443620128, 4, 8), (0.001368009527972693, 2, 4), (0.003600091192911611, 4, 8)]),
    ("lora_plus", 1e-4, [(0.00012520653814999459, 2, 6.728798155213286, 4), (0.0006074996073425694, 2, 26.03510920711828, 4)]),
    ("few_shot", None, [(2,), (8,), (16,), (1,)]),
    ("step_by_step", 5e-5, [(6.260326907499729e-05, 0.7436704297351775), (8.025955666793807e-05, 0.5903948646972071)]),
])
def test_the_draws_of_a_seed_stay_those_of_studies_made_before(technique, rate, points):
    cfg = config(technique, **{"train__lr": rate} if rate else {})
    actual = search_tuning._sweep(cfg, declared(cfg), 4)
    assert actual.points is not None and [tuple(actual.space.complete(p).values()) for p in actual.points][: len(points)] == points


def test_no_point_is_drawn_twice_and_a_small_space_is_gone_through_once():
    points = Sweep("random", Space({"k": Parameter(choices=(1, 2, 4)), "n": Parameter(low=1, high=2)}), n_trials=50).points
    assert points is not None and sorted((p["k"], p["n"]) for p in points) == sorted(itertools.product([1, 2, 4], [1, 2]))


# the expected maximum


def test_the_expected_best_of_k_draws():
    values = [0.5, 0.9, 0.7]
    by_hand = [sum(max(draw) for draw in itertools.product(values, repeat=k)) / 3**k for k in (1, 2, 3)]
    assert expected_best(values) == pytest.approx(by_hand) and expected_best([0.4] * 5) == pytest.approx([0.4] * 5)


def test_a_trial_without_a_value_counts_as_nought_and_more_trials_never_expect_less():
    assert expected_best([None, 1.0]) == pytest.approx([0.5, 0.75])
    actual = expected_best([0.3, 0.1, None, 0.8, 0.8])
    assert actual == sorted(actual) and actual[-1] < 0.8


# the budget


class Runs:
    """Trials whose validation accuracy is a function of their settings, in the place of training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, accuracy, rows: int = 1_000_000) -> None:
        self.seen: list[dict] = []
        self.rows = rows

        def run(cfg, shared, scratch, label, count_errors=False, meanwhile=None):
            assert count_errors
            self.seen.append({"lr": cfg.train.lr, "r": cfg.method.config.r, "seed": cfg.seed})
            value = accuracy(cfg.train.lr, cfg.method.config.r)
            if value is None:
                return record.oom_result(cfg, "too large", {})
            if value == "error":
                return record.bare_result(cfg, status="error", error="ended with code 1", precision="fp32")
            work = Work(steps=1, diverged_at=1 if value == 0.0 else None)
            scores = {"validation": Score(self.rows, value, value, value, nll=cfg.train.lr)}
            return record.bare_result(cfg, status="diverged" if value == 0.0 else "ok", precision="fp32", scores=scores, work=work)

        monkeypatch.setattr(search_trials, "run_trial", run)
        for where in (inputs, grid):
            monkeypatch.setattr(where, "preload", lambda chosen: None)


def words_in(tmp_path: Path, overrides: list[str]) -> list[str]:
    return [*overrides, *QUICK, f"paths.tuning={tmp_path}/tuning", "technique=lora", "tune.trials=6"]


def tuned_file(tmp_path: Path) -> Tuned:
    return tuned.read(tmp_path / "tuning/quick/lora-n160.yaml")


@pytest.mark.slow
def test_inside_its_range_the_whole_budget_goes_there(tmp_path, overrides, monkeypatch, imports):
    runs = Runs(monkeypatch, lambda lr, r: 0.9 - abs(math.log10(lr) + 3) / 10)
    words = [*words_in(tmp_path, overrides), "+search={method.config.r: {choices: [8]}}"]
    assert tune.main(words) == 0
    actual = tuned_file(tmp_path)
    assert len(runs.seen) == 6 == len(actual.trials) and {t["part"] for t in actual.trials} == {"declared"} and not actual.edges
    assert actual.validation == max(t["validation"] for t in actual.trials) and actual.settings == max(actual.trials, key=lambda t: t["validation"])["settings"]
    assert actual.settings["method.config.lora_alpha"] == 2 * actual.settings["method.config.r"] and actual.budget == 6 and len(actual.values) == 6


@pytest.mark.slow
def test_of_trials_that_few_rows_do_not_tell_apart_the_nearest_to_the_technique_s_own_is_taken(tmp_path, overrides, monkeypatch, imports, capsys):
    Runs(monkeypatch, lambda lr, r: 0.6 - abs(math.log10(lr) + 3) / 10, rows=32)
    words = [*words_in(tmp_path, overrides), "+search={method.config.r: {choices: [8]}}", "train.lr=2e-3"]
    assert tune.main(words) == 0
    actual = tuned_file(tmp_path)
    nearest = min(actual.trials, key=lambda t: abs(math.log(t["settings"]["train.lr"] / 2e-3)))
    assert actual.settings == nearest["settings"] and actual.validation == nearest["validation"] < max(t["validation"] for t in actual.trials)
    assert "of those within a standard error of the highest" in capsys.readouterr().out


@pytest.mark.slow
def test_at_the_edge_the_rest_of_the_same_budget_goes_beyond(tmp_path, overrides, monkeypatch, imports, capsys):
    runs = Runs(monkeypatch, lambda lr, r: min(1.0, 0.5 + (math.log10(lr) + 6) / 10))
    assert tune.main([*words_in(tmp_path, overrides), "train.lr=1e-4", "tune.seed=5"]) == 0
    actual = tuned_file(tmp_path)
    assert [t["part"] for t in actual.trials] == ["declared"] * 4 + ["widened"] * 2 and len(runs.seen) == 6
    edge = next(e for e in actual.edges if e.key == "train.lr")
    assert edge.side == "high" and edge.widened["high"] == 0.01 and edge.widened["low"] == float(f"{edge.value:.6g}")
    assert all(t["settings"]["train.lr"] >= edge.widened["low"] for t in actual.trials[4:])
    assert actual.settings["train.lr"] > edge.value and len(actual.values) == 4
    assert "is at the high edge; 2 trials go to" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "choices"), [(2, [1e-4, 1e-3, 1e-2]), (7, [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2])])
def test_a_budget_that_is_spent_or_choices_that_go_on_nowhere_are_one_part(tmp_path, overrides, monkeypatch, imports, budget, choices):
    runs = Runs(monkeypatch, lambda lr, r: min(1.0, 0.5 + (math.log10(lr) + 6) / 10))
    seen = []
    monkeypatch.setattr(search_tuning, "_sweep", lambda *given, own=search_tuning._sweep: seen.append(given[2]) or own(*given))
    assert tune.main([*words_in(tmp_path, overrides), f"tune.trials={budget}", f"+search={{train.lr: {{choices: {choices}}}}}", "tune.only=[train.lr]"]) == 0
    assert len(runs.seen) == budget and seen[0] == budget and {t["part"] for t in tuned_file(tmp_path).trials} == {"declared"}


@pytest.mark.slow
def test_trials_that_fail_are_counted_and_not_replaced(tmp_path, overrides, monkeypatch, imports, capsys):
    outcomes = iter([None, "error", 0.0, 0.7, None, "error"])
    runs = Runs(monkeypatch, lambda lr, r: next(outcomes))
    words = [*words_in(tmp_path, overrides), "+search={method.config.r: {choices: [8]}}", "tune.seed=1"]
    assert tune.main(words) == 0
    actual = tuned_file(tmp_path)
    assert len(runs.seen) == 6 == len(actual.trials) and actual.failed == 5 and actual.validation == 0.7
    assert [t["status"] for t in actual.trials].count("oom") == 2 and [t["status"] for t in actual.trials].count("error") == 2
    assert sum(t["diverged"] for t in actual.trials) == 1 and "5 without a value" in capsys.readouterr().out
    assert tune.main(words) == 0 and len(runs.seen) == 6 and tuned_file(tmp_path).trials == actual.trials, "none of them is tried again"


@pytest.mark.slow
def test_without_any_value_it_says_so(tmp_path, overrides, monkeypatch, imports, capsys):
    Runs(monkeypatch, lambda lr, r: None)
    assert tune.main([*words_in(tmp_path, overrides), "tune.trials=2"]) == 2
    assert "none of 2 trials has a value (2 oom; see above)" in capsys.readouterr().err and not (tmp_path / "tuning").exists()


def test_where_every_trial_diverged_nothing_is_tuned(tmp_path, overrides, monkeypatch, imports, capsys):
    Runs(monkeypatch, lambda lr, r: 0.0)
    assert tune.main([*words_in(tmp_path, overrides), "tune.trials=2"]) == 2
    assert "none of 2 trials has a value (2 diverged; see above), so nothing is tuned" in capsys.readouterr().err and not (tmp_path / "tuning").exists()


def test_equal_figures_are_told_apart_by_the_loss_and_then_the_earlier_wins():
    figures = [(None, 0.1), (0.5, 0.9), (0.7, None), (0.7, 0.4), (0.7, 0.4)]
    trials = [{"number": n, "status": "ok", "validation": v, "nll": loss} for n, (v, loss) in enumerate(figures)]
    assert search_tuning.best_of(trials)["number"] == 3
    with pytest.raises(UserError, match="none of 1 trials has a value"):
        search_tuning.best_of(trials[:1])


def test_a_grid_is_tuned_technique_by_technique_at_every_size(monkeypatch):
    assert search_tuning.each_technique(config("lora", tune__techniques=["lora", "full+tuned"]), ["experiments=standard", "tune.trials=4"]) == [
        ["experiments=standard", "tune.trials=4", f"technique={t}", "seed=0", f"train_rows={n}"] for n in (200, 1000) for t in ("lora", "full")]


def test_what_has_nothing_to_search_is_skipped_with_a_sentence(capsys):
    assert search_tuning.tune(config("zero_shot"), 12, search_tuning.Shared()) is None
    assert "zero_shot, 160 rows: skipped, it trains nothing and names nothing else to search" in capsys.readouterr().out


# tuned files and cells


def example(**changes) -> Tuned:
    trial = {"number": 0, "part": "declared", "status": "ok", "diverged": False, "validation": 0.75, "nll": 0.5, "settings": {"train.lr": 3e-3}}
    edge, lost = Edge("train.lr", 3e-3, "high", {"low": 3e-3, "high": 0.1, "log": True}), {**trial, "number": 1, "validation": None, "status": "oom"}
    actual = Tuned("quick", "lora", "vader_movies_5", "smollm2_135m", 160, 0, "accuracy", {"train.lr": 3e-3, "method.config.r": 16}, {"train.lr": LR}, 12, 0.75,
                  [edge], [trial, lost], 33.25, False)
    return dataclasses.replace(actual, **changes)


@pytest.fixture
def tuning(tmp_path) -> Path:
    tuned.write(tmp_path / "quick" / "lora-n160.yaml", example())
    return tmp_path


def cell_of(tuning: Path, technique: str = "lora", words: Sequence[str] = (), **changes: Any) -> DictConfig:
    return applied(config(technique, tuned=True, paths__tuning=str(tuning), **changes), words)


def test_a_tuned_file_comes_back_as_it_was(tmp_path, tuning):
    assert tuned.read(tmp_path / "quick/lora-n160.yaml") == example() and tuned.read_all(tmp_path / "quick") == {("lora", "160"): example()}
    (tmp_path / "quick/lora-n160.yaml").write_text("settings: {}")
    with pytest.raises(UserError, match="is no tuned file"):
        tuned.read(tmp_path / "quick/lora-n160.yaml")


def test_a_technique_with_tuned_after_it_is_the_same_as_tuned_true(tuning):
    assert spelled_out(["technique=lora+tuned", "seed=1"]) == ["technique=lora", "tuned=true", "seed=1"]
    one = compose_cell([*QUICK, f"paths.tuning={tuning}", "technique=lora+tuned"])
    assert one == cell_of(tuning) and one.train.lr == 3e-3 and one.method.config.r == 16
    assert cell_name(one) == "lora+tuned-s0-n160"
    actual = effort(one)
    assert actual and (actual.searched, actual.trials, actual.device_s, actual.validation) == (1, 2, 33.25, 0.75) and effort(config("lora")) is None


def test_an_untuned_cell_stays_as_it_was_and_the_same_settings_by_hand_are_the_same_cell(tuning):
    untuned, by_hand = config("lora"), config("lora", train__lr=3e-3, method__config__r=16)
    assert applied(config("lora"), []) == untuned
    assert fingerprint(cell_of(tuning)) == fingerprint(by_hand) != fingerprint(untuned)


@pytest.mark.parametrize(("words", "message"), [
    ({"technique": "full"}, r"full-n160.yaml does not exist; run: python -m pipeline.tune experiments=quick technique=full train_rows=160"),
    ({"words": ["train.lr=1"]}, "train.lr is given by hand, but tuned=true takes it from"),
    ({"task__name": "trec"}, "was tuned with task=vader_movies_5, this cell has task=trec"),
    ({"method": {"type": "full"}}, "sets 'method.config.r', which this cell does not have; tune again"),
])
def test_a_cell_that_cannot_be_composed_of_it_says_why(tuning, words, message):
    with pytest.raises(UserError, match=message):
        cell_of(tuning, **words)


def test_the_grid_s_tuned_cells_are_those_that_search(monkeypatch, capsys):
    axes = {"techniques": ["zero_shot", "few_shot", "lora", "lora+tuned"], "seeds": [0], "train_rows": [160]}
    monkeypatch.setattr(grid, "grid", lambda name: {"grid": axes})
    actual = grid.grid_overrides(["experiments=quick", "tuned=true"])
    assert [word.partition("=")[2] for words in actual for word in words if word.startswith("technique=")] == ["few_shot", "lora"]
    assert "nothing is searched for zero_shot: the untuned cell stands" in capsys.readouterr().out


def test_a_cell_s_plan_changes_with_its_tuned_settings_and_with_nothing_else_of_the_file(tmp_path, tuning):
    def planned() -> dict:
        return identity.plan(cell_of(tuning))

    before, path = planned(), tmp_path / "quick" / "lora-n160.yaml"
    assert before["config"]["train"]["lr"] == 3e-3
    tuned.write(path, example(device_s=99.0, validation=0.5))
    assert planned() == before
    tuned.write(path, example(settings={"train.lr": 4e-3, "method.config.r": 16}))
    assert planned()["config"]["train"]["lr"] == 4e-3


def test_cells_of_every_size_take_what_was_tuned_at_tune_rows(tuning):
    cfg = config("lora", tuned=True, train_rows=40, tune__rows=160, paths__tuning=str(tuning))
    assert tuned.path_of(cfg).name == "lora-n160.yaml" and applied(cfg, []).train.lr == 3e-3 and effort(cfg).file.endswith("lora-n160.yaml")
    with pytest.raises(UserError, match="lora-n80.yaml does not exist; run: .* train_rows=80"):
        applied(config("lora", tuned=True, train_rows=40, tune__rows=80, paths__tuning=str(tuning)), [])


def test_a_variant_is_tuned_by_itself(tuning):
    cfg = config("lora", tuned=True, variant="dora", paths__tuning=str(tuning))
    assert tuned.label(cfg) == "lora+dora" and tuned.path_of(cfg).name == "lora+dora-n160.yaml"
    with pytest.raises(UserError, match="does not exist"):
        applied(cfg, [])


# the report


def test_the_report_shows_untuned_beside_tuned():
    rows = make_rows([Cell(result(name, right=right), Path("none"), name, "160") for name, right in (("lora", 150), ("lora+tuned", 175))])
    again = example(task="vader_movies", edges=[Edge("train.lr", 3e-3, "high", {"low": 3e-3, "high": 0.1}, True)])
    actual = report_tuning.part(rows, {("lora", "160"): again, ("gone", "160"): example()}, {"reparametrised": "f1"})["tuning"]
    (colour, texts), = actual["lines"]
    assert colour == "f1" and texts == [("lora", ""), ("60.0", ""), ("70.0", "+10.0 points"), ("75.0", "lr at its high edge, widened: again"),
                                        ("1", "lr 0.003, r 16"), ("2", "1 without a value"), ("33 s", "")]
    assert any("`lora` lies at the edge" in text for text in actual["remarks"]) and not any("has run" in text for text in actual["remarks"])
    assert [drawing[0] for drawing in actual["charts"][0][1]] == ["wide", "narrow"] and "2 trials: 56.2% expected" in actual["charts"][0][1][0][1]
    assert report_tuning.summary(rows, {("lora", "160"): again}) == ["`lora` tuned (2 trials, 33 s): 70.0% against 60.0% untuned."]
    assert report_tuning.part(rows, {}, {}) == {"tuning": None}


def test_tuned_on_another_task_is_not_ranked_beside():
    rows = make_rows([Cell(result("lora"), Path("none"), "lora", "160")])
    with pytest.raises(UserError, match="quick/lora-n160.yaml has task=vader_movies_5, the cells task=vader_movies, which no ranking may mix"):
        report_tuning.part(rows, {("lora", "160"): example()}, {})


def test_unequal_budgets_and_missing_tuned_cells_are_said():
    rows = make_rows([Cell(result(name), Path("none"), name, "160") for name in ("lora", "full")])
    tunings = {("lora", "160"): example(task="vader_movies"), ("full", "160"): example(task="vader_movies", technique="full", budget=24)}
    texts = report_tuning.part(rows, tunings, {"reparametrised": "f1", "full": "f2"})["tuning"]["remarks"]
    assert any("Budgets differ (12, 24 trials)" in t for t in texts) and any("pipeline.cells experiments=quick tuned=true" in t for t in texts)


# on real training


@pytest.mark.slow
def test_tuned_packed_and_one_by_one_are_the_same_and_no_test_row_is_read(tmp_path, tiny, overrides, imports):
    import shutil

    shutil.copytree(tiny / "data", tmp_path / "data")
    (tmp_path / "data/vader_movies/test.jsonl").unlink()
    words = [*[o for o in overrides if not o.startswith("paths.data")], f"paths.data={tmp_path}/data", "experiments=quick", "train_rows=48", "technique=lora",
             "precision=fp32", "tune.trials=6", "task=vader_movies"]
    for how in ("packed", "sequential"):
        assert tune.main([*words, f"tune.executor={how}", f"paths.tuning={tmp_path}/{how}", f"paths.sweeps={tmp_path}/s-{how}"]) == 0
    one, other = (tuned.read(tmp_path / how / "quick/lora-n48.yaml") for how in ("packed", "sequential"))
    assert one.packed and not other.packed and one.settings == other.settings and one.edges == other.edges
    assert [t["settings"] for t in one.trials] == [t["settings"] for t in other.trials] and len(one.trials) == 6
    assert [t["validation"] for t in one.trials] == [t["validation"] for t in other.trials] and one.device_s > 0

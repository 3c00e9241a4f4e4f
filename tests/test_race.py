"""The race: who leaves, what is named, the budget, resuming after a kill, bad input; one real race on the tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from pipeline import race as command
from pipeline.cell import child, identity, inputs
from pipeline.core.compose import compose
from pipeline.core.files import UserError, read_json
from pipeline.core.progress import Progress
from pipeline.measure.clock import Stopwatch
from pipeline.racing import screen, words
from pipeline.racing.drive import BudgetUsed, Driver, Seeds, Stops
from pipeline.racing.entrants import Asked, Entrant
from pipeline.racing.journal import Entry, Journal, Screened
from pipeline.racing.page import course, write
from pipeline.racing.policy import Arm, Race, Rules, rows_needed, weights
from pipeline.racing.screen import ladder, order
from pipeline.search.space import Parameter, Space

ROWS = 800


def race_of(levels: Sequence[float], within: float = 0.05, seeds: int = 16, budget: float = float("inf"), seed: int = 0, fixed: Sequence[int] = ()) -> Race:
    """A race on synthetic answers, run to its end; seconds of a seed are the arm's price."""
    rng = np.random.default_rng(seed)
    arms = [Arm(f"t{k}", float(k + 1), k + 1, cost=(float(k),)) for k in range(len(levels))]
    race = Race(arms, ROWS, Rules(within, 0.05, tuple(s for s in (1, 2, 3, 4, 6, 8, 12, 16) if s <= seeds)))
    hard = rng.random(ROWS)
    while action := race.next(budget - race.spent_s):
        for _ in range(action.seeds):
            p = levels[action.arm] + (0.0 if action.arm in fixed else 0.01 * rng.standard_normal())
            noise = 0.0 if action.arm in fixed else 0.05 * rng.standard_normal(ROWS)
            race.add(action.arm, (hard + noise < p).astype(float), arms[action.arm].price_s, fixed=action.arm in fixed)
    return race


def test_one_that_is_far_ahead_is_named_and_the_others_leave_early():
    race = race_of([0.6, 0.9, 0.6, 0.5, 0.55, 0.6])
    assert race.named == 1
    assert sum(len(r) for r in race.answers.runs) <= 12  # of 6 x 16
    assert set(race.left) == {0, 2, 3, 4, 5} or all((1, k) in race.cleared for k in (0, 2, 3, 4, 5))


def test_of_two_that_are_alike_the_cheapest_is_named():
    race = race_of([0.8, 0.8, 0.5])
    assert race.named == 0 and 2 in race.left


def test_equal_arms_on_few_rows_stay_undecided_and_no_seed_is_wasted_on_it():
    race = race_of([0.7] * 4, within=0.005)
    assert race.named is None and len(race.alive) >= 2
    assert sum(len(r) for r in race.answers.runs) <= 4 * 3  # two of each to begin with, three of those of which most is expected
    assert race.more_hours() is None and any(one.needed is None for one in race.open())


def test_most_is_expected_of_what_many_seeds_show_not_of_a_single_high_one():
    race = Race([Arm(f"t{k}", 1.0, k + 1) for k in range(4)], ROWS, Rules(0.01, 0.05))
    rng = np.random.default_rng(3)
    for arm, levels in enumerate(([0.81], [0.83, 0.77, 0.8, 0.82, 0.78, 0.8], [0.71, 0.76, 0.68], [0.74, 0.69, 0.72])):
        for level in levels:
            race.add(arm, (rng.random(ROWS).argsort().argsort() < level * ROWS).astype(float), 1.0)
    assert race.alive[:2] == [0, 1] and race.named is None
    assert race.favourite == 1 and race.expected[0] < 0.81


def test_the_cheapest_run_several_times_so_that_one_seed_of_a_dear_one_tells():
    race = race_of([0.9, 0.6, 0.6, 0.6, 0.6, *[0.5] * 15], within=0.05)
    seeds = [len(runs) for runs in race.answers.runs]  # prices go up with the number
    assert race.named == 0 and min(seeds[:4]) == 4 and max(seeds[5:]) <= 2 and sum(seeds) < 20 * 16 / 6


def test_the_budget_is_never_overrun_and_what_it_did_not_hold_is_still_alive():
    race = race_of([0.8, 0.78, 0.76, 0.7, 0.65, 0.6], within=0.01, budget=15.0)
    assert race.spent_s <= 15.0 and race.named is None
    assert race.more_hours() is None or race.more_hours() > 0


def test_an_arm_without_chance_runs_once():
    race = race_of([0.6, 0.8, 0.79], fixed=(0,))
    assert len(race.answers.runs[0]) == 1 and 0 in race.left


def test_the_shares_of_the_error_add_up_and_the_first_has_the_most():
    shares = weights(20)
    assert shares.sum() == pytest.approx(1) and (np.diff(shares) < 0).all() and shares[0] > 0.3


def test_an_arm_never_leaves_to_one_that_is_seen_below_it():
    race = race_of([0.7, 0.72, 0.74, 0.5])
    assert all(one.difference > 0 for one in race.left.values())


def test_the_rows_that_within_takes():
    assert rows_needed(0.01, 0.05, 0.05) > 2 * rows_needed(0.02, 0.05, 0.05)
    assert 500 < rows_needed(0.02, 0.05, 0.05) < 1500


# the driver, with a runner in the place of cells


class Fake:
    """Answers of synthetic techniques; dies before a run where `dies` says so."""

    def __init__(self, journal: Journal, levels: dict[str, float], names: Sequence[str], dies: int | None = None) -> None:
        self.journal, self.levels, self.names, self.dies = journal, levels, names, dies
        self.ran: list[tuple[str, int, int]] = []
        self.collapses: set[tuple[str, int, int]] = set()

    def run(self, wanted: Sequence[tuple[int, int, int]], floors: Sequence[float | None], left_s: float) -> list[Entry]:
        if self.dies is not None and len(self.ran) >= self.dies:
            self.journal.begin("killed")
            self.journal.running["seconds"] = 3.0  # type: ignore[index]
            self.journal.write()
            raise KeyboardInterrupt
        made = []
        for arm, unit, again in wanted:
            key = (self.names[arm], unit, again)
            self.ran.append(key)
            made.append(Entry(*key, "collapsed" if key in self.collapses else "ok", 10.0, f"{self.names[arm]}/{unit}/{again}"))
        if sum(entry.seconds for entry in made) > left_s:
            self.journal.lose("stopped", left_s)
            raise BudgetUsed
        return made

    def answers(self, entry: Entry) -> np.ndarray | None:
        rng = np.random.default_rng([entry.unit, sum(map(ord, entry.technique))])
        p = self.levels[entry.technique] + 0.01 * rng.standard_normal()
        return (np.random.default_rng(7).random(ROWS) + 0.05 * rng.standard_normal(ROWS) < p).astype(float)


LEVELS = {"lora": 0.8, "full": 0.79, "ia3": 0.75, "vera": 0.6}
ASKED = Asked(budget_s=3600.0, within=0.05, error=0.05, these=False, rates=3, screen_share=0.25, collapse=0.15, seed=1000, looks=(1, 2, 3, 4, 6, 8),
              at_once=1, rows=ROWS)


def driver_of(folder: Path, dies: int | None = None, asked: Asked = ASKED, settings: dict[str, Any] | None = None) -> tuple[Driver, Fake]:
    cfg = OmegaConf.create({"device": "cpu"})
    entrants = [Entrant(name, cfg, 10.0, True) for name in LEVELS]
    journal = Journal(folder / "journal.json", settings or {"within": asked.within, "error": asked.error})
    for name, level in LEVELS.items():
        journal.screened.setdefault(name, Screened(name, {"train.lr": 1e-3}, level, 1.0, 5.0))
    order(entrants, journal)
    fake = Fake(journal, LEVELS, list(LEVELS), dies)
    return Driver(entrants, asked, journal.screened, journal, fake), fake


def test_a_race_that_is_killed_anywhere_makes_the_same_decisions_and_pays_for_nothing_twice(tmp_path):
    whole, fake = driver_of(tmp_path / "whole")
    expected = whole.go()
    for dies in range(len(fake.ran)):
        again, first = driver_of(tmp_path / str(dies), dies)
        with pytest.raises(KeyboardInterrupt):
            again.go()
        resumed, second = driver_of(tmp_path / str(dies))
        race = resumed.go()
        assert first.ran + second.ran == fake.ran
        assert (race.named, race.left, race.course) == (expected.named, expected.left, expected.course)
        assert resumed.journal.spent_s == pytest.approx(whole.journal.spent_s + 3.0)


def test_a_race_is_not_resumed_with_other_settings_but_may_be_given_more_hours(tmp_path):
    driver, _ = driver_of(tmp_path, asked=replace(ASKED, budget_s=60.0))
    driver.go()
    more, fake = driver_of(tmp_path)
    assert more.go().named is not None and ("lora", 0, 0) not in fake.ran
    with pytest.raises(UserError, match=r"is of a race with within=0\.05, not 0\.02; give the settings that it was begun with, or delete"):
        driver_of(tmp_path, settings={"within": 0.02, "error": 0.05})


def test_a_collapsed_seed_is_begun_anew_and_told(tmp_path):
    driver, fake = driver_of(tmp_path)
    fake.collapses = {("lora", 0, 0), *(("vera", 0, again) for again in range(4))}
    race = driver.go()
    assert ("lora", 0, 1) in fake.ran and race.refused == {3}
    end = words.told(driver, [], "accuracy")
    assert any("`lora`: 1 of" in note for note in end.notes) and any("`vera` gave no usable result (collapsed)" in note for note in end.notes)
    assert race.seconds[0][0] == 20.0  # both trainings are its price


def test_the_page_begins_with_the_statement(tmp_path, drawn):
    driver, _ = driver_of(tmp_path / "races")
    race = driver.go()
    end = words.told(driver, [Entrant("qlora", OmegaConf.create({}), 1.0, True, "does not fit into memory by forecast (90.0 GiB)")], "accuracy")
    page = write(tmp_path / "report", "quick", driver, end, "accuracy").read_text()
    name = race.arms[race.named].name  # type: ignore[index]
    assert end.statement.startswith(f"`{name}` is within 5 points of the best of 4 techniques") and "wrong with probability at most 0.05" in end.statement
    assert "does not fit into memory" in page and "<svg" in page and name in page
    text = (tmp_path / "report" / "race.md").read_text()
    assert "| within, points |" in text and "Without any model" in text
    assert read_json(tmp_path / "report" / "race.json")["chosen"] == name


def test_what_is_open_says_which_and_what_it_would_take(tmp_path):
    driver, _ = driver_of(tmp_path, asked=replace(ASKED, budget_s=70.0, within=0.01))
    driver.go()
    end = words.told(driver, [], "accuracy")
    assert end.kind == "open" and end.statement.startswith("Undecided: ") and end.spent_h <= end.budget_h
    assert re.search(r"more hours would be needed|test rows would be needed", end.statement)


def test_who_did_not_run_has_no_line_in_the_course_and_a_dash_in_the_table(tmp_path, drawn):
    """Techniques that the budget did not hold were drawn to the end of the race, like those that ran."""
    nobody, _ = driver_of(tmp_path / "nobody", asked=replace(ASKED, budget_s=25.0))
    nobody.go()
    page = write(tmp_path / "none", "quick", nobody, words.told(nobody, [], "accuracy"), "accuracy").read_text()
    assert "A line a technique" not in page and "not run: the budget did not hold it" in page
    driver, _ = driver_of(tmp_path, asked=replace(ASKED, budget_s=45.0))
    race = driver.go()
    ran = {race.arms[k].name for k in range(len(race.arms)) if race.answers.runs[k]}
    end = words.told(driver, [], "accuracy")
    assert 0 < len(ran) < len(race.arms) and {line.name for line in end.lines if line.level is not None} == ran
    dots = course(driver)["layer"][-1]["data"]["values"]
    assert {one["tip"].partition(" | ")[0] for one in dots} == ran
    missing = next(line for line in end.lines if line.name not in ran)
    page = write(tmp_path / "report", "quick", driver, end, "accuracy").read_text()
    assert re.search(rf"{missing.name}</th><td class=.number.>\d</td><td class=.number.>—</td>", page)
    assert f"| {missing.name} | {missing.rank} | — | 0 |" in (tmp_path / "report" / "race.md").read_text()


def test_a_run_that_can_only_collapse_is_stopped_midway():
    with child.limited(100.0) as limit:
        stops = Stops(limit, 0.6)
        for told in (Progress("train", 0.4, metric=0.2), Progress("train", 0.6, metric=0.55), Progress("test", 0.9, metric=0.2), None):
            stops.runs(told)
        assert not stops.hopeless and limit.seconds > 0
        stops.runs(Progress("train", 0.6, metric=0.2))
        assert stops.hopeless and limit.seconds == 0.0


def test_a_cell_that_ends_with_an_error_leaves_the_race_and_is_not_begun_anew(overrides, tmp_path, imports, monkeypatch):
    cfg = compose([*overrides, "technique=lora", "train.lr=0.001", "train_rows=48", "train.batch_size=49", "experiment=raced"])
    journal = Journal(tmp_path / "journal.json", {})
    monkeypatch.setattr(inputs, "check_ahead", lambda cfg: None)
    runner = Seeds([Entrant("lora", cfg, 1.0, True)], ASKED, {"lora": Screened("lora", {}, 0.9, None, 0.0)}, journal, lambda: inputs.preload([cfg]))
    assert runner.run([(0, 0, 0)], [0.75], 60.0)[0].status == "failed"


def test_a_ladder_of_rates_begins_at_the_rule_s():
    assert ladder(1e-3, 3) == [1e-3, 3.2e-3, 3.2e-4]


@pytest.mark.parametrize(("rows", "taken"), [(40, 1e-3), (40_000, 3.2e-3)])
def test_screening_leaves_the_rule_s_rate_for_one_that_is_more_than_a_standard_error_better(rows, taken):
    """Two points: a quarter of a standard error of 40 rows, eight of 40,000."""
    space = Space({"train.lr": Parameter(choices=(1e-3, 3.2e-3, 3.2e-4))})
    values = {1e-3: 0.5, 3.2e-3: 0.52, 3.2e-4: None}
    found = [{"train.lr": lr, "validation": value, "nll": None, "status": "ok", "validation_rows": rows} for lr, value in values.items()]
    one = screen._found("lora", found, space, 1e-3, 7.0, "")
    assert one.settings == {"train.lr": taken} and one.validation == values[taken] and len(one.trials) == 3 and one.seconds == 7.0
    assert screen._found("lora", found[2:], space, 1e-3, 7.0, "").reason == "no rate gave a value"


# children that are ended in time


def test_a_child_is_ended_in_time(monkeypatch):
    monkeypatch.setattr(child, "GRACE_S", 0.2)
    monkeypatch.setattr(child, "POLL_S", 0.01)
    with child.limited(0.3) as limit:
        done = child.run_in_child(lambda: __import__("time").sleep(30) or 0)
    assert limit.reached and done.code == 128 + 15
    with child.limited(30) as limit:
        assert child.run_in_child(lambda: 0).code == 0 and not limit.reached


# the command


def words_of(overrides: Sequence[str], root: Path, *more: str) -> list[str]:
    return [*overrides, "experiments=quick", f"paths.races={root}/races", "train.batch_size=8", "train.epochs=1", "train_rows=48", "synthetic=none", *more]


@pytest.mark.parametrize(("more", "sentence"), [
    ((), "needs a budget; add budget_hours="),
    (("budget_hours=1", "within=0.5"), r"48 test rows are too few for within=0\.5: .* takes about [\d,]+ rows; add test rows, or take within=[\d.]+, or "
                                       r"race\.rows=these"),
    (("budget_hours=1", "within=60", "race.techniques=[lora]"), r"one technique \(lora\) is no race"),
    (("budget_hours=1e-6", "within=60", "race.techniques=[lora,full]"), r"budget_hours=1e-06 holds no two techniques: .* the smallest budget that would do"),
    (("budget_hours=1", "within=60", "task.metric=macro_f1"), r"task\.metric=macro_f1 is no mean over rows"),
    (("budget_hours=-1", "within=60"), r"'budget_hours' is -1"),
    (("budget_hours=1", "within=60", "race.row=these"), r"race\.row"),
])
def test_bad_input_is_one_sentence(overrides, tmp_path, capsys, more, sentence):
    assert command.main(words_of(overrides, tmp_path, *more)) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said) and said.count("\n") == 1


@pytest.mark.slow
def test_a_cell_that_takes_longer_than_what_is_left_is_ended_in_time_and_keeps_its_checkpoint(overrides, tmp_path, monkeypatch, imports):
    monkeypatch.setattr(child, "GRACE_S", 0.5)
    cfg = compose([*overrides, "technique=lora", "train.steps=100000", "train.lr=0.001", "train_rows=48", "train.batch_size=8", "experiment=raced"])
    journal = Journal(tmp_path / "journal.json", {})
    runner = Seeds([Entrant("lora", cfg, 1.0, True)], ASKED, {"lora": Screened("lora", {}, None, None, 0.0)}, journal, lambda: inputs.preload([cfg]))
    watch = Stopwatch()
    with pytest.raises(BudgetUsed):
        runner.run([(0, 0, 0)], [None], 6.0)
    assert watch.peek() < 8 and 4 < journal.spent_s < 8 and "budget" in journal.lost[0]["what"] and not journal.entries
    assert identity.checkpoint_of(runner.cell(0, 0, 0)).exists()


@pytest.mark.slow
def test_a_real_race_ends_with_a_statement_within_its_budget_and_resumes_to_the_same(overrides, tmp_path, capsys, imports):
    asked = words_of(overrides, tmp_path, "budget_hours=0.2", "within=45", "error=0.2", "race.techniques=[lora,zero_shot]", "race.rates=1", "race.seeds=4",
                     "race.collapse=null", "train.lr=0.02", "evaluate.latency_rows=0")
    assert command.main(asked) == 0
    said = capsys.readouterr().out
    end = read_json(tmp_path / "report" / "quick-race" / "race.json")
    journal = json.loads((tmp_path / "races" / "quick" / "journal.json").read_text())
    assert end["kind"] == "named" and end["spent_h"] <= 0.2 and end["statement"].replace("`", "") in said
    assert {entry["status"] for entry in journal["entries"]} == {"ok"} and journal["screened"][0]["technique"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("result.json")}
    assert command.main(asked) == 0
    assert read_json(tmp_path / "report" / "quick-race" / "race.json") == end
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("result.json")} == before

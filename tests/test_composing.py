"""Configs of many cells: composed in several processes they are those composed one by one, and what is refused is refused in one sentence."""

from __future__ import annotations

import os
from typing import Any

import pytest

from pipeline.cell import composing, grid
from pipeline.core.compose import plain
from pipeline.core.files import UserError
from pipeline.measure import machine

TECHNIQUES = ("zero_shot", "lora", "full", "qlora", "ia3", "prompt_tuning", "step_by_step")


@pytest.mark.parametrize("cpus", [1, 2, 3, 16])
def test_cells_composed_in_several_processes_are_those_composed_one_by_one(overrides, cpus, monkeypatch):
    monkeypatch.setattr(machine, "cpu_count", lambda: cpus)
    every = [[*overrides, f"technique={t}", f"seed={seed}"] for t in TECHNIQUES for seed in (0, 7)]
    composed = grid.compose_cells(every)
    expected = [grid.compose_cell(words) for words in every]
    assert composed == expected and [plain(cfg) for cfg in composed] == [plain(cfg) for cfg in expected]


def test_no_more_is_composed_here_than_in_any_other_process(overrides, monkeypatch):
    here: list[str] = []
    parent, work = os.getpid(), composing.compose_cell

    def compose_cell(words: Any) -> Any:
        here.extend([words[-1]] if os.getpid() == parent else [])
        return work(words)

    monkeypatch.setattr(composing, "compose_cell", compose_cell)
    monkeypatch.setattr(machine, "cpu_count", lambda: 3)
    grid.compose_cells([[*overrides, f"technique={t}"] for t in TECHNIQUES])
    assert here == ["technique=zero_shot", "technique=lora", "technique=ia3"], "the first before the others are forked, then one of three"


@pytest.mark.parametrize("at", [0, 1, 2, 6])
def test_a_config_that_does_not_compose_is_refused_wherever_it_was_tried(overrides, at, monkeypatch, capfd):
    monkeypatch.setattr(machine, "cpu_count", lambda: 3)
    every = [[*overrides, f"technique={t}"] for t in TECHNIQUES]
    every[at] = [*overrides, "technique=lore"]
    with pytest.raises(UserError, match="unknown technique 'lore'"):
        grid.compose_cells(every)
    assert capfd.readouterr().err == "", "the child that met it first says nothing"

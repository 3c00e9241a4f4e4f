"""Means over seeds, and differences from a technique with intervals: known answers, and that the interval holds the truth as often as it says."""

from __future__ import annotations

import re

import numpy as np
import pytest

from benchmarks import race_means
from benchmarks.race_cache import packed, write
from pipeline.core.files import UserError


def run(technique: str, seed: int, right: list[int], task: str = "trec") -> dict:
    test = {"rows": len(right), "right": sum(right), "nll": None, "bits": packed(np.array(right))}
    return {"model": "m", "task": task, "technique": technique, "seed": seed, "seconds": 1.0, "diverged_at": None, "curve": [[1.0, 0.5, None]], "test": test}


@pytest.fixture
def cells(tmp_path):
    """LoRA has 50 and 75%, full 75 and 75% of four rows on one task; both all of it on the other; a third technique has one seed."""
    made = [run("lora", 1, [1, 1, 0, 0]), run("lora", 2, [1, 1, 1, 0]), run("full", 1, [1, 1, 1, 0]), run("full", 2, [1, 0, 1, 1]), run("ia3", 1, [1, 1, 1, 1])]
    made += [run(name, seed, [1] * 4, "cqa") for name in ("lora", "full") for seed in (1, 2)]
    write(tmp_path / "cells.jsonl", made)
    return tmp_path / "cells.jsonl"


def test_means_and_spreads_are_those_of_the_seeds_and_unfinished_techniques_are_left_out(cells):
    head, _, *lines = race_means.table(cells, "m").splitlines()
    assert head == "| technique, m | cqa | trec | mean of 2 |"
    assert lines == ["| full | 100.0 ± 0.0 | 75.0 ± 0.0 | 87.5 ± 0.0 |", "| lora | 100.0 ± 0.0 | 62.5 ± 17.7 | 81.2 ± 8.8 |"]


def test_differences_are_paired_by_seed(cells):
    (line,) = race_means.table(cells, "m", "lora").splitlines()[2:]
    assert "full | +0.0 (+0.0 to +0.0) | +12.5 (−146.3 to +171.3)" in line  # 25 and 0 points, Student's t of one degree of freedom: 12.5 ± 12.706 · 12.5


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng, held = np.random.default_rng(0), 0
    for _ in range(2000):
        shared = rng.normal(scale=3.0, size=16)
        said = race_means.difference(shared + rng.normal(1.0, 1.0, 16), shared + rng.normal(scale=1.0, size=16))
        low, high = re.findall(r"[-\d.]+", said.replace("−", "-"))[1:]
        held += float(low) <= 1.0 <= float(high)
    assert 0.93 < held / 2000 < 0.98


@pytest.mark.parametrize(("model", "against"), [("other", ""), ("m", "ia3"), ("m", "dora")])
def test_what_is_not_there_is_one_sentence(cells, model, against):
    with pytest.raises(UserError, match=r"has no runs of .* on all tasks with"):
        race_means.table(cells, model, against)

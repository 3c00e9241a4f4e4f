"""pipeline.tune: which values lie at the edge of their range, and what is then added there."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.search import tuning as search_tuning
from pipeline.search.space import Parameter, Space

LR = {"low": 1e-4, "high": 1e-2, "log": True}


def parameter(entry: dict[str, Any]) -> Parameter:
    return Parameter(**entry | ({"choices": tuple(entry["choices"])} if "choices" in entry else {}))


@pytest.mark.parametrize(("given", "value", "tried", "side"), [
    (LR, 9e-3, [1e-3, 9e-3], "high"),
    (LR, 9e-3, [9e-3, 9.5e-3], None),  # a trial further out was worse
    (LR, 2e-4, [1e-3, 2e-4], "low"),
    (LR, 1e-3, [1e-3], None),
    ({"low": 0.0, "high": 1.0}, 0.74, [0.74], None),
    ({"low": 0.0, "high": 1.0}, 0.76, [0.76], "high"),
    ({"low": 1, "high": 1}, 1, [1], None),
    ({"choices": [2, 4, 8]}, 8, [8], "high"),
    ({"choices": [8, 2, 4]}, 2, [2], "low"),
    ({"choices": [2, 4, 8]}, 4, [4], None),
    ({"choices": ["linear", "cosine"]}, "cosine", ["cosine"], None),
    ({"choices": [False, True]}, True, [True], None),
])
def test_the_edge_of_a_range(given, value, tried, side):
    assert search_tuning.edge_of(parameter(given), value, tried) == side


@pytest.mark.parametrize(("given", "limits", "value", "part"), [
    (LR, {}, 9e-3, {"low": 9e-3, "high": 0.1, "log": True}),
    (LR, {}, 1.5e-4, {"low": 1e-5, "high": 1.5e-4, "log": True}),
    (LR, {"most": 0.02}, 9e-3, {"low": 9e-3, "high": 0.02, "log": True}),
    (LR, {"most": 0.01}, 9e-3, None),
    ({"low": 0.1, "high": 1.0}, {}, 0.95, {"low": 0.95, "high": 1.45}),
    ({"low": 0.1, "high": 1.0}, {}, 0.12, {"low": 0.0, "high": 0.12}),
    ({"low": 2, "high": 10}, {}, 10, {"low": 10, "high": 14}),
    ({"low": 1, "high": 8}, {}, 1, None),
    ({"choices": [2, 4, 8, 16, 32]}, {}, 32, {"choices": [64, 128]}),
    ({"choices": [2, 4, 8, 16, 32]}, {}, 2, {"choices": [1]}),
    ({"choices": [1, 2, 4]}, {}, 1, None),
    ({"choices": [10, 20, 30]}, {}, 30, {"choices": [40]}),
    ({"choices": [10, 20, 30]}, {"most": 35}, 30, None),
    ({"choices": [1, 2, 7]}, {}, 7, None),
    ({"choices": [0.1, 0.2, 0.4]}, {}, 0.4, {"choices": [0.8]}),
])
def test_what_is_added_at_an_edge(given, limits, value, part):
    before = Space({"key": parameter(given | limits), "other": Parameter(choices=(1, 2, 3))})
    after, edges = search_tuning.widened(before, [{"params": {"key": value, "other": 2}, "validation": 0.5, "nll": None}])
    assert [e.key for e in edges] == ["key"] and edges[0].widened == part
    assert after.entries == {"key": part or given, "other": {"choices": [1, 2, 3]}}

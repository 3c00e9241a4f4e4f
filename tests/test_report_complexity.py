"""The report's charts of what was forgotten, and its panels of what a technique costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from report_cells import keep, result, score

from pipeline.core.files import UserError, sha256, write_json, write_jsonl
from pipeline.intake import mistakes as listed
from pipeline.records.finished import select
from pipeline.records.results import Forgetting, Result
from pipeline.reporting import costs, forgetting
from pipeline.reporting import rows as report_rows
from pipeline.reporting.charts import colours
from pipeline.reporting.figures import Row
from pipeline.reporting.mistakes import mistakes
from pipeline.reporting.page import page, template
from pipeline.reporting.rows import make_rows

PROBED = "100 news sentences, 500 agreement pairs, 200 LAMBADA passages"


def probed(name: str, right: int, ppl: float, pairs: float = 0.9, lambada: float | None = 0.4, **more: Any) -> Result:
    """A cell whose base has perplexity 100, 90% of the pairs and 40% of LAMBADA, in 16 bits 80, 92% and 44%."""
    stored = Forgetting(ppl, 100.0, pairs, 0.9, 80.0, 0.92, PROBED, lambada, None if lambada is None else 0.4, None if lambada is None else 0.44)
    return dataclasses.replace(result(name, right), forgetting=stored, **more)


def rows_of(root: Path, *actual: Result) -> list[Row]:
    for one in actual:
        keep(root, one)
    grid = {"techniques": [r.technique for r in actual], "seeds": [0, 1], "train_rows": [200]}
    return make_rows(select(root / "quick", grid)[0])


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {r.technique: r for r in rows}


def test_lambada_and_transfer_have_their_changes(tmp_path: Path) -> None:
    rows = by_name(rows_of(tmp_path, probed("zero_shot", 150, 100.0), probed("qlora", 200, 130.0, 0.86, 0.35)))
    assert rows["zero_shot"].lambada_change == rows["zero_shot"].perplexity_change == rows["zero_shot"].transfer_change == 0.0
    assert rows["qlora"].lambada_change == pytest.approx(-0.05) and rows["qlora"].lambada_change_16bit == pytest.approx(-0.09)
    assert rows["qlora"].transfer_change == pytest.approx(0.2)


def test_a_chart_has_the_base_at_zero_and_says_what_was_learned_and_lost(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, probed("zero_shot", 150, 100.0), probed("lora", 200, 112.0, 0.86), probed("qlora", 190, 130.0, 0.86, 0.35))
    actual = forgetting.charts(rows, colours(rows))
    assert [c.title for c in actual] == ["Against perplexity", "Against grammar", "Against LAMBADA", "What carries over"]
    assert all(not c.left_out for c in actual)
    tips = [[one["tip"] for one in chart.spec["layer"][-1]["data"]["values"]] for chart in actual]
    assert any("learned +20.0 points above zero-shot | perplexity of news +12.0%" in tip for tip in tips[0])
    assert any("learned 0.0 points above zero-shot | perplexity of news 0.0%" in tip for tip in tips[0])
    assert any("perplexity of news +30.0% | against the base in 16 bits +62.5%" in tip for tip in tips[0])
    beyond = [layer["data"]["values"] for layer in actual[0].spec["layer"] if layer["mark"]["type"] == "rule" and "opacity" in layer["mark"]]
    assert [len(lines) for lines in beyond] == [1], "one line, of the quantised base"
    assert any("minimal pairs lost +4.0 points" in tip for tip in tips[1]) and any("lambada words lost +5.0 points" in tip for tip in tips[2])
    assert len(tips[0]) == 3
    assert forgetting.probes(rows) == [PROBED]


def test_without_zero_shot_or_a_probe_there_is_no_chart(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a", probed("full", 210, 120.0), probed("lora", 200, 112.0))
    assert forgetting.charts(rows, colours(rows)) == []
    rows = rows_of(tmp_path / "b", probed("zero_shot", 150, 100.0, lambada=None), probed("lora", 200, 112.0, lambada=None))
    assert "Against LAMBADA" not in [c.title for c in forgetting.charts(rows, colours(rows))]


def test_what_was_not_measured_or_lies_too_far_is_named(tmp_path: Path) -> None:
    trained = [probed(name, 200 + i, 110.0 + i) for i, name in enumerate(("full", "lora", "prompt_tuning", "bitfit"))]
    bare = dataclasses.replace(result("dora", 205), forgetting=None)
    rows = rows_of(tmp_path, probed("zero_shot", 150, 100.0), *trained, probed("step_by_step", 220, 50_000.0), bare)
    chart = forgetting.charts(rows, colours(rows))[0]
    assert [text.partition(" ")[0] for text in chart.left_out] == ["step_by_step", "dora"]
    assert "perplexity ×500, learned +28.0" in chart.left_out[0] and "not measured" in chart.left_out[1]


def test_of_many_techniques_those_that_no_other_beats_at_learning_and_keeping_are_named(tmp_path: Path) -> None:
    many = [probed(f"t{i:02}", 200 + i % 7, 110.0 + i) for i in range(30)]
    rows = rows_of(tmp_path, probed("zero_shot", 150, 100.0), *many)
    chart = forgetting.charts(rows, colours(rows))[0]
    names = [one["text"] for layer in chart.spec["layer"] if layer["mark"]["type"] == "text" for one in layer["data"]["values"]]
    assert chart.front_alone and set(names) == {"zero_shot", *(f"t{i:02}" for i in range(7))}
    assert len(chart.spec["layer"][-1]["data"]["values"]) == 31, "all have their dots"


def test_learning_is_counted_from_the_base_in_the_experiments_own_precision(tmp_path: Path) -> None:
    better = probed("zero_shot_nf4", 160, 100.0, precision="nf4", method="none", objective="none")
    rows = rows_of(tmp_path, better, probed("zero_shot", 150, 100.0), probed("lora", 200, 112.0))
    actual = report_rows.zero_shot(rows)
    assert actual and actual.technique == "zero_shot"


def served(name: str, seed: int = 0, own: float = 2.0, mixed: bool = True) -> Result:
    one = result(name, 200, seed)
    assert one.inference
    times: dict[str, Any] = {"adapters": {"1": 0.1, "8": own, "64": 8 * own}, "one_adapter": {"1": 0.1, "8": 1.0, "64": 8.0}, "adapters_mixed": mixed}
    return dataclasses.replace(one, inference=dataclasses.replace(one.inference, request_peak_bytes=2**30, merged_request_peak_bytes=2**29, **times))


def test_a_panel_shows_what_a_technique_costs(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, served("lora", 0, 2.0), served("lora", 1, 4.0), result("full", 190), result("zero_shot", 150), result("teacher", 178))
    panels = {p.row.technique: p for p in costs.panels(rows)}
    assert list(panels) == ["lora", "full", "zero_shot"], "the teacher is no way of making the model do the task"
    lora = {g.title: g for g in panels["lora"].figures}
    assert lora["Trainable"].text == "2.44 M" and lora["Trainable"].share == pytest.approx(100 * 2_442_240 / 134_515_008, abs=0.01)
    assert (lora["Its memory"].text, lora["Its memory, merged"].text) == ("1 GiB", "512 MiB")
    assert (lora["Its memory"].share, lora["Its memory, merged"].share) == (100.0, 50.0), "attached and merged on one scale"
    full = {g.title: g for g in panels["full"].figures}
    assert (full["Its memory"].text, full["Its memory"].share) == ("—", None) and full["Trainable"].share == 100.0
    assert panels["lora"].numbers == ["1", "8", "64"]
    assert panels["lora"].many == {"own adapter": ["100 ms", "3.0 s", "24 s"], "all by one": ["100 ms", "1.0 s", "8.0 s"]}
    assert panels["full"].numbers == [] and "Tuning" not in full, "nobody was tuned: no line of dashes"
    assert costs.unmeasured(rows)[:2] == ["Hyperparameters tried", "Tuning"]


def test_one_picture_has_every_measure_and_no_dash(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, served("lora"), result("full", 190), result("zero_shot", 150))
    spec = costs.picture(costs.panels(rows), colours(rows), 4)
    assert [part["title"]["text"] for part in spec["concat"]][:2] == ["Trainable", "Artefact"] and spec["columns"] == 4
    texts = {one["name"]: one["text"] for one in spec["concat"][0]["data"]["values"]}
    assert texts == {"lora": "2.44 M", "full": "135 M", "zero_shot": "0"} and "—" not in str([p["data"]["values"][0]["text"] for p in spec["concat"]])


def test_wrong_answers_stand_beside_the_right_ones_with_their_texts(tmp_path: Path) -> None:
    """Texts come from the prepared data where these are what the cell saw; the picture counts what was taken for what."""
    rows = [{"id": f"t{i}", "prompt": f"text number {i}"} for i in range(6)]
    write_jsonl(tmp_path / "data/vader_movies/test.jsonl", rows)
    write_json(tmp_path / "data/vader_movies/manifest.json", {})
    digest = sha256(tmp_path / "data/vader_movies/manifest.json")
    said = ["good", "bad", "bad", "good", "bad", None]
    for name, right in (("zero_shot", 3), ("lora", 3)):
        one = result(name, right, scores={"test": score(right, 6)}, provenance={"data_sha256": digest})
        predictions = [{"split": "test", "id": f"t{i}", "answer": "good", "prediction": p, "correct": p == "good",
                        "scores": {"good": -1.0, "bad": -2.0} if p else {}} for i, p in enumerate(said)]
        write_jsonl(keep(tmp_path, one, with_predictions=False) / "predictions.jsonl", predictions)
    (row, *_) = make_rows(select(tmp_path / "quick", {"techniques": ["zero_shot", "lora"], "seeds": [0], "train_rows": [200]})[0])
    one = mistakes(row, tmp_path / "data")
    assert one and (one.count, one.rows) == (4, 6) and one.pairs == [("good", "bad", 3), ("good", "no answer", 1)]
    assert [(w.text, w.answer, w.said) for w in one.wrong][:1] == [("text number 1", "good", "bad")] and one.wrong[-1].said == "no answer"
    theirs = listed.mistakes(row.cells[0], tmp_path / "data/vader_movies")
    assert [w.prompt for w in theirs.wrong] == [f"text number {i}" for i in (1, 2, 4, 5)] and theirs.confusion["good", "bad"] == 3
    assert one.matrix and {(c["right"], c["said"]): c["n"] for c in one.matrix["data"]["values"]}["good", "bad"] == 3
    across = one.matrix["layer"][0]["encoding"]["x"]["axis"]
    assert across["labelOverlap"] is False, "every column says which answer it is"
    assert "text number 1" in template("mistakes.html").render(mistakes=[one], task="vader_movies")
    write_json(tmp_path / "data/vader_movies/manifest.json", {"other": 1})
    other = mistakes(row, tmp_path / "data")
    assert other and other.wrong[0].text == "", "the data are no longer those that were seen"
    page = template("mistakes.html").render(mistakes=[other], task="vader_movies")
    assert "cannot be shown: data/vader_movies" in page and "Test row" not in page and "<tbody>" not in page, "no column of dashes"
    page = template("mistakes.html").render(mistakes=[dataclasses.replace(other, matrix=None, pairs=[])], task="vader_movies")
    assert "Test row" not in page and '<td class="said">bad</td>' in page, "free texts: what was said beside what is right"
    with pytest.raises(UserError, match="does not hold the rows that .* answered; run: python -m pipeline.prepare task=vader_movies"):
        listed.mistakes(row.cells[0], tmp_path / "data/vader_movies")


def test_a_panel_says_how_adapters_share_the_base(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, served("lora"), served("prompt_tuning", mixed=False), served("few_shot"))
    how = {p.row.technique: (p.how, list(p.many)) for p in costs.panels(rows)}
    assert how["lora"] == ("one batch, every row by its own adapter", ["own adapter", "all by one"])
    assert how["prompt_tuning"][0] == "adapters take turns: PEFT does not mix them"
    assert how["few_shot"] == ("the model is the base itself", ["requests"])


def test_both_parts_stand_on_the_page_and_only_where_something_was_measured(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a", probed("zero_shot", 150, 100.0), probed("lora", 200, 112.0), served("full"))
    text = page("quick", rows, [])
    assert "Learned against forgotten" in text and PROBED in text and "Complexity" in text and 'class="growth costs"' in text
    bare = [dataclasses.replace(result(n, 190), forgetting=None, scores={"test": result(n, 190).scores["test"]}) for n in ("zero_shot", "lora")]
    assert "Learned against forgotten" not in page("quick", rows_of(tmp_path / "b", *bare), [])

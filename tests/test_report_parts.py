"""What the report is made of: rows and how they are compared, its sentences, statistics, axes and labels."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from report_cells import BASE_NOTE, PROVENANCE, diverged, keep, oom, result, resumed

from pipeline.core.compose import ROOT
from pipeline.core.files import write_jsonl
from pipeline.measure.memory import Memory
from pipeline.records.finished import Cell, select
from pipeline.records.results import Cost, Result, Score, Synthetic
from pipeline.reporting import words as report_format
from pipeline.reporting.charts import colours, costs, pareto, scatter
from pipeline.reporting.figures import COLUMNS, FIGURES, SECTIONS, Row, columns, metrics, remarks
from pipeline.reporting.plot import Box, Label, leader, place_labels, scale, stacked, text_width
from pipeline.reporting.rows import make_rows
from pipeline.reporting.text import TABLES, markdown, opening, warnings
from pipeline.scoring.answers import by_row
from pipeline.stats.tiers import holm, sign_flip


def rows_of(*found: Result, root: Path) -> dict[str, Row]:
    """Rows of cells written below `root`, all in the grid."""
    for one in found:
        keep(root, one)
    axes = {"techniques": "technique", "seeds": "seed", "train_rows": "train_rows"}
    grid = {axis: sorted({getattr(r, field) for r in found}) for axis, field in axes.items()}
    return {r.name: r for r in make_rows(select(root / "quick", grid)[0])}


def test_a_clean_seed_stands_for_the_times(tmp_path: Path) -> None:
    first, second = result("full", 214, 0), result("full", 216, 1)
    rows = rows_of(resumed(first), second, root=tmp_path)
    assert second.phases and rows["full"].timing == "" and rows["full"].train_s == second.phases.train_s
    assert rows["full"].test == pytest.approx(430 / 500)


def test_shared_process_marks_the_total_alone(tmp_path: Path) -> None:
    alone = dataclasses.replace(result("full"), notes=[], shared_process=False)
    rows = rows_of(alone, result("lora"), root=tmp_path)
    assert rows["lora"].shared_process and not rows["full"].shared_process and rows["lora"].timing == ""
    assert rows["lora"].own_notes == (BASE_NOTE,)  # not on every cell


def test_one_seed_out_of_memory(tmp_path: Path) -> None:
    row = rows_of(result("full", 210, 0), oom("full", 1), root=tmp_path)["full"]
    assert (row.status, row.seeds, row.test) == ("oom in 1 of 2 seeds", 1, 210 / 250)


def test_diverged_seeds_are_counted_and_give_no_figure(tmp_path: Path) -> None:
    row = rows_of(result("full", 210, 0), diverged("full", 1), oom("full", 2), root=tmp_path)["full"]
    assert (row.status, row.seeds, row.test, row.diverged) == ("diverged in 1 of 3 seeds, oom in 1 of 3 seeds", 1, 210 / 250, 1)
    assert row.perplexity_change == result("full").forgetting.perplexity / 31.4 - 1


def test_rows_are_compared_at_the_same_number_of_training_rows(tmp_path: Path) -> None:
    found = [result(name, right, rows=n) for n, name, right in (
        (50, "zero_shot", 195), (50, "full", 200), (50, "lora", 198), (1000, "zero_shot", 195), (1000, "full", 240), (1000, "lora", 199))]
    rows = rows_of(*found, root=tmp_path)
    assert list(rows)[0] == "full (1000 rows)"
    assert {n: rows[n].standing for n in rows} == {
        "full (1000 rows)": "take", "lora (1000 rows)": "lower", "zero_shot (1000 rows)": "lower",
        "full (50 rows)": "tied", "lora (50 rows)": "tied", "zero_shot (50 rows)": "no_training",
    }
    text = opening(list(rows.values()))
    assert text[0].startswith("With 1,000 training rows: Take `full`: 96.0% accuracy")
    assert text[-1].startswith("With 50 training rows: Do not train yet: `zero_shot`, the untouched base, reaches 78.0%")


def test_standing_by_the_test_over_rows(tmp_path: Path) -> None:
    right = {"full": 217, "lora": 212, "zero_shot": 200, "few_shot": 150}
    for name, count in right.items():
        keep(tmp_path / "with", result(name, count))
        keep(tmp_path / "without", result(name, count), with_predictions=False)
    grid = {"techniques": list(right), "seeds": [0], "train_rows": [200]}
    with_answers, without = ({r.name: r for r in make_rows(select(tmp_path / k / "quick", grid)[0])} for k in ("with", "without"))
    assert {r.standing for r in without.values()} == {""} and without["full"].against_zero_shot is None
    assert {n: r.standing for n, r in with_answers.items()} == {"full": "take", "lora": "tied", "zero_shot": "lower", "few_shot": "lower"}
    assert {n: r.letters for n, r in with_answers.items()} == {"full": "a", "lora": "ab", "zero_shot": "b", "few_shot": "c"}
    assert with_answers["full"].against_zero_shot == pytest.approx(17 / 250)
    assert "The answers to single rows are not kept, so nothing is said" in " ".join(opening(list(without.values())))
    rows = list(with_answers.values())
    text = " ".join(opening(rows))
    assert "Not told apart from it: `lora`." in text and "One seed: this compares these weights, not the techniques;" in text
    assert "Tier of these weights" in [c.title for c in columns(rows)[0]] and remarks(rows[1]) == ["not told apart from full (these weights)"]
    table = markdown("quick", rows, [])
    assert "- One seed: tiers and p-values compare these weights" in table and "test over the rows alone, corrected for all pairs (docs" in table


def test_seeds_that_spread_widely_tell_less_than_one(tmp_path: Path) -> None:
    """What one seed separates, three that differ by as much as the techniques do not; zero-shot's repeats are one run."""
    counts = {"zero_shot": (195, 195, 195), "full": (205, 240, 206), "lora": (200, 170, 235)}
    rows = rows_of(*(result(name, right, seed) for name, found in counts.items() for seed, right in enumerate(found)), root=tmp_path)
    assert rows["full"].covers_seeds and rows["lora"].standing == "tied" and set(rows["lora"].letters) & set(rows["full"].letters)
    several = list(rows.values())
    assert "one seed" not in " ".join(opening(several)).lower() and "these weights" not in markdown("quick", several, [])
    assert "Tier" in [c.title for c in columns(several)[0]] and "- tier: a test over seeds and rows, corrected for all pairs" in markdown("quick", several, [])
    alone = rows_of(*(result(name, found[1], 0) for name, found in counts.items()), root=tmp_path / "alone")
    assert alone["lora"].standing == "lost" and alone["lora"].covers_seeds is False


def test_opening_states_the_numbers(tmp_path: Path) -> None:
    found = [result("zero_shot", 195), result("full", 217), result("lora", 214), result("teacher", 178)]
    said = opening(list(rows_of(*found, root=tmp_path).values()))
    assert said[0].startswith("Take `lora`: 85.6% accuracy on 250 test rows for 92 s of training and 1.51 GiB of memory, 7.6 points above the untouched base "
                              "`zero_shot` (95% interval +")
    assert said[1] == "It costs least of those that are as good: `full` is 1.2 points higher, which these data do not tell apart."
    assert "`lora` trains fastest (92 s; `full`: 118 s, 1.3 times as much), needs the least memory (1.51 GiB; `full`: 3.18 GiB," in " ".join(said)
    assert said[-1] == "The teacher `lexicon`, whose rationales the distilled techniques learn from, is right on 71.2% itself."


def test_a_cost_that_is_nearly_the_same_is_no_claim(tmp_path: Path) -> None:
    made = [dataclasses.replace(one := result(name, right), memory=dataclasses.replace(one.memory, peak_bytes=peak))
            for name, right, peak in (("full", 217, 505 * 2**20), ("lora", 214, 494 * 2**20))]
    said = " ".join(opening(list(rows_of(result("zero_shot", 195), *made, root=tmp_path).values())))
    assert "trains fastest" in said and "least memory" not in said and "1.0 times" not in said


def test_opening_when_nothing_beats_the_base(tmp_path: Path) -> None:
    rows = rows_of(result("zero_shot", 210), result("full", 200), result("lora", 212), root=tmp_path)
    said = opening(list(rows.values()))
    assert said[0].startswith("`full` (80.0%) lies below the untouched base `zero_shot` (84.0%)")
    assert "python -m pipeline.tune experiments=quick technique=full" in said[0] and said[1].startswith("Do not train yet: `zero_shot`")
    assert remarks(rows["full"])[0].startswith("below the untouched base: no verdict, tune it") and rows["lora"].standing == "tied"


def test_no_two_sentences_of_a_report_contradict_each_other(tmp_path: Path) -> None:
    """The p-value against zero-shot is corrected as the tiers are: no difference is called clear that the letters deny."""
    counts = {"zero_shot": 175, "few_shot": 184, "full": 199, "lora": 194, "qlora": 188, "prompt_tuning": 186}
    rows = rows_of(*(result(name, right) for name, right in counts.items()), root=tmp_path)
    for name, row in rows.items():
        if name != "zero_shot":
            told_apart = not set(row.letters) & set(rows["zero_shot"].letters)
            assert row.against_zero_shot_p is not None and (row.against_zero_shot_p < 0.05) is told_apart
    assert not any("best" in text for row in rows.values() for text in remarks(row))


def test_every_metric_is_compared_by_its_own_figures(tmp_path: Path) -> None:
    """ROUGE 42.0 against 0.0 read "0.0 points above it", because exact match was compared."""
    texts = {"zero_shot": "nothing at all", "lora": "the cat sat on a mat"}
    for name, text in texts.items():
        predictions = [{"split": "test", "id": f"t{i}", "answer": "the cat sat on the mat", "prediction": text, "output": text, "correct": False}
                       for i in range(30)]
        rouge = sum(by_row(predictions, "rouge_l")[0].values()) / 30
        score = Score(30, 0.0, 0.0, 0.11, rouge_l=rouge, metric_low=rouge, metric_high=rouge)
        one = dataclasses.replace(result(name), metric="rouge_l", scores={"test": score})
        write_jsonl(keep(tmp_path, one, with_predictions=False) / "predictions.jsonl", predictions)
    grid = {"techniques": list(texts), "seeds": [0], "train_rows": [200]}
    rows = {r.name: r for r in make_rows(select(tmp_path / "quick", grid)[0])}
    assert rows["lora"].against_zero_shot == pytest.approx(rows["lora"].test) and (rows["lora"].test or 0) > 0.8
    text = opening(list(rows.values()))[0]
    assert text.startswith("Take `lora`: 83.3% ROUGE-L on 30 test rows") and "83.3 points above the untouched base" in text


def test_differing_conditions_are_told(tmp_path: Path) -> None:
    other = dataclasses.replace(result("lora"), hardware={"device": "cuda", "gpu": "NVIDIA H100", "gpu_memory_bytes": 80 * 2**30},
                                provenance={**PROVENANCE, "data_sha256": 64 * "1"})
    told = " ".join(warnings(list(rows_of(result("full"), other, root=tmp_path).values()), []))
    assert "differ in hardware (AMD EPYC (2 cores), 23.5 GiB; NVIDIA H100, 80 GiB)" in told and "differ in data (sha256 0018" in told
    same = rows_of(result("full"), result("lora"), result("teacher"), root=tmp_path / "same")
    assert warnings(list(same.values()), []) == []


def test_all_rows_of_the_task(tmp_path: Path) -> None:
    found = dataclasses.replace(result("full"), cell="full-s0-nall", train_rows=700)
    keep(tmp_path, found)
    kept, missing = select(tmp_path / "quick", {"techniques": ["full"], "seeds": [0, 1], "train_rows": [None]})
    assert [c.result.cell for c in kept] == ["full-s0-nall"] and missing == ["full-s1-nall"]


# the table of figures


def test_every_figure_stands_in_a_result_and_every_column_says_what_it_means() -> None:
    full = result("lora")
    cell = Cell(dataclasses.replace(full, cost=Cost(1.0, "EUR", 2.5), synthetic=Synthetic("made", 9, 0.5, "t", 1.0)), Path("none"), "lora", "200")
    assert all(one.about and one.section in SECTIONS for one in COLUMNS)
    for key, one in FIGURES.items():
        assert hasattr(Row, key) and one.key == key
        one.of(cell)  # a name that Result does not have would raise here
    assert {key for keys in TABLES for key in keys} <= {one.key for one in COLUMNS}


def test_the_figures_for_dvc_leave_out_what_was_not_measured() -> None:
    bare = dataclasses.replace(result("lora"), scores={"test": Score(10, 0.8, 0.49, 0.943)}, memory=Memory("cpu_rss", None), phases=None)
    assert metrics(Cell(bare, Path("none"), "lora", "200")) == {"test": 0.8, "trainable": 2_442_240, "artefact_bytes": 9_787_976, "latency_s": 0.118}


# statistics and drawing


def test_pareto_front_of_a_known_set() -> None:
    points = [(1.0, 0.5), (2.0, 0.7), (3.0, 0.6), (4.0, 0.9), (4.0, 0.8), (2.0, 0.7), (5.0, 0.9)]
    assert pareto(points) == [0, 1, 5, 3]
    assert pareto([(0.0, 0.5)]) == [0] and pareto([]) == []


def test_sign_flip_is_mcnemar_for_one_seed() -> None:
    for gained, lost in ((8, 1), (0, 0), (5, 5), (30, 10), (1, 0)):
        exact = min(1.0, 2 * sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1)) / 2 ** (gained + lost))
        assert sign_flip([1] * gained + [-1] * lost + [0] * 9) == pytest.approx(exact)
    assert sign_flip([1] * 8 + [-1]) == pytest.approx(0.0390625)
    assert sign_flip([2, 1]) == pytest.approx(0.5) and sign_flip([2, -1]) == 1.0  # sums 3, 1, -1, -3


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([]) == []


def test_numbers_as_text() -> None:
    f = report_format
    assert [f.size(v) for v in (None, 0, 1_420, 9_787_976, 3.41e9)] == ["—", "0", "1.39 KiB", "9.33 MiB", "3.18 GiB"]
    assert [f.count(v) for v in (None, 0, 11_520, 2_442_240, 134_515_008)] == ["—", "0", "11,520", "2.44 M", "135 M"]
    assert [f.seconds(v) for v in (None, 0.0, 0.417, 4.21, 61.4, 1234)] == ["—", "0", "0.42", "4.2", "61", "1,234"]
    assert [f.seconds(v) for v in (0.0003, 0.996, 9.96)] == ["< 0.01", "1.0", "10"] and f.size(9.999 * 2**20) == "10.0 MiB" and f.rate(1165.37) == "1,165"
    assert [f.growth(v) for v in (None, 0.0, 0.082, -0.021, 8.99, 51.9, 4950.965)] == ["—", "0.0%", "+8.2%", "−2.1%", "+899.0%", "×53", "×4,952"]
    assert [f.points(v) for v in (None, 0.0, -0.0001, 0.082, -0.068)] == ["—", "0.0", "0.0", "+8.2", "−6.8"]
    assert [f.p_value(v) for v in (None, 0.0004, 0.0391, 0.45)] == ["", "p < 0.001", "p = 0.039", "p = 0.45"]


def test_zero_has_its_place_on_a_log_axis() -> None:
    axis = scale([0.0, 1e4, 1e8], 40, 360, log=True)
    assert axis.log and axis.zero is not None and axis(0.0) == axis.zero < axis(1e4) - 15 < axis(1e8) < 360
    assert not scale([5.0, 6.0], 0, 100, log=True).log
    assert all(scale([0.0, 1e4, 1e8], 40, 360, log=True)(t) > axis.start for t in axis.ticks())


def test_labels_do_not_collide() -> None:
    points = [(100.0 + 3 * i, 100.0 + 2 * i, f"technique_{i}") for i in range(8)]
    dots = [Box(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points]
    placed = place_labels(points, [dots, [Box(0, 90, 380, 91)]], Box(0, 0, 380, 300))
    boxes = [Box(p.x, p.y - 6, p.x + text_width("technique_0"), p.y + 6) for p in placed if p]
    assert len(boxes) == 8
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in [*boxes[:i], *dots])
    assert place_labels([(5.0, 5.0, "too long for this frame")], [[]], Box(0, 0, 50, 50)) == [None]
    assert leader(points[0][:2], Label(points[0][0] + 9, 100.0, 60)) is None, "a name beside its dot"
    assert leader((100.0, 100.0), Label(140.0, 100.0, 60)) == (140.0, 100.0) and leader((100.0, 100.0), Label(70.0, 150.0, 60)) == (100.0, 143.5)
    levels = stacked([10.0, 11.0, 11.5, 80.0], 13)
    assert all(b - a >= 12.99 for a, b in zip(levels, levels[1:], strict=False)) and levels[3] == 80.0


def test_many_techniques_are_counted_and_not_listed(tmp_path: Path) -> None:
    """Twelve alike, the last far behind for lack of seeds to tell: three names, a number, and how far down it goes."""
    near = [result(f"t{i:02}", 200 - i, memory=Memory("cpu_rss", (i + 1) * 10**9, 10**9)) for i in range(12)]
    rows = list(rows_of(*near, result("zero_shot", 150), root=tmp_path).values())
    assert "corrected as a false-discovery rate" in markdown("quick", rows, []) and "all pairs" not in markdown("quick", rows, [])
    text = " ".join(opening(rows))
    assert "Not told apart from it: `t01`, `t02`, `t03` and " in text and "`t07`, `t08`" not in text
    assert "Of the trained techniques within 2.0 points of the highest, `t00` needs the least memory (954 MiB; `t05`: 5.59 GiB" in text


def test_engines_that_were_taken_for_want_of_a_hand_written_step_are_one_note(tmp_path: Path) -> None:
    """Of 45 techniques 27 lines said the same of one each."""
    def of(name: str, reason: str) -> Result:
        one = result(name, 200)
        return dataclasses.replace(one, work=dataclasses.replace(one.work, engine="captured", engine_reason=reason))

    kinds = [of(name, f"{name.upper()} has no hand-written step") for name in ("vera", "road")]
    text = markdown("quick", list(rows_of(*kinds, of("lora_fa", "the method corrects its gradients"), root=tmp_path).values()), [])
    said = r"^- (vera, road|road, vera): engine: .*because they have no hand-written step$"
    assert text.count("no hand-written step") == 1 and re.search(said, text, re.MULTILINE)
    assert "- lora_fa: engine: autograd, because the method corrects its gradients\n" in text
    alone = markdown("quick", list(rows_of(kinds[0], result("full", 190), root=tmp_path / "alone").values()), [])
    assert "because VERA has no hand-written step" in alone, "of one it is said why"


def test_the_untouched_base_is_the_one_in_the_experiment_s_own_precision(tmp_path: Path) -> None:
    rounded = dataclasses.replace(result("zero_shot", 160), technique="zero_shot_int8", cell="zero_shot_int8-s0-n200", precision="int8")
    rows = rows_of(result("full", 200), result("zero_shot", 150), rounded, root=tmp_path)
    assert rows["full"].against_zero_shot == pytest.approx((200 - 150) / 250)
    assert "20.0 points above the untouched base `zero_shot`" in " ".join(opening(list(rows.values())))


def test_a_family_has_a_colour_of_its_own() -> None:
    """As many as conf/technique/ names, each with its rules in the style sheets."""
    families = sorted({str(yaml.safe_load(p.read_text())["technique"]["family"]) for p in (ROOT / "conf" / "technique").glob("*.yaml")} - {"teacher"})
    found = colours([SimpleNamespace(family=name, teacher=None) for name in families])  # type: ignore[list-item]
    assert len(set(found.values())) == len(families) >= 9
    style = (ROOT / "pipeline/reporting/templates/report.css").read_text()
    for name in found.values():
        assert all(f"{rule}{name}" in style for rule in (".swatch.",)) and style.count(f"--{name}:") == 2


def of_layer(spec: dict, mark: str) -> list[dict]:
    """The data of a drawing's last layer with this mark."""
    return next(layer["data"]["values"] for layer in reversed(spec["layer"]) if layer["mark"]["type"] == mark)


def test_of_many_points_those_on_the_front_are_named(tmp_path: Path) -> None:
    found = [result(f"t{i:02}", 200 - i, memory=Memory("cpu_rss", (30 - i % 29) * 10**8, 10**8)) for i in range(30)]
    rows = list(rows_of(*found, root=tmp_path).values())
    cost = next(c for c in costs(rows) if "memory" in c.title)
    few, many = (scatter(some, cost, colours(rows)) for some in (rows[:10], rows))
    assert few and many and len(of_layer(few.spec, "text")) == 10
    assert len(of_layer(many.spec, "point")) == 30 and 0 < len(of_layer(many.spec, "text")) < 30
    assert many.front_alone and not few.front_alone, "the page says so"


def test_what_begins_at_another_cell_has_no_training_cost_of_its_own(tmp_path: Path) -> None:
    begun = result("t1", 205, start="full")
    rows = list(rows_of(result("full", 200), result("lora", 190), begun, root=tmp_path).values())
    time, memory, trained = (scatter(rows, cost, colours(rows)) for cost in costs(rows))
    assert time and trained and time.left_out == trained.left_out == ["t1 (begins at another cell)"]
    assert memory and memory.left_out == [] and "t1` trains fastest" not in " ".join(opening(rows))

"""The report as a whole: known figures, em dashes, escaping, missing and lost cells, whole or not at all, self-contained."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import altair as alt
import pytest
import yaml
from report_cells import BASE_NOTE, GRID, PROVENANCE, diverged, keep, oom, result, resumed, score, write_experiment

from pipeline import report
from pipeline.cell import grid as cells
from pipeline.core import files
from pipeline.measure.memory import Memory
from pipeline.records.finished import Cell
from pipeline.records.results import Result
from pipeline.reporting.figures import metrics
from pipeline.reporting.page import words
from pipeline.reporting.rows import history_csv


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the experiment `quick` and its grid."""
    monkeypatch.setattr(cells, "experiments", lambda: tmp_path / "experiments")
    write_grid(tmp_path, GRID)
    return tmp_path


def write_grid(home: Path, grid: dict[str, Any]) -> None:
    (home / "experiments" / "quick").mkdir(parents=True, exist_ok=True)
    (home / "experiments" / "quick" / "params.yaml").write_text(yaml.safe_dump({"experiment": "quick", "grid": grid}))


def run(home: Path) -> int:
    return report.main(["experiments=quick", f"paths.results={home}/results", f"paths.report={home}/report"])


def table(home: Path) -> dict[str, dict[str, str]]:
    lines = csv.DictReader(io.StringIO((home / "report" / "quick" / "table.csv").read_text(encoding="utf-8")))
    return {line["name"]: line for line in lines}


class Page(HTMLParser):
    """Tags, attributes and the text of the comparison's cells by row."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attributes)))
        if name not in ("meta", "br", "link", "input"):
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name


def test_report_of_an_experiment(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_experiment(home / "results")
    assert run(home) == 0
    printed = capsys.readouterr().out
    folder = home / "report" / "quick"
    assert sorted(p.name for p in folder.iterdir()) == ["charts", "history.csv", "index.html", "metrics", "table.csv", "table.md"]
    assert len(list((folder / "metrics").iterdir())) == 14 and not (folder / "metrics" / "step_by_step-s0-n200.json").exists()
    assert json.loads((folder / "metrics" / "full-s1-n200.json").read_text()) == metrics(Cell(result("full", 217, 1), folder, "full", "200"))
    assert printed == (folder / "table.md").read_text() + f"\nreport: {folder / 'index.html'}\n"
    points = list(csv.DictReader(io.StringIO((folder / "history.csv").read_text())))
    assert [(p["step"], p["loss"]) for p in points if p["cell"] == "full-s1-n200"] == [
        (str(p["step"]), str(p.get("loss", ""))) for p in result("full", 217, 1).history
    ]
    lines = table(home)
    assert list(lines) == ["full", "lora+best", "lora", "qlora", "prompt_tuning", "zero_shot", "few_shot", "teacher", "step_by_step"]
    full = lines["full"]
    assert float(full["test"]) == pytest.approx((214 + 217) / 2 / 250)
    assert float(full["accuracy_low"]) == pytest.approx(score(214).accuracy_low)
    assert float(full["accuracy_high"]) == pytest.approx(score(217).accuracy_high)
    assert (float(full["test_seed_low"]), float(full["test_seed_high"]), full["seeds"]) == (214 / 250, 217 / 250, "2")
    assert float(full["train_s"]) == pytest.approx(118 * 1.015) and full["labelled_rows"] == "240" and full["trainable"] == "134515008"
    assert float(full["transfer"]) == pytest.approx((214 + 217) / 500 - (9 + 31 + 4) / 750)
    assert float(full["perplexity_change"]) == pytest.approx(118 * 1.015 / 40 / 31.4)
    assert (lines["zero_shot"]["labelled_rows"], lines["few_shot"]["labelled_rows"], lines["teacher"]["labelled_rows"]) == ("0", "8", "0")
    assert lines["lora+best"]["seeds"] == "1" and lines["lora+best"]["test_seed_low"] == ""


@pytest.mark.slow
def test_other_sizes_and_seeds_than_the_grid_s_are_reported_on_demand(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_experiment(home / "results")
    write_grid(home, {**GRID, "train_rows": [7], "seeds": [0]})
    assert run(home) == 0 and "full" not in table(home)
    capsys.readouterr()
    words = ["experiments=quick", f"paths.results={home}/results", f"paths.report={home}/report", "report.train_rows=[200]", "report.seeds=[0,1,4,5,6,7]"]
    assert report.main(words) == 0
    printed = capsys.readouterr().out
    assert table(home)["full"]["seeds"] == "2"
    assert re.search(r"^- not run: (\d\d) cells, (\S+ ){12}…$", printed, re.M), "many are counted, a dozen named"


@pytest.mark.parametrize(("word", "said"), [
    ("report.seeds=3", "'report.seeds' is 3; it takes a list or null"), ("report.train_rows=[many]", "'report.train_rows[0]' is 'many'; it takes int"),
    ("report.seeds=[]", "'report.seeds' is []; write what it is, or null"), ("report.seeds=[true]", "'report.seeds[0]' is True; it takes int"),
])
def test_an_axis_that_is_no_list_of_numbers_is_refused(home: Path, capsys: pytest.CaptureFixture[str], word: str, said: str) -> None:
    assert report.main(["experiments=quick", f"paths.results={home}/results", f"paths.report={home}/report", word]) == 2
    assert said in capsys.readouterr().err and not (home / "report").exists()


@pytest.mark.parametrize(("changes", "said"), [
    ({"task": "svamp"}, "full-s0-n200 has task=vader_movies and {}/lora-s0-n200 has task=svamp, which no ranking may mix; move one of the two folders away"),
    ({"model": "llama"}, "model=smollm2_135m and {}/lora-s0-n200 has model=llama"),
    ({"metric": "macro_f1"}, "metric=accuracy and {}/lora-s0-n200 has metric=macro_f1"),
])
def test_cells_of_several_tasks_models_or_metrics_are_not_ranked(home: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], said: str) -> None:
    write_grid(home, {"techniques": ["full", "lora", "step_by_step"], "seeds": [0], "train_rows": [200]})
    keep(home / "results", result("full"))
    keep(home / "results", dataclasses.replace(result("lora"), **changes))
    assert run(home) == 2 and not (home / "report").exists()
    error = capsys.readouterr().err
    assert said.format(home / "results" / "quick") in error and "experiment=<name>" in error and error.count("\n") == 1


def test_a_cell_out_of_memory_has_no_metric_that_could_differ(home: Path) -> None:
    write_grid(home, {"techniques": ["full", "step_by_step"], "seeds": [0], "train_rows": [200]})
    keep(home / "results", dataclasses.replace(result("full"), metric="macro_f1"))
    keep(home / "results", oom("step_by_step"))
    assert run(home) == 0 and set(table(home)) == {"full", "step_by_step"}


def test_one_cell_of_what_no_seed_changes_is_all_of_them(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The untouched base and the teacher answer alike whatever the seed, so benchmarks.slot runs them once."""
    write_grid(home, {"techniques": ["zero_shot", "teacher", "few_shot"], "seeds": [0, 1], "train_rows": [200, 300]})
    for name in ("zero_shot", "teacher", "few_shot"):
        keep(home / "results", result(name, 195))
    assert run(home) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if "not run" in line)
    assert set(said.partition("not run: ")[2].split(", ")) == {
        *(f"{name}-s{seed}-n300" for name in ("zero_shot", "teacher", "few_shot") for seed in (0, 1)), "few_shot-s1-n200"}


def test_missing_and_lost_cells_are_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_experiment(home / "results")
    run(home)
    printed, page = capsys.readouterr().out, (home / "report" / "quick" / "index.html").read_text()
    assert "not run: prompt_tuning-s1-n200\n" in printed
    assert "out of memory on AMD EPYC (2 cores): step_by_step-s0-n200, step_by_step-s1-n200" in printed
    assert re.search(r"^\| step_by_step .*\| out of memory +\|$", printed, re.M)
    assert "not run: prompt_tuning-s1-n200" in page and "ended beyond the limit of 3.0 GiB" in page
    assert "bitfit" not in printed + page  # out of the grid, still on disk
    assert table(home)["step_by_step"]["status"] == "oom"


def test_a_diverged_cell_is_a_row_without_figures(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_grid(home, {"techniques": ["full", "lora"], "seeds": [0], "train_rows": [200]})
    keep(home / "results", result("full"))
    keep(home / "results", diverged("lora"))
    assert run(home) == 0
    printed, page = capsys.readouterr().out, (home / "report" / "quick" / "index.html").read_text()
    assert "diverged, so without a figure: lora-s0-n200" in printed and re.search(r"^\| lora .*\| diverged +\|$", printed, re.M)
    assert "training diverged at step 3" in page and (table(home)["lora"]["status"], table(home)["lora"]["test"]) == ("diverged", "")


def test_a_damaged_result_is_named_and_left_out(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_grid(home, {"techniques": ["full", "lora"], "seeds": [0], "train_rows": [200]})
    for name in ("full", "lora"):
        keep(home / "results", result(name))
    path = next((home / "results").rglob("lora-s0-n200")) / "result.json"
    path.write_text(path.read_text()[:100])
    assert run(home) == 0
    told = capsys.readouterr()
    assert told.err.count(f"warning: {path} is not JSON") == 1 and "not run: lora-s0-n200" in told.out and set(table(home)) == {"full"}


def test_unmeasured_is_an_em_dash_and_never_zero(home: Path) -> None:
    write_experiment(home / "results")
    run(home)
    text = (home / "report" / "quick" / "table.md").read_text()
    timed = [line for line in text.splitlines() if "‡" in line]
    qlora, zero = (next(line for line in timed if line.startswith(f"| {name} ")).split("|") for name in ("qlora", "zero_shot"))
    header = next(line for line in text.splitlines() if "Peak memory" in line).split("|")
    cost = {h.strip(): (q.strip(), z.strip()) for h, q, z in zip(header, qlora, zero, strict=True)}
    assert cost["Peak memory"] == ("—", "0.98 GiB (RSS)")
    assert cost["Train, s"][1] == "0" and cost["Trainable"][1] == "0"  # truly nothing
    lost = next(line for line in text.splitlines() if line.startswith("| step_by_step") and "out of" not in line)
    assert {cell.strip() for cell in lost.split("|")[2:-1]} == {"—"}
    assert table(home)["qlora"]["peak_bytes"] == "" and table(home)["teacher"]["trainable"] == ""


def test_columns_without_any_value_are_said_to_be_unmeasured(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("zero_shot", "full"):
        found = result(name)
        scores = {k: v for k, v in found.scores.items() if not k.startswith("transfer/")}
        keep(home / "results", dataclasses.replace(found, forgetting=None, scores=scores))
    run(home)
    printed, page = capsys.readouterr().out, (home / "report" / "quick" / "index.html").read_text()
    assert "not measured: Transfer, %, Energy, kJ, Perplexity, Minimal pairs" in printed
    assert "Not measured in this experiment: Transfer, %, Energy, kJ, Perplexity, Minimal pairs." in page
    assert "Transfer," not in page.partition("<thead>")[2].partition("<tbody>")[0], "no column of dashes"


def test_page_is_self_contained_and_well_formed(home: Path, drawn: None) -> None:
    write_experiment(home / "results")
    run(home)
    html = (home / "report" / "quick" / "index.html").read_text()
    page = Page(html)
    assert page.open == []
    assert not re.search(r"https?://(?!127\.0\.0\.1)|@import|url\(", html), "MLflow's own pages are the only ones linked to"
    assert not [t for t, a in page.tags if t in ("link", "img", "iframe", "object", "base") or "src" in a or ("href" in a and t != "a")]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    inner = {a["href"][1:] for t, a in page.tags if t == "a" and a["href"].startswith("#")}
    assert len(ids) == len(set(ids)) and inner and inner <= set(ids), "every point and every name leads to its cells"
    assert html.count("tags.`alignscope.cell` = 'quick/lora-s0-n200'") == 1 and "train:" in html, "command, MLflow run and config of every cell"
    assert "default-src 'none'" in html and "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    sorts = [a["aria-sort"] for t, a in page.tags if t == "th" and "aria-sort" in a]
    assert sorts == ["descending"]
    assert html.count("<svg ") == 1 + 3 + 2 + 2 + 3 + 5  # intervals, costs, complexity and times twice each, what was forgotten, curves of what trained
    assert html.index('class="opening"') < html.index('id="comparison"') < html.index("Quality against cost"), "verdict, then the table, then the pictures"
    folder = home / "report" / "quick" / "charts"
    kept = {"intervals", "complexity", "times", "against_training_time", "against_peak_memory", "against_trainable_parameters"}
    assert {p.name for p in folder.iterdir()} == {f"{name}.{end}" for name in kept for end in ("vl.json", "svg", "png")}
    for name in kept:
        alt.Chart.from_dict(json.loads((folder / f"{name}.vl.json").read_text()), validate=True)
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") and "http://www.w3.org/2000/svg" in (folder / f"{name}.svg").read_text()
    assert BASE_NOTE in html and "2.13.0+cpu" in html and str(PROVENANCE["model_sha256"]) in html and str(PROVENANCE["command"]) in html


def test_texts_of_results_are_escaped(home: Path) -> None:
    evil = "<script>alert(1)</script>"
    write_grid(home, GRID | {"techniques": ["zero_shot", "evil"]})
    found = result("lora", 212)
    keep(home / "results", result("zero_shot", 195))
    changes: dict[str, Any] = {"notes": [evil, "a|b"], "hyperparameters": {evil: evil, "a|b": "a|b"}, "family": evil}
    keep(home / "results", dataclasses.replace(found, technique="evil", cell="evil-s0-n200", **changes, provenance={**PROVENANCE, "command": evil}))
    assert run(home) == 0
    html, text = (home / "report" / "quick" / "index.html").read_text(), (home / "report" / "quick" / "table.md").read_text()
    assert [t for t, _ in Page(html).tags].count("script") == 1 and "alert(1)" in html
    assert html.count("<script>") == 1 and "&lt;script&gt;alert" in html
    assert len({len(line) for line in text.splitlines() if line.startswith("| ") and "Train, s" in line}) == 1
    assert words("a `<b>` & c") == "a <b>&lt;b&gt;</b> &amp; c"


@pytest.mark.slow
def test_nothing_is_half_written(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_experiment(home / "results")
    run(home)
    folder = home / "report" / "quick"
    before = {p: p.read_bytes() for p in folder.rglob("*.*")}
    keep(home / "results", result("prompt_tuning", 200, 1))
    write = files.write_text

    def failing(path: Path, text: str) -> None:
        if path.name == "table.csv":
            raise OSError(28, "No space left on device", str(path))
        write(path, text)

    monkeypatch.setattr(report, "write_text", failing)
    assert run(home) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in folder.rglob("*.*")} == before and [p.name for p in folder.parent.iterdir()] == ["quick"]
    monkeypatch.undo()
    monkeypatch.setattr(cells, "experiments", lambda: home / "experiments")
    assert run(home) == 0 and "not run" not in (folder / "table.md").read_text()


@pytest.mark.parametrize("technique, code", [("lora", 2), ("bitfit", 0)])
def test_a_result_of_an_older_schema(home: Path, technique: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    write_experiment(home / "results")
    path = home / "results" / "quick" / f"{technique}-s0-n200" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 0}))
    assert run(home) == code
    if code:
        assert "was written by schema 0" in capsys.readouterr().err and not (home / "report").exists()


def test_without_results_or_grid(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home) == 2
    assert "none of the grid's 16 cells; run: python -m pipeline.cells experiments=quick" in capsys.readouterr().err
    assert report.main([]) == 2
    assert "experiments/scratch/params.yaml" in capsys.readouterr().err
    assert not (home / "report").exists()


NOTHING: dict[str, Any] = dict.fromkeys(("phases", "memory", "work", "size", "inference", "forgetting"))


@pytest.mark.parametrize("found", [
    [oom("full")], [result("teacher", 178)], [result("zero_shot")], [result("full", 0), result("lora", 0)],
    [dataclasses.replace(result("lora"), history=[{"step": 1, "loss": 2.0, "lr": 0.1}])],
    [dataclasses.replace(result("lora"), scores={}, provenance={}, hardware={}, **NOTHING)],
    [dataclasses.replace(result("full"), metric="macro_f1"), dataclasses.replace(result("zero_shot"), metric="macro_f1")],
], ids=["oom", "teacher", "zero_shot", "all wrong", "one step", "bare", "macro_f1"])
def test_report_of_few_or_poor_cells(home: Path, found: list[Result]) -> None:
    for one in found:
        keep(home / "results", one)
    assert run(home) == 0
    assert not re.search(r"\b(nan|None|inf)\b", (home / "report" / "quick" / "table.md").read_text())
    assert Page((home / "report" / "quick" / "index.html").read_text()).open == []


@pytest.mark.slow
def test_resumed_and_packed_times_are_marked_and_kept_out_of_charts(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = dataclasses.replace(result("qlora", 207), packed=True, memory=Memory("cpu_rss", 10**9))
    for one in (result("zero_shot", 195), result("full", 214), resumed(result("lora", 212)), packed):
        keep(home / "results", one)
    run(home)
    printed, html, lines = capsys.readouterr().out, (home / "report" / "quick" / "index.html").read_text(), table(home)
    assert re.search(r"^\| lora +\| +92 † ", printed, re.M) and "† resumed, or packed" in printed
    assert (lines["lora"]["train_s"], lines["lora"]["timing"], lines["qlora"]["timing"]) == ("", "resumed", "packed")
    assert lines["full"]["train_s"] == "118" and lines["full"]["timing"] == ""
    assert "Not drawn: lora (resumed), qlora (packed)." in html and "Not drawn: qlora (packed)." in html


def test_what_a_technique_adds_to_its_history_gets_a_column() -> None:
    plain: dict[str, float] = {"step": 1, "loss": 2.0, "lr": 1e-3}
    lines = list(csv.DictReader(io.StringIO(history_csv({"grpo": [{**plain, "reward": 0.25}], "lora": [plain]}))))
    assert [(line["cell"], line["reward"]) for line in lines] == [("grpo", "0.25"), ("lora", "")]

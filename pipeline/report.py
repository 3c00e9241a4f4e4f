"""Compare the cells of an experiment: one row a technique, charts, and a paragraph that says what came out.

    python -m pipeline.report experiments=quick
    python -m pipeline.report experiments=techniques report.train_rows=[1000] report.seeds=[0,1,2]      other cells than the grid's

Reads results/<experiment>/**/result.json and predictions.jsonl, and what pipeline.evaluate wrote of the same cells (split=merged, suite=…),
keeps the cells of experiments/<name>/params.yaml's grid (and confirm cells of its techniques), and writes report/<experiment>/{index.html,
table.md, table.csv, history.csv, metrics/<cell>.json, charts/<name>.{vl.json,svg,png}} atomically; `dvc metrics` reads the metrics,
`dvc plots` the CSVs and charts. Prints table.md and the path of the page.
Cells without a result are named, those out of memory are rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from pipeline.cell.grid import grid
from pipeline.core.commands import entry
from pipeline.core.files import atomic_folder, write_json, write_text
from pipeline.records import failed, tuned
from pipeline.records.finished import select
from pipeline.records.mlflow import log_note
from pipeline.reporting import tuning, vega
from pipeline.reporting.figures import metrics
from pipeline.reporting.growth import growth, summary
from pipeline.reporting.page import drawings, page
from pipeline.reporting.rows import history_csv, make_rows, table_csv
from pipeline.reporting.text import markdown


def run(cfg: DictConfig, overrides: list[str]) -> None:
    """Write and print the report of cfg.experiment."""
    axes = {key: list(value) for key in ("train_rows", "seeds") if (value := cfg.report[key]) is not None}
    cells, missing = select(Path(cfg.paths.results) / cfg.experiment, {**grid(cfg.experiment)["grid"], **axes})
    rows = make_rows(cells, Path(cfg.paths.evaluations))
    grown = growth(rows, cfg.report.target)
    tunings = tuned.read_all(Path(cfg.paths.tuning) / cfg.experiment)
    missing = failed.named(cfg.paths.work, cfg.experiment, missing)
    text = markdown(cfg.experiment, rows, missing, [*summary(grown), *tuning.summary(rows, tunings)])
    files = {
        "index.html": page(cfg.experiment, rows, missing, grown, tunings, Path(cfg.paths.data)),
        "table.md": text,
        "table.csv": table_csv(rows),
        "history.csv": history_csv({c.result.cell: c.result.history for c in cells}),
    }
    folder = Path(cfg.paths.report) / cfg.experiment
    with atomic_folder(folder, "table.csv") as beside:
        beside.mkdir()
        for name, content in files.items():
            write_text(beside / name, content)
        for name, drawn in vega.files(drawings(rows, grown)).items():
            (beside / name).parent.mkdir(exist_ok=True)
            (beside / name).write_bytes(drawn)
        for cell in cells:
            if figures := metrics(cell):
                write_json(beside / "metrics" / f"{cell.result.cell}.json", figures)
    log_note(cfg, text)
    print(f"{text}\nreport: {folder / 'index.html'}")


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())

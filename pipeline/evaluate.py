"""Score the artefact of a finished cell on a prepared split, the same task's or another set's.

    python -m pipeline.evaluate cell=results/quick/lora-s0-n160 split=transfer/tweets

    python -m pipeline.evaluate cell=results/quick/lora-s0-n160 suite=[arc_easy,wikitext]      tasks of lm-evaluation-harness
    python -m pipeline.evaluate cell=results/quick/lora-s0-n160 split=test to=tasks            the split as such a task, then
    python -m pipeline.evaluate cell=results/quick/full-s0-n160 suite=<its name> suite_path=tasks

Splits: validation, test, transfer/<set>. Writes evaluations/<experiment>/<cell>/<split>/{score.json, predictions.jsonl}. With
split=probes it probes what the artefact forgot (docs/forgetting.md) and writes forgetting.json there; with split=merged it folds the adapter into
weights of bf16, NF4, int8 and GGUF Q8_0 and writes what is left of it to merged.json (docs/serving.md); with suite=… it asks that library's tasks of
the artefact and of its base, and writes suites/<task>.{json,jsonl}.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from omegaconf import DictConfig

from pipeline.core.commands import entry
from pipeline.core.files import UserError, write_json, write_jsonl
from pipeline.records.finished import cell_config, finished
from pipeline.records.results import Result
from pipeline.scoring.answers import headline
from pipeline.serving import merging, suites
from pipeline.serving.artefact import Artefact, probe_artefact, rows_of, score_artefact, scorer_of


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Load the cell's artefact onto its base and score the split; limits and batch size are this command's."""
    if not cfg.cell:
        raise UserError("pipeline.evaluate needs a finished cell; add cell=results/<experiment>/<cell>")
    result = finished(cfg.cell)
    if cfg.suite:
        return _suite(cfg, result)
    target = Path(cfg.paths.evaluations) / result.experiment / result.cell / cfg.split.replace("/", "-")
    config, folder = cell_config(result, cfg), Path(cfg.cell) / "artefact"
    if cfg.split == "probes":
        probes = probe_artefact(config, folder)
        write_json(target / "forgetting.json", {"cell": result.cell, **dataclasses.asdict(probes)})
        after, before = ("—" if value is None else f"{value:.2f}" for value in (probes.perplexity, probes.perplexity_base))
        print(f"{result.cell}: perplexity {after}, the base's {before}; {probes.probes}; {target}/forgetting.json")
        return 0
    if cfg.split == "merged":
        print(merging.write(result, Artefact.at(result.cell, folder, config), target / "merged.json"))
        return 0
    if cfg.to:
        return _as_task(cfg, result)
    predictions, score = score_artefact(config, folder, cfg.split)
    write_jsonl(target / "predictions.jsonl", predictions)
    write_json(target / "score.json", {"split": cfg.split, "cell": result.cell, **dataclasses.asdict(score)})
    print(f"{result.cell} on {cfg.split}: {result.metric} {headline(score, result.metric):.3f}, {score.rows} rows; {target}/score.json")
    return 0


def _suite(cfg: DictConfig, result: Result) -> int:
    artefact = Artefact.at(result.cell, Path(cfg.cell) / "artefact", cell_config(result, cfg))
    suite = suites.Suite((cfg.suite,) if isinstance(cfg.suite, str) else tuple(cfg.suite), cfg.suite_path, cfg.suite_rows, cfg.merged)
    target = Path(cfg.paths.evaluations) / result.experiment / result.cell / "suites"
    for task, metrics in suites.run(result, artefact, suite, target, Path(cfg.paths.work)).items():
        print(f"{result.cell} on {task}: {suites.summary(metrics)}; {target}/{task}.json")
    return 0


def _as_task(cfg: DictConfig, result: Result) -> int:
    config = cell_config(result, cfg)
    name = f"{result.experiment}-{result.cell}-{cfg.split}".replace("/", "-")
    rows, scorer = rows_of(config, cfg.split), scorer_of(result.technique, Path(cfg.cell) / "artefact", config)
    path = suites.write_task(Path(cfg.to), name, rows, scorer)
    print(f"{path}: {len(rows)} rows; suite={name} suite_path={cfg.to} asks them of any cell, and lm_eval --include_path {cfg.to} --tasks {name} of any model")
    return 0


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())

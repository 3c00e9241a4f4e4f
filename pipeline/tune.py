"""Give every technique of an experiment the same number of random trials on validation rows, and fix one setting of each for all seeds.

    python -m pipeline.tune experiments=quick                                  all techniques of the grid
    python -m pipeline.tune experiments=quick technique=lora tune.trials=24    one technique, another budget
    python -m pipeline.tune experiments=quick 'tune.techniques=[lora,full]'    some
    python -m pipeline.cells experiments=quick tuned=true                      then: the tuned cells, beside the untuned ones

Writes tuning/<experiment>/<technique>-n<train_rows>.yaml (keep it in git: cells are composed of it) and studies under sweeps/. A number of training
rows is tuned by itself, with the grid's first seed: validation rows are labelled rows, and those of a larger set are not this one's to look at.

The budget is tune.trials, whatever becomes of them: a trial that runs out of memory, diverges or ends with an error is one of them; so is one
whose settings the input does not suit (more demonstrations than the context holds). Two thirds are drawn from the declared range
(conf/search/). If the best value then lies at an edge, the rest is drawn from there and beyond, once; else from the declared range. Of the trials
within a standard error of the highest the one nearest to the technique's own settings is taken: the highest is high by luck (pipeline/search/choice.py).
Started again after a kill, it resumes with the same draws. Test rows are never read.
"""

from __future__ import annotations

import sys

from omegaconf import DictConfig

from pipeline.core import settings
from pipeline.core.commands import entry
from pipeline.core.compose import compose
from pipeline.core.files import UserError
from pipeline.records import tuned
from pipeline.records.results import rank_key
from pipeline.reporting.figures import METRICS
from pipeline.reporting.verdict import of_search
from pipeline.search.study import short
from pipeline.search.tuning import Shared, budget_of, check, each_technique, summary, tune


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Tune what the grid (or the command) names, one after another."""
    if cfg.tuned:
        raise UserError("pipeline.tune starts from untuned settings; leave out tuned=true (or +tuned)")
    settings.read(cfg)
    budget, done = budget_of(cfg), {}
    chosen = [compose(o) for o in each_technique(cfg, overrides)]
    for one in chosen:
        check(one, budget)
    shared = Shared()
    for one in chosen:
        if result := tune(one, budget, shared):
            done[tuned.path_of(one)] = result
    for path, result in done.items():
        print(f"{path}: {summary(result)}\n  {verdict(result)}".rstrip())
    return 0


def verdict(result: tuned.Tuned) -> str:
    """What the trials tell of the settings, in sentences."""
    ranked = sorted((t for t in result.trials if t["validation"] is not None), key=lambda t: rank_key(t["validation"], t["nll"]), reverse=True)
    trials = [(short(t["settings"]), t["validation"], None) for t in ranked]
    rows = max((t.get("validation_rows") or 0 for t in ranked), default=None)
    return of_search(trials, rows, METRICS.get(result.metric, result.metric), short(result.settings)).replace("`", "")


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())

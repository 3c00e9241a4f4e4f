"""Run PEFT's own adapter configurations, a file or a folder of them, as cells of an experiment.

    python -m pipeline.peft_configs experiments=quick technique=peft_config technique.path=path/to/experiments

A folder is laid out as PEFT's method_comparison/MetaMathQA/experiments: <method>/<name>/adapter_config.json, with an optional
training_params.json beside it. Every cell leaves its usual files under results/, and peft_results/<method>--<name>.json in
the format of that project's results. A configuration that does not fit is named and passed over.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from pipeline.cell import identity
from pipeline.cell.grid import grid_overrides, is_done, run_cells
from pipeline.core import settings
from pipeline.core.commands import entry
from pipeline.core.compose import build, compose, without
from pipeline.core.files import UserError, check_name, write_json
from pipeline.core.peft_files import experiment_name, find
from pipeline.forecasting.text import warn
from pipeline.records.finished import name as cell_name
from pipeline.records.peft_result import as_peft_result
from pipeline.records.results import read


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Run the missing cells of every configuration and write their results in PEFT's format. 2 if any was passed over."""
    path = OmegaConf.select(cfg, "technique.path")
    if not path:
        raise UserError("pipeline.peft_configs needs a file or folder; add technique=peft_config technique.path=<adapter_config.json or folder>")
    cells, code = [], 0
    for file in find(path):
        try:
            check_name(experiment_name(str(file)).replace("/", "--"), f"the name of {file.parent} (its last two folders)")
            made = [compose(o) for o in grid_overrides(_of(file, overrides))]
            for one in made:
                settings.read(one)
                build(one.method, "method")
            cells += made
        except UserError as error:
            print(f"passed over: {error}", file=sys.stderr)
            code = 2
    code = max(code, run_cells(cells, warn))
    done = [one for one in cells if is_done(one)]
    names = [one.variant for one in done]
    for one in done:
        suffix = "" if names.count(one.variant) == 1 else cell_name(one).rpartition(one.variant)[2]
        target = Path(cfg.paths.peft_results) / f"{one.variant}{suffix}.json"
        write_json(target, as_peft_result(read(identity.folder_of(one))))
        print(target)
    return code


def _of(file: Path, overrides: list[str]) -> list[str]:
    """The command's overrides for one configuration."""
    return [*without(overrides, "technique", "technique.path"), "technique=peft_config", f"technique.path={file}"]


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())

"""Search a technique's rank (and more) with Optuna on validation rows, then run the best setting as a cell of its own.

    python -m pipeline.sweep experiments=quick technique=lora                       every rank once (make sweep)
    python -m pipeline.sweep experiments=quick technique=lora sweep=rank_memory     accuracy against peak memory
    python -m pipeline.sweep experiments=quick technique=lora sweep=rank_alpha_lr   rank x alpha x learning rate
    python -m pipeline.sweep experiments=quick technique=lora sweep.executor=packed several trials at once (auto: on a GPU)
    optuna-dashboard sqlite:///sweeps/quick/lora/study.db                           look at it

Writes sweeps/<experiment>/<technique>/{study.db, sweep.json, trials.csv, best.json} and the confirm cell under results/.
Test rows are scored in the confirm cell only. A killed sweep goes on where it was: started again, it tries the trial
that died once more and runs those that are missing. A trial that runs out of memory is an answer, not an error.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from pipeline import cell, cells, results, settings, sweep_packed, tracking, train
from pipeline.config import entry
from pipeline.files import Unsuited, UserError
from pipeline.measure import Stopwatch, hardware, now
from pipeline.results import Result
from pipeline.supervise import run_in_child
from pipeline.sweep_space import Sweep, at, read
from pipeline.sweep_study import answered, fail, numbers, open_study, revive, short, table, tell, write_best, write_trials

if TYPE_CHECKING:
    import optuna

UNSUITED = 73  # exit code of a trial whose settings the input does not suit
NOT_ITS_OWN = (2, 128 + 9, 128 + 15)  # exit codes of bad input, and of a process that was ended from outside
LOCK_S = 5  # a sweep killed a moment ago may still hold its lock through a child that is ending


def run(cfg: DictConfig, given: Sequence[str] = ()) -> int:
    """Search, write the outputs, confirm the best. `given`: the config keys set by hand."""
    cfg = _of_grid(cfg, given)
    settings.read(cfg)
    sweep = read(cfg)
    folder = Path(cfg.paths.sweeps) / cfg.experiment / _name(cfg)
    confirmed: list[DictConfig] = []
    with alone(folder):
        study = open_study(folder, cfg, sweep)
        try:
            search(study, sweep, cfg, folder)
            best = write_best(folder, study, sweep)
            print(table(study, sweep))
            print(f"best: {' '.join(best['overrides'])} (trial {best['trial']}), in {folder / 'best.json'}")
            return _confirm(cfg, best, confirmed) if sweep.confirm else 0
        finally:
            tracking.log_sweep(folder, cfg)
            for chosen in confirmed:
                tracking.log_cell(cell.folder_of(chosen), chosen)


def _name(cfg: DictConfig) -> str:
    return f"{cfg.technique.name}+{cfg.variant}" if cfg.variant else str(cfg.technique.name)


def _of_grid(cfg: DictConfig, given: Sequence[str]) -> DictConfig:
    """The cell's config with the first seed and train_rows of the experiment's grid, unless they were given."""
    if "experiments" not in given:
        return cfg
    grid = cells.grid(cfg.experiment)["grid"]
    wanted = {"seed": grid["seeds"][0], "train_rows": grid["train_rows"][0]}
    return at(cfg, {key: value for key, value in wanted.items() if key not in given})


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the sweep's folder. Whoever holds it knows that a trial still marked as running is dead."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=LOCK_S)
    except Timeout as error:
        raise UserError(f"another sweep is at work in {folder}; wait for it, or end it") from error
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; free space or mend paths.sweeps, then run again") from error
    try:
        yield
    finally:
        lock.release()


def search(study: optuna.Study, sweep: Sweep, cfg: DictConfig, folder: Path, load: Callable[[], cell.Shared] | None = None) -> None:
    """Run trials until `sweep.target` have an answer or the time is up. load: gives what an earlier search may have read.

    Raises:
        UserError: a trial ended with an error (shown above it); started again, the search tries it once more.
    """
    revive(study, sweep)
    write_trials(folder, study, sweep)
    print(f"{answered(study)} of {sweep.target} trials are done")
    watch, load = Stopwatch(), functools.cache(load or (lambda: cells.preload([cfg])))
    if answered(study) < sweep.target:
        reason = sweep_packed.refusal(sweep, cfg)
        if reason is None:
            reason = sweep_packed.search(study, sweep, cfg, folder, load())
            revive(study, sweep)
        if reason:
            _not_packed(sweep, reason)
    while answered(study) < sweep.target and (sweep.timeout_s is None or watch.peek() < sweep.timeout_s):
        shared, lap = load(), Stopwatch()
        trial = study.ask()
        chosen = sweep.complete({key: dimension.suggest(trial, key) for key, dimension in sweep.dimensions.items()})
        try:
            result = run_trial(at(cfg, chosen), shared, folder / ".trial", short(chosen), sweep.count_errors)
            tell(study, trial, sweep, result, lap.lap())
        except BaseException:
            fail(study, trial.number)
            raise
        finally:
            write_trials(folder, study, sweep)
        print(f"trial {answered(study)} of {sweep.target}: {short(chosen)}: {_outcome(result)}", flush=True)


def _not_packed(sweep: Sweep, reason: str) -> None:
    if sweep.pruner:
        raise UserError(f"sweep.pruner needs packed trials, but {reason}; set sweep.pruner=null")
    if sweep.executor != "sequential":
        print(f"one trial after another, because {reason}", flush=True)


def run_trial(cfg: DictConfig, shared: cell.Shared, scratch: Path, label: str, count_errors: bool = False) -> Result:
    """One trial in a child process: its memory is its own, and running out of it is a result. `scratch` is emptied.

    Args:
        count_errors: an error of its own is a result, too, and so are settings that the input does not suit.

    Raises:
        UserError: it ended otherwise: bad input and a full disk are no trial's own.
    """
    shutil.rmtree(scratch, ignore_errors=True)

    def work() -> int:
        try:
            results.write(scratch, cell.run(cfg, shared=shared, splits=("validation",), folder=None, started=now()))
        except Unsuited as error:
            print(f"error: {error}", file=sys.stderr)
            return UNSUITED
        return 0

    try:
        done = run_in_child(work, cfg.memory_limit_gb and int(cfg.memory_limit_gb * 2**30))
        if done.out_of_memory:
            return cell.oom_result(cfg, done.out_of_memory, hardware("cpu"))
        if done.code == 130:
            raise KeyboardInterrupt
        if done.code and count_errors and done.code not in NOT_ITS_OWN:
            why = "its settings do not suit the input" if done.code == UNSUITED else f"ended with code {done.code}"
            return cell.bare_result(cfg, status="error", error=why, hardware=hardware("cpu"), precision=cfg.precision.name)
        if done.code:
            raise UserError(f"the trial with {label} ended with code {done.code} (see above); mend the cause and run again")
        return results.read(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _outcome(result: Result) -> str:
    if result.status == "error":
        return f"{result.error}; it counts as a trial without a value"
    if result.status != "ok":
        return f"out of memory ({result.error})"
    found = numbers(result)
    peak = f", peak {found['peak_bytes'] / 2**30:.2f} GiB" if found["peak_bytes"] else ""
    value = getattr(result.scores["validation"], result.metric)
    return f"validation {result.metric} {value:.3f}{peak}, train {found['train_s'] or 0:.1f} s"


def _confirm(cfg: DictConfig, best: dict[str, Any], confirmed: list[DictConfig]) -> int:
    """Run the best setting, or each point of the front, as a cell of the experiment; test rows are scored here only."""
    code, shared = 0, None
    for choice in best["front"] or [best]:
        variant = f"{cfg.variant}-{choice['variant']}" if cfg.variant else choice["variant"]
        chosen = at(cfg, {**choice["settings"], "variant": variant})
        if not cells.is_done(chosen):
            shared = shared or cells.preload([chosen])
            code = max(code, train.run_cell(chosen, shared, now()))
        if code == 130:
            break
        if cells.is_done(chosen):
            print(f"confirmed in {cell.folder_of(chosen)}")
            confirmed.append(chosen)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """The entry: Hydra overrides in, exit code out."""
    words = sys.argv[1:] if argv is None else list(argv)
    given = [word.partition("=")[0].lstrip("+") for word in words]
    return entry(lambda cfg: run(cfg, given))(argv)


if __name__ == "__main__":
    sys.exit(main())

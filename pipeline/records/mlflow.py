"""MLflow as a mirror of the result files: one run a cell, one nested run a trial. The only file that imports mlflow.

Training never depends on it: `log_cell` warns in one sentence if the database or server cannot be written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.core import locks
from pipeline.core.compose import plain
from pipeline.core.files import UserError, atomic_path
from pipeline.core.settings import Tracking, build
from pipeline.records.runs import HEADLINES, Dataset, Run, cell_run, sweep_runs

CELL, DIGEST, PARENT, MODEL = "alignscope.cell", "alignscope.digest", "mlflow.parentRunId", "alignscope.model"
VIEW = "alignscope"
"""Of the shared view that shows the headline columns: <experiment's address>?viewStateShareKey=alignscope."""
KIND, NOTE, PRIMARY = "mlflow.experimentKind", "mlflow.note.content", "mlflow.experiment.primaryMetric.name"
WRITER = "alignscope.writer"
"""On a server: which lock its writer held, by machine and path. What such a writer left half-written is dead once another one holds that lock."""
SQLITE = "sqlite:///"
LONGEST_NOTE = 20_000  # characters of an experiment's tag that MLflow takes
BATCH = 100  # params or tags that MLflow takes in one call; metrics: 1,000
ENVIRONMENT = {  # what the user has set stays
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
LOUD = ("alembic", "mlflow", "urllib3")

_unreachable: set[str] = set()


def log_cell(folder: str | Path, cfg: DictConfig) -> bool:
    """Mirror a finished cell from its folder: its one run is made, or made anew if the files changed. Never raises.

    Returns:
        Whether trying with further cells makes sense: not where MLflow is missing or no server answers.
    """
    return _attempt(cfg, lambda mirror: mirror.cell(Path(folder)))


def log_sweep(folder: str | Path, cfg: DictConfig) -> bool:
    """Mirror a sweep from its folder: a parent run, and a nested run each finished trial. Never raises; returns as log_cell does."""
    return _attempt(cfg, lambda mirror: mirror.sweep(Path(folder)))


def log_note(cfg: DictConfig, text: str) -> None:
    """Keep a text, such as the report's verdict and table, as the note of the experiment, where that is in MLflow. Never raises."""
    uri = str(cfg.tracking.get("uri", ""))
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists():
        return
    _attempt(cfg, lambda mirror: mirror.note(cfg.experiment, text))


def page_of(cfg: DictConfig, experiment: str | None) -> str:
    """Where MLflow's pages show an experiment's runs, the headline columns first: what follows its address. Without an experiment, or where MLflow has none
    of that name: the list of experiments. Either opens on model training, which the bare address does not: there MLflow's pages begin with traces."""
    with _connected(_settings(cfg), Path(cfg.paths.work)) as mirror:
        found = mirror.client.get_experiment_by_name(experiment) if experiment else None
    return _of_runs(found.experiment_id) if found else "#/experiments?workflowType=machine_learning"


def _of_runs(experiment_id: str) -> str:
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}&workflowType=machine_learning"


def _attempt(cfg: DictConfig, work: Callable[[Mirror], object]) -> bool:
    uri = "MLflow"
    try:
        settings = _settings(cfg)
        uri = settings.uri
        if settings.enabled and uri not in _unreachable:
            with _connected(settings, Path(cfg.paths.work)) as mirror:
                work(mirror)
    except Exception as error:  # noqa: BLE001  (a mirror that fails must not fail the training)
        if uri.startswith("http") or isinstance(error, ImportError):
            _unreachable.add(uri)  # do not wait again, nor warn again, for every further cell
        command = f"python -m pipeline.tracking backfill experiments={cfg.experiment}"
        print(f"warning: {uri} was not written ({_reason(error)}); results are complete, once it answers run `{command}`", file=sys.stderr)
    return uri not in _unreachable


def _settings(cfg: DictConfig) -> Tracking:
    settings = build(Tracking, plain(cfg)["tracking"], "tracking")
    assert isinstance(settings, Tracking)
    return settings


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "Max retries exceeded" in text or "refused" in text:
        return "no server answers there"
    if "status 401" in text or "not authenticated" in text or "error code 401" in text:
        return "it wants to know who writes: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    return text[:200]


@contextlib.contextmanager
def _connected(settings: Tracking, work: Path) -> Iterator[Mirror]:
    """A mirror whose runs are written one at a time on this machine; the environment and log levels are put back afterwards."""
    local = Path(settings.uri.removeprefix(SQLITE)).absolute() if settings.uri.startswith(SQLITE) else None
    lock = local.with_name(f"{local.name}.lock") if local else work / "tracking.lock"
    added = {k: v for k, v in ENVIRONMENT.items() if k not in os.environ}
    levels = {name: logging.getLogger(name).level for name in LOUD}
    os.environ.update(added)
    try:
        import mlflow

        for name in LOUD:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with locks.in_turn(lock):
            if local and not local.exists():  # made under another name: no other process, nor a kill half-way, leaves or meets half a schema
                with atomic_path(local) as beside:
                    mlflow.MlflowClient(tracking_uri=f"{SQLITE}{beside}").search_experiments()
            client = mlflow.MlflowClient(tracking_uri=f"{SQLITE}{local}" if local else settings.uri)
        yield Mirror(client, settings.artifacts if local else None, lock, bool(local))
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for key in added:
            os.environ.pop(key, None)


class Mirror:
    """Writes runs through an MLflow client. `counts` says how many runs were written and how many were up to date.

    Args:
        lock: acquired for one run at a time, so that several processes that write many take turns, and write none twice.
        lock_is_enough: nobody writes who does not take it; a server has writers on other machines.
    """

    def __init__(self, client: Any, artifacts: str | None, lock: Path, lock_is_enough: bool = True) -> None:
        self.client, self.artifacts, self.lock, self.lock_is_enough = client, artifacts, lock, lock_is_enough
        self.writer = f"{socket.gethostname()}:{lock.absolute()}"
        self.counts: Counter[str] = Counter()

    def cell(self, folder: Path) -> None:
        self.put(cell_run(folder))

    def sweep(self, folder: Path) -> None:
        """Parent and children; children that the sweep no longer has (it was started anew) are deleted."""
        parent, children = sweep_runs(folder)
        parent_id = self.put(parent)
        current = {child.cell for child in children}
        with locks.in_turn(self.lock):
            for run in self._find(parent.experiment, f"tags.`{CELL}` LIKE '{parent.cell}/%'"):
                cell = run.data.tags[CELL]
                if cell not in current and cell.startswith(f"{parent.cell}/"):  # LIKE takes _ for any character
                    self.client.delete_run(run.info.run_id)
        for child in children:
            self.put(child, parent_id)

    def note(self, experiment: str, text: str) -> None:
        """Keep a text as the experiment's note; nothing where MLflow has no such experiment."""
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            return
        text = f"[The runs by test figure, with training time, peak memory and r beside it]({_of_runs(found.experiment_id)})\n\n{text}"
        if len(text) > LONGEST_NOTE:
            rest = f"\n\nToo long for a note of MLflow: all of it is in table.md of {experiment}'s report."
            text = text[: text.rfind("\n", 0, LONGEST_NOTE - len(rest) + 1)] + rest
        if found.tags.get(NOTE) != text:
            self._tag(found.experiment_id, NOTE, text)

    def put(self, run: Run, parent_id: str | None = None) -> str:
        """Find or create the one run of `run.cell` and bring it up to date. Returns its id.

        Raises:
            locks.Busy: a process that writes a run has made the others wait for too long.
        """
        with locks.in_turn(self.lock):
            return self._put(run, parent_id)

    def _put(self, run: Run, parent_id: str | None) -> str:
        runs, digest = self._runs_of(run), run.digest()
        same = [one for one in runs if one.data.tags.get(DIGEST) == digest]
        if same and (len(runs) == 1 or not self.lock_is_enough):
            self.counts["up to date"] += 1
            run_id = self._only(same)
            if parent_id and same[0].data.tags.get(PARENT) != parent_id:
                self.client.set_tag(run_id, PARENT, parent_id)
            return run_id
        for old in runs:  # a run's params cannot be changed, so a changed cell gets a new run
            if self.lock_is_enough or DIGEST in old.data.tags or old.data.tags.get(WRITER) == self.writer:  # else another machine is writing it
                self.client.delete_run(old.info.run_id)
                if model := old.data.tags.get(MODEL):
                    self.client.delete_logged_model(model)
        tags = {CELL: run.cell} | ({PARENT: parent_id} if parent_id else {}) | ({} if self.lock_is_enough else {WRITER: self.writer})
        run_id = str(self.client.create_run(self._experiment(run.experiment), run.start_ms, tags, run.name).info.run_id)
        self._fill(run_id, run)
        self._present(run)
        self.client.set_tag(run_id, DIGEST, digest)  # last: a run without it was not finished
        self.counts["written"] += 1
        return run_id if self.lock_is_enough else self._only([one for one in self._runs_of(run) if one.data.tags.get(DIGEST) == digest]) or run_id

    def _only(self, finished: list[Any]) -> str:
        """The id of the one that stays of finished runs that say the same: where machines that share no lock wrote a cell at once, there are several.

        All choose the same one, so it is deleted by nobody; and who finishes last sees the others.
        """
        by_id = sorted(str(one.info.run_id) for one in finished)
        for double in by_id[1:]:
            self.client.delete_run(double)
        return by_id[0] if by_id else ""

    def _runs_of(self, run: Run) -> list[Any]:
        return self._find(run.experiment, f"tags.`{CELL}` = '{run.cell}'")

    def _find(self, experiment: str, condition: str) -> list[Any]:
        return list(self.client.search_runs([self._experiment(experiment)], condition, max_results=50_000))

    def _experiment(self, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            place = (Path(self.artifacts) / name).absolute().as_uri() if self.artifacts else None
            try:
                return str(self.client.create_experiment(name, place))
            except Exception:
                experiment = self.client.get_experiment_by_name(name)
                if experiment is None:  # it was not that another machine has just made it
                    raise
        if experiment.lifecycle_stage == "deleted":
            self.client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)

    def _present(self, run: Run) -> None:
        """Have the experiment's page open on model training, with the headline columns in the shared view."""
        if not run.metric:
            return
        first = f"1_test_{run.metric}"
        columns = ["params.`technique`", *(f"metrics.`{name}`" for name in (first, *HEADLINES[:2])), f"params.`{HEADLINES[2]}`", "params.`train_rows`",
                   "params.`seed`"]
        view = {"orderByKey": f"metrics.`{first}`", "orderByAsc": False, "selectedColumns": columns}
        wanted = {KIND: "custom_model_development", PRIMARY: first, f"mlflow.sharedViewState.{VIEW}": json.dumps(view)}
        experiment = self.client.get_experiment(self._experiment(run.experiment))
        for key, value in wanted.items():
            if experiment.tags.get(key) != value:
                self._tag(experiment.experiment_id, key, value)

    def _tag(self, experiment_id: str, key: str, value: str) -> None:
        """Set an experiment's tag. MLflow looks for it, then inserts it: of two machines that do so at once the database refuses one, which finds it there."""
        try:
            self.client.set_experiment_tag(experiment_id, key, value)
        except Exception:
            if key not in self.client.get_experiment(experiment_id).tags:
                raise
            self.client.set_experiment_tag(experiment_id, key, value)

    def _model(self, run_id: str, run: Run) -> None:
        """Log the cell's artefact as a model that mlflow.pyfunc.load_model serves (serving/pyfunc.py)."""
        from mlflow import entities, pyfunc

        assert run.model is not None
        about = self.client.create_logged_model(self._experiment(run.experiment), run.name, run_id, model_type="alignscope")
        with tempfile.TemporaryDirectory() as folder:
            data, model = Path(folder) / "cell", Path(folder) / "model"
            shutil.copytree(run.model / "artefact", data / "artefact")
            shutil.copy(run.model / "result.json", data / "result.json")
            pyfunc.save_model(model, loader_module="pipeline.serving.pyfunc", data_path=str(data), pip_requirements=["torch", "transformers", "peft"],
                              mlflow_model=pyfunc.Model(model_uuid=about.model_id, run_id=run_id, model_id=about.model_id))
            self.client.log_model_artifacts(about.model_id, str(model))
        self.client.finalize_logged_model(about.model_id, "READY")
        self.client.log_outputs(run_id, [entities.LoggedModelOutput(about.model_id, 0)])
        self.client.set_tag(run_id, MODEL, about.model_id)

    def _fill(self, run_id: str, run: Run) -> None:
        from mlflow import entities

        metrics = [entities.Metric(m.key, m.value, m.timestamp_ms, m.step) for m in run.metrics]
        params = [entities.Param(k, v) for k, v in run.params.items()]
        tags = [entities.RunTag(k, v) for k, v in run.tags.items()]
        for at in range(0, max(len(metrics), len(params), len(tags)), BATCH):
            part = slice(at, at + BATCH)
            self.client.log_batch(run_id, metrics=metrics[part], params=params[part], tags=tags[part])
        if run.datasets:
            inputs = [_input(d) for d in run.datasets]
            try:
                self.client.log_inputs(run_id, inputs)
            except Exception:  # noqa: BLE001  (of two writers that name a new data set at once, MLflow 3.17 refuses one; then it is there)
                self.client.log_inputs(run_id, inputs)
        if run.config:
            self.client.log_dict(run_id, run.config, "config.yaml")
        for path in run.files:
            self.client.log_artifact(run_id, str(path))
        if run.model is not None:
            self._model(run_id, run)
        if run.end_ms is not None:
            self.client.set_terminated(run_id, run.status, run.end_ms)


def _input(dataset: Dataset) -> Any:
    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput, InputTag

    about = {"uri": dataset.uri, "sha256": dataset.sha256}
    entity = Entity(
        name=dataset.name, digest=dataset.sha256[:36],  # the longest that MLflow takes
        source_type="local", source=json.dumps(about), profile=json.dumps({"rows": dataset.rows, "sha256": dataset.sha256}),
    )
    return DatasetInput(entity, [InputTag("mlflow.data.context", dataset.context)])


def backfill(cfg: DictConfig, everything: bool) -> int:
    """Mirror all results and sweeps on disk (of one experiment, or of every one). Returns 2 if a file was unreadable.

    Raises:
        UserError: tracking is off, nothing is on disk, or the database or server cannot be written.
    """
    settings = _settings(cfg)
    if not settings.enabled:
        raise UserError("tracking is off, so there is nothing to fill; leave out tracking=none")
    roots = [Path(root) if everything else Path(root) / cfg.experiment for root in (cfg.paths.results, cfg.paths.sweeps)]
    cells = [p.parent for p in sorted(roots[0].rglob("result.json"))]
    sweeps = [p.parent for p in sorted(roots[1].rglob("sweep.json"))]
    if not cells and not sweeps:
        raise UserError(f"there is no result below {roots[0]} and no sweep below {roots[1]}; run cells first, or fix experiments=")
    counts: Counter[str] = Counter()
    unreadable = []
    for folder, method in [(f, Mirror.cell) for f in cells] + [(f, Mirror.sweep) for f in sweeps]:
        try:
            with _connected(settings, Path(cfg.paths.work)) as mirror:
                method(mirror, folder)
                counts += mirror.counts
        except locks.Busy:
            raise
        except UserError as error:
            unreadable.append(error)
        except Exception as error:
            raise UserError(f"{settings.uri} cannot be written ({_reason(error)}); start it or fix tracking.uri, then run again") from error
    done = ", ".join(f"{counts[what]} {what}" for what in ("written", "up to date"))
    print(f"{len(cells)} cells and {len(sweeps)} sweeps in {settings.uri}; runs: {done}")
    for each in unreadable:
        print(f"error: {each}", file=sys.stderr)
    return 2 if unreadable else 0

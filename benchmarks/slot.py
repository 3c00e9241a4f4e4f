"""Fill some minutes on one or two GPUs with tuning and cells of several experiments, in processes that share them; started again, it does what is missing.

    python -m benchmarks.slot run experiments=step_by_step_cqa,step_by_step_svamp gpus=0,1 processes=12 limit_s=520 -- tracking=none paths.data=/tmp/data
    python -m benchmarks.slot plan experiments=step_by_step_cqa        what there is to do, and what is done
    … techniques=full,lora sizes=0,1        those techniques (lora+r8: a variant), those of the grid's numbers of training rows, by their place
    … run experiments=rank_cqa,rank_svamp / experiments=nf4 sizes=0 …        a second group, whose jobs come after the first's

The words after -- are Hydra's, for every job; stale=keep among them: what is of older code alone stands (without it a commit between two slots runs all again).
Jobs come in this order: tuning, then cells, the fewest training rows first; of these the first technique of every experiment, then the second. A cell whose
technique is not tuned yet waits for that. Cells that packs train (seeds of an adapter) are one job, others one each; an untouched base and a teacher, whose
answers no seed changes, have the first seed alone. Every result says that it shared the GPU (share=true): accuracies count, times and memory do not; measure
those with pipeline.cells. A job is locked by its process, which a kill undoes. Artefacts are deleted as soon as a cell is done (artefacts=keep: not), so that a
disk holds hundreds of cells. limit_s counts from the command's start; it ends some ten seconds later.
Exit codes: 0 nothing is missing, 1 something is, 2 bad input.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import os
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from benchmarks import processes
from pipeline.cell import grid, identity, inputs, packing, pool, record
from pipeline.cell.child import GRACE_S as CELL_GRACE_S
from pipeline.cell.child import limited, pause
from pipeline.core.commands import key_values, words_entry
from pipeline.core.compose import SUFFIX, by_key, compose, without
from pipeline.core.files import UserError, discard_folder
from pipeline.core.locks import Busy, held
from pipeline.measure.clock import Stopwatch
from pipeline.records import tuned
from pipeline.records.finished import SEEDLESS
from pipeline.search import tuning
from pipeline.search.space import at

OWN = {"gpus": "", "processes": "1", "limit_s": "inf", "artefacts": "drop"}
GRACE_S = 20.0
"""After the limit, until processes are ended: cells were asked to end before it."""
ATTEMPTS = 2
"""How often a job is begun in a run: a cell that ran out of memory beside others may find room later."""
TIMES_ARE_SHARED = ["share=true", "preflight=false", "evaluate.latency_rows=0", "evaluate.adapters=[]", "train.progress=false"]


@dataclass(frozen=True)
class Job:
    """One technique's tuning, or some of its cells. cells: overrides of each; empty: the tuning that `words` compose."""

    name: str
    words: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...] = ()

    @property
    def ready(self) -> bool:
        """Whether it can begin: the technique of its cells is tuned, if it has to be."""
        return not self.cells or SUFFIX not in by_key(self.cells[0])["technique"] or tuned.path_of(_composed(self.words)).exists()

    def configs(self) -> list[DictConfig]:
        """The composed cells of one that is ready; they are everybody's, and stay as they are."""
        return _cells_of(self.cells)

    @property
    def done(self) -> bool:
        if not self.cells:
            return tuned.path_of(_composed(self.words)).exists()
        return self.ready and all(map(grid.stands, self.configs()))

    @property
    def lock(self) -> Path:
        name = hashlib.sha256(self.name.encode()).hexdigest()[:16]
        return Path(by_key(self.words).get("paths.work", ".work")) / "locks" / f"slot-{name}.lock"

    @property
    def note(self) -> Path:
        """Is there once a process of this run has seen the job done, so that the others need not look."""
        return self.lock.with_suffix(".done")


@functools.cache
def _composed(words: tuple[str, ...]) -> DictConfig:
    return AHEAD[words] if words in AHEAD else compose(words)


AHEAD: dict[tuple[str, ...], DictConfig] = {}
"""Of what `_composed` is asked for, that which `jobs` composed at once."""
CELLS: dict[tuple[tuple[str, ...], ...], list[DictConfig]] = {}
"""What cells' words compose, as far as somebody asked."""


def _cells_of(*several: tuple[tuple[str, ...], ...]) -> list[DictConfig]:
    """The configs of some cells, or of several such. What was not asked for before is composed at once: on all CPUs, and once for all seeds."""
    new = [cells for cells in dict.fromkeys(several) if cells not in CELLS]
    configs = iter(grid.compose_cells([words for cells in new for words in cells]) if new else ())
    for cells in new:
        CELLS[cells] = [next(configs) for _ in cells]
        for cfg in CELLS[cells]:
            cfg.pack = len(cells) > 1
    return [cfg for cells in several for cfg in CELLS[cells]]


@dataclass(frozen=True)
class Group:
    """Experiments whose jobs come together. techniques, sizes: those alone; none: all."""

    experiments: Sequence[str]
    techniques: Sequence[str] = ()
    sizes: Sequence[int] = ()


@dataclass(frozen=True)
class Place:
    """A technique or variant of an experiment's grid at one of its numbers of training rows.

    own: the experiment's words; entry: the grid's; number, size: where it and the rows stand in the grid; tuned_at: rows to tune at, None: all of them.
    """

    experiment: str
    own: tuple[str, ...]
    entry: tuple[str, ...]
    number: int
    size: int
    rows: int
    tuned_at: int | None
    seeds: tuple[int, ...]

    @property
    def plain(self) -> tuple[str, ...]:
        return (*self.own, self.entry[0].removesuffix(SUFFIX), *self.entry[1:])

    @property
    def tuning_rows(self) -> int:
        return self.rows if self.tuned_at is None else self.tuned_at

    @property
    def tuning(self) -> tuple[str, ...]:
        return (*self.plain, f"train_rows={self.tuning_rows}")

    def tunings(self) -> list[Job]:
        """The one, if it is to be tuned."""
        return [Job(f"{self.experiment}.{_label(self.entry)}.tune.{self.tuning_rows}", self.tuning)] * self.entry[0].endswith(SUFFIX)

    def cells(self) -> list[Job]:
        """Its seeds: one job if they are packed."""
        cfg = _composed(self.plain)
        seeds = self.seeds[:1] if record.kind_of(cfg) in SEEDLESS else self.seeds
        every = tuple((*without(self.own, "seed"), *self.entry, f"seed={seed}", f"train_rows={self.rows}") for seed in seeds)
        name = f"{self.experiment}.{_label(self.entry)}.n{self.rows}"
        if packing.packs(cfg) and len(self.seeds) > 1:
            return [Job(name, self.tuning, every)]
        return [Job(f"{name}.s{seed}", self.tuning, (one,)) for seed, one in zip(seeds, every, strict=True)]


def jobs(groups: Sequence[Group], words: Sequence[str]) -> list[Job]:
    """All of them in their order, one group after another. Raises UserError: an experiment without such techniques or sizes."""
    places = [[place for experiment in group.experiments for place in _places(experiment, group, words)] for group in groups]
    plain = list(dict.fromkeys(place.plain for some in places for place in some))
    AHEAD.update(zip(plain, grid.compose_cells(plain), strict=True))
    AHEAD.update({place.tuning: at(AHEAD[place.plain], {"train_rows": place.tuning_rows}) for some in places for place in some})
    every: list[Job] = []
    for some in places:
        every += [job for place in sorted(some, key=lambda one: one.number) for job in place.tunings()]
        every += [job for place in sorted(some, key=lambda one: (one.size, one.number)) for job in place.cells()]
    return list(dict.fromkeys(every))


def _places(experiment: str, group: Group, words: Sequence[str]) -> list[Place]:
    axes = grid.grid(experiment)["grid"]
    entries = grid.entries(axes, {})
    own = (f"experiments={experiment}", *TIMES_ARE_SHARED, *words, f"seed={axes['seeds'][0]}")
    chosen = [(number, entry) for number, entry in enumerate(entries) if not group.techniques or _label(entry) in group.techniques]
    if not chosen:
        raise UserError(f"experiment {experiment} has none of the techniques {', '.join(group.techniques)}; it has {', '.join(map(_label, entries))}")
    if max(group.sizes, default=0) >= len(axes["train_rows"]):
        raise UserError(f"experiment {experiment} has {len(axes['train_rows'])} numbers of training rows, so no sizes={max(group.sizes)}; they count from 0")
    tuned_at, sizes = compose(own).tune.rows, group.sizes or range(len(axes["train_rows"]))
    return [Place(experiment, own, tuple(entry), number, size, axes["train_rows"][size], tuned_at, tuple(axes["seeds"]))
            for number, entry in chosen for size in sizes]


def _label(entry: Sequence[str]) -> str:
    """A grid's entry as a word: lora, lora+r8."""
    values = by_key(entry)
    return "+".join([values["technique"].removesuffix(SUFFIX), *([values["variant"]] if "variant" in values else [])])


# the processes


@dataclass(frozen=True)
class Slot:
    """What a process of the slot knows."""

    jobs: Sequence[Job]
    shared: inputs.Shared
    watch: Stopwatch
    limit_s: float
    keep: bool

    def over(self, parent: int) -> bool:
        return self.watch.peek() > self.limit_s - CELL_GRACE_S or os.getppid() != parent  # what begins is asked to end at once; nobody is left to wait for it

    def work(self) -> None:
        """Take jobs that nobody else does until none is left or the time is up."""
        tried, parent, left = Counter[str](), os.getppid(), dict.fromkeys(self.jobs)
        while left:
            begun = sum(tried.values())
            for job in list(left):
                if self.over(parent):
                    return
                with contextlib.suppress(Busy), held(job.lock):
                    if job.note.exists() or tried[job.name] == ATTEMPTS or job.done:
                        job.note.touch()
                        del left[job]
                    elif job.ready:
                        tried[job.name] += 1
                        self.do(job)
            if sum(tried.values()) > begun:
                continue
            if all(job.cells for job in left):  # others are at work on them, or their tuning failed
                return
            pause()

    def do(self, job: Job) -> None:
        begun, said = self.watch.peek(), "done"
        try:
            with limited(self.limit_s - begun):
                self.cells(job) if job.cells else self.tune(job)
        except (UserError, KeyboardInterrupt) as error:
            said = f"ended: {str(error) or 'the time is up'}"
        except Exception as error:  # noqa: BLE001 (one job's own; the others go on)
            traceback.print_exc()
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"{self.watch.peek():.0f} s: {job.name}: {said} in {self.watch.peek() - begun:.1f} s", flush=True)

    def tune(self, job: Job) -> None:
        cfg = copy.deepcopy(_composed(job.words))
        tuning.tune(cfg, tuning.budget_of(cfg), tuning.Shared(cfg.model.name, self.shared, grid.Mirror.silent()))

    def cells(self, job: Job) -> None:
        missing = grid.to_run(copy.deepcopy(job.configs()))
        if missing:
            grid.run_here(missing, self.shared, grid.Mirror.silent())
        for cfg in missing:
            pool.take_back(cfg)
            if not self.keep and grid.is_done(cfg):
                discard_folder(identity.folder_of(cfg) / "artefact")


# the commands


def run(words: Sequence[str]) -> int:
    """One of the commands above."""
    watch = Stopwatch()
    split = list(words).index("--") if "--" in words else len(words)
    command, rest = (words[0] if words else ""), list(words[split + 1 :])
    if command not in ("run", "plan"):
        raise UserError(f"benchmarks.slot takes run or plan first, not {command!r}")
    given, groups = dict(OWN), []
    for part in [list(part) for is_group, part in itertools.groupby(words[1:split], "/".__ne__) if is_group] or [[]]:
        own = key_values(part, ("experiments", "techniques", "sizes", *OWN), "benchmarks.slot")
        if "experiments" not in own:
            raise UserError("name the experiments: experiments=step_by_step_cqa,step_by_step_svamp")
        experiments, techniques, sizes = (_listed(own.pop(key, "")) for key in ("experiments", "techniques", "sizes"))
        if not all(size.isdecimal() for size in sizes):
            raise UserError(f"sizes={','.join(sizes)} are no places in a grid's train_rows; write them from 0, as in sizes=0,1")
        groups.append(Group(experiments, techniques, [int(size) for size in sizes]))
        given |= own
    every = jobs(groups, rest)
    if command == "run":
        fill(every, watch, _listed(given["gpus"]), int(given["processes"]), float(given["limit_s"]), given["artefacts"] == "keep")
    return tell(every)


def _listed(word: str) -> list[str]:
    return [part for part in word.split(",") if part]


def fill(every: Sequence[Job], watch: Stopwatch, gpus: Sequence[str], count: int, limit_s: float, keep: bool) -> None:
    """Do what is missing, `count` processes on each GPU. watch: from which the limit counts."""
    _cells_of(*(job.cells for job in every if job.cells and job.ready))
    left = [job for job in every if not job.done]
    if not left:
        return
    first = {by_key(job.words)["experiments"]: _composed(job.words) for job in left}
    for job in left:
        job.note.unlink(missing_ok=True)
    for cfg in first.values():
        inputs.check_ahead(cfg)
    places = processes.places(gpus, count)
    shared = _sharing(inputs.preload(list(first.values())), len(places))
    print(f"{watch.peek():.0f} s: {len(left)} of {len(every)} jobs are not done; {len(places)} processes", flush=True)
    processes.run(Slot(left, shared, watch, limit_s, keep).work, places, watch, limit_s, GRACE_S)


def _sharing(shared: inputs.Shared, at_once: int) -> inputs.Shared:
    """What every result says: that its process had no GPU to itself."""
    return dataclasses.replace(shared, threads=1, at_once=max(2, at_once), turns=None)


def tell(every: Sequence[Job]) -> int:
    """Print what is done of each experiment. Returns 1 if anything is missing."""
    done, whole = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    _cells_of(*(job.cells for job in every if job.cells and job.ready))
    for job in every:
        key = by_key(job.words)["experiments"], "cells" if job.cells else "tunings"
        whole[key] += len(job.cells) or 1
        done[key] += sum(map(grid.stands, job.configs() if job.ready else [])) if job.cells else job.done
    for (experiment, kind), count in whole.items():
        print(f"{experiment}: {done[experiment, kind]} of {count} {kind} are done")
    return int(done != whole)


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())

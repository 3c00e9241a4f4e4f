"""The figures behind the report, in one table: the fields of Row. Each says where in a cell's result it stands, how the cells of several seeds
make one, which column shows it and how, and what it means.

Library. rows.py makes rows by it; the columns of table.md and index.html, table.csv, metrics/*.json and the explanations are read from it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.methods.base import QUANTISED
from pipeline.records.evaluations import SAID, TITLES, Evaluations
from pipeline.records.finished import Cell
from pipeline.records.results import Result
from pipeline.reporting import values
from pipeline.reporting import words as f
from pipeline.stats.verdict import Verdict

CONTROLS = "controls"
"""The family of techniques that are made to gain nothing: shown beside the others, never to be taken or tuned."""
METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1", "rouge_l": "ROUGE-L", "exact_match": "exact match", "numeric": "right numbers",
           "token_f1": "token F1", "custom": "own metric"}
COUNTERS = {"cpu_rss": "RSS", "gpu_reserved": "GPU"}
STANDINGS = {
    "take": "take",
    "no_training": "take: no training",
    "leads": "leads, not confirmed",
    "tied": "not told apart from {name}",
    "lower": "below the highest ({p})",
    "lost": "below the untouched base: no verdict, tune it",
    "control": "a control: is to gain nothing",
}
"""How a row stands to the verdict -> what the last column says of it."""
RESUMED, SHARED = "†", "‡"
OTHER_MEMORY = ("packed", "parallel")
"""What a cell's `timing` says where its peak memory is not that of one GPU with one training."""
SECTIONS = ("", "Quality", "Data", "Training", "Model", "Merged", "Forgetting")
"""Of the columns, in their order on the page."""


def finished(cells: Sequence[Cell]) -> list[Cell]:
    return [c for c in cells if c.result.status == "ok"]


def shown(cells: Sequence[Cell]) -> list[Cell]:
    """The finished ones, or all where none is."""
    return finished(cells) or list(cells)


def timed(cells: Sequence[Cell]) -> list[Cell]:
    """The finished ones whose time is a single run's, or all finished ones where there is none such."""
    return [c for c in finished(cells) if not c.timing] or finished(cells)


def with_model(cells: Sequence[Cell]) -> list[Cell]:
    """The finished ones that a model answered; a teacher's answers come without one."""
    return [c for c in finished(cells) if c.result.size and c.result.size.total]


first = operator.itemgetter(0)


@dataclass(frozen=True)
class Figure:
    """One figure: a field of Row, a column of table.csv, and with a title a column of the page."""

    where: str | Callable[[Cell], Any] | None = None
    """Its dotted name in Result, or what gives it of a cell; None: rows.py sets it, from other rows or from
    what was evaluated beside the cells."""
    title: str = ""
    """Heads its column; empty: it has none."""
    section: str = ""
    show: Callable[[Any], str] = str
    """How the value reads; None is a dash."""
    main: Callable[[Row], str] | None = None
    """How the column's cell reads, where that takes more than the value."""
    small: Callable[[Row], str] = lambda row: ""
    """What stands below it, or in brackets."""
    mark: Callable[[Row], str] = lambda row: ""
    about: str = ""
    """What the column means."""
    optional: bool = False
    """Left out without a word where no row has a value; of others the report says that they were not measured."""
    last: int = 0
    """Columns of a section are sorted by it; those that are equal keep this table's order."""
    over: Callable[[Sequence[Cell]], list[Cell]] = finished
    """Which cells of a row count."""
    seeds: Callable[[Sequence[Any]], Any] = statistics.fmean
    """What makes one value of theirs that are known."""
    empty: Any = None
    """The value where none is known."""
    single: bool = False
    """Only a single run's value means anything: table.csv has none where a row's times are no single run's."""
    for_dvc: bool = False
    """Whether metrics/<cell>.json lists it."""
    key: str = ""
    """The field of Row."""

    def of(self, cell: Cell) -> Any:
        """The value of one cell; None where it was not measured."""
        if not isinstance(self.where, str):
            return self.where(cell) if self.where else None
        return functools.reduce(lambda part, name: None if part is None else getattr(part, name), self.where.split("."), cell.result)

    def over_seeds(self, cells: Sequence[Cell]) -> Any:
        known = [value for cell in self.over(cells) if (value := self.of(cell)) is not None]
        return self.seeds(known) if known else self.empty

    def value(self, row: Row) -> Any:
        """What the column is sorted by; None is last."""
        return getattr(row, self.key)

    def text(self, row: Row) -> str:
        text = self.main(row) if self.main else self.show(self.value(row))
        mark = self.mark(row)
        return f"{text} {mark}" if mark and text != f.DASH else text


def _figure(*args: Any, **more: Any) -> Any:
    """A field of Row with its line of the table: the fields of Figure."""
    return field(default=more.get("empty"), metadata={"figure": Figure(*args, **more)})


_same = functools.partial(_figure, over=shown, seeds=first)
"""A figure that the cells of a row have in common."""


def _whole(value: float | None) -> str:
    return f.DASH if value is None else f"{value:,.0f}"


def _kilojoules(joules: float | None) -> str:
    return f.DASH if joules is None else f"{joules / 1000:,.1f}" if joules >= 1000 else f"{joules / 1000:.2g}"


def _to_16bit(show: Callable[[float | None], str], key: str) -> Callable[[Row], str]:
    """What is below a column of forgetting: the change against the base in 16 bits, where the base is quantised."""
    def small(row: Row) -> str:
        value = getattr(row, key)
        return f"16-bit {show(value)}" if value is not None and row.precision in QUANTISED else ""

    return small


def _resumed(row: Row) -> str:
    return RESUMED if row.timing else ""


def _merged(precision: str) -> Any:
    def small(row: Row) -> str:
        drift, verdict = (getattr(row, f"merged_{precision}_{what}") for what in ("drift", "verdict"))
        return "" if drift is None else f"drift {drift:.2g}{'; ' if verdict != 'kept' else ''}{SAID[verdict]}"

    title = TITLES[precision]
    means = ("The adapter folded into the weights and these rounded to bf16: the metric's change against the adapter beside its base, in percentage points. "
             "Under it the drift between the two (Kullback-Leibler, nats a token), and where the adapter was rounded away (less than half of its change is "
             "left), the model changed too much (by more than adapter and rounding explain), or the precision changes the base by more than the adapter did "
             "(python -m pipeline.evaluate cell=… split=merged, docs/serving.md).")
    return _figure(None, f"Merged {title}", "Merged", f.points, small=small, optional=True, about=means if precision == "bf16" else f"The same, of {title}.")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One technique at one number of training rows: the table of figures, in the order of table.csv's columns.

    Shares, accuracies and their differences are fractions; a figure that was not measured is None.
    """

    name: str = _figure(
        title="Technique", small=lambda r: r.family if r.teacher else f"{r.family} · {r.precision}",
        about="The file in conf/technique/; after a + its variant, such as the best setting of a sweep. Under it the family, techniques "
        "that change the model in the same way, and the precision that the base's weights are held in.")
    """Technique, and the number of training rows where the report has several."""
    technique: str = _same(lambda c: c.label)
    family: str = _same("family")
    method: str = _same("method")
    kind: str = _same("kind")
    """What it is: one of results.KINDS."""
    precision: str = _same("precision")
    train_rows: int = _same("train_rows")
    seeds: int = _figure("seed", "Seeds", "Data", over=shown, seeds=len, last=1, about="Runs with different seeds; the figures are their means.")
    status: str = _figure("status", over=list, seeds=values.status)
    """ok, oom, diverged, or "oom in 1 of 3 seeds"."""
    metric: str = _same("metric")
    test: float | None = _figure(
        values.headline("test"), "Test {metric}, %", "Quality", f.percent, small=lambda r: interval(r), last=-1, for_dvc=True,
        about="Share of the test rows answered right (or the task's own metric), in percent. Under it its 95% interval (Wilson's; of other metrics than "
        "accuracy the bootstrap's over rows); "
        "with several seeds it reaches from the lowest to the highest bound of their intervals.")
    accuracy: float | None = _figure("test.accuracy")
    accuracy_low: float | None = _figure("test.accuracy_low", seeds=min)
    accuracy_high: float | None = _figure("test.accuracy_high", seeds=max)
    metric_low: float | None = _figure(values.bound(0), seeds=min)
    """The headline metric's 95% interval, whatever the metric."""
    metric_high: float | None = _figure(values.bound(1), seeds=max)
    test_seed_low: float | None = _figure(values.headline("test"), seeds=lambda each: min(each) if len(each) > 1 else None)
    test_seed_high: float | None = _figure(
        values.headline("test"), "Over seeds, %", "Quality", main=lambda r: f.span(r.test_seed_low, r.test_seed_high) or f.DASH, optional=True,
        seeds=lambda each: max(each) if len(each) > 1 else None,
        about="Smallest and largest test figure over the seeds: the spread of training, not that of drawing the test rows.")
    test_rows: int | None = _figure("test.rows", seeds=min)
    standing: str = _figure(empty="")
    """To the verdict at the same number of training rows. One of STANDINGS; empty: not compared."""
    letters: str = _figure(
        None, "Tier", "Quality", lambda v: v or f.DASH, small=lambda r: "one seed" if r.one_seed else "", optional=True, last=-1, empty="",
        about="Techniques that share a letter cannot be told apart by these runs; a is the highest one's (docs/statistics.md). What the letters rest on "
        "stands under the table.")
    against_best_p: float | None = _figure()
    """Against the highest, corrected for all pairs of the group."""
    covers_seeds: bool | None = _figure()
    """Whether that test covers the spread over seeds; None: not compared."""
    against_zero_shot: float | None = _figure(
        None, "Against zero-shot", "Quality", f.points, small=lambda r: f.p_value(r.against_zero_shot_p),
        about="The metric beyond zero-shot's in percentage points on the same test rows, and the p-value over seeds and rows (two-sided, corrected for all "
        "pairs of techniques as the tiers are; with one seed McNemar's exact test, for other metrics than accuracy the paired bootstrap).")
    against_zero_shot_p: float | None = _figure()
    macro_f1: float | None = _figure(
        "test.macro_f1", "Macro-F1, %", "Quality", f.percent,
        about="Mean over the answers of their F1: a rare answer counts as much as a frequent one.")
    validation: float | None = _figure(
        values.headline("validation"), "Validation, %", "Quality", f.percent, for_dvc=True,
        about="The same metric on the validation rows, which chose the checkpoint.")
    pair_accuracy: float | None = _figure(
        "pairs", "Pairs, %", "Quality", f.percent, optional=True, seeds=lambda each: values.pairs(each, "accuracy"),
        small=lambda r: "" if r.calibration_error is None else f"calibration error {f.percent(r.calibration_error)}",
        about="Of a reward model: share of test pairs, a row's right answer and a wrong one, that it ranks right; chance is 50. Under it how far the chances "
        "that it claims are from the shares that are right (expected calibration error, points).")
    calibration_error: float | None = _figure("pairs", seeds=lambda each: values.pairs(each, "calibration_error"))
    transfer: float | None = _figure(values.transfer, "Transfer, %", "Quality", f.percent, about="Mean of the same metric over test sets of other domains.")
    labelled_rows: int | None = _figure(
        "labelled_rows", "Labelled rows", "Data", _whole, seeds=first,
        about="Labelled rows that the technique used: training rows, plus the validation rows that chose the checkpoint; "
        "demonstrations alone for few-shot, all rows that retrieval searches or a choice of prompt is scored on; none for an untouched base.")
    rationale_rows: int | None = _figure(
        lambda c: c.result.teacher.rows if c.result.teacher and c.result.kind != "teacher" else None, "Rationale rows", "Data", _whole,
        seeds=first, optional=True, about="Training rows with a rationale of the teacher.")
    synthetic_rows: int | None = _figure(
        "synthetic.rows", "Synthetic rows", "Data", _whole, seeds=first, optional=True,
        about="Rows that a teacher wrote (pipeline.synthesize), trained on beside the labelled ones, which alone count as labelled.")
    train_s: float | None = _figure(
        "phases.train_s", "Train, s", "Training", f.seconds, over=timed, mark=lambda r: _resumed(r) if r.train_s else "", single=True, for_dvc=True,
        about="Seconds in training steps alone: no start-up, validation or evaluation. "
        f"{RESUMED}: the run was resumed, packed with others, timed with others on the device, or shared by several GPUs; that is no single run's time, "
        "and no chart has it.")
    wall_s: float | None = _figure(
        "phases.wall_s", "Total, s", "Training", f.seconds, over=timed, mark=lambda r: _resumed(r) + (SHARED if r.shared_process else ""), single=True,
        for_dvc=True,
        about="Wall clock of the whole cell, evaluation included. "
        f"{SHARED}: imports and base were read once for several cells, so their start-up and load are missing from it.")
    made_s: float | None = _figure(
        values.made_s, "With its parts, s", "Training", f.seconds, optional=True, over=timed, mark=_resumed, single=True,
        about="Of what is made of other cells (the one it begins at, a reward model and what that begins at): warm-up and training of all of them and its own.")
    teacher_s: float | None = _figure(
        values.teacher_s, "Teacher, s", "Training", f.seconds, optional=True, about="Seconds that the teacher took for its rationales, or for synthetic rows.")
    tokens_per_s: float | None = _figure(
        "work.tokens_per_s", "Tokens/s", "Training", _whole, over=timed, mark=_resumed, single=True,
        about="Real tokens (no padding) through training steps in a second.")
    timing: str = _figure(lambda c: c.timing, over=timed, seeds=first, empty="")
    """resumed or packed: the times are no single run's, and table.csv leaves them empty."""
    shared_process: bool = _figure("shared_process", over=timed, seeds=any, empty=False)
    peak_bytes: float | None = _figure(
        "memory.peak_bytes", "Peak memory", "Training", f.size, small=lambda r: memory_kind(r), last=1, for_dvc=True,
        about="Peak while training, validation kept out; while evaluating for a technique that trains nothing. "
        "RSS: resident memory of the process on the CPU; GPU: what the allocator reserved.")
    memory_kind: str | None = _figure(lambda c: c.result.memory.kind if c.result.memory and c.result.memory.peak_bytes is not None else None, seeds=first)
    trainable: float | None = _figure(
        "size.trainable", "Trainable", "Model", f.count, small=lambda r: f.share(r.trainable_share), over=with_model, for_dvc=True,
        about="Parameters that are trained, and their share of all.")
    trainable_share: float | None = _figure(lambda c: c.result.size.trainable / c.result.size.total if c.result.size else None, over=with_model)
    artefact_bytes: float | None = _figure(
        "size.artefact_bytes", "Artefact", "Model", f.size, over=with_model, for_dvc=True,
        about="Bytes on disk that training leaves to serve, beside the base model.")
    latency_s: float | None = _figure(
        "inference.latency_s", "Latency, ms", "Model", f.milliseconds, for_dvc=True,
        small=lambda r: "" if r.merged_latency_s is None else f"merged {f.milliseconds(r.merged_latency_s)}",
        about="Median time of a request of one test row, artefact attached; under it merged into the base, where that is possible.")
    merged_latency_s: float | None = _figure("inference.merged_latency_s")
    request_peak_bytes: float | None = _figure("inference.request_peak_bytes")
    merged_request_peak_bytes: float | None = _figure("inference.merged_request_peak_bytes")
    merged_bf16: float | None = _merged("bf16")
    merged_bf16_drift: float | None = _figure()
    merged_bf16_left: float | None = _figure()
    merged_bf16_verdict: str | None = _figure()
    merged_nf4: float | None = _merged("nf4")
    merged_nf4_drift: float | None = _figure()
    merged_nf4_left: float | None = _figure()
    merged_nf4_verdict: str | None = _figure()
    merged_int8: float | None = _merged("int8")
    merged_int8_drift: float | None = _figure()
    merged_int8_left: float | None = _figure()
    merged_int8_verdict: str | None = _figure()
    merged_q8_0: float | None = _merged("q8_0")
    merged_q8_0_drift: float | None = _figure()
    merged_q8_0_left: float | None = _figure()
    merged_q8_0_verdict: str | None = _figure()
    """One of records.evaluations.SAID, of several seeds the worst."""
    perplexity_change: float | None = _figure(
        values.growth_of("perplexity_base"), "Perplexity", "Forgetting", f.growth, small=_to_16bit(f.growth, "perplexity_change_16bit"),
        about="Change of the perplexity on unrelated text against the untouched base in the same precision "
        "(above 0: forgotten; ×53: 53 times the base's); under it against the base in 16 bits, where the base is quantised.")
    perplexity_change_16bit: float | None = _figure(values.growth_of("perplexity_base_16bit"))
    pairs_change: float | None = _figure(
        values.change_of("pairs", "pairs_base"), "Minimal pairs", "Forgetting", f.points, small=_to_16bit(f.points, "pairs_change_16bit"),
        about="Change of the share of grammatical minimal pairs ranked right, in percentage points (below 0: forgotten), likewise.")
    pairs_change_16bit: float | None = _figure(values.change_of("pairs", "pairs_base_16bit"))
    lambada_change: float | None = _figure(
        values.change_of("lambada", "lambada_base"), "LAMBADA", "Forgetting", f.points, small=_to_16bit(f.points, "lambada_change_16bit"), optional=True,
        about="Change of the share of LAMBADA passages whose last word the model says, in percentage points (below 0: forgotten), likewise.")
    lambada_change_16bit: float | None = _figure(values.change_of("lambada", "lambada_base_16bit"))
    transfer_change: float | None = _figure()
    """Mean of the transfer sets above zero-shot's."""
    energy_j: float | None = _figure(
        "work.energy_j", "Energy, kJ", "Training", _kilojoules, over=timed, single=True,
        small=lambda r: "" if r.host_energy_j is None else f"CPU {_kilojoules(r.host_energy_j)}",
        about="Energy of the training steps, validation left out: the GPU's counter, and under it the CPU's; on the CPU that of its packages and their "
        "memory (RAPL). Counters are the machine's and include what else ran. Why a dash is a dash stands in the cell's details.")
    host_energy_j: float | None = _figure("work.host_energy_j", over=timed, single=True)
    cost: float | None = _figure(
        "cost", "Cost", "Training", main=lambda r: f.DASH if r.cost is None else f"{r.cost:.3g} {r.currency}", optional=True, over=timed, single=True,
        seeds=values.one_currency(lambda costs: statistics.fmean(c.amount for c in costs)),
        about="Wall clock of the whole cell at the config's price_per_hour.")
    """Of a cell, in `currency`; None without a price, or where its seeds were priced in several."""
    currency: str | None = _figure("cost", over=timed, seeds=values.one_currency(lambda costs: costs[0].currency))
    engine: str | None = _figure("work.engine", over=list, seeds=lambda each: ", ".join(dict.fromkeys(each)))
    """What did the training steps (results.ENGINES); several seeds' that differ are all named."""
    diverged: int = _figure(lambda c: c.result.status == "diverged", over=list, seeds=sum, empty=0)
    """Seeds whose loss, weights or scores were not finite."""
    notes: str = _figure(lambda c: notes_of([c]), over=list, seeds=lambda each: "; ".join(dict.fromkeys(itertools.chain(*each))))
    own_notes: tuple[str, ...] = ()
    """Notes that not every row has."""
    cells: tuple[Cell, ...] = field(default=(), repr=False)
    evaluations: tuple[Evaluations, ...] = field(default=(), repr=False)
    """What was evaluated beside the finished ones, in their order."""
    verdict: Verdict | None = field(default=None, repr=False, compare=False)
    """On all rows of the same number of training rows; the rows of a group share it."""

    @property
    def teacher(self) -> bool:
        """The teacher is no way of making the model do the task: it is shown, not compared."""
        return self.kind == "teacher"

    @property
    def one_seed(self) -> bool:
        """Whether its letter speaks of these weights alone: no technique beside it has several seeds."""
        return self.covers_seeds is False

    @property
    def begins(self) -> bool:
        """Whether it begins at what another cell trained, whose cost is not in its own."""
        return any(r.start for r in self.results)

    @property
    def group(self) -> str:
        """The grid's number of training rows ("200", "all"): rows of one group are compared with each other."""
        return self.cells[0].rows

    @property
    def results(self) -> list[Result]:
        return [c.result for c in self.cells]


FIGURES = {one.name: dataclasses.replace(one.metadata["figure"], key=one.name) for one in dataclasses.fields(Row) if one.metadata}
"""Name -> figure, in the order of table.csv."""
COLUMNS = sorted((one for one in FIGURES.values() if one.title), key=lambda one: (SECTIONS.index(one.section), one.last))


def notes_of(cells: Sequence[Cell]) -> list[str]:
    """Notes and errors of cells, each once."""
    return list(dict.fromkeys(n for c in cells for n in [*c.result.notes, c.result.error] if n))


def metrics(cell: Cell) -> dict[str, float]:
    """The few figures that `dvc metrics show` lists, by name; what was not measured is left out."""
    every = {key: one.of(cell) for key, one in FIGURES.items() if one.for_dvc}
    return {key: value for key, value in every.items() if value is not None}


def columns(rows: Sequence[Row]) -> tuple[list[Figure], list[Figure]]:
    """(columns of which some row has a value, columns that were not measured at all)."""
    metric = metric_name(rows)
    weights = " of these weights" if any(r.one_seed for r in rows) and not any(r.covers_seeds for r in rows) else ""
    every = [dataclasses.replace(c, title=c.title.format(metric=metric) + weights * (c.key == "letters")) for c in COLUMNS]
    empty = [c for c in every if all(c.value(r) is None for r in rows)]
    return [c for c in every if c not in empty], [c for c in empty if not c.optional]


def metric_name(rows: Sequence[Row]) -> str:
    return METRICS.get(rows[0].metric, rows[0].metric)


def memory_kind(row: Row) -> str:
    """Which counter the peak is of, in a word."""
    return COUNTERS.get(row.memory_kind or "", row.memory_kind or "")


def interval(row: Row) -> str:
    """The headline metric's 95% interval in percent; empty where none was measured."""
    return f.span(row.metric_low, row.metric_high)


def remarks(row: Row) -> list[str]:
    """What the last column says: how the row stands to the best, out of memory or diverged, unusual timing."""
    standing = STANDINGS.get(row.standing, "").format(name=row.verdict.name if row.verdict else "", p=f.p_value(row.against_best_p))
    standing += " (these weights)" if standing and row.one_seed else ""
    status = "" if row.status == "ok" else row.status.replace("oom", "out of memory", 1)
    return [text for text in (standing, "teacher" if row.teacher else "", status, row.timing) if text]

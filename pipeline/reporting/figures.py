"""The columns of the comparison, said once for the HTML page and table.md; and as plain numbers table.csv, all
fields of a row, and history.csv, all training curves.

Library of `python -m pipeline.report`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.reporting import words as f
from pipeline.reporting.rows import QUANTISED, Row

METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1", "rouge_l": "ROUGE-L"}
KINDS = {"cpu_rss": "RSS", "gpu_reserved": "GPU"}
RESUMED, SHARED = "†", "‡"
LAST_FIELD = "notes"


@dataclass(frozen=True)
class Column:
    """One column: a field of Row, which it is sorted by, and how its cell reads."""

    key: str
    title: str
    group: str
    main: Callable[[Row], str]
    small: Callable[[Row], str] = lambda row: ""
    optional: bool = False
    """Left out without a word where no row has a value; of others the report says that they were not measured."""

    @property
    def about(self) -> str:
        """What the column means."""
        return ABOUT[self.key]

    def value(self, row: Row) -> Any:
        """What the column is sorted by; None is last."""
        return getattr(row, self.key)


COLUMNS = [
    Column("name", "Technique", "", lambda r: r.name, lambda r: r.family if r.teacher else f"{r.family} · {r.precision}"),
    Column("test", "Test {metric}, %", "Quality", lambda r: f.percent(r.test), lambda r: interval(r)),
    Column("letters", "Tier", "Quality", lambda r: r.letters or f.DASH, lambda r: "" if r.covers_seeds in (None, True) else "one seed", optional=True),
    Column("test_seed_high", "Over seeds, %", "Quality", lambda r: f.span(r.test_seed_low, r.test_seed_high) or f.DASH, optional=True),
    Column("against_zero_shot", "Against zero-shot", "Quality", lambda r: f.points(r.against_zero_shot),
           lambda r: f.p_value(r.against_zero_shot_p)),
    Column("macro_f1", "Macro-F1, %", "Quality", lambda r: f.percent(r.macro_f1)),
    Column("validation", "Validation, %", "Quality", lambda r: f.percent(r.validation)),
    Column("transfer", "Transfer, %", "Quality", lambda r: f.percent(r.transfer)),
    Column("labelled_rows", "Labelled rows", "Data", lambda r: _whole(r.labelled_rows)),
    Column("rationale_rows", "Rationale rows", "Data", lambda r: _whole(r.rationale_rows), optional=True),
    Column("synthetic_rows", "Synthetic rows", "Data", lambda r: _whole(r.synthetic_rows), optional=True),
    Column("seeds", "Seeds", "Data", lambda r: str(r.seeds)),
    Column("train_s", "Train, s", "Training", lambda r: _marked(f.seconds(r.train_s), r)),
    Column("wall_s", "Total, s", "Training", lambda r: _marked(f.seconds(r.wall_s), r, SHARED if r.shared_process else "")),
    Column("teacher_s", "Teacher, s", "Training", lambda r: f.seconds(r.teacher_s), optional=True),
    Column("tokens_per_s", "Tokens/s", "Training", lambda r: _marked(_whole(r.tokens_per_s), r)),
    Column("energy_j", "Energy, kJ", "Training", lambda r: _kilojoules(r.energy_j),
           lambda r: "" if r.host_energy_j is None else f"CPU {_kilojoules(r.host_energy_j)}"),
    Column("cost", "Cost", "Training", lambda r: f.DASH if r.cost is None else f"{r.cost:.3g} {r.currency}", optional=True),
    Column("peak_bytes", "Peak memory", "Training", lambda r: f.size(r.peak_bytes), lambda r: memory_kind(r)),
    Column("trainable", "Trainable", "Model", lambda r: f.count(r.trainable),
           lambda r: f.share(r.trainable_share)),
    Column("artefact_bytes", "Artefact", "Model", lambda r: f.size(r.artefact_bytes)),
    Column("latency_s", "Latency, ms", "Model", lambda r: f.milliseconds(r.latency_s),
           lambda r: "" if r.merged_latency_s is None else f"merged {f.milliseconds(r.merged_latency_s)}"),
    Column("perplexity_change", "Perplexity", "Forgetting", lambda r: _growth(r.perplexity_change),
           lambda r: _to_16bit(r, r.perplexity_change_16bit, _growth)),
    Column("pairs_change", "Minimal pairs", "Forgetting", lambda r: f.points(r.pairs_change),
           lambda r: _to_16bit(r, r.pairs_change_16bit, f.points)),
    Column("lambada_change", "LAMBADA", "Forgetting", lambda r: f.points(r.lambada_change),
           lambda r: _to_16bit(r, r.lambada_change_16bit, f.points), optional=True),
]

ABOUT = {
    "name": "The file in conf/technique/; after a + its variant, such as the best setting of a sweep. Under it the family, techniques "
    "that change the model in the same way, and the precision that the base's weights are held in.",
    "labelled_rows": "Labelled rows that the technique used: training rows, plus the validation rows that chose the checkpoint; "
    "demonstrations alone for few-shot, all rows that retrieval searches or a choice of prompt is scored on; none for an untouched base.",
    "rationale_rows": "Training rows with a rationale of the teacher.",
    "synthetic_rows": "Rows that a teacher wrote (pipeline.synthesize), trained on beside the labelled ones, which alone count as labelled.",
    "seeds": "Runs with different seeds; the figures are their means.",
    "test": "Share of the test rows answered right (or the task's own metric), in percent. Under it the 95% interval of accuracy (Wilson); "
    "with several seeds it reaches from the lowest to the highest bound of their intervals.",
    "test_seed_high": "Smallest and largest test figure over the seeds: the spread of training, not that of drawing the test rows.",
    "letters": "Techniques that share a letter cannot be told apart by these runs; a is the best one's. Tested over seeds and test rows, corrected for "
    "all pairs (docs/statistics.md); of more than ten techniques, at most 5% of the differences shown should be chance. "
    "One seed: how much a technique's figure moves from seed to seed is not known, and the test is over the rows alone.",
    "against_zero_shot": "Accuracy beyond zero-shot's in percentage points on the same test rows, and the p-value over seeds and rows "
    "(two-sided, not corrected for the number of techniques; with one seed McNemar's exact test).",
    "macro_f1": "Mean over the answers of their F1: a rare answer counts as much as a frequent one.",
    "validation": "The same metric on the validation rows, which chose the checkpoint.",
    "transfer": "Mean of the same metric over test sets of other domains.",
    "train_s": "Seconds in training steps alone: no start-up, validation or evaluation. "
    f"{RESUMED}: the run was resumed or packed with others; that is no single run's time, and no chart has it.",
    "wall_s": "Wall clock of the whole cell, evaluation included. "
    f"{SHARED}: imports and base were read once for several cells, so their start-up and load are missing from it.",
    "teacher_s": "Seconds that the teacher took for its rationales, or for synthetic rows.",
    "tokens_per_s": "Real tokens (no padding) through training steps in a second.",
    "energy_j": "Energy of the training steps, validation left out: the GPU's counter, and under it the CPU's; on the CPU that of its packages and their "
    "memory (RAPL). Counters are the machine's and include what else ran. Why a dash is a dash stands in the cell's details.",
    "cost": "Wall clock of the whole cell at the config's price_per_hour.",
    "peak_bytes": "Peak while training, validation kept out; while evaluating for a technique that trains nothing. "
    "RSS: resident memory of the process on the CPU; GPU: what the allocator reserved.",
    "trainable": "Parameters that are trained, and their share of all.",
    "artefact_bytes": "Bytes on disk that training leaves to serve, beside the base model.",
    "latency_s": "Median time of a request of one test row, artefact attached; under it merged into the base, where that is possible.",
    "perplexity_change": "Change of the perplexity on unrelated text against the untouched base in the same precision "
    "(above 0: forgotten); under it against the base in 16 bits, where the base is quantised.",
    "pairs_change": "Change of the share of grammatical minimal pairs ranked right, in percentage points (below 0: forgotten), likewise.",
    "lambada_change": "Change of the share of LAMBADA passages whose last word the model says, in percentage points (below 0: forgotten), likewise.",
}


def columns(rows: Sequence[Row]) -> tuple[list[Column], list[Column]]:
    """(columns of which some row has a value, columns that were not measured at all)."""
    metric = metric_name(rows)
    every = [dataclasses.replace(c, title=c.title.format(metric=metric)) for c in COLUMNS]
    empty = [c for c in every if all(c.value(r) is None for r in rows)]
    return [c for c in every if c not in empty], [c for c in empty if not c.optional]


def metric_name(rows: Sequence[Row]) -> str:
    """The headline metric in words."""
    return METRICS.get(rows[0].metric, rows[0].metric)


def memory_kind(row: Row) -> str:
    """Which counter the peak is of, in a word."""
    return KINDS.get(row.memory_kind or "", row.memory_kind or "")


def interval(row: Row) -> str:
    """The 95% interval in percent; empty where the headline metric is not the one that has it."""
    return f.span(row.accuracy_low, row.accuracy_high) if row.metric == "accuracy" else ""


def _whole(value: float | None) -> str:
    return f.DASH if value is None else f"{value:,.0f}"


def _kilojoules(joules: float | None) -> str:
    return f.DASH if joules is None else f"{joules / 1000:,.1f}" if joules >= 1000 else f"{joules / 1000:.2g}"


def _marked(text: str, row: Row, further: str = "") -> str:
    mark = (RESUMED if row.timing else "") + further
    return f"{text} {mark}" if mark and text != f.DASH else text


def _growth(value: float | None) -> str:
    return f.DASH if value is None else f"{f.signed(100 * value)}%"


def _to_16bit(row: Row, value: float | None, show: Callable[[float | None], str]) -> str:
    return f"16-bit {show(value)}" if value is not None and row.precision in QUANTISED else ""


def timing_notes(rows: Sequence[Row]) -> list[str]:
    """What the marks at times stand for, those that occur."""
    resumed = [f"{RESUMED} resumed, or packed with other cells: no single run's time"]
    shared = [f"{SHARED} imports and base were read once for several cells: their start-up and load are missing from the total"]
    return resumed * any(r.timing for r in rows) + shared * any(r.shared_process for r in rows)


def remarks(row: Row) -> list[str]:
    """What the last column says: how the row stands to the best, out of memory, unusual timing."""
    standing = {
        "best": "best",
        "near": "not told apart from the best",
        "below": f"below the best ({f.p_value(row.against_best_p)})",
    }.get(row.standing, "")
    status = "" if row.status == "ok" else row.status.replace("oom", "out of memory", 1)
    return [text for text in (standing, "teacher" if row.teacher else "", status, row.timing) if text]


def table_csv(rows: Sequence[Row]) -> str:
    """One line a row, plain numbers (fractions, seconds, bytes), empty where nothing was measured or a time is no single run's."""
    names = [field.name for field in dataclasses.fields(Row)]
    names = names[: names.index(LAST_FIELD) + 1]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        hidden = ("train_s", "wall_s", "tokens_per_s", "energy_j", "host_energy_j", "cost") if row.timing else ()
        writer.writerow([_plain(None if name in hidden else getattr(row, name)) for name in names])
    return out.getvalue()


def history_csv(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The training curves of all cells, one line a point: cell, step, loss, lr, validation_metric, validation_nll, and what a technique adds (reward)."""
    out = io.StringIO()
    known = ["cell", "step", "loss", "lr", "validation_metric", "validation_nll"]
    further = sorted({key for points in histories.values() for point in points for key in point} - set(known))
    writer = csv.DictWriter(out, [*known, *further], lineterminator="\n")
    writer.writeheader()
    for cell, points in histories.items():
        writer.writerows({"cell": cell, **point} for point in points)
    return out.getvalue()


def _plain(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)

"""What requests cost a model that is served: seconds and memory of one, of one with the adapter merged, of many adapters over one base.

Library of pipeline/cell/evaluation.py. These figures depend on shapes, the code and the machine, not on what was learnt. So they are measured once
for each `key`, and later cells of the experiment whose requests are about as long take them over and say from whom (`Inference.requests_from`);
latency=measure measures all anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.cell import identity, locks
from pipeline.cell.inputs import Parts
from pipeline.core import locks as core_locks
from pipeline.core.files import UserError, read_object, write_json
from pipeline.data.rows import source_of
from pipeline.measure import clock, machine, turns
from pipeline.measure.memory import PeakMemory
from pipeline.models.base import manifest, memory_bytes, parameters
from pipeline.records.finished import name as cell_name
from pipeline.records.finished import read_or_name
from pipeline.records.results import Inference
from pipeline.scoring.scorer import Scorer
from pipeline.scoring.sharing import shared_latency

FIELDS = ("latency_s", "merged_latency_s", "request_peak_bytes", "merged_request_peak_bytes", "adapters", "one_adapter", "adapters_mixed")
"""Of Inference."""
ALIKE = 0.1
"""Share by which the tokens of requests may differ whose figures are the same: that of a prefix such as predict:, not of demonstrations."""
Tried = Callable[[str, Any, Callable[[], Any]], Any]
"""(name, value where it fails, what measures) -> its value."""


def measure(parts: Parts, scorer: Scorer, rows: Sequence[dict], inference: Inference, tried: Tried,
            failed: Mapping[str, str]) -> Inference:
    """The figures added to `inference`, measured or taken over; `scorer.model` may be merged at the end, so it comes last.

    Args:
        rows: the test rows; the first few are the requests.
        failed: what could not be measured, as `tried` fills it.
    """
    asked = rows[: parts.settings.evaluate.latency_rows]
    if not asked:
        return inference
    mark = key(parts, scorer, asked)
    if mark is None or parts.cfg.latency == "measure":
        return dataclasses.replace(_measured(parts, scorer, asked, inference, tried), requests_key=mark)
    tokens = sum(len(source_of(prompt)) + len(prompt) + sum(map(len, choices)) for prompt, choices in scorer.items(asked))
    with _one_at_a_time(_memory(parts, mark)):
        before = _before(parts, mark, tokens)
        if before is not None:
            return dataclasses.replace(inference, **before, requests_key=mark)
        if parts.cfg.share or turns.crowded():  # others are on the device at any time: the figures are nobody's
            return _measured(parts, scorer, asked, inference, tried)
        made = dataclasses.replace(_measured(parts, scorer, asked, inference, tried), requests_key=mark)
        if made.latency_s is not None and not failed:
            figures = {name: getattr(made, name) for name in FIELDS}
            write_json(_memory(parts, mark), {"cell": cell_name(parts.cfg), "key": mark, "tokens": tokens, "figures": figures})
    return made


def key(parts: Parts, scorer: Scorer, asked: Sequence[dict]) -> str | None:
    """Hash of all that the figures depend on; None where they depend on what was learnt.

    Method with its settings, precision and shape of the model; base, code, machine and packages; what is asked for. An answer
    that is generated ends where the model says so, and reasoning likewise: such figures are a cell's own. So are those of a cell that begins at another.
    """
    cfg = parts.cfg
    if scorer.task.scoring != "choice" or scorer.reasoning or cfg.start:
        return None
    decisive = identity.decides(cfg)
    evaluate = parts.settings.evaluate
    held = {
        "method": decisive["method"], "precision": [parts.precision, vars(parts.settings.precision)], "dtype": str(parts.dtype),
        "rows": None if parts.method.trains else [cfg.train_rows, decisive.get("seed")], "shape": [*parameters(scorer.model), memory_bytes(scorer.model)],
        "model": manifest(parts.model)["sha256"], "code": identity.request_code(cfg), "hardware": machine.hardware(parts.device) | machine.arithmetic(),
        "packages": machine.versions(machine.PACKAGES), "evaluate": [evaluate.latency_rows, evaluate.adapters, evaluate.batch_tokens],
        "requests": [len(row["choices"]) for row in asked],
    }
    return hashlib.sha256(json.dumps(held, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _memory(parts: Parts, mark: str) -> Path:
    return Path(parts.cfg.paths.work) / "requests" / parts.cfg.experiment / f"{mark}.json"


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Of cells with one key, one measures while the others wait for it, without the device."""
    with contextlib.ExitStack() as stack:
        with turns.away(waiting=True):
            stack.enter_context(core_locks.held(path.with_suffix(".lock"), core_locks.FOREVER))
        yield


def _before(parts: Parts, mark: str, tokens: int) -> dict[str, Any] | None:
    """The figures of another cell of this experiment with this key, which has its result or is about to; None where there is none.

    tokens: of all requests of this one."""
    path = _memory(parts, mark)
    if not path.exists():
        return None
    try:
        known = read_object(path)
        if abs(known["tokens"] - tokens) > ALIKE * tokens:
            return None
        cell, figures = known["cell"], {name: known["figures"][name] for name in FIELDS}
    except (UserError, KeyError, TypeError):
        return None
    if known.get("key") != mark or cell == cell_name(parts.cfg) or not (_has_result(parts, cell, mark) or _is_computed(parts, cell)):
        return None
    return {**figures, "requests_from": cell}


def _has_result(parts: Parts, cell: str, mark: str) -> bool:
    result = read_or_name(Path(parts.cfg.paths.results) / parts.cfg.experiment / cell / "result.json")
    return bool(result and result.status == "ok" and result.inference and result.inference.requests_key == mark and result.inference.requests_from is None)


def _is_computed(parts: Parts, cell: str) -> bool:
    path = locks.path_of(parts.cfg).with_name(f"{parts.cfg.experiment}-{cell}.lock")
    try:
        with core_locks.held(path):
            return False
    except core_locks.Busy:
        return True


def _measured(parts: Parts, scorer: Scorer, asked: Sequence[dict], inference: Inference, tried: Tried) -> Inference:
    latency, request_bytes = _requests(parts, scorer, asked)
    alone = dataclasses.replace(inference, latency_s=latency, request_peak_bytes=request_bytes)
    shared = tried("adapters", alone, lambda: _many_adapters(parts, scorer, asked, alone))
    measured: Inference = tried("merged_latency_s", shared, lambda: _merged(parts, scorer, asked, shared))
    return measured


def _requests(parts: Parts, scorer: Scorer, asked: Sequence[dict]) -> tuple[float | None, int | None]:
    """Median seconds of a one-row request to the model as it stands, and the peak memory of answering some."""
    memory = PeakMemory(parts.device)
    memory.start()
    latency = clock.latency_s(lambda row: scorer.predict([row]), list(asked), parts.device, timed=turns.alone)
    return latency, memory.stop().peak_bytes


def _many_adapters(parts: Parts, scorer: Scorer, asked: Sequence[dict], inference: Inference) -> Inference:
    """How long requests take that each have an adapter of their own over one base, where adapters can share one."""
    shared = shared_latency(scorer, parts.method, asked, parts.settings.evaluate.adapters)
    return dataclasses.replace(inference, adapters=shared.adapters, one_adapter=shared.one_adapter, adapters_mixed=shared.mixed) if shared else inference


def _merged(parts: Parts, scorer: Scorer, asked: Sequence[dict], inference: Inference) -> Inference:
    """Latency and memory once more with the adapter folded in, where that is possible; the last thing done to the model."""
    if inference.latency_s is None or not parts.method.merges:
        return inference
    if not hasattr(scorer.model, "peft_config"):
        return dataclasses.replace(inference, merged_latency_s=inference.latency_s, merged_request_peak_bytes=inference.request_peak_bytes)
    scorer.model = parts.method.merged(scorer.model)
    latency, request_bytes = _requests(parts, scorer, asked)
    return dataclasses.replace(inference, merged_latency_s=latency, merged_request_peak_bytes=request_bytes)

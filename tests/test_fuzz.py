"""Hostile settings and damaged data through the real entries: one sentence and exit code 2, or done as it was said; never a trace or a hang.

    python -m pytest -q tests/test_fuzz.py        minutes; prints how the cases ended (docs/reliability.md)

Every case runs in a forked child of this process, whose imports are warm. The cases are drawn with SEED alone; FUZZ_SEED=<number> draws others.
"""

from __future__ import annotations

import contextlib
import ctypes
import gzip
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import write_model, write_rationales, write_task

from pipeline import forecast, prepare, train
from pipeline.cell.identity import flat, folder_of
from pipeline.core.compose import ROOT, compose, plain
from pipeline.core.files import read_json, read_jsonl
from pipeline.data.recipe import text_of
from pipeline.data.sources import read_table
from pipeline.records.results import read

pytestmark = pytest.mark.slow
SEED = int(os.environ.get("FUZZ_SEED", "20261129"))
CONFIGS, PAIRS, FILES = 280, 60, 240
HANG_CPU_S, HANG_S = 20, 120
"""Of a process's own time, so that a busy machine is no hang; of the clock, for one that waits."""
MEMORY = 12 << 30
NAMES = {"refused": "one sentence, exit code 2", "done": "as it was said, exit code 0"}


@dataclass
class Outcome:
    """kind: refused or done, as NAMES has them, else what went wrong."""

    kind: str
    said: str


@dataclass
class Tally:
    """What became of the cases, and those that went wrong."""

    what: str
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, case: str, outcome: Outcome) -> None:
        self.counts[outcome.kind] += 1
        if outcome.kind not in NAMES:
            self.wrong.append(f"{outcome.kind}: {case}: {outcome.said}")

    def check(self, capsys: pytest.CaptureFixture[str]) -> None:
        ends = ", ".join(f"{count} {kind} ({NAMES[kind]})" if kind in NAMES else f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        with capsys.disabled():
            print(f"\n{self.what}: {self.counts.total()} cases (seed {SEED}): {ends}; {len(self.wrong)} wrong", *self.wrong, sep="\n  ")
        assert not self.wrong
        assert all(self.counts[kind] > 20 for kind in NAMES), "cases of both kinds, else this tests little"


def forked(call: Callable[[], int], folder: Path) -> Outcome:
    """How `call` ends in a child of its own, whose current folder is folder/cwd."""
    (folder / "cwd").mkdir(parents=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _in_child(call, folder)
    end, status = time.monotonic() + HANG_S, None
    while status is None and time.monotonic() < end:
        pid, ended = os.waitpid(child, os.WNOHANG)
        status = ended if pid else None
        time.sleep(0.005)
    if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return Outcome("hang", f"{HANG_S} s of the clock")
    code, error = os.waitstatus_to_exitcode(status), (folder / "err").read_text(errors="replace")
    if "ended by signal" in error or code == -signal.SIGXCPU:
        return Outcome("hang", f"{HANG_CPU_S} s of the processor")
    sentences = re.findall(r"^error: .*$", error, re.M)
    if "Traceback" in error or code not in (0, 2):
        return Outcome("trace", error.strip().rpartition("\n")[2] or f"exit code {code}")
    if len(sentences) != (code == 2):
        return Outcome("other words", error[-300:])
    return Outcome("refused" if code == 2 else "done", "".join(sentences))


def _in_child(call: Callable[[], int], folder: Path) -> None:
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # do not outlive the test
        resource.setrlimit(resource.RLIMIT_CPU, (HANG_CPU_S, HANG_CPU_S + 5))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(folder / "cwd")
        code = call()
    except BaseException:  # noqa: BLE001  (whatever it is, it shows as a trace)
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def tree(folder: Path) -> dict[str, int]:
    """Files below a folder, with when they were changed."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def checkout() -> set[str]:
    """What git says of this checkout's files, ignored ones too, but for what Python and the tests' own tools write."""
    command = ["git", "status", "--porcelain", "--ignored", "--untracked-files=all"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line for line in lines if not re.search(r"__pycache__|_cache|\.venv", line)}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, imports: None) -> Iterator[Path]:
    """A folder with data/, models/ and rationales/; neither it nor the checkout may change."""
    import datasets

    datasets.disable_progress_bars()

    root = tmp_path_factory.mktemp("ground")
    write_task(root / "data" / "vader_movies")
    write_rationales(root / "rationales" / "vader_movies" / "lexicon", root / "data" / "vader_movies")
    write_model(root / "models" / "smollm2_135m")
    before, known = tree(root), checkout()
    yield root
    assert tree(root) == before and not checkout() - known, "something was written outside of a case's own folders"


# Settings

HOSTILE = [
    "null", "''", "[]", "{}", "-1", "0", "1", "2.5", "true", "false", "perhaps", "inf", "-inf", "nan", "1e400", "1e-320", "99999999999999999999", "100000",
    "[1]", "[null]", "[a,[b]]", "{a:1}", "'('", "../x", "/", ".", "a/b", "'a b'", "${seed}", "${oc.env:NOT_SET_ANYWHERE}", "\udcff", "'\t'", "x" * 5000,
]
TECHNIQUES = [
    "lora", "adalora", "vera", "loha", "boft", "oft", "ia3", "prompt_tuning", "prefix_tuning", "full", "top_layers", "bitfit_added", "adapter_houlsby",
    "compacter", "ladder", "few_shot", "prompt_choice", "retrieval", "dpo", "kto", "step_by_step_lora", "rationale_first", "lora_plus", "zero_shot",
    "magnitude_pruning", "low_rank",
]


def words_of(ground: Path, folder: Path) -> list[str]:
    own = [f"paths.{name}={folder}/{name}" for name in ("results", "work", "report", "sweeps", "synthetic", "plans", "tuning", "evaluations", "peft_results")]
    return [
        f"paths.data={ground}/data", f"paths.models={ground}/models", f"paths.rationales={ground}/rationales", *own, f"hydra.run.dir={folder}/hydra",
        "task=vader_movies", "model=smollm2_135m", "teacher=lexicon", "tracking=none", "device=cpu", "train.progress=false", "evaluate.forgetting=false",
        "evaluate.transfer_rows=0", "evaluate.latency_rows=1", "evaluate.adapters=[]", "model.note=null", "train_rows=16", "train.batch_size=8",
        "train.steps=1", "evaluate.test_rows=8",
    ]


def keys_of(ground: Path, technique: str) -> list[str]:
    """Keys of a technique's composed config, at every depth, and the groups."""
    config = plain(compose([*words_of(ground, ground), f"technique={technique}"]))
    keys = {key for key, _ in flat(config) if not key.startswith("paths.")}
    groups = {key.rpartition(".")[0] for key in keys} - {""}
    return sorted(keys | groups | {"paths", "paths.results", "paths.work", "paths.data", "hydra", "x", ""})


def configs(ground: Path, rng: random.Random) -> Iterator[list[str]]:
    """Overrides of one hostile value, then of two."""
    keys = {technique: keys_of(ground, technique) for technique in TECHNIQUES}
    for count in (*[1] * CONFIGS, *[2] * PAIRS):
        technique = rng.choice(TECHNIQUES) if rng.random() < 0.6 else "lora"
        own = [key for key in keys[technique] if key.startswith(("method", "objective"))]
        drawn = [rng.choice(own if rng.random() < 0.3 else keys[technique]) for _ in range(count)]
        yield [f"technique={technique}", *(f"{rng.choice(['', '', '', '+', '++'])}{key}={rng.choice(HOSTILE)}" for key in dict.fromkeys(drawn))]


def settled(words: list[str], folder: Path, outcome: Outcome) -> Outcome:
    """The outcome of a training; other than done where what it left is not the cell that was asked for, or lies elsewhere."""
    if outcome.kind == "done":
        cfg = compose(words)
        result = read(folder / "cwd" / folder_of(cfg))
        if json.dumps(result.config, sort_keys=True, default=str) != json.dumps(plain(cfg), sort_keys=True, default=str):
            return Outcome("another config", f"{result.cell} in {folder}")
        if result.status == "ok" and result.test is None:
            return Outcome("no scores", result.cell)
    left = [path for path in (folder / "cwd").rglob("*") if path.is_file() and path.suffix != ".lock"]
    if left and not any(re.match(r"\+*paths\.", word) for word in words[len(words_of(folder, folder)):]):
        return Outcome("written elsewhere", str(left[0]))
    return outcome


def test_hostile_settings(ground, tmp_path, capsys):
    rng, tally = random.Random(SEED), Tally("settings")
    for number, more in enumerate(configs(ground, rng)):
        folder = tmp_path / str(number)
        words = [*words_of(ground, folder), *more]
        entry = forecast if rng.random() < 0.1 else train
        outcome = forked(lambda entry=entry, words=words: entry.main(words), folder)
        tally.add(" ".join(more)[:200], settled(words, folder, outcome) if entry is train else outcome)
    tally.check(capsys)


# Data

COUNT = 40
YAMLS = {
    "choice": "answer: {column: label, labels: {pos: positive, neg: negative}}\nscoring: choice\n",
    "template": "answer: '{label}'\nchoices: [pos, neg]\nscoring: choice\n",
    "generate": "answer: '{label}'\nscoring: generate\n",
}
VALUES: list[Any] = [
    None, "", " ", 0, -1, 1.5, float("nan"), float("inf"), 10**30, True, [], ["a", "b"], [None], [["a"]], {"a": 1}, {}, "\x00", "a\x00b", "\ud800", "\ufeff",
    "pos", "POS", "neg ", "x" * 100_000, "\u202e", "é", "e\u0301", "{text}", "\r", "\n", "b'x'", "nan", "=1+1",
]
BYTES = [b"\x00", b"\xff", b"\xef\xbb\xbf", b'"', b"\t", b",", b"\n", b"\r\n", b"\\", b"{", b"[" * 3000, b"NaN", b"\\ud800", b"<html>", b"'", b"\xc3"]


def rows_of(rng: random.Random) -> list[dict[str, Any]]:
    return [{"text": f"film {n} {rng.choice(['story', 'plot', 'cast'])}", "label": "pos" if n % 2 else "neg", "n": n} for n in range(COUNT)]


def written(rows: list[dict[str, Any]], ending: str) -> bytes:
    """The rows as a file of this kind."""
    from datasets import Dataset

    if ending == "parquet":
        out = io.BytesIO()
        Dataset.from_list(rows).to_parquet(out)
        return out.getvalue()
    if ending in ("jsonl", "json"):
        return "".join(json.dumps(row) + "\n" for row in rows).encode() if ending == "jsonl" else json.dumps(rows).encode()
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(("," if ending == "csv" else "\t").join(line) for line in cells).encode("utf-8", "surrogatepass")


def spoilt_rows(rows: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """One value, key or label of some rows other than it should be."""
    kind, at = rng.randrange(6), rng.randrange(COUNT)
    if kind == 0:
        rows[at][rng.choice(["text", "label", "n"])] = rng.choice(VALUES)
    elif kind == 1:
        rows[at].pop(rng.choice(["text", "label"]))
    elif kind == 2:
        rows += [{**row, "label": "pos"} for row in rng.sample(rows, rng.choice([1, 2, 20]))]
    elif kind == 3:
        column, value = rng.choice(["text", "label"]), rng.choice(VALUES)
        rows = [{**row, column: value} for row in rows]
    elif kind == 4:
        rows = [{**row, "text": row["text"].encode()} for row in rows] if rng.random() < 0.5 else rows[: rng.choice([0, 1, 2])]
    else:
        rows[at]["label"] = str(rows[at]["label"]).upper()
    return rows


def spoilt_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes put in, taken out or repeated, a file cut off, or none of this kind."""
    at, length = rng.randrange(len(data) + 1), rng.choice([1, 3, 50])
    return rng.choice([
        lambda: data[:at] + rng.choice(BYTES) + data[at:], lambda: data[:at] + data[at + length:], lambda: data[:at], lambda: data[at:],
        lambda: data + data[:at],
        lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1:], lambda: rng.choice(BYTES) + data, lambda: b"", lambda: gzip.compress(data, mtime=0),
        lambda: b"<!DOCTYPE html>\n<html><body>Not found</body></html>\n", lambda: data.decode("utf-8", "replace").encode("utf-16"),
    ])()


def damaged(rng: random.Random, ending: str) -> bytes:
    rows = rows_of(rng)
    for _ in range(20):  # a Parquet column holds values of one type
        with contextlib.suppress(Exception):
            return written(spoilt_rows(rows, rng), ending) if rng.random() < 0.6 else spoilt_bytes(written(rows_of(rng), ending), rng)
    return b""


def prepared(folder: Path, file: Path, outcome: Outcome) -> Outcome:
    """The outcome of a preparation; other than done where rows are lost without a count, or a prompt is not the text of its column."""
    if outcome.kind != "done":
        return outcome
    held = folder / "data" / "own"
    manifest, rows = read_json(held / "manifest.json"), [row for name in ("train", "validation", "test") for row in read_jsonl(held / f"{name}.jsonl")]
    left_out = sum(sum(counts.values()) for counts in manifest["left_out"].values())
    if len(rows) + left_out != len(read_table(file)):
        return Outcome("rows lost", f"{len(rows)} kept and {left_out} left out of {len(read_table(file))}")
    odd = next((row for row in rows if row["prompt"] != f"Review: {text_of(row['fields']['text'])}" or not row["answer"]), None)
    return outcome if odd is None else Outcome("another prompt", repr(odd)[:200])


def test_damaged_data(ground, tmp_path, capsys):
    rng, tally = random.Random(SEED), Tally("data files")
    for number in range(FILES):
        folder, ending = tmp_path / str(number), rng.choice(["csv", "tsv", "jsonl", "jsonl", "json", "parquet", "parquet"])
        (folder / "task").mkdir(parents=True)
        file, (name, yaml) = folder / f"rows.{ending}", rng.choice(sorted(YAMLS.items()))
        file.write_bytes(damaged(rng, ending))
        (folder / "task" / "own.yaml").write_text(f"name: own\nsource: {{type: files, files: {file}}}\nprompt: 'Review: {{text}}'\n{yaml}")
        words = [f"hydra.searchpath=[file://{folder}]", "task=own", f"paths.data={folder}/data", f"paths.work={folder}/work"]
        tally.add(f"{file} ({name})", prepared(folder, file, forked(lambda words=words: prepare.main(words), folder)))
    tally.check(capsys)

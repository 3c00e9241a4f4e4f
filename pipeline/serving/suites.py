"""lm-evaluation-harness on a cell's model, and a task of ours as one of that library's: `python -m pipeline.evaluate suite=… to=…`.

Library; the only file that imports lm_eval (the extra lm-eval). The library asks a language model three things: the log-likelihood of a text after
another, of a whole text, and a greedy continuation; here the cell's model answers them, soft prompt, adapter and rounding included. Nothing is fetched
but what a task names: one of your own files (suite_path) needs no network.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError, closest, read_object, write_json, write_jsonl, write_text
from pipeline.data.rows import by_length, pad
from pipeline.models import architecture
from pipeline.models.base import autocast, most_tokens
from pipeline.records.evaluations import run_of
from pipeline.records.results import Result
from pipeline.scoring.scorer import Scorer, generate, logits_at
from pipeline.serving.artefact import Artefact, Base

KEPT = ("acc", "acc_norm", "exact_match")
"""Figures that are printed first where a task has them."""
BOOTSTRAPS = 100
"""Resamples of what has no standard error in closed form."""
NEW_TOKENS = 256
"""Of a generated answer, where the task does not say: the library's own default."""


@dataclass(frozen=True)
class Suite:
    """tasks: names of the library's, or of files under `path`. rows: of each task, the first so many; None: all. merged: the adapter folded in."""

    tasks: tuple[str, ...]
    path: str | None = None
    rows: int | None = None
    merged: bool = False


def refusal(artefact: Artefact) -> str | None:
    """Why a suite says nothing of this artefact; None: it does."""
    if artefact.method.own_prompt:
        return "what it does is in the request, before every prompt, and a suite has prompts of its own; choose the cell zero_shot"
    if architecture.of_folder(Path(artefact.cfg.paths.models) / artefact.cfg.model.name) is architecture.ENCODER_DECODER:
        return f"a suite's requests continue a prompt, and its base is {architecture.ENCODER_DECODER.name}; choose split=test in its place"
    return None


def run(result: Result, artefact: Artefact, suite: Suite, target: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Scores by task and metric: {value, stderr, base, change}, of the artefact and of its untouched base; also written to `target`/<task>.json,
    the rows' requests and answers to <task>.jsonl.

    Args:
        work: a folder for the base's scores, which are asked once for a base, tasks and rows.

    Raises:
        UserError: the library is not installed, it has no such task, a task's data are not to be had, an artefact that cannot be asked.
    """
    harness = _harness()
    if reason := refusal(artefact):
        raise UserError(f"{artefact.name} cannot be asked a suite: {reason}")
    if suite.merged and not (artefact.method.peft and artefact.method.merges):
        raise UserError(f"{artefact.name} has no adapter that can be merged; leave out merged=true")
    manager, base = _tasks(suite), Base.of(artefact.cfg)
    about_base = [result.provenance.get("model_sha256"), artefact.cfg.start, str(artefact.settings.precision), str(base.dtype)]
    before = _base_scores(harness, base, manager, suite, work, about_base, artefact)
    model = artefact.load(base)[0]
    if suite.merged:
        model = artefact.method.merged(model)
    after = _asked(base, model, manager, suite, artefact)
    scores = {task: {name: _compared(one, before.get(task, {}).get(name)) for name, one in metrics.items()} for task, metrics in _scores(after).items()}
    for task, metrics in scores.items():
        about = {"cell": artefact.name, "run": run_of(result), "task": task, "lm_eval": harness, "rows": suite.rows, "merged": suite.merged, "metrics": metrics}
        write_json(target / f"{task}.json", about)
        write_jsonl(target / f"{task}.jsonl", [_sample(sample) for sample in after["samples"].get(task, ())])
    return scores


def summary(metrics: dict[str, Any]) -> str:
    """A task's scores in words: those that are known best first."""
    names = sorted(metrics, key=lambda name: (name not in KEPT, name))
    return ", ".join(f"{name} {metrics[name]['value']:.3f} (the base's {metrics[name]['base']:.3f})" for name in names)


def _harness() -> str:
    """The library's version. Raises UserError where it is not installed."""
    try:
        import lm_eval
    except ImportError as error:
        raise UserError("suite= runs lm-evaluation-harness, which is not installed; run: .venv/bin/pip install 'lm-eval>=0.4.13,<0.5'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else it forks for its bootstraps, after torch has begun threads
    return str(lm_eval.__version__)


def _tasks(suite: Suite) -> Any:
    """The library's TaskManager that knows the suite's tasks; of your own files alone where those have them all, since the library's are 15,000."""
    from lm_eval.tasks import TaskManager

    if suite.path is not None and not Path(suite.path).is_dir():
        raise UserError(f"suite_path={suite.path} is no folder; name one that holds task files of lm-evaluation-harness")
    if suite.path is not None:
        own = TaskManager(include_path=suite.path, include_defaults=False)
        if all(own.match_tasks([task]) for task in suite.tasks):
            return own
    manager = TaskManager(include_path=suite.path)
    for task in suite.tasks:
        if not manager.match_tasks([task]):
            raise UserError(f"lm-evaluation-harness has no task {task!r}{closest(task, manager.all_tasks)}; suite_path= names a folder of your own task files")
    return manager


def _base_scores(harness: str, base: Base, manager: Any, suite: Suite, work: Path, about: list[Any], artefact: Artefact) -> dict[str, Any]:
    own = sorted(Path(suite.path).rglob("*")) if suite.path else []
    files = [hashlib.sha256(file.read_bytes()).hexdigest() for file in own if file.is_file()]
    key = hashlib.sha256(json.dumps([harness, suite.tasks, suite.rows, files, *about], default=str).encode()).hexdigest()[:24]
    kept = work / "suites" / f"{key}.json"
    if not kept.exists():
        write_json(kept, _scores(_asked(base, base.model, manager, suite, artefact)))
    return read_object(kept)


def _asked(base: Base, model: Any, manager: Any, suite: Suite, artefact: Artefact) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    asked = language_model(model, base, artefact.settings.evaluate.batch_tokens)
    try:
        return simple_evaluate(asked, tasks=list(suite.tasks), limit=suite.rows, task_manager=manager, log_samples=True, bootstrap_iters=BOOTSTRAPS)
    except (OSError, ConnectionError, FileNotFoundError) as error:
        raise UserError(f"the data of suite={','.join(suite.tasks)} are not to be had ({' '.join(str(error).split())}); where there is no network, "
                        "write tasks over files of your own and name their folder in suite_path=") from error


def _scores(asked: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """{task: {metric: {value, stderr}}}; a metric's filter stands behind it where it has one."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for task, values in asked["results"].items():
        for name, value in values.items():
            metric, _, given = name.partition(",")
            if not given or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{given}")
            label = metric if given == "none" else f"{metric} ({given})"
            found.setdefault(task, {})[label] = {"value": float(value), "stderr": float(error) if isinstance(error, (int, float)) else None}
    return found


def _compared(after: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    base = before["value"] if before else None
    return {**after, "base": base, "change": None if base is None else after["value"] - base}


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    return {"doc_id": sample["doc_id"], "id": sample["doc"].get("id"), "target": sample["target"], "resps": sample["resps"],
            "filtered_resps": sample["filtered_resps"]}


def language_model(model: Any, base: Base, batch_tokens: int) -> Any:
    """A model of the library's that answers with this one (lm_eval.api.model.TemplateLM), greedily."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokenizer, length = base.tokenizer, most_tokens(base.model, 1 << 20)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    class CellModel(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            return int(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)

        @property
        def tokenizer_name(self) -> str:
            return str(tokenizer.name_or_path).replace("/", "__")

        def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
            return str(tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt))

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            begun = tokenizer.bos_token is not None and string.startswith(tokenizer.bos_token)
            ids = tokenizer(string, add_special_tokens=not begun if add_special_tokens is None else add_special_tokens)["input_ids"]
            return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not string.endswith(tokenizer.eos_token) else ids

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context[-max(1, length - len(said)) :], said) for _, context, said in requests]
            return log_likelihoods(model, pairs, batch_tokens, pad_id, base)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            sums = []
            for request in requests:
                ids = self.tok_encode(request.args[0], add_special_tokens=False)
                windows = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, self.prefix_token_id, length - 1, 1)]
                sums.append(sum(value for value, _ in log_likelihoods(model, windows, batch_tokens, pad_id, base)))
            return sums

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            said: list[str] = [""] * len(requests)
            groups: dict[int, list[int]] = {}
            for index, request in enumerate(requests):
                if request.args[1].get("do_sample"):
                    raise UserError("the suite draws its answers (do_sample: true), and a cell's model answers greedily here; choose another task")
                groups.setdefault(int(request.args[1].get("max_gen_toks", NEW_TOKENS)), []).append(index)
            for new, part in groups.items():
                prompts = [self.tok_encode(requests[i].args[0])[-(length - new) :] for i in part]
                texts = generate(model, prompts, new, batch_tokens, tokenizer, pad_id, base.device, base.dtype)
                for i, text in zip(part, texts, strict=True):
                    until = requests[i].args[1].get("until") or []
                    said[i] = min((text.partition(end)[0] for end in ([until] if isinstance(until, str) else until) if end), key=len, default=text)
            return said

    return CellModel()


def log_likelihoods(model: Any, pairs: Sequence[tuple[list[int], list[int]]], batch_tokens: int, pad_id: int, base: Base) -> list[tuple[float, bool]]:
    """(sum of log-probabilities in nats, whether each token is the likeliest one) of the second tokens after the first, pair by pair."""
    import torch

    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    model.eval()
    with torch.inference_mode(), autocast(base.device, base.dtype):
        for part in by_length([len(context) + len(said) for context, said in pairs], batch_tokens):
            ids = pad([(pairs[i][0] + pairs[i][1])[:-1] for i in part], pad_id).to(base.device)
            at = [(row, len(pairs[i][0]) - 1 + k) for row, i in enumerate(part) for k in range(len(pairs[i][1]))]
            rows, cols = (torch.tensor(each, device=base.device) for each in zip(*at, strict=True))
            targets = torch.tensor([token for i in part for token in pairs[i][1]], device=base.device)
            log_p = logits_at(model, ids, rows, cols).log_softmax(-1)
            sums = torch.zeros(len(part), device=base.device).index_add(0, rows, log_p.gather(1, targets[:, None])[:, 0])
            missed = torch.zeros(len(part), device=base.device).index_add(0, rows, (log_p.argmax(-1) != targets).float())
            for i, value, misses in zip(part, sums.tolist(), missed.tolist(), strict=True):
                found[i] = (value, misses == 0)
    return found


def write_task(folder: Path, name: str, rows: Sequence[dict], scorer: Scorer) -> Path:
    """One of our splits as a task of the library's: <name>.yaml over <name>.jsonl, whose prompts are those that the cell's model saw.

    Log-likelihoods of choices, or greedy texts, are then the cell's own, row by row (with `suite=<name> suite_path=<folder>`). Returns the YAML.
    The library's accuracy takes sums of log-likelihoods: of a task that divides by the number of tokens (length_normalised) it differs.

    Raises:
        UserError: a technique that reasons before it answers, which the library has no request for.
    """
    if scorer.encoder.start is not None:
        raise UserError(f"a task of lm-evaluation-harness continues its prompt, and this base is {architecture.ENCODER_DECODER.name}; leave out to=")
    if scorer.reasoning:
        raise UserError("this technique reasons before it answers, for which lm-evaluation-harness has no request; choose a cell of another objective")
    task, encoder, choice = scorer.task, scorer.encoder, scorer.task.scoring == "choice"
    write_jsonl(folder / f"{name}.jsonl", list(_documents(rows, scorer)))
    lines = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str((folder / f"{name}.jsonl").absolute())}}, "test_split": "test",
        "output_type": "multiple_choice" if choice else "generate_until", "doc_to_text": "prompt", "doc_to_target": "answer", "target_delimiter": encoder.glue,
        "metric_list": [{"metric": "acc" if choice else "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    ends = [encoder.stop] if encoder.stop else []
    lines |= {"doc_to_choice": "choices"} if choice else {"generation_kwargs": {"until": ends, "do_sample": False, "max_gen_toks": task.max_new_tokens}}
    if not choice and task.answer_pattern:
        lines["filter_list"] = [{"name": "answer", "filter": [{"function": "regex", "regex_pattern": task.answer_pattern}, {"function": "take_first"}]}]
    import yaml

    write_text(folder / f"{name}.yaml", f"# {len(rows)} rows, written by pipeline.evaluate.\n{yaml.safe_dump(lines, sort_keys=False, allow_unicode=True)}")
    return folder / f"{name}.yaml"


def _documents(rows: Sequence[dict], scorer: Scorer) -> Iterator[dict[str, Any]]:
    for row in rows:
        document = {"id": row["id"], "prompt": scorer.encoder.asked(scorer.prompt(row["prompt"])), "answer": row["answer"]}
        if scorer.task.scoring == "choice":
            document |= {"choices": row["choices"], "answer": row["choices"].index(row["answer"])}
        yield document

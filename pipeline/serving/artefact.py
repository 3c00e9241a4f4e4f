"""Artefacts of finished cells, ready to answer: alone on their base, or many over one base, chosen row by row.

Library of `python -m pipeline.evaluate`, `pipeline.serve` and `pipeline.export`. LoRA adapters, and techniques that change only the
request (zero-shot, few-shot, retrieval) share a batch; other adapters are put on the base in turn.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.core.compose import build
from pipeline.core.files import Unsuited, UserError, read_jsonl, read_object
from pipeline.core.settings import Settings, read
from pipeline.data import recipe
from pipeline.data.choices import Items
from pipeline.data.conversations import Conversation, normalised
from pipeline.data.rows import Encoder, read_rows
from pipeline.methods.base import Method
from pipeline.models import architecture
from pipeline.models.base import cast, device_of, load_model, load_tokenizer, most_tokens, pickle_alone, resolve
from pipeline.objectives.base import Objective
from pipeline.records.finished import cell_config, finished, needed
from pipeline.records.results import Forgetting, Result, Score
from pipeline.scoring import answers, reading, rewards
from pipeline.scoring.best_of import BestOf, Selection
from pipeline.scoring.drawing import RewardReader
from pipeline.scoring.per_row import measured
from pipeline.scoring.probes import Probing
from pipeline.scoring.scorer import WHOLE, Scorer

NO_ADAPTER = "__base__"  # PEFT's name for a row that the base answers by itself


@dataclass(frozen=True)
class Base:
    """An untouched base model on its device. dtype: of its arithmetic."""

    model: Any
    tokenizer: Any
    device: Any
    dtype: Any

    @classmethod
    def of(cls, cfg: DictConfig) -> Base:
        """The base of a cell's config, or what the cell started from. Raises UserError where its folder is not there."""
        device, folder = device_of(cfg.device), Path(cfg.paths.models) / cfg.model.name
        settings = read(cfg)
        dtype = resolve(settings.precision, device)[1]
        trusted = settings.model.trust_remote_code
        model = started(cfg, dtype)[0] if cfg.start else load_model(folder, settings.precision, device, trust_remote_code=trusted)
        return cls(model, load_tokenizer(folder, trusted), device, dtype)


@dataclass(frozen=True)
class Artefact:
    """What a cell left to serve, before it is loaded."""

    name: str
    folder: Path
    cfg: DictConfig
    settings: Settings
    method: Method
    objective: Objective

    @classmethod
    def at(cls, name: str, folder: Path, cfg: DictConfig) -> Artefact:
        """Raises UserError: no artefact there, or a technique whose answers come without a model."""
        method = build(cfg.method, "method")
        if not (folder / "artefact.json").exists():
            raise UserError(f"{folder} has no artefact; run the cell again, or dvc checkout it")
        if pickle := pickle_alone(folder):
            raise UserError(f"{folder} has pickle weights only ({pickle}), which can run code and no cell writes; run the cell again, or dvc checkout it")
        if method.answers_without_model:
            raise UserError(f"the {method.name} answers without a model; its rows are in rationales/")
        return cls(name, folder, cfg, read(cfg), method, build(cfg.objective, "objective"))

    @property
    def mixes(self) -> bool:
        """Whether its rows are answered in one batch with other artefacts' rows; of a LoRA that adapts experts, PEFT's cannot be."""
        if self.method.sharing != "together" or self.objective.reasoning or self.objective.scalar_head or self.objective.selection:
            return False
        return not (self.method.peft and read_object(self.folder / "adapter_config.json").get("target_parameters"))

    def load(self, base: Base) -> tuple[Any, Any]:
        """(model, state) on the base, which may be changed in place. Raises UserError where the files are damaged."""
        return self.guarded(functools.partial(self._loaded, base))

    def _loaded(self, base: Base) -> tuple[Any, Any]:
        model, state = self.method.load(base.model, self.folder)
        if self.objective.scalar_head:
            rewards.load(model, self.folder)
        return model, state

    def guarded(self, load: Callable[[], Any]) -> Any:
        """What `load` gives. Raises UserError where the files are damaged."""
        from safetensors import SafetensorError

        try:
            return load()
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise UserError(f"{self.folder} cannot be loaded ({' '.join(str(error).split())}); run the cell again, or dvc checkout it") from error

    def scorer(self, base: Base, model: Any, state: Any) -> Scorer:
        """What answers this artefact's rows with `model`."""
        train = self.settings.train
        encoder = Encoder(base.tokenizer, self.settings.task, most_tokens(base.model, train.max_length), train.too_long,
                          architecture.start_id(base.model))
        scorer = Scorer(model, encoder, self.settings.task, lambda p: self.method.prompt(self.objective.prompt(p), state),
                        self.settings.evaluate.batch_tokens, base.device, base.dtype, reasoning=self.objective.reasoning)
        return selecting(scorer, self.objective.selection, self.cfg) if self.objective.selection else scorer


def scorer_of(name: str, artefact: Path | None, cfg: DictConfig) -> Scorer:
    """What answers as the artefact in this folder does, on the config's base; None: as that base does by itself.

    Raises:
        UserError: as Artefact.at and Base.of.
    """
    if artefact is None:
        base, model = Base.of(cfg), Path(cfg.paths.models) / cfg.model.name
        return Artefact(name, model, cfg, read(cfg), build(cfg.method, "method"), build(cfg.objective, "objective")).scorer(base, base.model, None)
    served = Artefact.at(name, artefact, cfg)
    base = Base.of(cfg)
    return served.scorer(base, *served.load(base))


ABOVE_CHANCE = 0.05
"""Largest p-value of a reward model's held-out pairs with which it is used."""


def reward_reader(word: str, cfg: DictConfig, unproven: bool, tokenizer: Any) -> RewardReader:
    """What gives rewards as the finished reward model `word` does, for texts in this tokenizer's tokens. unproven: also one that is not above chance.

    Raises:
        UserError: no such cell, no reward model, one of another vocabulary, or one that does not rank held-out pairs above chance.
    """
    folder, key = needed(word, cfg, "objective.reward"), f"objective.reward={word}"
    result = finished(folder)
    held = result.pairs.get("validation")
    if not result.pairs:
        raise UserError(f"{key} is a cell of {result.technique}, which gives no rewards; name one of technique=reward_model")
    if not unproven and (held is None or held.p_value > ABOVE_CHANCE):
        known = f"ranks {held.accuracy:.1%} of {held.pairs} held-out pairs right (p = {held.p_value:.2g} against chance)" if held else "has no held-out pairs"
        raise Unsuited(f"{key} {known}: nothing could be learnt from it; train it on more rows, or say objective.unproven=use")
    config = cell_config(result, cfg)
    config.task = cfg.task
    scorer = scorer_of(word, folder / "artefact", config)
    if scorer.encoder.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{key} has another vocabulary than {cfg.model.name}; choose a reward model of the same tokenizer")
    return RewardReader(scorer)


def selecting(scorer: Scorer, selection: Selection, cfg: DictConfig) -> BestOf:
    """What answers with the best of what `scorer`'s model draws. Raises UserError as reward_reader."""
    return BestOf(scorer, selection, reward_reader(selection.reward, cfg, selection.unproven, scorer.encoder.tokenizer), cfg.seed)


def started(cfg: DictConfig, dtype: Any) -> tuple[Any, Result]:
    """The model that `start` names, as a frozen plain model of the base's architecture in `dtype`, and the result of that cell.

    Its adapter is merged, so any method can train it; an artefact trained on it needs that cell's artefact to be served.

    Raises:
        UserError: no such finished cell, of another base model, or one whose artefact is not a change of the base's weights.
    """
    folder = needed(cfg.start, cfg, "start")
    result = finished(folder)
    if result.model != cfg.model.name:
        raise UserError(f"start={cfg.start} is a cell of the model {result.model}, this one is of {cfg.model.name}; choose model={result.model}")
    artefact = Artefact.at(result.technique, folder / "artefact", cell_config(result, cfg))
    if artefact.objective.scalar_head:
        raise UserError(f"start={cfg.start} is a cell of {result.technique}, a model of rewards and not of texts; choose a cell that answers (full, lora, …)")
    base = Base.of(artefact.cfg)
    names, path = set(base.model.state_dict()), base.model.config._name_or_path
    model, state = artefact.load(base)
    if hasattr(model, "peft_config") and artefact.method.merges:
        model = artefact.method.merged(model)
    if state is not None or hasattr(model, "peft_config") or set(model.state_dict()) != names and not hasattr(base.model, "quantization_method"):
        what = f"start={cfg.start} is a cell of {result.technique}, which leaves no weights of the base's architecture"
        raise UserError(f"{what}; choose a cell that does (full, lora, …)")
    model.config._name_or_path = path
    return cast(model, dtype).requires_grad_(False).eval(), result


def check_sharing(artefacts: Sequence[Artefact]) -> None:
    """Raises UserError naming an artefact that cannot share a base with others."""
    for artefact in artefacts:
        if artefact.method.sharing == "no":
            what = f"{artefact.name} cannot share a base: {artefact.method.name} is a model of its own"
            raise UserError(f"{what}; pipeline.evaluate scores it alone, pipeline.export writes it as a model of its own")


class Multiplexer:
    """Many artefacts over one base: requests {adapter, prompt, choices} in, answers out. `report` has a line for each batch answered.

    Args:
        artefacts: those that `check_sharing` lets through.

    Raises (from `answer`):
        UserError: an artefact that cannot be loaded.
    """

    def __init__(self, base: Base, artefacts: Sequence[Artefact]) -> None:
        self.base, self.artefacts = base, {a.name: a for a in artefacts}
        self.report: list[str] = []

    def answer(self, requests: Sequence[dict]) -> list[dict]:
        """One answer a request, in their order: {answer, scores} or {answer, output}."""
        answered: list[dict] = [{} for _ in requests]
        by_name: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_name.setdefault(request["adapter"], []).append(index)
        together = [n for n in by_name if self.artefacts[n].mixes]
        self._put(answered, requests, sorted(i for n in together for i in by_name[n]), functools.partial(self._mixed, together))
        for name in by_name:
            if name not in together:
                self._put(answered, requests, by_name[name], functools.partial(self._alone, name))
        return answered

    def _put(self, answered: list[dict], requests: Sequence[dict], indices: list[int], answer: Callable[[list[dict]], list[dict]]) -> None:
        rows = [{"choices": None, **requests[i], "id": i, "answer": ""} for i in indices]
        for prediction in answer(rows) if rows else ():
            more = {k: prediction[k] for k in ("scores", "output") if k in prediction}
            answered[prediction["id"]] = {"answer": prediction["prediction"], **more}

    def _alone(self, name: str, rows: list[dict]) -> list[dict]:
        artefact = self.artefacts[name]
        what = artefact.objective.name if artefact.objective.selection or artefact.objective.scalar_head else artefact.method.name
        why = "it reasons first" if artefact.objective.reasoning else f"{what} cannot share a batch"
        self.report.append(f"{len(rows)} by {name} alone ({why})")
        model, state = artefact.load(self.base)
        try:
            return artefact.scorer(self.base, model, state).predict(rows)
        finally:
            detach(model, self.base)

    def _mixed(self, names: Sequence[str], rows: list[dict]) -> list[dict]:
        """Rows of several artefacts in one batch, choices and generated answers apart."""
        loaded = [n for n in names if self.artefacts[n].method.peft]
        labels = {n: f"a{i}" for i, n in enumerate(loaded)}
        states = {n: None if n in loaded else self.artefacts[n].load(self.base)[1] for n in names}
        scorers = {n: self.artefacts[n].scorer(self.base, self.base.model, states[n]) for n in names}
        items = [scorers[row["adapter"]].items([row])[0] for row in rows]  # before any adapter is there: retrieval embeds with the base
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for index, row in enumerate(rows):
            task, encoder = scorers[row["adapter"]].task, scorers[row["adapter"]].encoder
            kinds.setdefault((task.scoring, *((task.max_new_tokens, encoder.end_id) if task.scoring == "generate" else ())), []).append(index)
        model = self._attached(labels)
        for scorer in scorers.values():
            scorer.model = model
        try:
            return [p for part in kinds.values() for p in self._batch(part, rows, items, scorers, labels)]
        finally:
            detach(model, self.base)

    def _batch(self, part: list[int], rows: list[dict], items: Items, scorers: dict[str, Scorer], labels: dict[str, str]) -> list[dict]:
        batch, asked = [rows[i] for i in part], [items[i] for i in part]
        scorer = scorers[batch[0]["adapter"]]
        owners = [labels.get(row["adapter"], NO_ADAPTER) for row in batch] if labels else WHOLE
        count = len({row["adapter"] for row in batch})
        self.report.append(f"{len(batch)} in one batch of {count} artefact{'s' * (count > 1)}")
        if scorer.task.scoring == "choice":
            sums = scorer.log_likelihoods(asked, owners)
            return [p for row, values in zip(batch, sums, strict=True) for p in answers.chosen([row], [values], scorers[row["adapter"]].task)]
        return [{"id": row["id"], "prediction": reading.extract(text, scorers[row["adapter"]].task.answer_pattern), "output": text}
                for row, text in zip(batch, scorer.texts(asked, owners), strict=True)]

    def _attached(self, labels: dict[str, str]) -> Any:
        from peft import PeftModel

        model = self.base.model
        for name, label in labels.items():
            artefact = self.artefacts[name]
            first = model is self.base.model
            attach = functools.partial(PeftModel.from_pretrained, model) if first else model.load_adapter
            attached = artefact.guarded(functools.partial(attach, artefact.folder, adapter_name=label))
            model = attached if first else model
        return model.eval()


def detach(model: Any, base: Base) -> None:
    """Leave the base as it was before an adapter of PEFT, or a head, was put on it."""
    rewards.detach(model)
    if not hasattr(model, "peft_config") or model is base.model:
        return
    if not model.active_peft_config.is_prompt_learning:
        model.unload()
    if hasattr(base.model, "peft_config"):
        del base.model.peft_config
    base.model.eval()


def score_artefact(cfg: DictConfig, artefact: Path, split: str) -> tuple[list[dict], Score]:
    """Predictions and score of an artefact, from the files alone.

    Raises:
        UserError: no such split or artefact, a damaged one, or a technique whose answers come without a model.
    """
    rows = rows_of(cfg, split)
    scorer = scorer_of(cfg.technique.name, artefact, cfg)
    for note in scorer.check({split: rows}):
        print(f"note: {note}")
    predictions = measured(scorer.predict(rows), rows, scorer.task)
    return [{"split": split, **p} for p in predictions], answers.score(predictions, scorer.task)


def probe_artefact(cfg: DictConfig, artefact: Path) -> Forgetting:
    """What an artefact forgot against its untouched base, from the files alone."""
    served = Artefact.at(cfg.technique.name, artefact, cfg)
    base = Base.of(cfg)
    probing = Probing(cfg, served.settings, base.tokenizer, base.model)
    if probing.note:
        print(f"note: {probing.note}")
    return probing.forgetting(served.load(base)[0])


def rows_of(cfg: DictConfig, split: str) -> list[dict]:
    """The split's first rows, as many as the evaluate settings say."""
    folder = Path(cfg.paths.data) / cfg.task.name
    kinds = {"test": cfg.evaluate.test_rows, "validation": None}
    limit = kinds.get(split, cfg.evaluate.transfer_rows)
    splits = ["validation", "test", *(f"transfer/{p.stem}" for p in sorted((folder / "transfer").glob("*.jsonl")))]
    if split not in splits:
        raise UserError(f"unknown split {split!r} of {folder}; there are: {', '.join(splits)}")
    return read_rows(folder / f"{split}.jsonl")[:limit]


def read_requests(source: str) -> list[dict[str, Any]]:
    """Raises UserError naming the line of a request that is none."""
    if source == "-":
        try:
            requests = [json.loads(line) for line in sys.stdin if line.strip()]
        except json.JSONDecodeError as error:
            raise UserError(f"standard input has a line that is no JSON ({error}); send one JSON object a line") from error
    else:
        requests = read_jsonl(source)
    requests = [spoken(number, row) for number, row in enumerate(requests, 1)]
    for number, row in enumerate(requests, 1):
        for key in ("adapter", "prompt"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key]:
                raise UserError(f"request {number} of {source} has no text {key!r}; every request is {{adapter, prompt}}, choices where the task needs them")
    if not requests:
        raise UserError(f"{source} has no request; add lines like {{\"adapter\": \"lora-s0-n160\", \"prompt\": \"…\"}}")
    return requests


def spoken(number: int, request: Any) -> Any:
    """The request, with a conversation in `messages` as its prompt. Raises UserError where it is none, or the user says nothing in it."""
    if not isinstance(request, dict) or "messages" not in request or "prompt" in request:
        return request
    turns = normalised(request["messages"], f"request {number}", "messages", tools=request.get("tools"))
    if not any(turn["role"] == "user" for turn in turns):
        raise UserError(f"request {number} has no user turn in messages; add what is asked")
    return {**request, "prompt": Conversation(turns)}


def folder_of(root: Path, name: str) -> Path:
    """A cell's folder. Raises UserError where there is no such cell, or the name leads elsewhere."""
    cells = sorted(p.parent.name for p in root.glob("*/result.json"))
    if name not in cells:
        raise UserError(f"{root} has no cell {name!r} to answer with; there are: {', '.join(cells) or 'none'}")
    return root / name


def check_one_base(results: dict[str, Result]) -> None:
    """Raises UserError naming two cells that differ in model, precision or start."""
    first, *others = results
    for key in ("model", "precision", "start"):
        for name in others:
            if (value := _shared(results[name], key)) != (expected := _shared(results[first], key)):
                raise UserError(f"{name} has {key} {value} and {first} has {expected}; artefacts share a base of one model in one precision, send them apart")


def _shared(result: Result, key: str) -> Any:
    """What artefacts over one base have in common; their start is a cell of one seed and number of rows."""
    if key != "start":
        return getattr(result, key)
    start = result.config.get("start")
    return start and (start if "/" in start else f"{start}-s{result.seed}-n{result.config['train_rows']} of {result.experiment}")


def with_choices(number: int, request: dict[str, Any], artefact: Artefact) -> dict[str, Any]:
    """The request with its task's fixed choices, where it brings none. Raises UserError where the task needs some."""
    if artefact.settings.task.scoring != "choice":
        return request
    choices = request.get("choices") or recipe.read(artefact.cfg).choice_list
    if not isinstance(choices, list) or len(set(map(str, choices))) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"request {number}: the task of {request['adapter']} chooses among a row's own choices; give it a list of two or more texts")
    return {**request, "choices": choices}

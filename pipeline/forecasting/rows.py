"""The rows that a cell would train on, in tokens: from the prepared data and the model's tokenizer, or as the config says.

Library of cell.py. The tokenizer is read with the library that transformers' own rests on, which takes a tenth of a second.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.core.compose import build
from pipeline.core.files import read_json
from pipeline.core.settings import Settings
from pipeline.data.rows import Encoded, Encoder, load_rationales, read_rows
from pipeline.forecasting.shape import NoForecast
from pipeline.objectives.base import Objective
from pipeline.teachers.synthetic import rows as synthetic

MOST_ROWS = 1024
"""Rows whose tokens are counted; what more rows would add is not worth the wait."""
TEXTS = 1 << 14
"""Texts whose tokens are remembered: techniques of one grid ask for the same."""
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What FastTokenizer reads."""
LABELS = 8
"""Labelled tokens of a row, where nothing says how many and an answer is not generated."""


@dataclass(frozen=True)
class TrainingRows:
    """examples: of each row. count: of rows there are (of which `examples` are the first). source: where the lengths are from."""

    examples: Sequence[Sequence[Encoded]]
    count: int
    source: str


class FastTokenizer:
    """As much of a tokenizer as pipeline.data.rows.Encoder asks for."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        named = config.get("eos_token")
        token = named.get("content") if isinstance(named, dict) else named
        eos = self._tokenizer.token_to_id(token) if token else None
        self.eos_token_id = eos if eos is not None else 0
        self.pad_token_id = self.eos_token_id
        chat = folder / "chat_template.jinja"
        self.chat_template = chat.read_text(encoding="utf-8") if chat.exists() else config.get("chat_template")
        self._config = config
        self._ids = functools.lru_cache(TEXTS)(lambda text, special: self._tokenizer.encode(text, add_special_tokens=special).ids)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(self._ids(text, add_special_tokens))}

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool, tokenize: bool) -> str:
        """The prompt in the model's own template (transformers renders it with jinja2 too)."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(str(self.chat_template))
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt, bos_token=self._config.get("bos_token") or "", eos_token="")


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path, changed: tuple[int, ...]) -> FastTokenizer:
    """Read once for the techniques of a grid. changed: when its files did."""
    return FastTokenizer(folder)


@functools.lru_cache(maxsize=1)
def _rows(path: Path, changed: tuple[int, ...]) -> list[dict]:
    """Likewise."""
    return read_rows(path)


def _changed(*paths: Path) -> tuple[int, ...]:
    return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in paths)


def training_rows(cfg: DictConfig, settings: Settings) -> TrainingRows:
    """The cell's rows, as far as they are known. Raises NoForecast: an objective with a loss or batches of its own, or a teacher's text that is not there."""
    objective: Objective = build(cfg.objective, "objective")
    if objective.own_part:
        raise NoForecast(f"no forecast for objective {objective.name}, whose {objective.own_part} is its own")
    data, model = Path(cfg.paths.data) / cfg.task.name, Path(cfg.paths.models) / cfg.model.name
    if cfg.forecast.length is not None or not (data / "train.jsonl").exists() or not (model / "tokenizer.json").exists():
        return _as_configured(cfg, settings, objective)
    rows = list(_rows(data / "train.jsonl", _changed(data / "train.jsonl")))
    random.Random(cfg.seed).shuffle(rows)  # as pipeline.data.rows.load_rows draws them
    rows = rows[: cfg.train_rows]
    rows += synthetic.extra(cfg, rows)[0]
    first = f"first {MOST_ROWS} of the " if len(rows) > MOST_ROWS else ""
    source = f"the {first}{len(rows)} training rows of {data} in the model's own tokens"
    return TrainingRows(_encoded(cfg, settings, objective, rows[:MOST_ROWS], model), len(rows), source)


def _encoded(cfg: DictConfig, settings: Settings, objective: Objective, rows: list[dict[str, Any]], model: Path) -> list[list[Encoded]]:
    rationales: dict[str, dict] = {}
    if objective.needs_rationales:
        folder = Path(cfg.paths.rationales) / cfg.task.name / cfg.teacher.name
        if not (folder / "rationales.jsonl").exists():
            raise NoForecast(f"no forecast for objective {objective.name}: {folder} holds no teacher's text yet")
        rationales = load_rationales(folder)
    encoder = Encoder(_tokenizer(model, _changed(*(model / name for name in FILES))), settings.task, settings.train.max_length, "truncate")
    return [[encoder.example(e) for e in objective.examples(row, settings.task, rationales.get(row["id"]))] for row in rows]


def _as_configured(cfg: DictConfig, settings: Settings, objective: Objective) -> TrainingRows:
    """Rows of one length: the config's."""
    length = cfg.forecast.length
    fed = int(length) if length is not None else settings.train.max_length - 1
    most = f"train.max_length={settings.train.max_length} (data or tokenizer are not prepared, so rows may be shorter)"
    source = f"forecast.length={fed}" if length is not None else most
    labels = min(fed, settings.task.max_new_tokens if settings.task.scoring == "generate" else LABELS)
    count = cfg.train_rows or settings.train.batch_size
    row = [Encoded(range(fed + 1), fed + 1 - labels)] * (2 if objective.needs_rationales else 1)  # type: ignore[arg-type]
    return TrainingRows([row] * min(count, max(MOST_ROWS, settings.train.batch_size)), count, source)

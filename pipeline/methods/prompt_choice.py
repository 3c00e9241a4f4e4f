"""A prompt template chosen on validation rows; nothing is trained. conf/method/prompt_choice.yaml."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError, read_json, write_json
from pipeline.data.conversations import reworded
from pipeline.data.rows import Example
from pipeline.methods.base import Method
from pipeline.records.results import rank_key

MOST_ANSWERS = 20


@dataclass(frozen=True)
class PromptChoice(Method):
    """The template that answers validation best (ties: the lower nll), of a list; manual prompt search as Perez et al. (2021) describe it.

    A template wraps the task's own prompt: {prompt} stands for it, {answers} for the training rows' distinct answers.
    A template that asks for {answers} is left out where they are more than 20: then they are free text.
    """

    prepares = True
    chooses = True
    own_prompt = True

    templates: list[str]

    def __post_init__(self) -> None:
        bad = next((t for t in self.templates if "{prompt}" not in t), None)
        if bad is not None or not self.templates:
            raise UserError(f"method.templates has {bad!r}; every template holds {{prompt}}, where the task's prompt goes")

    @property
    def sharing(self) -> str:
        return "together"

    def prepare(self, examples: Sequence[Example], seed: int, base: Any) -> dict[str, Any]:
        answers = sorted({e.answer for e in examples})
        return {"template": self.templates[0], "answers": answers if len(answers) <= MOST_ANSWERS else [], "tried": []}

    def choose(self, state: dict[str, Any], validate: Callable[[Any], tuple[float, float | None]]) -> dict[str, Any]:
        usable = [t for t in self.templates if state["answers"] or "{answers}" not in t]
        if not usable:
            raise UserError(f"every one of method.templates asks for {{answers}}, but the task has more than {MOST_ANSWERS}; add one without it")
        tried: list[dict[str, Any]] = []
        for template in usable:
            metric, nll = validate({**state, "template": template})
            tried.append({"template": template, "metric": metric, "nll": nll})
        best = max(tried, key=lambda t: rank_key(t["metric"], t["nll"]))
        return {**state, "template": best["template"], "tried": tried}

    def prompt(self, prompt: str, state: dict[str, Any]) -> str:
        template = state["template"].replace("{answers}", ", ".join(state["answers"]))
        return reworded(prompt, lambda asked: template.replace("{prompt}", asked))

    def hyperparameters(self) -> dict[str, Any]:
        return {"templates": len(self.templates), "labels_from": "validation"}

    def labelled_rows(self, train: int, validation: int) -> int:
        return validation

    @property
    def takes_rows(self) -> bool:
        return True

    def save(self, model: Any, state: dict[str, Any], folder: Path) -> None:
        write_json(folder / "template.json", state)

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        return base, read_json(folder / "template.json")

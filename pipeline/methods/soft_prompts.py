"""Soft prompts that PEFT does not have: one of few numbers (IPT), and one with trained output rows for the answers (WARP).

conf/method/ipt.yaml, warp.yaml. PEFT's prompt tuning is what both are built upon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError, read_json, write_json
from pipeline.data.rows import Example
from pipeline.methods import peft_options
from pipeline.methods.base import Method, check_counts
from pipeline.methods.peft_adapter import prompts_on_device

PROMPT, ROWS, TOKENS = "adapter_model.safetensors", "answers.safetensors", "tokens.json"


@dataclass(frozen=True)
class SoftPrompt(Method):
    """k trained vectors before the input, initialised with embeddings of the vocabulary."""

    trains = True
    soft_prompt = True

    virtual_tokens: int

    def __post_init__(self) -> None:
        check_counts(self, "virtual_tokens")

    def hyperparameters(self) -> dict[str, Any]:
        return {"virtual_tokens": self.virtual_tokens}

    def wrap(self, model: Any) -> Any:
        from peft import PromptTuningConfig, get_peft_model

        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.virtual_tokens, prompt_tuning_init="SAMPLE_VOCAB")
        return prompts_on_device(get_peft_model(model, peft_options.fitted(config, model)))

    def save(self, model: Any, state: Any, folder: Path) -> None:
        model.save_pretrained(folder, save_embedding_layers=False)

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        from peft import PeftModel

        return prompts_on_device(PeftModel.from_pretrained(base, folder)).eval(), None


@dataclass(frozen=True)
class Ipt(SoftPrompt):
    """Intrinsic prompt tuning (Qin et al., 2021): only the coordinates of a soft prompt in a small subspace are trained.

    The paper finds the subspace with an autoencoder over the trained prompts of a hundred tasks. Here it is spanned by the principal axes of
    the prompts of earlier prompt_tuning cells (`prompts`), or by random directions, where there are none (the paper's comparison). The artefact is the
    prompt itself.

    Raises:
        UserError: fewer prompts than axes, or prompts of another shape.
    """

    changes_when_served = True

    dimensions: int
    """Of the subspace."""
    prompts: list[str] | None = None
    """Folders of finished cells of prompt tuning (results/<experiment>/<cell>), of the same model and virtual tokens. Only their names decide what
    is run again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "dimensions")
        if self.prompts is not None and len(self.prompts) <= self.dimensions:
            most = len(self.prompts) - 1
            raise UserError(f"{most + 1} prompts span at most {most} dimensions, and method.dimensions is {self.dimensions}; lower it")

    def hyperparameters(self) -> dict[str, Any]:
        return super().hyperparameters() | {"dimensions": self.dimensions, "subspace": f"{len(self.prompts)} prompts" if self.prompts else "random"}

    def wrap(self, model: Any) -> Any:
        from pipeline.methods.modules.prompts import IntrinsicPrompt, fitted_basis, random_basis

        wrapped = super().wrap(model)
        encoder = wrapped.prompt_encoder["default"]
        start = encoder.embedding.weight
        if self.prompts:
            mean, basis = fitted_basis(self.dimensions, [_prompt(Path(p), start) for p in self.prompts])
            start.data = mean
        else:
            basis = random_basis(self.dimensions, start.data)
        wrapped.prompt_encoder["default"] = IntrinsicPrompt(encoder, basis)
        return wrapped

    def served(self, model: Any, dtype: Any) -> Any:
        encoder = model.prompt_encoder["default"]
        encoder.embedding.weight.data = encoder.prompt().detach()
        model.prompt_encoder["default"] = encoder.encoder
        return model


def _prompt(folder: Path, like: Any) -> Any:
    """The soft prompt that a cell left. Raises UserError where there is none of this shape."""
    from safetensors.torch import load_file

    path = folder / "artefact" / PROMPT
    prompt = load_file(path, device=str(like.device)).get("prompt_embeddings") if path.exists() else None
    if prompt is None or prompt.shape != like.shape:
        what = "no soft prompt" if prompt is None else f"a soft prompt of {tuple(prompt.shape)} numbers, not {tuple(like.shape)}"
        raise UserError(f"{folder} of method.prompts holds {what}; name finished cells of prompt_tuning of this model and these virtual tokens")
    return prompt


@dataclass(frozen=True)
class Warp(SoftPrompt):
    """WARP (Hambardzumyan et al., 2021): a soft prompt, and a trained vector for each label in the place of its output embedding.

    The paper reads a masked language model at a [MASK]; a decoder is read where its answer begins, and a label's vectors are changes of the
    output layer's rows for its tokens, which start at zero.

    Raises:
        UserError: answers that are no small set of labels.
    """

    prepares = True

    def prepare(self, examples: Sequence[Example], seed: int, base: Any) -> None:
        from pipeline.methods.modules import answers

        answers.add(base, answers.tokens(examples, base, "WARP"))

    def wrap(self, model: Any) -> Any:
        from pipeline.methods.modules import answers

        wrapped = super().wrap(model)
        answers.of(model).rows.requires_grad_(True)
        return wrapped

    def save(self, model: Any, state: Any, folder: Path) -> None:
        from safetensors.torch import save_file

        from pipeline.methods.modules import answers

        super().save(model, state, folder)
        rows = answers.of(model)
        save_file({"rows": rows.rows.detach().contiguous()}, folder / ROWS)
        write_json(folder / TOKENS, rows.ids.tolist())

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        from safetensors.torch import load_file

        from pipeline.methods.modules import answers

        answers.add(base, read_json(folder / TOKENS)).rows.data = load_file(folder / ROWS, device=str(base.device))["rows"]
        base.requires_grad_(False)
        return super().load(base, folder)

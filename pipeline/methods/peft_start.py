"""LoRA's initial weights from training rows: EVA, CorDA, LoRA-GA, through PEFT's own calls. Library of peft_adapter.py.

EVA (Paischer et al., 2024) begins A at the principal directions of what goes into a layer; CorDA (Yang et al., 2024) takes the weights apart by them;
LoRA-GA (Wang et al., 2024) begins at the directions of the first gradient. The last two take what they begin at out of the base.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError
from pipeline.data.rows import Example, pad
from pipeline.methods import peft_options
from pipeline.models.base import load_tokenizer, most_tokens

EXAMPLES, BEGUN = "_examples_to_start_from", "_adapter_at_the_start"
"""Attributes: of the base, the training examples until the adapter is there; of the model, an adapter's first weights until it is saved."""
ROWS, BATCH, MOST_TOKENS = 64, 8, 512
MOST_PASSES = 1000
"""Batches after which EVA's directions have to stand still."""


def keep(base: Any, examples: Sequence[Example]) -> None:
    """Let an adapter that is put on the base begin at these examples."""
    setattr(base, EXAMPLES, examples[:ROWS])


def taken(base: Any) -> Sequence[Example]:
    """The stored examples, which are then no longer there; none where none were stored."""
    return vars(base).pop(EXAMPLES, ())


def attached(base: Any, config: Any) -> Any:
    """The base in an adapter that begins at the stored examples. Raises UserError where there are too few."""
    from peft import get_peft_model, get_peft_model_state_dict
    from peft.tuners.lora import eva
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    examples, kind = taken(base), peft_options.start(config)
    if not examples:
        raise UserError(f"method.config.init_lora_weights={kind} begins at training rows; raise train_rows")
    config = _maybe_include_all_linear_layers(copy.deepcopy(config), base)
    batches = list(_batches(base, examples))
    if kind == "lora_ga":
        preprocess_loraga(base, config, lambda: _backward(base, batches))
    elif kind == "corda":
        rows = [ids[None, mask > 0] for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
        preprocess_corda(base, config, lambda: _forward(base, rows))
    model = get_peft_model(base, config)
    if kind == "eva":
        texts = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
        eva.initialize_lora_eva_weights(model, texts, forward_fn=_at_most(MOST_PASSES), show_progress_bar=False)
    else:
        setattr(model, BEGUN, {name: w.detach().to("cpu", copy=True) for name, w in get_peft_model_state_dict(model).items()})
    return model


def save(model: Any, folder: Path) -> bool:
    """Write an adapter whose base gave up what it began at as one of the untouched base: LoRA of twice the rank, A·B − A₀·B₀. False: it is no such one."""
    import tempfile

    from safetensors.torch import save_file

    begun = getattr(model, BEGUN, None)
    if begun is None:
        return False
    with tempfile.TemporaryDirectory() as place:
        first = Path(place) / "start"
        first.mkdir()
        save_file(begun, first / "adapter_model.safetensors")
        model.save_pretrained(folder, save_embedding_layers=False, path_initial_model_for_weight_conversion=str(first))
    return True


def _batches(base: Any, examples: Sequence[Example]) -> Iterator[dict[str, Any]]:
    """input_ids, attention_mask and labels [B, T] of the examples; labels are -100 outside the answer."""
    import torch

    tokenizer, most = load_tokenizer(Path(base.config._name_or_path)), most_tokens(base, MOST_TOKENS)
    whole = [tokenizer(f"{e.prompt} {e.answer}")["input_ids"][-most:] for e in examples]
    answers = [len(tokenizer(f" {e.answer}", add_special_tokens=False)["input_ids"]) for e in examples]
    for first in range(0, len(whole), BATCH):
        part, lengths = whole[first : first + BATCH], answers[first : first + BATCH]
        ids = pad(part, 0).to(base.device)
        at, ends = torch.arange(ids.shape[1], device=base.device), torch.tensor([len(p) for p in part], device=base.device)[:, None]
        begins = ends - torch.tensor(lengths, device=base.device)[:, None]
        yield {"input_ids": ids, "attention_mask": (at < ends).long(), "labels": ids.where((at >= begins) & (at < ends), -100)}


def _forward(base: Any, rows: Sequence[Any]) -> None:
    for ids in rows:
        base(ids)


def _backward(base: Any, batches: list[dict[str, Any]]) -> None:
    for batch in batches:
        base(**batch).loss.backward()


def _at_most(passes: int) -> Callable[[Any, dict[str, Any]], Any]:
    """A forward pass that refuses to be the one after so many: EVA goes on until its directions stand still, which too few tokens never do."""
    done = 0

    def forward(model: Any, inputs: dict[str, Any]) -> Any:
        nonlocal done
        done += 1
        if done > passes:
            raise UserError(f"EVA's directions do not stand still after {passes} batches; raise train_rows, or lower method.config.r or eva_config.rho")
        return model(**inputs)

    return forward

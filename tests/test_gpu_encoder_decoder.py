"""Bases whose prompt an encoder reads, on a CUDA device: python -m pytest -m gpu tests/test_gpu_encoder_decoder.py -s"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES, column, write_model
from conftest import make_rows

from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import compose
from pipeline.core.files import write_json
from pipeline.core.settings import Precision, Task
from pipeline.data.rows import Encoder
from pipeline.models import architecture
from pipeline.models.base import load_model, load_tokenizer
from pipeline.scoring.scorer import choice_log_likelihoods, generate

pytestmark = pytest.mark.gpu
TECHNIQUES = ["zero_shot", "few_shot", "full", "lora", "qlora", "ia3", "prompt_tuning", "prefix_tuning", "adapter_houlsby", "ln_tuning", "top_layers",
              "step_by_step", "dpo", "logit_distillation", "ladder", "grpo", "written lora"]
BASE = {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "d_kv": 64}
"""T5 v1.1 base's sizes."""


def on_gpu(overrides: list[str]) -> list[str]:
    return [*(o for o in overrides if o != "device=cpu"), "device=cuda"]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "refused"), [("t5-v1_1", {"ladder", "grpo"}), ("t5gemma", {"ladder", "grpo", "logit_distillation"})])
def test_every_technique_learns_or_is_refused(overrides, tmp_path, capsys, name, refused):
    found = column(name, on_gpu(overrides), tmp_path / "work", capsys, TECHNIQUES, True)
    with capsys.disabled():
        print(f"\n{found.line(name)}")
    assert not found.failed and set(found.refused) == refused


@pytest.fixture(scope="module")
def base_size(tiny, tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("t5") / "t5_base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "t5-base", (ARCHITECTURES["t5-v1_1"][0], ARCHITECTURES["t5-v1_1"][1] | BASE))
        write_model("t5-base", tiny / "models" / "smollm2_135m", folder)
    write_json(folder / "manifest.json", {"name": folder.name, "sha256": folder.name})
    return folder


@pytest.mark.parametrize("technique", ["full", "lora", "qlora", "prefix_tuning", "step_by_step_prefixed"])
def test_a_model_of_real_size_trains(overrides, base_size, technique, capsys):
    words = [o for o in on_gpu(overrides) if not o.startswith(("paths.models=", "model="))]
    cfg = compose([*words, f"paths.models={base_size.parent}", "model=local", f"model.name={base_size.name}", f"model.source.path={base_size}",
                   f"technique={technique}", "train.steps=20", "train.lr=1e-4", "evaluate.adapters=[1,4]"])
    result = cell_run.run(cfg, folder=identity.folder_of(cfg))
    assert result.status == "ok" and result.unmeasured == {} and len(result.history) == 20
    assert (result.work.engine, result.precision) == ("eager", "nf4" if technique == "qlora" else "bf16")
    assert result.size.total > 190e6
    with capsys.disabled():
        first, last = (result.history[at]["loss"] for at in (0, -1))
        print(f"\n{technique}: {result.phases.train_s / 20 * 1e3:.1f} ms a step, {result.memory.peak_bytes / 2**30:.2f} GiB, loss {first:.3f} to {last:.3f}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_answers_do_not_depend_on_their_neighbours(base_size, precision):
    import torch

    device = torch.device("cuda")
    model = load_model(base_size, Precision(precision), device)
    dtype: Any = torch.float32 if precision == "fp32" else torch.bfloat16
    encoder = Encoder(load_tokenizer(base_size), Task("any", "choice"), 64, "error", architecture.start_id(model))
    choices = [encoder.answer(text) for text in ("positive", "negative", "positive film of")]
    items = [(encoder.prompt(row["prompt"]), choices) for row in make_rows(9, 9, "test")]
    together = choice_log_likelihoods(model, items, 4096, encoder.pad_id, device, dtype)
    alone = [choice_log_likelihoods(model, [item], 4096, encoder.pad_id, device, dtype)[0] for item in items]
    close = {"fp32": {"abs": 1e-2, "rel": 1e-4}, "bf16": {"abs": 0.5, "rel": 2e-2}}[precision]
    assert together == [pytest.approx(one, **close) for one in alone]
    if precision == "fp32":
        prompts = [prompt for prompt, _ in items]
        written = generate(model, prompts, 5, 4096, encoder.tokenizer, encoder.pad_id, device, dtype)
        assert written == [generate(model, [p], 5, 4096, encoder.tokenizer, encoder.pad_id, device, dtype)[0] for p in prompts]

"""Every technique that trains, on a CUDA device: python -m pytest -m gpu tests/test_techniques_gpu.py"""

from __future__ import annotations

import pytest

from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.cell.grid import grid
from pipeline.core.compose import compose
from pipeline.core.files import read_jsonl
from pipeline.serving import artefact as evaluate

pytestmark = pytest.mark.gpu
SMALL = {"top_layers": ["method.top_layers=1"], "vera": ["method.config.r=16"], "oft": ["method.config.oft_block_size=16"]}


@pytest.mark.parametrize("name", [t for t in grid("techniques")["grid"]["techniques"] if t != "teacher"])
def test_a_technique_runs_on_the_gpu_and_its_artefact_answers_alike(overrides, tmp_path, name):
    mine = [*(o for o in overrides if o != "device=cpu"), "device=cuda", f"technique={name}", "train.steps=12", *SMALL.get(name, [])]
    cfg = compose(mine)
    for path in identity.reads(cfg):  # a cell to begin at, or to be taught by
        if path.name == "result.json" and not path.exists():
            cell_run.run(compose([*mine, "technique=full"]), folder=path.parent)
    result = cell_run.run(cfg, folder=tmp_path / "cell")
    assert result.status == "ok" and len(result.history) == (12 if result.size.trainable else 0)
    stored = [p for p in read_jsonl(tmp_path / "cell" / "predictions.jsonl") if p["split"] == "test"]
    actual, _ = evaluate.score_artefact(cfg, tmp_path / "cell" / "artefact", "test")
    for one, other in zip(actual, stored, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=0.1)  # bf16, and atomic sums of some kernels

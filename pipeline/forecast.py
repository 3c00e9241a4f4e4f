"""What a cell will take, before anything heavy is read: memory by what holds it, whether it fits, the largest batch, time.

    python -m pipeline.forecast technique=qlora train.batch_size=32                             on the card at hand
    python -m pipeline.forecast technique=lora model=local model.source.path=/models/llama forecast.gpu_memory_gb=16
    python -m pipeline.forecast technique=lora model=hub model.source.repository=Qwen/Qwen3-8B forecast.gpu_memory_gb=24    a model that is not here
    python -m pipeline.forecast technique=full forecast.model_config=/models/llama/config.json  by this file
    python -m pipeline.forecast technique=lora forecast.calibrate=true                          times a few steps here first, once

Arithmetic on the model's config.json, in about a second. How well it agrees with measured peaks: experiments/forecast/.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from pipeline.core.commands import entry
from pipeline.forecasting.cell import calibrate, forecast
from pipeline.forecasting.text import table


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Print the forecast; 0 whether or not it fits. Of a model that is not prepared it reads the config.json where the model is, or its known shape."""
    where = cfg.model.source.get("repository") or (cfg.model.source.get("path") if cfg.model.source.type == "local" else None)
    if where and not cfg.forecast.model_config and not cfg.forecast.calibrate and not (Path(cfg.paths.models) / cfg.model.name / "config.json").exists():
        from pipeline.intake.fitting import config_of  # numpy

        config, source = config_of(where)
        cfg.forecast.model_config = str(config)
        print(f"{cfg.model.name} is not prepared; its shape: {source}")
    if cfg.forecast.calibrate:
        calibrate(cfg)
    print("\n".join(table(forecast(cfg))))
    return 0


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())

"""Every technique on a tiny model of many architectures: it learns the separable task, or is refused in one sentence before the first step.

    python -m pytest tests/test_architectures.py -k "falcon or opt"       compares with the table in docs/models.md
    WRITE_MODELS=1 python -m pytest tests/test_architectures.py           writes the table, an architecture's row when it is done
    TECHNIQUES=lora,ladder python -m pytest tests/test_architectures.py   tries these alone and compares nothing

About two minutes an architecture on one core; rows are written one by one, so several processes may share the work (-k).
"""

from __future__ import annotations

import os
import re

import pytest
from architectures import ARCHITECTURES, TECHNIQUES, column, keep_settings, replace_line

from pipeline.core.compose import ROOT

TABLE = ROOT / "docs" / "models.md"
KEY = re.compile(r"\b(method|objective|train|task)\.\w+|\b(technique|precision|model|start)=[\w<]")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_technique_runs_or_is_refused_by_name(overrides, tmp_path, capsys, architecture):
    some, writes = os.environ.get("TECHNIQUES"), bool(os.environ.get("WRITE_MODELS"))
    found = column(architecture, overrides, tmp_path / "work", capsys, some.split(",") if some else list(TECHNIQUES), writes)
    if writes and not some:
        keep_settings(architecture, found.settings)
    assert not found.failed, "\n".join(f"{technique}: {why}" for technique, why in found.failed.items())
    for technique, sentence in found.refused.items():
        named = architecture.partition("-")[0] in sentence and KEY.search(sentence.partition(": ")[2] or sentence)
        assert named, f"{technique} is refused without the architecture's name or a key: {sentence}"
    if some:
        print(found.line(architecture))
    elif writes:
        replace_line(TABLE, architecture, found.line(architecture))
    else:
        assert found.line(architecture) in TABLE.read_text(encoding="utf-8").splitlines()

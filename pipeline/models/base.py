"""The base model and its tokenizer, from a folder under models/ and in a precision.

Library. `python -m pipeline.base_model model=<name>` puts the folder there. Weights are safetensors; pickle weights
and a model's own code are refused unless its config says otherwise.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import pickle
from pathlib import Path
from typing import Any

from pipeline.core.compose import CONF
from pipeline.core.files import UserError, read_object
from pipeline.core.settings import Precision
from pipeline.measure.memory import out_of_memory
from pipeline.models import architecture


def device_of(name: str) -> Any:
    """torch.device for auto, cpu or cuda. Raises UserError where cuda is asked for and absent."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no GPU here; set device=auto or device=cpu, or install a CUDA build of torch and its driver")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def resolve(precision: Precision, device: Any) -> tuple[str, Any]:
    """(precision name, dtype of the arithmetic): auto is bf16 on a GPU that has it, fp32 elsewhere."""
    import torch

    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    name = precision.name if precision.name != "auto" else ("bf16" if fast else "fp32")
    compute = precision.compute if precision.compute != "auto" else ("bf16" if fast else "fp32")
    compute = name if name in ("fp32", "bf16") else compute
    return name, torch.bfloat16 if compute == "bf16" else torch.float32


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model folder. Raises UserError where there is none, or one that cannot be read or comes with code that is not trusted."""
    manifest(folder)
    return tokenizer_at(folder, str(folder), trust_remote_code)


def tokenizer_at(folder: Path, shown: str, trust_remote_code: bool) -> Any:
    """The same of a folder without a manifest. shown: what to call it in a message."""
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")):
        raise UserError(f"{shown} holds no tokenizer (tokenizer.json); put the model's tokenizer files beside its weights")
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"the tokenizer of {shown} cannot be loaded: {_without_reader(folder) or _why(error)}") from error


def _without_reader(folder: Path) -> str | None:
    """What is missing where a tokenizer is SentencePiece's file alone, as T5's are on the hub: transformers then asks for a package that would not do."""
    if (folder / "tokenizer.json").exists() or not any(folder.glob("*.model")) or importlib.util.find_spec("sentencepiece"):
        return None
    return "it is a file of SentencePiece, which transformers reads with that package; run: pip install sentencepiece, then this again"


def _why(error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return "it comes with Python code of its own; read that code, then set model.trust_remote_code=true" if "trust_remote_code" in reason else reason


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def pickle_alone(folder: Path) -> str | None:
    """The name of a file of pickled weights in a folder that has no safetensors; None where there is none."""
    if any(folder.glob("*.safetensors")):
        return None
    return next((p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES), None)


def refuse_pickles(folder: Path, allow_pickle: bool) -> None:
    """Raise UserError where weights come as pickle files alone, unless the config allows that."""
    if any(folder.glob("*.safetensors")) or allow_pickle:
        return
    if pickle := pickle_alone(folder):
        raise UserError(f"{folder} has pickle weights only ({pickle}), which can run code; convert them to safetensors, or set model.allow_pickle=true")
    raise UserError(f"{folder} holds no weights (*.safetensors); put the model's weights there")


def manifest(folder: Path) -> dict[str, Any]:
    """A prepared model's manifest. Raises UserError if the model stage has not run."""
    if not (folder / "manifest.json").exists():
        listed = (CONF / "model" / f"{folder.name}.yaml").exists()
        own = f"model=local model.source.path=<its folder> model.name={folder.name} (model=hub model.source.repository=<owner/name> from the hub)"
        wrong = "is not what the model stage made (it has no manifest.json)" if folder.exists() else "is not there"
        raise UserError(f"{folder} {wrong}; run: python -m pipeline.base_model {f'model={folder.name}' if listed else own}")
    return read_object(folder / "manifest.json")


def load_stored(folder: Path, trust_remote_code: bool = False) -> Any:
    """The base model as it lies on disk, on the CPU: what cells of one process share before they fork.

    Args:
        trust_remote_code: whether Python code that lies in the folder may run; this run's config says so (model.trust_remote_code).

    Raises:
        UserError: no such folder, or a model that comes with code, which is not trusted.
    """
    manifest(folder)
    return _pretrained(folder, trust_remote_code, dtype="auto")


def _pretrained(folder: Path, trust_remote_code: bool, **how: Any) -> Any:
    refuse_pickles(folder, allow_pickle=False)
    return model_at(folder, str(folder), trust_remote_code, use_safetensors=True, **how)


def model_at(folder: Path, shown: str, trust_remote_code: bool, **how: Any) -> Any:
    """The language model in a folder. Raises UserError for what is none, is damaged, or comes with code that is not trusted."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from pipeline.models import attention

    attention.register()
    kind = architecture.of_folder(folder)
    try:
        with quiet():
            return getattr(transformers, kind.auto).from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code, **how)
    except (ValueError, OSError, LookupError, TypeError, AttributeError, RuntimeError, ImportError, StrictDataclassError, SafetensorError,
            pickle.UnpicklingError) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"the model {shown} cannot be loaded as {kind.name}: {_why(error)}") from error


def check_loads(folder: Path, trust_remote_code: bool = False) -> None:
    """Load a stored model as cells will, and let it answer one token. Raises UserError where it does not, or has weights that are not finite."""
    import torch

    try:
        model = load_stored(folder, trust_remote_code)
        with torch.no_grad():
            model.eval()(**architecture.one_token(model))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the model loads, but not once it is stored as cells read it: {type(error).__name__}: {' '.join(str(error).split())}") from error
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        raise UserError(f"the model has weights that are not finite ({bad[0]}); fetch or convert it again")


def attention_of(model: Any) -> str | None:
    """The attention that transformers chose for the model: sdpa where its architecture has it, else eager. None for one without attention heads."""
    config = model.config.get_text_config()
    return config._attn_implementation if getattr(config, "num_attention_heads", None) else None


def load_model(folder: Path, precision: Precision, device: Any, stored: Any = None, trust_remote_code: bool = False) -> Any:
    """The base model on `device`, in eval mode, all parameters frozen.

    Args:
        stored: `load_stored(folder)`, if it was read already; it is changed in place.
        trust_remote_code: as for `load_stored`.

    Raises:
        UserError: as `load_stored`.
    """
    name, dtype = resolve(precision, device)
    if name in ("nf4", "int8"):
        manifest(folder)
        model = from_quantised(folder, precision, dtype, device, trust_remote_code)
    else:
        model = stored if stored is not None else load_stored(folder, trust_remote_code)
        move(cast(model, dtype), device)
    model.requires_grad_(False)
    return model.eval()


def cast(model: Any, dtype: Any) -> Any:
    """The model with its parameters in `dtype`; buffers (rotary frequencies) stay in fp32, as `model.to(dtype)` would not leave them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def move(model: Any, device: Any) -> Any:
    """The model on `device`. All parameters go in one call of torch, which leaves Python to others until they are there: one by one, each would wait for
    Python twice while another thread reads the tokenizer, 5 ms or more."""
    import torch

    here = [p for p in model.parameters() if p.device.type == "cpu" != device.type]
    there = [torch.empty_like(p.data, device=device) for p in here]
    if here:
        torch._foreach_copy_(there, [p.data for p in here])
    for parameter, moved in zip(here, there, strict=True):
        parameter.data = moved
    return model.to(device)  # the buffers


def from_quantised(folder: Path, precision: Precision | None, dtype: Any, device: Any, trust_remote_code: bool = False) -> Any:
    """A model folder rounded to precision's int8 or nf4 while it is read, frozen. precision: None where the folder holds rounded weights.

    Raises:
        UserError: an architecture of whose layers bitsandbytes' loader rounds none.
    """
    how = {} if precision is None else {"quantization_config": quantisation(precision.name, precision, dtype)}
    model = _pretrained(folder, trust_remote_code, dtype=dtype, device_map={"": str(device)}, **how)
    if not any(quantised(p) for p in model.parameters()):
        raise UserError(f"{type(model).__name__} cannot be rounded to {precision.name if precision else '4 or 8 bits'}: transformers rounds plain linear "
                        f"layers, and {_other_layers(model)}; choose precision=auto, fp32 or bf16")
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights at the first evaluation on a CPU with AVX512-BF16; from then on they are
        # computed in bf16, pass no gradient to what lies below, and dequantise to noise
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (mypy takes a module's attribute for a tensor)
    return model.requires_grad_(False).eval()


def _other_layers(model: Any) -> str:
    """What a model has in the place of plain linear layers."""
    import torch

    kinds = sorted({type(m).__name__ for m in model.base_model.modules() if isinstance(m, torch.nn.Linear) and type(m) is not torch.nn.Linear})
    return f"its own are {', '.join(kinds)}" if kinds else "it has none"


def quantised(parameter: Any) -> bool:
    """Whether the parameter's values are rounded to 8 or 4 bits."""
    return getattr(parameter, "quant_state", None) is not None or type(parameter).__name__ == "Int8Params"


def values(parameter: Any) -> int:
    """How many numbers a parameter stands for: of a 4-bit one, each of its values."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def quantisation(name: str, precision: Precision, dtype: Any) -> Any:
    """transformers' config of int8 or nf4."""
    from transformers import BitsAndBytesConfig

    if name == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line a layer: "inputs will be cast"
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=precision.double_quantisation, bnb_4bit_compute_dtype=dtype
    )


def dequantised(model: Any) -> Any:
    """A model of bitsandbytes with plain layers in the place of its own: GPT-2's are Conv1D again, which transformers leaves as transposed linear ones."""
    import torch
    from transformers.pytorch_utils import Conv1D

    transposed = [name for name, module in model.named_modules() if getattr(module, "source_cls", None) is Conv1D]
    model = model.dequantize()
    for name in transposed:
        linear = model.get_submodule(name)
        with torch.device("meta"):
            layer = Conv1D(linear.out_features, linear.in_features)
        layer.weight, layer.bias = torch.nn.Parameter(linear.weight.T.contiguous(), requires_grad=False), linear.bias
        model.set_submodule(name, layer)
    return model


def untie(model: Any) -> None:
    """Give an output layer that is the embedding matrix a copy of its own, so that a change of one leaves the other as it is."""
    import torch

    head, embeddings = (getattr(m, "base_layer", m) for m in (model.get_output_embeddings(), model.get_input_embeddings()))
    if head is not None and head.weight is embeddings.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


@contextlib.contextmanager
def quiet() -> Any:
    """Without transformers' loading bars and hints; errors still raise."""
    from transformers.utils import logging as hints

    before = hints.get_verbosity()
    hints.set_verbosity_error()
    hints.disable_progress_bar()
    try:
        yield
    finally:
        hints.set_verbosity(before)


def most_tokens(model: Any, wanted: int) -> int:
    """`wanted`, or the model's context where that is less."""
    return min(wanted, getattr(model.config, "max_position_embeddings", None) or wanted)


def memory_bytes(model: Any) -> int:
    """Bytes of parameters and buffers, quantisation constants included."""
    constants = quantisation_bytes(model)
    weights = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    return weights + sum(map(_bytes, int8_scales(model))) + constants["constants"] + constants["tables"]


def int8_scales(model: Any) -> list[Any]:
    """The scale a row of every LLM.int8() weight: bitsandbytes has it with the weight until the layer is used first, then in the layer's state."""
    holders = [*model.parameters(), *(getattr(module, "state", None) for module in model.modules())]
    return [holder.SCB for holder in holders if getattr(holder, "SCB", None) is not None]


def parameters(model: Any) -> tuple[int, int]:
    """(trainable, total) parameters; a 4-bit weight counts each of its values, tied weights count once."""
    total = trainable = 0
    for parameter in model.parameters():
        count = values(parameter)
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def quantisation_bytes(model: Any) -> dict[str, int]:
    """Bytes beside the 4-bit values of a bitsandbytes model.

    constants: block scales (fp32, one per 64 values; with double quantisation 8 bits each plus one fp32 per 256 of
    them and one offset a tensor; Dettmers et al., 2023, section 3). tables: the code books, a fixed cost a tensor.
    values: how many quantised values the model holds.
    """
    sizes = {"constants": 0, "tables": 0, "values": 0}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is None:
            continue
        sizes["values"] += state.shape.numel()
        sizes["constants"] += _bytes(state.absmax)
        sizes["tables"] += _bytes(state.code)
        if state.nested:
            sizes["constants"] += _bytes(state.state2.absmax) + _bytes(state.offset)
            sizes["tables"] += _bytes(state.state2.code)
    return sizes


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


def autocast(device: Any, dtype: Any, cache: bool = True) -> Any:
    """The arithmetic's dtype: a torch.autocast context for bf16, nothing for fp32. cache: False inside a CUDA graph's capture."""
    import torch

    return torch.autocast(device.type, dtype, cache_enabled=cache) if dtype == torch.bfloat16 else contextlib.nullcontext()

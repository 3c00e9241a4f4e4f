"""Tiny random models of many architectures, what every technique needs to learn the separable task on them, and one pair of both tried.

Library of test_architectures.py. `ARCHITECTURES` and `TECHNIQUES` are the two sides of the table in docs/models.md.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows, write_rationales, write_task

from pipeline.base_model import main as base_model
from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import ROOT, build, by_key, compose, without
from pipeline.core.files import UserError, read_jsonl
from pipeline.serving import artefact

WINDOW = 24
"""Tokens of a sliding window: longer than a soft prompt, shorter than a soft prompt and a row."""
COMMON = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "tie_word_embeddings": True, "initializer_range": 0.15,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_AND_GLOBAL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


def _of(config: str, *leave: str, **own: Any) -> tuple[str, dict[str, Any]]:
    return config, {k: v for k, v in COMMON.items() if k not in leave} | own


GPT2_NAMES = ("intermediate_size", "num_key_value_heads")
T5 = {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_ff": 128, "d_kv": 16, "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0}
MODULE = {k: v for k, v in COMMON.items() if k != "tie_word_embeddings"} | LOCAL_AND_GLOBAL | {"head_dim": 16, "eos_token_id": 1, "pad_token_id": 1}
"""An encoder, or a decoder, of T5Gemma."""
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": _of("LlamaConfig"),
    "mistral": _of("MistralConfig", sliding_window=WINDOW),
    "qwen2": _of("Qwen2Config"),
    "qwen3": _of("Qwen3Config", head_dim=32),
    "qwen3_moe": _of("Qwen3MoeConfig", num_experts=4, head_dim=32, **EXPERTS),
    "gemma2": _of("Gemma2Config", head_dim=32, **LOCAL_AND_GLOBAL),
    "gemma3_text": _of("Gemma3TextConfig", head_dim=32, **LOCAL_AND_GLOBAL),
    "phi3": _of("Phi3Config"),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.15, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
                            "attn_pdrop": 0.0}),
    "gpt_neox": _of("GPTNeoXConfig", "num_key_value_heads"),
    "olmo2": _of("Olmo2Config"),
    "falcon": _of("FalconConfig", *GPT2_NAMES, multi_query=True, new_decoder_architecture=False),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.15}),
    "opt": _of("OPTConfig", *GPT2_NAMES, "initializer_range", ffn_dim=128, word_embed_proj_dim=64, init_std=0.15, dropout=0.0),
    "mixtral": _of("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "granite": _of("GraniteConfig", logits_scaling=8.0),
    "smollm3": _of("SmolLM3Config", no_rope_layers=[1, 0]),
    "cohere2": _of("Cohere2Config", logit_scale=0.5, **LOCAL_AND_GLOBAL),
    "stablelm": _of("StableLmConfig"),
    "starcoder2": _of("Starcoder2Config"),
    "deepseek_v3": _of("DeepseekV3Config", num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=24,
                       n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, **EXPERTS),
    "gpt_oss": _of("GptOssConfig", head_dim=16, num_local_experts=4, num_experts_per_tok=2, **LOCAL_AND_GLOBAL),
    "mamba": ("MambaConfig", {"hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.15, "state_size": 8}),
    "t5": ("T5Config", T5),
    "t5-v1_1": ("T5Config", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "umt5": ("UMT5Config", T5 | {"feed_forward_proj": "gated-gelu"}),
    "t5gemma": ("T5GemmaConfig", {"encoder": MODULE, "decoder": MODULE | {"bos_token_id": 0}, "bos_token_id": 0, "initializer_range": 0.15}),
}
"""By model_type, with a shape of its own behind a hyphen: the class of its config, and what makes it tiny. The larger
initialisation is conftest's: weights small enough for a real width leave a width of 64 with nothing to tell words apart by."""

ROWS = 192
"""Three times as many as elsewhere, in a third of the epochs: with 64 rows many a pair fits them all and still answers 90% of others."""
LEARN = ["train.epochs=4", "train.batch_size=8", "train.validations=2", f"train_rows={ROWS}"]
GENERATED = ["task.scoring=generate", "+task.max_new_tokens=3", "variant=written"]
TECHNIQUES: dict[str, list[str]] = {
    "zero_shot": [],
    "few_shot": [],
    "full": ["train.lr=3e-3"],
    "lora": ["train.lr=1e-2"],
    "qlora": ["train.lr=1e-2"],
    "dora": ["train.lr=1e-2"],
    "ia3": ["train.lr=0.1", "train.epochs=6"],
    "prompt_tuning": ["train.lr=0.1", "train.epochs=10"],
    "prefix_tuning": ["train.lr=0.1", "train.epochs=10"],
    "p_tuning": ["train.lr=1e-2", "train.epochs=10"],
    "adapter_houlsby": ["train.lr=1e-2"],
    "ladder": ["train.lr=1e-2", "method.reduction=4"],
    "bitfit_added": ["train.lr=0.1", "train.epochs=7"],
    "ln_tuning": ["train.lr=3e-2"],
    "top_layers": ["train.lr=3e-3", "method.top_layers=2"],
    "adalora": ["train.lr=3e-2"],
    "vera": ["train.lr=3e-2", "method.config.r=64"],
    "oft": ["train.lr=1e-2", "method.config.oft_block_size=16"],
    "step_by_step": ["train.lr=3e-3"],
    "dpo": ["train.lr=1e-2", "train.epochs=3"],
    "logit_distillation": ["train.lr=1e-2"],
    "wanda": [],
    "low_rank": [],
    "full_wanda": [],
    "retrieval": [],
    "grpo": ["train.lr=5e-3", "train.epochs=2", "start=full+weak"],
    "written zero_shot": GENERATED,
    "written few_shot": GENERATED,
    "written lora": [*GENERATED, "train.lr=1e-2"],
    "written prompt_tuning": [*GENERATED, "train.lr=0.1", "train.epochs=10"],
}
"""One of every kind, with the settings under which conftest's Llama learns the task; a later one begins at, or is taught by, `full` before it."""
STARTS = {"full+weak": ["train.lr=1e-3", "train.epochs=1"], "full+half": ["train.lr=2e-3", "train.epochs=2"]}
"""What grpo begins at: trained a little, so that some answers are right and not all."""
SET = re.compile(r"\{('[^{}]*')\}")
"""A Python set in a message of PEFT's, whose order is that of its hashes."""
REACHED = 0.95
LESS = {"mamba": ("prompt_tuning", "p_tuning", "ln_tuning", "written prompt_tuning"), "t5gemma": ("written prompt_tuning",)}
"""What trains and does not get there at any of the rates: in front of a frozen random state space model a soft prompt does little, since nothing of it can be
looked up later (Galim et al., 2024, show that it can set the first state at most), and its norms fit the training rows alone (90% of others); before what a
frozen random encoder reads it does not teach the decoder of T5Gemma where to end."""
FALLEN = 0.7
"""Of the first step's loss, what the last one's of such a pair is below."""
SETTINGS = ROOT / "tests" / "data" / "architecture_settings.json"
"""{architecture: {technique: settings beside those of the technique}}, where a random tiny model learns by others; written with the table."""
OTHERS = ((3, 1), (1, 3), (3, 3), (1 / 3, 1), (1 / 3, 3), (10, 3), (1, 10), (3, 10))
"""What is tried then, in turn: times the learning rate, times the epochs."""


@dataclass
class Column:
    """What became of an architecture's techniques."""

    ran: list[str] = field(default_factory=list)
    settings: dict[str, list[str]] = field(default_factory=dict)
    """By technique, where others than TECHNIQUES' were needed."""
    less: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def line(self, architecture: str) -> str:
        """Its row in docs/models.md."""
        other = "; ".join(f"{technique}: `{' '.join(more)}`" for technique, more in self.settings.items())
        told: dict[str, list[str]] = {}
        for technique, sentence in self.refused.items():
            told.setdefault(sentence.removeprefix(f"technique={technique.rpartition(' ')[2]} on {architecture.partition('-')[0]}: "), []).append(technique)
        refused = "<br>".join(f"{'all' if len(names) == len(TECHNIQUES) else ', '.join(names)}: {sentence}" for sentence, names in told.items())
        return f"| {architecture} | {len(self.ran)} | {other} | {', '.join(self.less)} | {refused} |"


def random_model(name: str, vocabulary: int = 31, **more: Any) -> Any:
    """A model of the architecture in fp32, its weights drawn with seed 0. more: keys of its config."""
    import torch
    import transformers

    kind, sizes = ARCHITECTURES[name]
    tokens = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
    parts = {part: sizes[part] | {"vocab_size": vocabulary} for part in ("encoder", "decoder") if part in sizes}
    config = getattr(transformers, kind)(**{**tokens, **sizes, **parts, **more})
    torch.manual_seed(0)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return auto.from_config(config)


def write_model(name: str, tokenizer: Path, folder: Path) -> None:
    """A random model of the architecture as a user has it: config, weights, the tokenizer of the folder `tokenizer`.

    transformers 5 takes Qwen2's own class for every tokenizer of that model_type, which makes byte-level pairs of whatever the file holds: it has such ones.
    """
    import transformers

    words = byte_pairs() if name == "qwen2" else transformers.AutoTokenizer.from_pretrained(tokenizer)
    random_model(name, len(words)).save_pretrained(folder)
    words.save_pretrained(folder)


def byte_pairs() -> Any:
    """A byte-level tokenizer with a token for every word of the task."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [f"{row['prompt']} {row['answer']}" for row in make_rows(ROWS, 1, "train")]
    texts += 3 * ["The words are positive. The words are negative. [label] [rationale]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<eos>"], initial_alphabet=alphabet, show_progress=False))
    file = json.loads(raw.to_str())["model"]
    return Qwen2Tokenizer(vocab=file["vocab"], merges=[tuple(m) for m in file["merges"]], unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


class NotLearnt(AssertionError):
    """Trained, and too few answers are right. fell: whether the loss came down."""

    def __init__(self, result: Any) -> None:
        first, last = (result.history[at]["loss"] for at in (0, -1)) if result.history else (0.0, 0.0)
        self.fell = last < FALLEN * first
        super().__init__(f"{result.test.accuracy:.2f}, the loss went from {first} to {last}")


def column(name: str, overrides: list[str], work: Path, capsys: pytest.CaptureFixture[str], chosen: list[str], search: bool) -> Column:
    """Register a model of the architecture and take it through the chosen techniques. search: try other settings where those that are known do not learn."""
    found, known = Column(), json.loads(SETTINGS.read_text(encoding="utf-8")).get(name, {})
    tiny = Path(compose(overrides).paths.models) / "smollm2_135m"
    write_model(name, tiny, work / "user")
    write_task(work / "data" / "vader_movies", train=ROWS)
    write_rationales(work / "rationales" / "vader_movies" / "lexicon", work / "data" / "vader_movies")
    places = [f"paths.{folder}={work}/{folder}" for folder in ("data", "rationales", "models")]
    here = [*overrides, *places, "experiment=architectures", "model=local", f"model.name={name}", f"model.source.path={work}/user"]
    capsys.readouterr()
    if code := base_model([*here, "technique=zero_shot"]):
        assert code == 2
        found.refused = dict.fromkeys(TECHNIQUES, capsys.readouterr().err.strip().removeprefix("error: ").replace(f"{work}/user", name))
        return found
    for technique in chosen:
        try:
            less = technique in LESS.get(name, ())
            if more := learnt(technique, here, known.get(technique, []), search and not less):
                found.settings[technique] = more
            found.ran.append(technique)
        except NotLearnt as error:
            if less and error.fell:
                found.less.append(technique)
            else:
                found.failed[technique] = str(error)
        except UserError as error:
            found.refused[technique] = SET.sub(lambda names: f"{{{', '.join(sorted(names[1].split(', ')))}}}", str(error).replace(str(work), ""))
        except Exception as error:  # noqa: BLE001 (the matrix tells all that went wrong, not the first alone)
            found.failed[technique] = f"{type(error).__name__}: {error}"
    shutil.rmtree(work, ignore_errors=True)
    return found


def learnt(technique: str, here: list[str], known: list[str], search: bool) -> list[str]:
    """The settings beside its own by which the technique runs. Raises as `pair`."""
    attempts = [known, *(other_settings(technique) if search else ())]
    for more in attempts:
        try:
            pair(technique, [*here, *more])
            return more
        except AssertionError:
            if more == attempts[-1]:
                raise
    raise AssertionError


def other_settings(technique: str) -> list[list[str]]:
    own = by_key([*LEARN, *TECHNIQUES[technique]])
    rate, epochs = (float(own.get(f"train.{key}", 0)) for key in ("lr", "epochs"))
    if technique == "full_wanda":
        return [["method.sparsity=0.25"]]
    if technique == "grpo":
        return [["start=full+half"], ["start=full+half", f"train.lr={rate / 3:.3g}"]]
    return [[f"train.lr={rate * a:.3g}", f"train.epochs={epochs * b:g}"] for a, b in OTHERS] if rate else []


def pair(technique: str, here: list[str]) -> None:
    """One technique on one architecture: trained, evaluated, loaded again.

    Raises:
        UserError: refused before the first step. AssertionError: refused after it, not learnt, or the artefact answers otherwise.
    """
    if technique == "grpo":
        start = by_key([*TECHNIQUES[technique], *here])["start"]
        run([*without(here, "train.lr", "train.epochs", "start"), *LEARN, "technique=full", f"variant={start.rpartition('+')[2]}", *STARTS[start]])
    cell = [*LEARN, f"technique={technique.rpartition(' ')[2]}", *TECHNIQUES[technique], *here]
    result, stepped = run(cell)
    assert result.status == "ok", result.error
    if (stepped or technique == "full_wanda") and result.test.accuracy < REACHED:
        raise NotLearnt(result)
    cfg = compose(cell)
    held = [p for p in read_jsonl(identity.folder_of(cfg) / "predictions.jsonl") if p["split"] == "test"]
    again, _ = artefact.score_artefact(cfg, identity.folder_of(cfg) / "artefact", "test")
    assert [p["prediction"] for p in again] == [p["prediction"] for p in held], "the artefact answers otherwise"


def run(overrides: list[str]) -> tuple[Any, bool]:
    """(the cell's result, whether it made a training step)."""
    cfg = compose(overrides)
    steps: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for loop in set(cell_run.LOOPS.values()):
            patch.setattr(loop, "train", _noted(loop.train, steps))
        try:
            result = cell_run.run(cfg, folder=identity.folder_of(cfg))
        except UserError as error:
            assert not steps, f"refused after training began: {error}"
            raise
    assert bool(steps) == build(cfg.method, "method").trains
    return result, bool(steps)


def _noted(train: Callable[[Any], Any], steps: list[int]) -> Callable[[Any], Any]:
    def train_and_note(self: Any) -> Any:
        trained = train(self)
        steps.append(trained.work.steps)
        return trained

    return train_and_note


def keep_settings(architecture: str, settings: dict[str, list[str]]) -> None:
    with SETTINGS.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        known = json.load(file) | {architecture: settings}
        file.seek(0)
        file.write(json.dumps({name: known[name] for name in ARCHITECTURES if known.get(name)}, indent=1) + "\n")
        file.truncate()


def replace_line(path: Path, architecture: str, line: str) -> None:
    """Put a row in the place of the architecture's own, or behind the table's last; several processes may do so at once."""
    with path.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = file.read().splitlines()
        mine = [i for i, each in enumerate(lines) if each.startswith(f"| {architecture} |")]
        last = max(i for i, each in enumerate(lines) if each.startswith("|"))
        lines[mine[0] if mine else last + 1 : mine[0] + 1 if mine else last + 1] = [line]
        file.seek(0)
        file.write("\n".join(lines) + "\n")
        file.truncate()

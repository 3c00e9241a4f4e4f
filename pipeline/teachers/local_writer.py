"""A writer that is a language model on this machine. conf/writer/local.yaml.

Batches hold prompts of similar length. Greedy texts come from this project's decoding (pipeline/engine/decode.py), sampled ones from transformers'
generate with Gumbel noise added to the logits: the likeliest token is then a draw at that temperature (Gumbel, 1954; Maddison et al., 2014). The noise
is a function of seed and prompt, so neither batches nor an interruption change what is drawn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.files import UserError, sha256
from pipeline.core.settings import Precision, Task, build
from pipeline.data.rows import Encoder, by_length, pad
from pipeline.measure.clock import Stopwatch
from pipeline.models import architecture
from pipeline.models.base import autocast, device_of, load_model, load_tokenizer, manifest, most_tokens, resolve
from pipeline.scoring.scorer import continuations
from pipeline.teachers.writers import Completion, Messages, Writer, as_text, digest

if TYPE_CHECKING:
    import torch

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, kw_only=True)
class LocalWriter(Writer):
    """
    Args:
        models, model: the folder models/<model>, as python -m pipeline.base_model leaves it.
        precision: auto, fp32, bf16, int8 or nf4. device: auto, cpu or cuda.
        trust_remote_code: whether Python code in the folder may run.
        batch_tokens: most tokens of a batch, padding and new ones included.
        separator: comes before every turn but replies where the tokenizer has no chat template; the text ends where it comes again.
    """

    kind = "local"

    models: str
    model: str
    precision: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    batch_tokens: int = 8192
    separator: str = "\n\n"

    @property
    def folder(self) -> Path:
        return Path(self.models) / self.model

    def check(self) -> None:
        manifest(self.folder)
        if architecture.of_folder(self.folder) is architecture.ENCODER_DECODER:
            raise UserError(f"writer.model={self.model} is {architecture.ENCODER_DECODER.name}, and texts are written by a decoder that continues its prompt; "
                            f"choose {architecture.DECODER.name}, or writer=server")
        _ = self.settings
        device_of(self.device)

    @property
    def settings(self) -> Precision:
        """Raises UserError for a precision that there is not."""
        precision: Precision = build(Precision, {"name": self.precision}, "precision")
        return precision

    def identity(self) -> dict[str, Any]:
        files = [self.folder / name for name in TOKENIZER]
        return {
            "model": self.model, "model_sha256": manifest(self.folder)["sha256"], "tokenizer_sha256": digest([sha256(p) for p in files if p.exists()]),
            "precision": self.precision, "max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "top_p": self.top_p,
            "separator": self.separator,
        }

    def _ask(self, prompts: dict[str, Messages], seed: int, keep: Callable[[str, Completion], None]) -> None:
        watch = Stopwatch(self._device)
        tokenizer, model = self._loaded
        keys = list(prompts)
        texts = [self.rendered(prompts[key]) for key in keys]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] if tokenizer.chat_template else self._encoder.prompt(text) for text in texts]
        self._check_room(ids, most_tokens(model, 1 << 30))
        for part, tokens in self._continued(ids, [f"{seed}/{key}" for key in keys]):
            seconds = watch.lap() / len(part)
            for index, row in zip(part, tokens.tolist(), strict=True):
                keep(keys[index], self._answer(row, len(ids[index]), seconds))

    def rendered(self, messages: Messages) -> str:
        """The text that the model continues: by its chat template, else the turns as plain text."""
        from jinja2 import TemplateError

        tokenizer = self._tokenizer
        if not tokenizer.chat_template:
            return as_text(messages, self.separator)
        render = functools.partial(tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=False)
        try:
            return render(messages)
        except TemplateError:  # some templates have no system turn
            return render(_without_system(messages))

    def _check_room(self, ids: list[list[int]], context: int) -> None:
        longest = max(map(len, ids)) + self.max_new_tokens
        if longest > context:
            raise UserError(
                f"the longest prompt takes {longest - self.max_new_tokens} tokens and writer.max_new_tokens={self.max_new_tokens} more, "
                f"but {self.model} reads {context}; lower writer.max_new_tokens or give fewer demonstrations"
            )

    def _answer(self, row: list[int], prompt_tokens: int, seconds: float) -> Completion:
        tokenizer = self._tokenizer
        ended = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        text = tokenizer.decode(row[:ended], skip_special_tokens=True)
        cut = ended == len(row)
        if not tokenizer.chat_template and self.separator in text.lstrip():
            text, cut = text.lstrip().partition(self.separator)[0], False
        return Completion(text.strip(), round(seconds, 4), prompt_tokens, min(ended + 1, len(row)), cut)

    def _continued(self, ids: list[list[int]], names: list[str]) -> Iterator[tuple[list[int], torch.Tensor]]:
        tokenizer, model = self._loaded
        pad_id = self._encoder.pad_id
        dtype = resolve(self.settings, self._device)[1]
        if self.temperature == 0:
            yield from continuations(model, ids, self.max_new_tokens, self.batch_tokens, tokenizer.eos_token_id, pad_id, self._device, dtype)
            return
        import torch
        from transformers import LogitsProcessorList

        with torch.inference_mode(), autocast(self._device, dtype):
            for part in by_length([len(one) + self.max_new_tokens for one in ids], self.batch_tokens):
                prompts = pad([ids[i] for i in part], pad_id, left=True).to(self._device)
                lengths = torch.tensor([len(ids[i]) for i in part], device=self._device)
                mask = (torch.arange(prompts.shape[1], device=self._device) >= prompts.shape[1] - lengths[:, None]).long()
                out = model.generate(
                    input_ids=prompts, attention_mask=mask, max_new_tokens=self.max_new_tokens, do_sample=False, pad_token_id=pad_id,
                    eos_token_id=tokenizer.eos_token_id, logits_processor=LogitsProcessorList([self._noise([names[i] for i in part])]),
                )
                yield part, out[:, prompts.shape[1] :]

    def _noise(self, names: list[str]) -> Callable[..., torch.Tensor]:
        """Logits [R, V] -> logits whose likeliest token is a draw at `temperature` among the likeliest tokens of share `top_p`."""
        import torch
        from transformers import TopPLogitsWarper

        generators = [torch.Generator("cpu").manual_seed(int(digest(name)[:15], 16)) for name in names]

        def noisy(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            scaled = logits.float() / self.temperature
            likeliest = TopPLogitsWarper(self.top_p)(ids, scaled) if self.top_p < 1 else scaled
            drawn = torch.stack([torch.empty(logits.shape[1]).exponential_(generator=one) for one in generators])
            return likeliest - drawn.log().to(likeliest.device)

        return noisy

    @functools.cached_property
    def _device(self) -> Any:
        return device_of(self.device)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._tokenizer, Task("prompts", "generate"), 1 << 30, "error")

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return self._tokenizer, load_model(self.folder, self.settings, self._device, trust_remote_code=self.trust_remote_code)


def _without_system(messages: Messages) -> Messages:
    """The system's text put before the first user's."""
    system = [m["content"] for m in messages if m["role"] == "system"]
    rest = [m for m in messages if m["role"] != "system"]
    return [{**rest[0], "content": "\n\n".join([*system, rest[0]["content"]])}, *rest[1:]] if rest else messages

"""Batched generation by `transformers` and torch, with the same prompts and endings: the exported model, on GPUs."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medllm_jax.data.tokenizer import encode_prompts, load_tokenizer
from medllm_jax.errors import UserError, first_line
from medllm_jax.evaluation.prompts import Prompt
from medllm_jax.evaluation.sampling import Completion, SamplingParams, cut_at_stop
from medllm_jax.terminal.log import without_bars_of_transformers
from medllm_jax.terminal.version import install_line

_SLICE = 1 << 24  # bytes hashed at a time
_LEAST_TEMPERATURE = 1e-30  # logits divided by less are infinite


def require_torch() -> Any:
    """The module; UserError where it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"--hf needs torch: {install_line('hf')}, or ask a server (--server)") from error
    return torch


class TorchGenerator:
    """Completes prompts by a model in Hugging Face format (a local folder), on the GPU if there is one."""

    def __init__(self, folder: str, *, batch_size: int, dtype: str | None = None):
        """Loads the model, from safetensors alone and without code of the folder's.

        Args:
          folder: config.json, *.safetensors, tokenizer.
          batch_size: prompts completed at a time.
          dtype: "float32" or "bfloat16"; by default float32 on a CPU and bfloat16 on a GPU.

        Raises:
          UserError: torch is not installed, or the folder holds no model that can be loaded.
        """
        torch = require_torch()
        from transformers import AutoModelForCausalLM

        if (Path(folder) / "checkpoints").is_dir():
            raise UserError(f"--hf {folder}: it is a run folder: give --run {folder}")
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"{folder}: no config.json in it; a local folder in Hugging Face format was expected")
        self._folder, self._batch_size = Path(folder), batch_size
        self._tokenizer = load_tokenizer(folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = dtype or {"cuda": "bfloat16", "cpu": "float32"}[device]
        try:
            with without_bars_of_transformers():
                model = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=getattr(torch, dtype),
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}: transformers can't load this model: {first_line(error)}") from error
        self._model = model.to(device).eval()
        named = model.generation_config.eos_token_id
        ids = [*(named if isinstance(named, list) else [named]), self._tokenizer.eos_token_id]
        self._eos = sorted({i for i in ids if i is not None})
        if not self._eos:
            raise UserError(
                f"{folder}: neither generation_config.json nor the tokenizer names an end-of-sequence token"
            )

    @property
    def chats(self) -> bool:
        """Whether there is a chat template for messages."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of config and weights, as they lie in the folder."""
        digest = hashlib.sha256((self._folder / "config.json").read_bytes())
        for file in sorted(self._folder.glob("*.safetensors")):
            with file.open("rb") as content:
                while part := content.read(_SLICE):
                    digest.update(part)
        return digest.hexdigest()[:32]

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], params: SamplingParams
    ) -> Iterator[Sequence[Completion]]:
        """`params.n` completions of each prompt, in order; see `evaluation.sampling.Sample`.

        They depend on the kind of device, too. UserError for a prompt without room in the model's context.
        """
        if params.temperature:
            for prompt, seed in zip(prompts, seeds, strict=True):
                yield self._sample_one(prompt, seed, params)
            return
        encoded = self._encode(prompts, params.max_new_tokens)
        for start in range(0, len(encoded), self._batch_size):
            batch = encoded[start : start + self._batch_size]
            yield from ([completion] for completion in self._complete(batch, params, do_sample=False))

    def _sample_one(self, prompt: Prompt, seed: int, params: SamplingParams) -> list[Completion]:
        import torch

        torch.manual_seed(seed)
        (encoded,) = self._encode([prompt], params.max_new_tokens)
        drawn = {
            "do_sample": True,
            "temperature": max(params.temperature, _LEAST_TEMPERATURE),
            "top_p": params.top_p,
            "top_k": 0,
        }
        found: list[Completion] = []
        while len(found) < params.n:
            rows = min(self._batch_size, params.n - len(found))
            found += self._complete([encoded] * rows, params, **drawn)
        return found

    def _encode(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
        encoded = encode_prompts(self._tokenizer, prompts)
        context = self._model.config.max_position_embeddings
        for number, tokens in enumerate(encoded):
            if not 0 < len(tokens) <= context - max_new_tokens:
                raise UserError(
                    f"prompt {number} has {len(tokens)} tokens and up to {max_new_tokens} may follow, but the model's "
                    f"context is {context}: change the prompt, or the template's max_new_tokens"
                )
        return encoded

    def _complete(self, encoded: list[list[int]], params: SamplingParams, **how: Any) -> list[Completion]:
        import torch

        width = max(map(len, encoded))
        # Padded at the left, so that all continue in the same column.
        tokens = torch.tensor([[self._eos[0]] * (width - len(row)) + row for row in encoded])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
        stopping = {"stop_strings": list(params.stop), "tokenizer": self._tokenizer} if params.stop else {}
        limits = {"max_new_tokens": params.max_new_tokens, "eos_token_id": self._eos, "pad_token_id": self._eos[0]}
        with torch.inference_mode():
            out = self._model.generate(
                tokens.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                repetition_penalty=1.0,
                **limits,
                **stopping,
                **how,
            )
        return [self._completion(row, params.stop) for row in out[:, width:].tolist()]

    def _completion(self, tokens: list[int], stop: tuple[str, ...]) -> Completion:
        end = next((place for place, token in enumerate(tokens) if token in self._eos), None)
        text = self._tokenizer.decode(tokens[:end], skip_special_tokens=False)
        cut = cut_at_stop(text, stop)
        if cut is not None:
            return Completion(cut, "stop")
        return Completion(text, "length" if end is None else "stop")

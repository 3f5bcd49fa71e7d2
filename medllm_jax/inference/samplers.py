"""The models that can be asked: of a checkpoint, of a folder in Hugging Face format, or of a server."""

from typing import TYPE_CHECKING

from medllm_jax.checkpoint.handle import Checkpoint
from medllm_jax.config.schema import MeshConfig, PrecisionConfig
from medllm_jax.evaluation.sampling import Sampler
from medllm_jax.inference.openai_client import OpenAIClient
from medllm_jax.storage.hub import MODEL, find_folder

if TYPE_CHECKING:
    from medllm_jax.inference.torch_generator import TorchGenerator


def checkpoint_sampler(
    checkpoint: Checkpoint, *, batch_size: int, mesh: MeshConfig, precision: PrecisionConfig, chat: bool
) -> Sampler:
    """The model of a checkpoint, on this process's devices."""
    from medllm_jax.inference.generator import Generator

    generator = Generator.from_checkpoint(checkpoint, batch_size=batch_size, mesh=mesh, precision=precision)
    return Sampler(generator.fingerprint, checkpoint.label, generator.sample, chat)


def folder_sampler(folder: str, *, batch_size: int, dtype: str | None, chat: bool) -> Sampler:
    """A model in Hugging Face format, by `transformers` and torch: a folder, or a name on the hub."""
    label, generator = folder_generator(folder, batch_size=batch_size, dtype=dtype)
    return Sampler(generator.fingerprint, label, generator.sample, chat)


def folder_generator(folder: str, *, batch_size: int, dtype: str | None) -> "tuple[str, TorchGenerator]":
    """What the model in a folder, or of a name on the hub, is called, and the model; its weights are not hashed yet."""
    from medllm_jax.inference.torch_generator import TorchGenerator, require_torch

    require_torch()  # before a model is downloaded for nothing
    found = find_folder(folder, MODEL, option="--hf")
    return found.label, TorchGenerator(found.folder, batch_size=batch_size, dtype=dtype)


def server_sampler(url: str, model: str, *, concurrency: int, chat: bool = False) -> Sampler:
    """The model that a server knows by a name, which stands for its weights: the server may move, the model stays."""
    client = OpenAIClient(url, model, concurrency=concurrency)
    return Sampler(client.model, client.url, client.sample, chat)

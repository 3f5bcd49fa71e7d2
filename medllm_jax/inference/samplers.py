"""The models that can be asked: of a checkpoint, of a folder in Hugging Face format, or of a server."""

from medllm_jax.checkpoint.handle import Checkpoint
from medllm_jax.config.schema import MeshConfig, PrecisionConfig
from medllm_jax.evaluation.sampling import Sampler
from medllm_jax.inference.openai_client import OpenAIClient
from medllm_jax.storage.hub import MODEL, find_folder


def checkpoint_sampler(
    checkpoint: Checkpoint, *, batch_size: int, mesh: MeshConfig, precision: PrecisionConfig, chat: bool
) -> Sampler:
    """The model of a checkpoint, on this process's devices."""
    from medllm_jax.inference.generator import Generator

    generator = Generator.from_checkpoint(checkpoint, batch_size=batch_size, mesh=mesh, precision=precision)
    return Sampler(generator.fingerprint, checkpoint.label, generator.sample, chat)


def folder_sampler(folder: str, *, batch_size: int, dtype: str, chat: bool) -> Sampler:
    """A model in Hugging Face format, by `transformers` and torch: a folder, or a name on the hub."""
    from medllm_jax.inference.torch_generator import TorchGenerator, require_torch

    require_torch()  # before a model is downloaded for nothing
    found = find_folder(folder, MODEL, option="--hf")
    generator = TorchGenerator(found.folder, batch_size=batch_size, dtype=dtype)
    return Sampler(generator.fingerprint, found.label, generator.sample, chat)


def server_sampler(url: str, model: str, *, concurrency: int, chat: bool = False) -> Sampler:
    """The model that a server knows by a name, which stands for its weights: the server may move, the model stays."""
    client = OpenAIClient(url, model, concurrency=concurrency)
    return Sampler(client.model, client.url, client.sample, chat)

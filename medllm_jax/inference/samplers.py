"""The models that can be asked: of a run, of a folder in Hugging Face format, or of a server, each as a `Sampler`."""

from medllm_jax.config.schema import MeshConfig, PrecisionConfig
from medllm_jax.evaluation.samples import SampleOptions, Sampler
from medllm_jax.inference.openai_client import OpenAIClient


def run_sampler(
    run: str, options: SampleOptions, *, batch_size: int, mesh: MeshConfig, precision: PrecisionConfig, chat: bool
) -> Sampler:
    """The newest model of a run folder, on this process's devices."""
    from medllm_jax.checkpoint.orbax import latest_step
    from medllm_jax.inference.generator import Generator, Sampling

    generator = Generator.from_run(run, batch_size=batch_size, mesh=mesh, precision=precision)

    def draw(prompts, seeds, *, samples, max_new_tokens, stop):
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        numbered = [(seed, number) for seed in seeds for number in range(samples)]
        sampling = Sampling(max_new_tokens, options.temperature, options.top_p, stop)
        yield from zip(*[generator(repeated, sampling, numbered)] * samples, strict=True)

    return Sampler(generator.fingerprint, f"{run}@{latest_step(run)}", draw, chat)


def folder_sampler(folder: str, options: SampleOptions, *, batch_size: int, dtype: str, chat: bool) -> Sampler:
    """A model in Hugging Face format, by `transformers` and torch."""
    from medllm_jax.inference.torch_generator import TorchGenerator

    generator = TorchGenerator(folder, batch_size=batch_size, dtype=dtype)

    def draw(prompts, seeds, *, samples, max_new_tokens, stop):
        limits = {"max_new_tokens": max_new_tokens, "stop": stop}
        if not options.temperature:
            yield from zip(generator.greedy(prompts, **limits), strict=True)
            return
        drawn = {"temperature": options.temperature, "top_p": options.top_p, **limits}
        for prompt, seed in zip(prompts, seeds, strict=True):
            yield generator.sample(prompt, seed, samples, **drawn)

    return Sampler(generator.fingerprint, folder, draw, chat)


def named_server_sampler(url: str, model: str, options: SampleOptions, *, concurrency: int, chat: bool) -> Sampler:
    """The model that a server knows by a name."""
    settings = {"temperature": options.temperature, "top_p": options.top_p, "concurrency": concurrency}
    return server_sampler(OpenAIClient(url, model, **settings), chat=chat)


def server_sampler(server: OpenAIClient, *, chat: bool = False) -> Sampler:
    """The model of a server. Its name stands for its weights: the server may move, and its samples are still its."""

    def draw(prompts, seeds, *, samples, max_new_tokens, stop):
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        numbered = [seed + number for seed in seeds for number in range(samples)]
        completions = server(repeated, max_new_tokens=max_new_tokens, stop=stop, seeds=numbered)
        yield from zip(*[completions] * samples, strict=True)

    return Sampler(server.model, server.url, draw, chat)

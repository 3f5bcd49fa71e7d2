"""A model behind an OpenAI-compatible server (vLLM, `transformers serve`, ...), as evaluation asks a model.

Text prompts go to /v1/completions and chat messages to /v1/chat/completions, several at once; what comes back is in the
order of the prompts. Requests that fail for a passing reason are repeated.
"""

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from medllm_jax.errors import UserError
from medllm_jax.evaluation.prompts import Prompt
from medllm_jax.evaluation.sampling import Completion, SamplingParams, cut_at_stop

_RETRIES = 8
_BACKOFF = 1.0  # seconds before the second repetition; each further wait is twice as long, up to a minute
_PASSING = (408, 429, 500, 502, 503, 504)
_CONNECT_SECONDS = 10.0
_AHEAD = 4  # times `concurrency`: how far the prompts that are asked run ahead of the first that is not answered


class OpenAIClient:
    """Completes prompts by a server's model.

    The key in the environment variable OPENAI_API_KEY, if there is one, goes with every request and nowhere else.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        concurrency: int = 8,
        timeout: float = 900.0,
    ):
        """Nothing is asked yet.

        Args:
          url: of the server, with or without its "/v1".
          model: the name by which the server knows it.
          concurrency: requests under way at a time, at most.
          timeout: seconds that one answer may take.

        Raises:
          UserError: an argument makes no sense.
        """
        import urllib3

        if not url.startswith(("http://", "https://")) or "@" in url:
            raise UserError("the server's URL must be like http://host:8000, without a user name or password in it")
        if not model:
            raise UserError(f"{url}: the model's name is missing; it is one of those that {url}/v1/models lists")
        if concurrency < 1:
            raise UserError(f"concurrency is {concurrency}: it must be at least 1")
        self.url, self.model = url.rstrip("/").removesuffix("/v1"), model
        self._concurrency = concurrency
        key = os.environ.get("OPENAI_API_KEY")
        self._http = urllib3.PoolManager(
            maxsize=concurrency,
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=timeout),
            # A completion may be asked for twice: nothing on the server changes by it.
            retries=urllib3.Retry(
                total=_RETRIES,
                allowed_methods=None,
                status_forcelist=_PASSING,
                backoff_factor=_BACKOFF,
                backoff_max=60,
                backoff_jitter=_BACKOFF,
                raise_on_status=False,
            ),
        )

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], params: SamplingParams
    ) -> Iterator[Sequence[Completion]]:
        """`params.n` completions of each prompt, in order; see `evaluation.sampling.Sample`."""
        repeated = [prompt for prompt in prompts for _ in range(params.n)]
        numbered = [seed + number for seed in seeds for number in range(params.n)]
        yield from zip(*[self(repeated, params, numbered)] * params.n, strict=True)

    def __call__(
        self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int] | None = None
    ) -> Iterator[Completion]:
        """One completion of each prompt, in order, each yielded as soon as it and all before it are there.

        Args:
          prompts: texts, or lists of chat messages.
          params: how to draw; a server that ignores the stop strings costs only time. Its seed and n are not sent.
          seeds: one a prompt, for servers that draw by the request's seed (vLLM does).

        Raises:
          UserError: the server cannot be reached, refuses a request, or answers something else than a completion.
        """
        with ThreadPoolExecutor(self._concurrency) as pool:
            waiting: deque[Future[Completion]] = deque()
            try:
                for prompt, seed in zip(prompts, seeds or [None] * len(prompts), strict=True):
                    waiting.append(pool.submit(self._ask, prompt, params, seed))
                    if len(waiting) >= _AHEAD * self._concurrency:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _ask(self, prompt: Prompt, params: SamplingParams, seed: int | None) -> Completion:
        import urllib3

        chat = isinstance(prompt, list)
        url = f"{self.url}/v1/{'chat/completions' if chat else 'completions'}"
        body: dict[str, Any] = {"model": self.model, "temperature": params.temperature, "top_p": params.top_p}
        body |= {("messages" if chat else "prompt"): prompt, "max_tokens": params.max_new_tokens}
        body |= ({"stop": list(params.stop)} if params.stop else {}) | ({} if seed is None else {"seed": seed})
        try:
            response = self._http.request("POST", url, body=json.dumps(body).encode())
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(
                f"{url}: no answer after {_RETRIES} repetitions ({type(reason).__name__}); "
                "see that the server runs, then run this again"
            ) from error
        if response.status != 200:
            raise UserError(f"{url}: status {response.status} for model {self.model!r}{_said(response.data, prompt)}")
        return _completion(response.data, chat, params.stop, url)


def _completion(data: bytes, chat: bool, stop: tuple[str, ...], url: str) -> Completion:
    try:
        choice = json.loads(data)["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        reason = choice["finish_reason"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{url}: the answer is no completion; is this an OpenAI-compatible server?") from error
    text = text or ""  # a chat message without content is null
    cut = cut_at_stop(text, stop)
    return Completion(text, str(reason)) if cut is None else Completion(cut, "stop")


def _said(data: bytes, prompt: Prompt) -> str:
    """What the server says about an error, unless it repeats the prompt, which belongs in no log."""
    try:
        content = json.loads(data)
        said = content.get("error", content)
        message: Any = said.get("message") if isinstance(said, dict) else said
    except (ValueError, AttributeError):
        return ""
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    if not isinstance(message, str) or any(line in message for line in lines):
        return ""
    return f": {' '.join(message.split())[:200]}"

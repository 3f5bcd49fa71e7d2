"""A model behind an OpenAI-compatible server (vLLM, `transformers serve`, ...), as evaluation asks a model.

Text prompts go to /v1/completions and chat messages to /v1/chat/completions, several at once; what comes back is in the
order of the prompts. A request that fails for a passing reason, or whose answer is no completion, is repeated; a prompt
that stays without an answer is left out and said, and ends nothing unless the server answers nothing any more.
"""

import json
import logging
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any
from urllib.parse import urljoin

from medllm_jax.errors import RunError, UserError
from medllm_jax.evaluation.prompts import Prompt
from medllm_jax.evaluation.sampling import UNANSWERED, Completion, SamplingParams, cut_at_stop, finish_reason_of
from medllm_jax.terminal.secrets import redact

_log = logging.getLogger(__name__)

_RETRIES = 8
_BACKOFF = 1.0  # seconds before the second repetition; each further wait is twice as long, up to a minute
_MAX_BACKOFF = 60.0
_MAX_WAIT = 120.0  # seconds that are waited at a server's word (Retry-After), at most
_PASSING = (408, 409, 425, 429)  # and all from 500 on
_CONNECT_SECONDS = 10.0
_AHEAD = 4  # times `concurrency`: how far the prompts that are asked run ahead of the first that is not answered
_MAX_LOST = 8  # prompts without an answer, one after the other: then the server answers nothing any more
_MAX_REDIRECTS = 3
_MAX_BYTES = 2**23  # of an answer
_BLOCK = 2**16
# Parts of a message that are text, and those that are no part of the answer; the field of the former's text.
_TEXT_PARTS, _OTHER_PARTS = ("text", "output_text"), ("thinking", "reasoning", "redacted_thinking")


class _Fault(Exception):  # noqa: N818 (not the user's to see)
    """Why a request has no answer that may have one at the next time.

    wait: seconds that the server asks to wait; reached: whether there is a server at all.
    """

    def __init__(self, reason: str, *, wait: float = 0.0, reached: bool = True):
        super().__init__(reason)
        self.wait, self.reached = wait, reached


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
        self._timeout = timeout
        self._told: set[str] = set()
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY holds a character that no key has: set it anew")
        try:
            self._http = urllib3.connection_from_url(
                self.url,
                maxsize=concurrency,
                headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
                timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=timeout),
                retries=False,  # they are ours
            )
        except urllib3.exceptions.HTTPError as error:
            raise UserError(f"{url[:60]}: that is no URL; one like http://host:8000 was expected") from error

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

        Returns:
          Completions; without text and with the finish reason UNANSWERED where a prompt stayed without an answer.

        Raises:
          UserError: the server refuses a request, or sends it to another host.
          RunError: the server cannot be reached, or answers nothing any more.
        """
        ended = threading.Event()
        lost = 0
        with ThreadPoolExecutor(self._concurrency) as pool:
            waiting: deque[Future[Completion | _Fault]] = deque()
            asked = zip(prompts, seeds or [None] * len(prompts), strict=True)
            try:
                while True:
                    for prompt, seed in islice(asked, _AHEAD * self._concurrency - len(waiting)):
                        waiting.append(pool.submit(self._ask, prompt, params, seed, ended))
                    if not waiting:
                        return
                    found = waiting.popleft().result()
                    lost = lost + 1 if isinstance(found, _Fault) else 0
                    if isinstance(found, _Fault) and (lost >= min(_MAX_LOST, len(prompts)) or not found.reached):
                        raise RunError(
                            f"{self.url}: no answer after {_RETRIES} repetitions ({found}); "
                            "see that the server runs, then run this again"
                        )
                    yield Completion("", UNANSWERED) if isinstance(found, _Fault) else found
            finally:
                ended.set()
                for future in waiting:
                    future.cancel()

    def _ask(
        self, prompt: Prompt, params: SamplingParams, seed: int | None, ended: threading.Event
    ) -> "Completion | _Fault":
        """The completion of one prompt, or the last of the faults that stood in its way."""
        chat = isinstance(prompt, list)
        body: dict[str, Any] = {"model": self.model, "temperature": params.temperature, "top_p": params.top_p}
        body |= {("messages" if chat else "prompt"): prompt, "max_tokens": params.max_new_tokens}
        body |= ({"stop": list(params.stop)} if params.stop else {}) | ({} if seed is None else {"seed": seed})
        url = f"{self.url}/v1/{'chat/completions' if chat else 'completions'}"
        data, started, wait, fault = json.dumps(body).encode(), time.monotonic(), 0.0, _Fault("not asked")
        for repetition in range(_RETRIES + 1):
            if ended.wait(wait):
                break
            try:
                return _completion(self._post(url, data, prompt), prompt, params)
            except _Fault as error:
                fault = error
            wait = self._pause(fault, repetition)
            # One that takes an answer's whole time again and again has had its share.
            if time.monotonic() - started > 2 * self._timeout:
                break
        if fault.reached and not ended.is_set():
            self._tell(f"{url}: no answer after {_RETRIES} repetitions ({fault}): the prompt is left out")
        return fault

    def _pause(self, fault: _Fault, repetition: int) -> float:
        """Seconds to wait after a fault: by the server's word, or doubling; those who wait don't come back at once."""
        if fault.wait > _MAX_WAIT:
            self._tell(f"{self.url} asks to wait {fault.wait:.0f} s ({fault}): it is asked again in {_MAX_WAIT:.0f} s")
        doubling = min(_BACKOFF * 2**repetition, _MAX_BACKOFF) if repetition else 0.0
        return min(fault.wait or doubling, _MAX_WAIT) + random.random() * _BACKOFF

    def _tell(self, text: str) -> None:
        """Says each thing once."""
        if text not in self._told:
            self._told.add(text)
            _log.warning(text)

    def _post(self, url: str, data: bytes, prompt: Prompt) -> bytes:
        """What the server answers with status 200; _Fault for what may pass, UserError for what won't."""
        import urllib3

        target = url
        try:
            for _ in range(_MAX_REDIRECTS):
                place = urllib3.util.parse_url(target).request_uri
                response = self._http.urlopen("POST", place, body=data, redirect=False, preload_content=False)
                answer = self._read(response)
                location = response.get_redirect_location()
                if not location:
                    break
                target = urljoin(target, location)
                if not self._http.is_same_host(target):
                    raise UserError(
                        f"{url} redirects to {_origin(target)}: prompts go to the host that was named and to no other; "
                        "give the URL of that one if it is right"
                    )
            else:
                raise UserError(f"{url} redirects again and again; give the URL that it ends at")
        except ValueError as error:
            raise UserError(f"{url} redirects to what is no URL") from error
        except (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError) as error:
            raise _Fault(type(error).__name__, reached=False) from error
        except urllib3.exceptions.HTTPError as error:
            raise _Fault(type(error).__name__) from error
        status = response.status
        if status in _PASSING or status >= 500:
            raise _Fault(f"status {status}{_said(answer, prompt)}", wait=_seconds(response.headers.get("Retry-After")))
        if status != 200:
            key = "; the key is what OPENAI_API_KEY holds" if status in (401, 403) else ""
            raise UserError(f"{url}: status {status} for model {self.model[:60]!r}{_said(answer, prompt)}{key}")
        return answer

    def _read(self, response: Any) -> bytes:
        """The body, which has a bound in size and, however slowly it comes, in time."""
        started, parts, size = time.monotonic(), [], 0
        try:
            while part := response.read1(_BLOCK):
                parts.append(part)
                size += len(part)
                if size > _MAX_BYTES:
                    raise _Fault(f"an answer of more than {_MAX_BYTES // 2**20} MiB")
                if time.monotonic() - started > self._timeout:
                    raise _Fault("an answer that does not end")
        except _Fault:
            response.close()
            raise
        response.release_conn()
        return b"".join(parts)


def _completion(data: bytes, prompt: Prompt, params: SamplingParams) -> Completion:
    """The completion in a server's answer; _Fault where it holds none."""
    try:
        answer = json.loads(data)
        choice = answer["choices"][0]
        text = _text(choice["message"] if isinstance(prompt, list) else {"content": choice["text"]})
        reason = choice.get("finish_reason")
        used = (answer.get("usage") or {}).get("completion_tokens")
        if reason is None and isinstance(used, int) and used >= params.max_new_tokens:
            reason = "length"
        if reason is not None and not isinstance(reason, str):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _Fault(f"the answer is no completion{_said(data, prompt)}") from error
    cut = cut_at_stop(text, params.stop)
    return Completion(text, finish_reason_of(reason)) if cut is None else Completion(cut, "stop")


def _text(message: dict[str, Any]) -> str:
    """The text of a message: a string, null (with, perhaps, a refusal beside it), or a list of parts."""
    content = message["content"] if message.get("content") is not None else message.get("refusal") or ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TypeError
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    if not all(part["type"] in _TEXT_PARTS + _OTHER_PARTS for part in parts):
        raise ValueError
    return "".join(part["text"] for part in parts if part["type"] in _TEXT_PARTS)


def _seconds(retry_after: str | None) -> float:
    """What a Retry-After header asks to wait: seconds, or a date; 0 where there is none, or another."""
    if retry_after is None:
        return 0.0
    if re.fullmatch(r"\s*\d{1,9}(\.\d{1,9})?\s*", retry_after, re.ASCII):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _origin(url: str) -> str:
    """Scheme, host and port, without what may be secret in a URL."""
    import urllib3

    place = urllib3.util.parse_url(url)
    return f"{place.scheme}://{place.netloc}"[:100]


def _said(data: bytes, prompt: Prompt) -> str:
    """What the server says about an error, unless it repeats the prompt, which belongs in no log."""
    try:
        content = json.loads(data)
        said = content.get("error", content)
        message: Any = said.get("message") if isinstance(said, dict) else said
    except (ValueError, AttributeError, RecursionError):
        return ""
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    if not isinstance(message, str) or any(line in message for line in lines):
        return ""
    return f": {redact(' '.join(message.split())[:200])}"

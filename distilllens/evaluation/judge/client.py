"""Requests to the endpoint: tries, waits and what ends them."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from distilllens.config import JudgeConfig
from distilllens.errors import ConfigError
from distilllens.evaluation.judge.questions import Reply
from distilllens.runs import HIDDEN, redact

if TYPE_CHECKING:
    from openai import APIStatusError

NO_KEY = "none"
"""What is sent as the key where the endpoint asks for none: the client insists on one."""
LARGEST_BODY = 4_000_000
"""Bytes of a reply that are read; a verdict with its reasons has a few thousand."""
RETRIED = (408, 409, 429)
"""Statuses below 500 that may go away by themselves."""
REFUSED = (400, 413, 422)
"""Statuses that may be about this one prompt: a content filter, the length of the context."""
UNSENT = ("ConnectError", "ConnectTimeout", "PoolTimeout")
"""Transport errors before a request is sent: httpx's or httpx2's, by openai's version."""
MOST_TOKENS = 10**9
"""Of a reply; an endpoint that tells more tells nothing."""
HINTS = {
    401: "put a valid key into the variable that --api_key_env names",
    403: "put a key that may use this model into the variable that --api_key_env names",
    404: "check --base_url (it often ends in /v1) and --model",
}


class NoReplyError(Exception):
    """A request failed in all its tries; the text says how the last one did."""


class RefusedError(NoReplyError):
    """The endpoint refuses this request, and further tries would not help."""


class SpentError(Exception):
    """No further try is allowed; the text names the limit."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A try that brought no reply and may be repeated."""

    problem: str
    wait: float | None = None
    """Seconds that the endpoint asks to wait."""
    may_be_billed: bool = True
    """Whether the request had been sent, and the endpoint may have worked on it."""


class Endpoint:
    """Sends requests; several threads may share it.

    Args:
        config: Address, model, limits.

    Raises:
        ConfigError: openai is not installed, or the key's variable is not set.
    """

    def __init__(self, config: JudgeConfig) -> None:
        if importlib.util.find_spec("openai") is None:
            raise ConfigError("judge needs the openai package", fix="bash scripts/setup.sh judge")
        import openai  # takes half a second

        self._config, self._openai = config, openai
        self._key = read_key(config)
        self._client = openai.OpenAI(
            base_url=config.base_url,
            api_key=self._key or NO_KEY,
            timeout=config.timeout,
            max_retries=0,  # ours are counted, and can be stopped
        )
        # Read from the environment, and meant for OpenAI alone.
        self._client.organization = self._client.project = None
        self._lock = threading.Lock()
        self._halted = threading.Event()
        self.num_sent = 0
        """Requests so far, tries included."""

    def halt(self) -> None:
        """Lets requests under way come to their end, and makes no further tries."""
        self._halted.set()

    def ask(self, messages: Sequence[Mapping[str, str]], lose: Callable[[], bool]) -> Reply:
        """Returns the endpoint's reply, after as many tries as it takes.

        Args:
            messages: The request.
            lose: Called after each try that brought no reply but may be billed; says whether
                ``max_cost`` allows another.

        Raises:
            NoReplyError: The last try failed too, or the endpoint asks for too long a wait.
            RefusedError: The endpoint refuses this request.
            SpentError: No further try is allowed.
            ConfigError: The endpoint refuses the key or the model.
        """
        for attempt in range(self._config.retries + 1):
            self._count()
            outcome = self._try(messages)
            if isinstance(outcome, Reply):
                return outcome
            problem, asked = outcome.problem, outcome.wait
            is_spent = outcome.may_be_billed and not lose()
            if asked is not None and asked > self._config.max_wait:
                problem = f"{problem}, and the endpoint asks to wait {asked:.0f} s"
                break
            if attempt == self._config.retries:
                break
            if is_spent:
                raise SpentError(f"max_cost={self._config.max_cost:g}")
            if self._halted.wait(self._wait(attempt, asked)):
                break
        raise NoReplyError(problem)

    def _count(self) -> None:
        with self._lock:
            if self.num_sent == self._config.max_requests:
                raise SpentError(f"max_requests={self._config.max_requests}")
            self.num_sent += 1

    def _wait(self, attempt: int, asked: float | None) -> float:
        """Returns the seconds before the next try; the jitter keeps threads apart."""
        if asked is not None:
            return asked + random.uniform(0, self._config.wait)
        longest = min(self._config.max_wait, self._config.wait * 2**attempt)
        return random.uniform(longest / 2, longest)

    def _try(self, messages: Sequence[Mapping[str, str]]) -> Reply | Failure:
        """Sends one request; returns what failed, if it can pass.

        Raises:
            RefusedError: It cannot, with this request.
            ConfigError: It cannot, with any.
        """
        config = self._config
        options: dict[str, Any] = {config.max_tokens_name: config.max_tokens}
        if config.temperature is not None:
            options["temperature"] = config.temperature
        deadline = time.monotonic() + config.timeout
        request: Any = self._client.chat.completions.with_streaming_response
        try:
            with request.create(model=config.model, messages=messages, **options) as response:
                body = _read_bytes(response, deadline)
        except self._openai.APIStatusError as error:
            status = error.status_code
            if status in REFUSED:
                raise RefusedError(self._hide(f"status {status}: {error}")) from None
            if status < 500 and status not in RETRIED:
                raise self._refused(error) from None
            wait = _retry_after(error.response.headers)
            return Failure(problem=f"status {status}", wait=wait, may_be_billed=status != 429)
        except self._openai.APIConnectionError as error:  # time-outs too
            was_sent = type(error.__cause__).__name__ not in UNSENT
            is_late = isinstance(error, self._openai.APITimeoutError)
            late = f"no reply within {config.timeout:g} s"
            problem = late if is_late else f"no connection ({error.__cause__ or error})"
            return Failure(problem=self._hide(problem), may_be_billed=was_sent)
        except TimeoutError:
            return Failure(problem=f"no end of the reply within {config.timeout:g} s")
        except Exception as error:  # whatever the transport raises in the middle of a body
            problem = f"the connection broke ({type(error).__name__}: {error})"
            return Failure(problem=self._hide(problem))
        # An endpoint may echo the key, and replies are stored.
        return read_body(body.replace(self._key.encode(), HIDDEN.encode()) if self._key else body)

    def _refused(self, error: APIStatusError) -> ConfigError:
        status = error.status_code
        return ConfigError(
            f"{self._config.base_url} answers with status {status}",
            why=self._hide(str(error)),
            fix=HINTS.get(status, "the endpoint's own documentation"),
            kept="replies so far are in cache.jsonl; the same command goes on with the rest",
        )

    def _hide(self, text: str) -> str:
        """Returns one printable line without the key, which an endpoint may echo."""
        text = text.replace(self._key, HIDDEN) if self._key else text
        return "".join(c if c.isprintable() else " " for c in redact(text))[:300]


def read_key(config: JudgeConfig) -> str:
    """Returns the key; empty if the endpoint needs none.

    Raises:
        ConfigError: The variable is not set, or holds what cannot be sent.
    """
    if config.api_key_env is None:
        return ""
    key = os.environ.get(config.api_key_env, "").strip()
    if key and key.isascii() and key.isprintable():
        return key
    raise ConfigError(
        redact(f"the environment variable {config.api_key_env} holds no key"),
        fix="export it, or --api_key_env null for an endpoint that asks for none",
    )


def _read_bytes(response: Any, deadline: float) -> bytes:
    """Returns the body; the client's own time limit is for each part of it, not for all.

    Raises:
        TimeoutError: The deadline has passed.
    """
    body = b""
    for part in response.iter_bytes():
        body += part
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(body) > LARGEST_BODY:
            break
    return body


def read_body(body: bytes) -> Reply:
    """Reads a chat completion; one that has no text says why in ``problem``."""
    if len(body) > LARGEST_BODY:
        return Reply(text="", problem=f"it has more than {LARGEST_BODY:,} bytes")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return Reply(text="", problem="the endpoint sent no JSON")
    match content:
        case {"choices": [{"message": {"content": str(text)}} as choice, *_]}:
            problem = ""
        case _:
            text, choice, problem = "", {}, "the endpoint sent no text of a chat completion"
    usage = content.get("usage") if isinstance(content, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        text=text,
        problem=problem,
        finish=str(choice.get("finish_reason", ""))[:40],
        model=str(content.get("model", ""))[:200] if isinstance(content, dict) else "",
        input_tokens=_tokens(usage.get("prompt_tokens")),
        output_tokens=_tokens(usage.get("completion_tokens")),
    )


def _tokens(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds that the endpoint asks to wait, given as such or as a date."""
    text = headers.get("retry-after", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None

"""Requests to the endpoint: tries, waits and what ends them."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
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
HINTS = {
    400: "the endpoint refuses the request: --max_tokens_name, --temperature null, or too long a "
    "prompt",
    401: "put a valid key into the variable that --api_key_env names",
    403: "put a key that may use this model into the variable that --api_key_env names",
    404: "check --base_url (it often ends in /v1) and --model",
}


class NoReplyError(Exception):
    """A request failed in all its tries; the text says how the last one did."""


class RequestsSpentError(Exception):
    """``max_requests`` were sent."""


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
        self._lock = threading.Lock()
        self._halted = threading.Event()
        self.num_sent = 0
        """Requests so far, tries included."""

    def halt(self) -> None:
        """Lets requests under way come to their end, and makes no further tries."""
        self._halted.set()

    def ask(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        """Returns the endpoint's reply, after as many tries as it takes.

        Raises:
            NoReplyError: The last try failed too, or the endpoint asks for too long a wait.
            RequestsSpentError: No further try is allowed.
            ConfigError: The endpoint refuses the key, the model or the request.
        """
        for attempt in range(self._config.retries + 1):
            self._count()
            failure = self._try(messages)
            if isinstance(failure, Reply):
                return failure
            problem, asked = failure
            if asked is not None and asked > self._config.max_wait:
                problem = f"{problem}, and the endpoint asks to wait {asked:.0f} s"
                break
            if attempt == self._config.retries or self._halted.wait(self._wait(attempt, asked)):
                break
        raise NoReplyError(problem)

    def _count(self) -> None:
        with self._lock:
            if self.num_sent == self._config.max_requests:
                raise RequestsSpentError
            self.num_sent += 1

    def _wait(self, attempt: int, asked: float | None) -> float:
        """Returns the seconds before the next try; the jitter keeps threads apart."""
        if asked is not None:
            return asked + random.uniform(0, self._config.wait)
        longest = min(self._config.max_wait, self._config.wait * 2**attempt)
        return random.uniform(longest / 2, longest)

    def _try(self, messages: Sequence[Mapping[str, str]]) -> Reply | tuple[str, float | None]:
        """Sends one request; returns what failed, and the wait that is asked for, if it can pass.

        Raises:
            ConfigError: It cannot.
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
            if status < 500 and status not in RETRIED:
                raise self._refused(error) from None
            return f"status {status}", _retry_after(error.response.headers)
        except self._openai.APITimeoutError:
            return f"no reply within {config.timeout:g} s", None
        except self._openai.APIConnectionError as error:
            return self._hide(f"no connection ({error.__cause__ or error})"), None
        except TimeoutError:
            return f"no end of the reply within {config.timeout:g} s", None
        except Exception as error:  # whatever the transport raises in the middle of a body
            return self._hide(f"the connection broke ({type(error).__name__}: {error})"), None
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
    return value if type(value) is int and value >= 0 else None


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

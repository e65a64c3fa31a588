"""Asks all questions, several at a time, within a budget; stops so that nothing paid is lost."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Context
from functools import partial

from distilllens.config import JudgeConfig
from distilllens.errors import ConfigError
from distilllens.evaluation.judge.cache import ReplyCache
from distilllens.evaluation.judge.client import Endpoint, NoReplyError, RefusedError, SpentError
from distilllens.evaluation.judge.questions import Conversation, Reply
from distilllens.runtime.signals import poll

TICK = 0.2
"""Seconds between looks at signals."""
PATIENCE = 3
"""Questions in a row without any reply, after which the endpoint is taken for dead."""
OVERHEAD_TOKENS = 100
"""Of a request's frame, at most; its text has no more tokens than bytes."""


@dataclass(kw_only=True)
class Ledger:
    """What this command's requests brought and cost; several threads may book."""

    config: JudgeConfig
    num_replies: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    num_uncounted: int = 0
    """Replies whose tokens the endpoint did not tell: they cost what they can at most."""
    num_lost: int = 0
    """Tries without a reply that may be billed; each costs what it can at most."""
    cost: float = 0.0
    reserved: dict[int, float] = field(default_factory=dict)
    """What each request under way, or its next try, can cost at most; by its conversation."""
    failures: list[str] = field(default_factory=list)
    """How the questions failed that got no reply."""
    failures_in_a_row: int = 0
    spent: str = ""
    """The limit that ended it; empty while there is none."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def settle(self, conversation: Conversation, reply: Reply) -> None:
        """Books a reply."""
        self.num_replies += 1
        self.failures_in_a_row = 0
        with self._lock:
            if reply.input_tokens is None or reply.output_tokens is None:
                self.num_uncounted += 1
                self.cost += highest_cost(self.config, conversation)
                return
            self.input_tokens += reply.input_tokens
            self.output_tokens += reply.output_tokens
            self.cost += token_cost(self.config, reply.input_tokens, reply.output_tokens)

    def reserve(self, conversation: Conversation) -> bool:
        """Sets aside what a request can cost, if ``max_cost`` allows it whatever comes."""
        possible = highest_cost(self.config, conversation)
        with self._lock:
            if not self._allows(possible):
                return False
            self.reserved[id(conversation)] = possible
            return True

    def release(self, conversation: Conversation) -> None:
        """Ends the reservation of a request that is over."""
        with self._lock:
            del self.reserved[id(conversation)]

    def lose(self, conversation: Conversation) -> bool:
        """Books a try without a reply; returns whether its reservation holds for another."""
        with self._lock:
            self.num_lost += 1
            self.cost += highest_cost(self.config, conversation)
            return self._allows(0.0)

    def _allows(self, more: float) -> bool:
        limit = self.config.max_cost
        return limit is None or self.cost + sum(self.reserved.values()) + more <= limit

    def describe(self) -> str:
        """Returns tokens and cost so far."""
        text = f"{self.input_tokens:,} + {self.output_tokens:,} tokens"
        return text if self.config.input_price is None else f"{text}, cost {self.cost:.4f}"


def token_cost(config: JudgeConfig, input_tokens: int, output_tokens: int) -> float:
    """Returns the price of tokens; 0 without prices."""
    prices = (config.input_price or 0.0, config.output_price or 0.0)
    return (input_tokens * prices[0] + output_tokens * prices[1]) / 1e6


def highest_cost(config: JudgeConfig, conversation: Conversation) -> float:
    """Returns what the next request of a conversation can cost at most."""
    size = len(json.dumps(conversation.messages, ensure_ascii=False).encode())
    return token_cost(config, size + OVERHEAD_TOKENS, config.max_tokens)


def ask_all(
    conversations: Sequence[Conversation],
    endpoint: Endpoint,
    cache: ReplyCache,
    ledger: Ledger,
    advance: Callable[[int], None],
) -> None:
    """Asks until every conversation is over, the budget is spent or the endpoint is dead.

    Args:
        conversations: Those that are not over.
        endpoint: Where to ask.
        cache: Gets each reply as soon as it is there.
        ledger: Gets counts, cost and failures.
        advance: Called with the number of conversations that have come to their end.

    Raises:
        ConfigError: The endpoint refuses all requests, or gives no reply to several in a row;
            ``max_cost`` does not allow a single one.
        StorageError: The cache cannot be written.
        Stopped: A signal ended it.
    """
    waiting = deque(conversations)
    under_way: dict[Future[Reply], Conversation] = {}
    config = ledger.config
    with ThreadPoolExecutor(config.concurrency, thread_name_prefix="judge") as pool:
        try:
            while waiting or under_way:
                while waiting and len(under_way) < config.concurrency and not ledger.spent:
                    if not ledger.reserve(waiting[0]):
                        break
                    conversation = waiting.popleft()
                    lose = partial(ledger.lose, conversation)
                    future = pool.submit(endpoint.ask, conversation.messages, lose)
                    under_way[future] = conversation
                if not under_way:
                    if not endpoint.num_sent:
                        raise _too_small(config, waiting)
                    ledger.spent = ledger.spent or f"max_cost={config.max_cost:g}"
                    return
                done, _ = wait(under_way, timeout=TICK, return_when=FIRST_COMPLETED)
                poll("judging; replies so far are kept")
                for future in done:
                    conversation = under_way.pop(future)
                    goes_on = _settle(conversation, future, cache, ledger)
                    ledger.release(conversation)
                    waiting.extendleft([conversation] * goes_on)
                    advance(not goes_on)
        except BaseException:
            endpoint.halt()
            _keep_the_rest(under_way, cache)
            raise


def _too_small(config: JudgeConfig, waiting: Iterable[Conversation]) -> ConfigError:
    most = max(highest_cost(config, conversation) for conversation in waiting)
    enough = Context(prec=2, rounding=ROUND_CEILING).create_decimal_from_float(most)
    return ConfigError(
        f"max_cost={config.max_cost:g} is less than one question can cost ({most:g})",
        why="a request counts as the bytes of its text plus max_tokens, until its reply is there",
        fix=f"--max_cost {enough}, or a smaller --max_tokens",
    )


def _settle(
    conversation: Conversation, future: Future[Reply], cache: ReplyCache, ledger: Ledger
) -> bool:
    """Books the outcome of one request; returns whether the conversation has to go on."""
    try:
        reply = future.result()
    except SpentError as error:
        ledger.spent = str(error)
        return False
    except NoReplyError as error:
        ledger.failures.append(str(error))
        if isinstance(error, RefusedError) and len(cache):
            return False  # an endpoint that has replied before refuses this prompt, not all
        ledger.failures_in_a_row += 1
        if ledger.failures_in_a_row == PATIENCE:
            raise ConfigError(
                f"{ledger.config.base_url} gave no reply to {PATIENCE} questions in a row",
                why=str(error),
                fix="check --base_url, or wait and try again; --retries, --max_wait and --timeout "
                "say how long to insist; for status 400, --max_tokens_name or --temperature null",
                kept="replies so far are in cache.jsonl; the same command goes on with the rest",
            ) from None
        return False
    cache.add(conversation.messages, reply)
    ledger.settle(conversation, reply)
    conversation.take(reply)
    return not conversation.is_over


def _keep_the_rest(under_way: dict[Future[Reply], Conversation], cache: ReplyCache) -> None:
    """Waits for requests under way, at most for their time limit: they are paid for."""
    wait(under_way)
    for future, conversation in under_way.items():
        if future.exception() is None:
            cache.add(conversation.messages, future.result())

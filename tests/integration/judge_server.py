"""An endpoint on loopback that misbehaves by script, and otherwise judges by a known rule."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Action:
    """What happens to one request."""

    text: str | None = None
    """The judge's words, in a body of the right form."""
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    sleep: float = 0.0
    """Seconds before the first byte."""
    drip: float = 0.0
    """Seconds between the body's bytes."""
    reset: bool = False
    """Break the connection instead."""


def texts(messages: list[dict[str, str]]) -> dict[str, str]:
    """Returns what stands between the tags of a question."""
    found = re.findall(r"<([a-z-]+)-([0-9a-f]{12})>\n(.*?)\n</\1-\2>", messages[0]["content"], re.S)
    return {name: text for name, _, text in found}


def longer_wins(messages: list[dict[str, str]]) -> Action:
    """The rule: the longer answer is better; an answer's score is its length."""
    parts = texts(messages)
    if "answer" in parts:
        return Action(text=f'Measured.\n{{"score": {len(parts["answer"])}}}')
    first, second = len(parts["first-answer"]), len(parts["second-answer"])
    word = "tie" if first == second else "first" if first > second else "second"
    return Action(text=f'Measured.\n{{"better": "{word}"}}')


Rule = Callable[[list[dict[str, str]]], Action]


class Server:
    """The endpoint; ``script`` holds the actions for the next requests, then the rule decides."""

    def __init__(self) -> None:
        self.rule: Rule = longer_wins
        self.script: list[Action] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.usage: dict[str, int] | None = {"prompt_tokens": 100, "completion_tokens": 10}
        self.most_at_once = 0
        self.on_request: Callable[[int], None] = lambda number: None
        self._now, self._lock = 0, threading.Lock()

    @property
    def count(self) -> int:
        return len(self.requests)

    def begin(self, body: dict[str, Any], headers: dict[str, str]) -> Action:
        with self._lock:
            self.requests.append(body)
            self.keys.append(headers.get("authorization", ""))
            self.headers.append(headers)
            self.times.append(time.monotonic())
            number = len(self.requests)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            action = self.script.pop(0) if self.script else self.rule(body["messages"])
        self.on_request(number)
        return action

    def end(self) -> None:
        with self._lock:
            self._now -= 1

    def body(self, action: Action) -> bytes:
        if action.body is not None:
            return action.body
        content: dict[str, Any] = {
            "id": "1",
            "object": "chat.completion",
            "model": "stub-1",
            "choices": [{"message": {"role": "assistant", "content": action.text or ""}}],
        }
        if self.usage is not None:
            content["usage"] = self.usage
        return json.dumps(content).encode()


@contextmanager
def running(server: Server) -> Iterator[str]:
    """Yields the address of the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            action = server.begin(json.loads(content), headers)
            time.sleep(action.sleep)
            server.end()  # before the reply: the client sends its next request when it has it
            with suppress(OSError):  # a client that has given up
                self.answer(action)

        def answer(self, action: Action) -> None:
            if action.reset:
                linger = struct.pack("ii", 1, 0)  # close with RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                self.connection.close()
                return
            body = server.body(action)
            self.send_response(action.status)
            for name, value in {"Content-Type": "application/json", **action.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            for byte in [bytes([b]) for b in body] if action.drip else [body]:
                self.wfile.write(byte)
                self.wfile.flush()
                time.sleep(action.drip)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/v1"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()

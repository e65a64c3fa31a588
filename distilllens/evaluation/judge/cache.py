"""Replies that were paid for, kept on disk: one JSON object a line, only ever appended.

The key of a reply is a hash of everything that decides it but the endpoint's address, so a cache
goes on when the same model moves to another host.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distilllens.config import JudgeConfig
from distilllens.errors import StorageError, unwritable
from distilllens.evaluation.judge.questions import PROMPT_VERSION, Conversation, Reply


class ReplyCache:
    """Replies by request.

    A line that a kill tore is ignored, and asked again; the others are as good as new.

    Args:
        file: Read if it is there; made at the first `add`.
        config: The judge's settings.

    Raises:
        StorageError: The file cannot be read.
    """

    def __init__(self, file: Path, config: JudgeConfig) -> None:
        self.file, self._settings = file, _settings(config)
        self._replies: dict[str, Reply] = {}
        self.num_torn = 0
        """Lines that could not be read."""
        try:
            content = file.read_bytes() if file.exists() else b""
        except OSError as error:
            raise _unwritable(file, error) from None
        self._ends_torn = bool(content) and not content.endswith(b"\n")
        for line in content.splitlines():
            self._read(line)

    def _read(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            key = record.pop("key")
            self._replies[key] = Reply(**record)
        except (ValueError, KeyError, TypeError, AttributeError):
            self.num_torn += bool(line.strip())

    def __len__(self) -> int:
        return len(self._replies)

    def key(self, messages: Sequence[dict[str, str]]) -> str:
        """Returns the name of a request."""
        content = json.dumps([self._settings, list(messages)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def replay(self, conversation: Conversation) -> None:
        """Leads a conversation on as far as its replies are known."""
        while not conversation.is_over:
            reply = self._replies.get(self.key(conversation.messages))
            if reply is None:
                return
            conversation.take(reply)

    def add(self, messages: Sequence[dict[str, str]], reply: Reply) -> None:
        """Keeps the reply to a request.

        Raises:
            StorageError: It cannot be written.
        """
        key = self.key(messages)
        line = json.dumps({"key": key, **asdict(reply)}, ensure_ascii=True) + "\n"
        try:
            with self.file.open("ab") as stream:
                stream.write(b"\n" * self._ends_torn + line.encode())
        except OSError as error:
            raise _unwritable(self.file, error) from None
        self._ends_torn = False
        self._replies[key] = reply


def _settings(config: JudgeConfig) -> dict[str, Any]:
    names = ("model", "temperature", "max_tokens")
    return {"prompt_version": PROMPT_VERSION, **{name: getattr(config, name) for name in names}}


def _unwritable(file: Path, error: OSError) -> StorageError:
    kept = "every reply that stands there"
    return unwritable(file, error, option="--output_dir", kept=kept)

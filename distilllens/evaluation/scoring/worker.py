"""The process that scores answers for another one; `pool` starts it.

Reads lines of JSON, ``[key, answer, references]``, and writes ``[key, rougeL, exact_match]`` for
each; for one that it cannot score, ``{"error": traceback}``, its last. It ends when its input does,
so it outlives nobody, however the other process ended. It loads neither torch nor transformers.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback

from distilllens.evaluation.rouge import exact_match, rouge_l_max


def main() -> int:
    """Scores until the input ends; returns the exit code."""
    # A scheduler signals every process; the one that started this one decides when it ends.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    for line in sys.stdin:
        try:
            key, answer, references = json.loads(line)
            reply = [key, rouge_l_max(answer, references), exact_match(answer, references)]
        except Exception:
            print(json.dumps({"error": traceback.format_exc()}), flush=True)
            return 1
        print(json.dumps(reply), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

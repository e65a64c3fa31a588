"""`python -m distilllens cache-teacher`: the teacher's hidden states, stored once."""

from __future__ import annotations

from collections.abc import Sequence

from distilllens.config import load_config
from distilllens.errors import EXIT_OK
from distilllens.runs import shown_command

ABOUT = (
    "Store the teacher's hidden states once, for trainings that then read them instead of running "
    "it. Takes the options of such a training and reads its model, data, objective (the layer "
    "pairs), eval.dev_size, optim.micro_batch_size and deepspeed (the precision); writes shards "
    "of rows, head.safetensors and manifest.json into model.teacher_cache."
)


def cache_teacher_main(argv: Sequence[str]) -> int:
    """Caches as the arguments say; returns 0.

    Raises:
        UserError: As `load_config` and `cache_teacher`.
    """
    config = load_config(argv, prog="python -m distilllens cache-teacher", about=ABOUT)
    # Late: torch and transformers take seconds, which help and typos need not wait for.
    from distilllens.commands.cache_teacher import cache_teacher
    from distilllens.runtime import distributed
    from distilllens.runtime.libraries import quiet_libraries
    from distilllens.runtime.signals import StopRequest

    quiet_libraries()
    command = shown_command(["python", "-m", "distilllens", "cache-teacher", *argv])
    cache_teacher(config, distributed.initialize(), StopRequest(resume_command=command))
    distributed.shutdown()
    return EXIT_OK

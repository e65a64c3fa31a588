"""How the libraries around us behave; import it before what loads DeepSpeed."""

from __future__ import annotations

import logging
import os
import warnings

import torch

if not torch.cuda.is_available():  # else DeepSpeed looks for every accelerator and warns
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def quiet_libraries() -> None:
    """Keeps the libraries' chatter off the screen; errors still come through."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="deepspeed")

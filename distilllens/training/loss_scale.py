"""float16: DeepSpeed multiplies the loss so that small gradients survive, and skips what overflows.

A skipped step counts as a step: its records are used up, and the learning rate goes on. The scale
is halved after two overflows, and doubled after a thousand steps without one.
"""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator

from distilllens.errors import ConfigError, NumericsError

DEEPSPEED_SAYS = "Current loss scale already at minimum"
"""Begin of the message of a plain Exception; DeepSpeed has no class of its own for it."""


def check_float16_runs() -> None:
    """Refuses a device that has no float16.

    Raises:
        ConfigError: It has none: most CPUs.
    """
    accelerator = get_accelerator()
    if not accelerator.is_fp16_supported():
        raise ConfigError(
            f"float16 does not run on this {accelerator.device_name()}",
            why="DeepSpeed finds no float16 arithmetic on it",
            fix="use a bf16 or fp32 file of configs/deepspeed/",
        )


def is_at_smallest_scale(error: Exception) -> bool:
    """Whether DeepSpeed gave up because gradients overflow at the smallest scale too."""
    return str(error).startswith(DEEPSPEED_SAYS)


def smallest_scale_error(step: int, *, kept: str) -> NumericsError:
    """Says so to the user.

    Args:
        step: Whose gradients overflowed.
        kept: What of the run is safe.
    """
    return NumericsError(
        f"gradients overflow float16 at step {step}, even at the smallest loss scale",
        why="each overflow halved the scale, and it is at fp16.min_loss_scale now; the update was "
        "not made",
        fix="a bf16 DeepSpeed file, which needs no scale; or lower --optim.lr, or add "
        "--optim.warmup",
        kept=kept,
    )

"""Which device the lens pages compute on."""

from __future__ import annotations

import torch

from distilllens.errors import ConfigError


def usable_device(name: str | None) -> str:
    """Returns the device of ``--device``; None: a GPU if there is one, else the CPU.

    Raises:
        ConfigError: This machine, or this build of torch, has no such device.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"--device {name} cannot be used", why=first_line) from None
    return name

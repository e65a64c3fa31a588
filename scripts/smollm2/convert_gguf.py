"""Converts a GGUF file into a Hugging Face folder: python convert_gguf.py FILE.gguf FOLDER."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(file: Path, folder: Path) -> None:
    """Writes ``folder`` with float32 safetensors and the tokenizer, whole or not at all.

    Args:
        file: Quantised weights; the values that the quantisation left are what is written.
        folder: A folder that is not there yet.
    """
    source, name = str(file.parent), file.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / folder.name
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.rename(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))

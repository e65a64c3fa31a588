"""The Alpaca prompt, the one template of training and evaluation."""

from __future__ import annotations

WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Returns the prompt of an instruction, with an input section if ``input`` is not empty.

    Both texts are put in as they are, nothing is stripped: that is how the published data sets
    were made (their ``prompt`` field), and so what published scores were measured with.
    """
    if not input:
        return WITHOUT_INPUT.format(instruction=instruction)
    return WITH_INPUT.format(instruction=instruction, input=input)

"""The Alpaca prompt, the one template of training and evaluation."""

from __future__ import annotations

import json

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


def chat_template(prefix: str = "") -> str:
    """Returns the same prompt as a Jinja template, for exported tokenizers.

    One user message is the instruction. With a system message before it, that one is the
    instruction and the user's the input, as the records have it. Anything else is refused: the
    model never saw a second turn.

    Args:
        prefix: Special tokens that the tokenizer puts before a text, as BOS: chats are tokenised
            without them.
    """
    before, _, after = (json.dumps(part) for part in WITHOUT_INPUT.partition("{instruction}"))
    first, _, rest = WITH_INPUT.partition("{instruction}")
    second, _, third = rest.partition("{input}")
    with_input = [json.dumps(part) for part in (first, second, third)]
    return (
        "{%- set roles = messages | map(attribute='role') | list -%}"
        "{%- if roles not in [['user'], ['system', 'user']] -%}"
        "{{- raise_exception('This model was trained on single prompts: give one user message, '"
        " 'or a system message (the instruction) and a user message (its input).') -}}"
        "{%- endif -%}"
        "{%- for message in messages -%}{%- if message['content'] is not string -%}"
        "{{- raise_exception('The content of a message must be a text.') -}}"
        "{%- endif -%}{%- endfor -%}"
        "{%- set last = messages[-1]['content'] -%}"
        "{%- set system = messages[0]['content'] if roles | length == 2 else '' -%}"
        f"{{{{- {json.dumps(prefix)} -}}}}"
        "{%- if system and last -%}"
        f"{{{{- {with_input[0]} + system + {with_input[1]} + last + {with_input[2]} -}}}}"
        "{%- else -%}"
        f"{{{{- {before} + (system or last) + {after} -}}}}"
        "{%- endif -%}"
    )

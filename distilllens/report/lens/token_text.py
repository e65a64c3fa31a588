"""Tokens as text that can be seen: white space, control characters and parts of characters shown.

A token is a piece of bytes. It may be a line break, half an emoji, or an order to write from right
to left; a map must show all of them as themselves, in one line, and never obey them.
"""

from __future__ import annotations

import re
import unicodedata

from transformers import PreTrainedTokenizerBase

SPACE, LINE_BREAK, TAB = "·", "⏎", "⇥"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How SentencePiece writes a single byte."""
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories without a shape of their own: control, format (also right-to-left overrides),
surrogates, private, unassigned, line and paragraph separators."""


class TokenText:
    """The shown form of a tokenizer's tokens.

    Args:
        tokenizer: Byte-level BPE, SentencePiece or any other.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.special = set(tokenizer.all_special_ids)
        self.known: dict[int, str] = {}

    def __call__(self, index: int) -> str:
        """Returns a token's shown form, never empty; a padding id without a token is ‹id 123›."""
        if index not in self.known:
            self.known[index] = self._shown(index)
        return self.known[index]

    def _shown(self, index: int) -> str:
        raw = self.tokenizer.convert_ids_to_tokens([index])[0]
        if raw is None:
            return f"‹id {index}›"
        if index in self.special:
            return visible(raw)
        text = str(self.tokenizer.decode([index], clean_up_tokenization_spaces=False))
        if "\ufffd" in text and (shown := _bytes_of(raw)):
            return shown
        if raw.startswith("▁") and not text.startswith(" "):
            text = " " + text  # SentencePiece's decoder strips the space of a first token
        return visible(text) or f"‹id {index}›"


def visible(text: str) -> str:
    """Returns a text with its white space and invisible characters shown.

    Spaces become ·, line breaks ⏎, tabs ⇥; control and format characters their number, ‹202E›.
    The joiners that build some emoji are format characters too: such an emoji falls into parts.
    """
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    known = {" ": SPACE, "\n": LINE_BREAK, "\t": TAB}.get(character)
    if known is not None:
        return known
    category = unicodedata.category(character)
    if category in HIDDEN or (category == "Zs"):
        return f"‹{ord(character):04X}›"
    if unicodedata.combining(character):
        return "◌" + character  # an accent alone needs something to stand on
    return character


def _bytes_of(raw: str) -> str:
    """Returns the bytes of a token that is no whole character, as ‹F0 9F›; empty if unknown."""
    if match := BYTE_TOKEN.fullmatch(raw):
        return f"‹{match.group(1).upper()}›"
    if all(character in BYTE_OF for character in raw):
        return "‹" + " ".join(f"{BYTE_OF[character]:02X}" for character in raw) + "›"
    return ""


def _byte_alphabet() -> dict[str, int]:
    """Returns which byte each character of byte-level BPE stands for (Radford et al. 2019).

    Printable bytes stand for themselves, the 68 others for the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + number): byte for number, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()

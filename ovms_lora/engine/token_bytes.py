"""What bytes one token of a vocabulary stands for: its text may be a part of a character, its bytes are exact.

Owns the three ways in which vocabularies write bytes. Knows no tokenizer.
"""

from __future__ import annotations

import re
from functools import cache

_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def byte_level_bytes(piece: str) -> bytes:
    """Return the bytes of a piece in GPT-2's alphabet, which has a printable stand-in for each byte."""
    alphabet = _byte_of_letter()
    return b"".join(bytes([alphabet[letter]]) if letter in alphabet else letter.encode() for letter in piece)


def decoded_byte_level(piece: str) -> bytes:
    """Return what a byte-level decoder makes of a piece; with a letter outside of the alphabet it stands for itself."""
    alphabet = _byte_of_letter()
    try:
        return bytes([alphabet[letter] for letter in piece])
    except KeyError:
        return piece.encode()


def sentencepiece_bytes(piece: str) -> bytes:
    """Return the bytes of a piece that writes a space as `▁`, and a byte outside of the vocabulary as `<0x0A>`."""
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()


@cache
def _byte_of_letter() -> dict[str, int]:
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(256, 512))
    return {chr(byte if byte in printable else next(stand_ins)): byte for byte in range(256)}

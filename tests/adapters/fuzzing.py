"""Mutates adapter folders with a seed, loads them, and holds them to what is promised of hostile ones.

The corpus (`corpus/*.json`) are folders as {file name: content in latin-1}: good ones, and whatever once broke a
promise. Run as a program it goes on for as long as it is told: `python -m tests.adapters.fuzzing SECONDS [SEED]`.
"""

from __future__ import annotations

import json
import random
import re
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ovms_lora.adapters.adapter import load_adapter
from ovms_lora.adapters.peft_config import CONFIG_NAME
from ovms_lora.adapters.safetensors_file import WEIGHTS_NAME
from ovms_lora.core.errors import AdapterError
from tests.adapters.adapter_files import tiny_base
from tests.processor_time import uncollected

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 0.1
BYTES = 32 << 20

Folder = dict[str, bytes]
Mutation = Callable[[bytes, random.Random], bytes]

_TOKENS = (
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b"0"),
    *(b"9" * 400, b"18446744073709551616", b"\x00", b"\xff\xfe", b"\\u0000", b"\\ud800", b'"r":0,', b"[" * 2000),
    *(
        b'"F64"',
        b'"I8"',
        b"[2,8]",
        b"[8,2]",
        b"[2147483648,8]",
        b"(a+)+$",
        b".*" * 40,
        b"(?=a)",
        b"[[:x:]]",
        b"a{9999}",
    ),
)
_NUMBER = re.compile(rb"-?\d+")


def corpus() -> dict[str, Folder]:
    """Return the folders of the corpus by name."""
    documents = {path.stem: json.loads(path.read_text()) for path in sorted(CORPUS.glob("*.json"))}
    return {name: {file: text.encode("latin-1") for file, text in folder.items()} for name, folder in documents.items()}


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(_TOKENS) + data[at + rng.choice([0, 0, 1, 4]) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    piece = data[at : at + rng.randrange(1, 60)]
    return data[:at] + piece * rng.choice([2, 10, 3000]) + data[at:]


def _number(data: bytes, rng: random.Random) -> bytes:
    found = list(_NUMBER.finditer(data))
    if not found:
        return data
    place = rng.choice(found)
    value = int(place[0][:18])
    new = rng.choice([0, -1, value + 1, value - 1, value * 2, 1 << 31, 1 << 63, rng.randrange(100)])
    return data[: place.start()] + str(new).encode() + data[place.end() :]


def _length(data: bytes, rng: random.Random) -> bytes:
    return (
        struct.pack("<Q", rng.choice([0, 1, len(data) - 8, len(data), 1 << 40, rng.randrange(4096)]) % (1 << 64))
        + data[8:]
    )


def _true_length(data: bytes, _: random.Random) -> bytes:
    """Make the first eight bytes the length of the header again, as far as braces tell it."""
    end = data.rfind(b"}}") + 2
    return struct.pack("<Q", max(end - 8, 0)) + data[8:]


_MUTATIONS: tuple[Mutation, ...] = (_cut, _flip, _insert, _insert, _repeat, _number, _number)
_OF_WEIGHTS: tuple[Mutation, ...] = (_length, _true_length, _true_length, _true_length)


def mutated(folder: Folder, rng: random.Random) -> Folder:
    """Return a folder with one to four changes."""
    changed = dict(folder)
    for _ in range(rng.randrange(1, 5)):
        name = rng.choice(sorted(changed))
        changed[name] = rng.choice(_MUTATIONS)(changed[name], rng)
        if name == WEIGHTS_NAME and rng.random() < 0.7:
            changed[name] = rng.choice(_OF_WEIGHTS)(changed[name], rng)
    return changed


@uncollected()
def violation(folder: Folder, place: Path) -> str | None:
    """Load a folder; return which promise it breaks, if any does: typed errors, at once, in little memory."""
    for name in {CONFIG_NAME, WEIGHTS_NAME, "tokenizer_config.json", "chat_template.jinja"} - folder.keys():
        (place / name).unlink(missing_ok=True)
    for name, data in folder.items():
        (place / name).write_bytes(data)
    begun = time.thread_time()
    try:
        adapter = load_adapter(place, tiny_base(), max_lora_rank=64, lora_dtype=np.float32)
    except AdapterError as error:
        if not error.message.isprintable() or len(error.message) > 1000:
            return f"a message that is not fit to be shown: {error.message[:200]!r}"
    except Exception as error:  # noqa: BLE001 - what must not happen
        return f"an untyped {type(error).__name__}: {error}"
    else:
        if not all(np.isfinite(pair.a).all() and np.isfinite(pair.b).all() for pair in adapter.layers.values()):
            return "values that are not finite"
    seconds = time.thread_time() - begun
    return f"{seconds:.3f} s of processor time" if seconds > SECONDS else None


def folders(seed: int) -> Iterator[tuple[str, Folder]]:
    """Return mutated folders without end, each with what it was made of."""
    rng, seeds = random.Random(seed), corpus()
    while True:
        name = rng.choice(sorted(seeds))
        yield name, mutated(seeds[name], rng)


def fuzz(seconds: float, seed: int, place: Path) -> tuple[int, list[tuple[str, Folder]]]:
    """Return how many folders were tried in so many seconds of the processor, and those that broke a promise."""
    until, tried, found = time.thread_time() + seconds, 0, []
    tracemalloc.start()
    try:
        for name, folder in folders(seed):
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            broken = violation(folder, place)
            _, peak = tracemalloc.get_traced_memory()
            if broken is None and peak - before > BYTES:
                broken = f"{(peak - before) >> 20} MiB of memory"
            tried += 1
            if broken:
                found.append((f"{name}: {broken}", folder))
            if time.thread_time() > until:
                return tried, found
    finally:
        tracemalloc.stop()
    raise AssertionError("there is always another folder")


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        count, bad = fuzz(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns(), Path(scratch))
    for what, content in bad:
        print(what, json.dumps({name: data.decode("latin-1") for name, data in content.items()}))
    print(f"{count} folders, {len(bad)} broke a promise")
    sys.exit(bool(bad))

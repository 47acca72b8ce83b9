"""The tokenizer of a GGUF file, rebuilt from the file's own tokens, merges, scores and token types.

Owns: which `tokenizer.ggml.*` entry means what, and the checks that the tokenizer built from them gives texts back.
Does not know: weights, folders, or where the metadata came from.

A model whose tokenizer is not known here is refused by name: a tokenizer that is almost right gives answers that are
almost right, which is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ovms_lora.core.errors import ExportError

# The split rules are those that the original tokenizers publish in their tokenizer.json.
_WORDS_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's rules for a file whose converter did not recognise the tokenizer.
_WORDS_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _WORDS_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

_GPT2_LIKE = frozenset({"gpt-2", "gpt2", "olmo", "jais", "phi-2"})
_DIGITS_FIRST = frozenset({"smollm", "starcoder", "refact", "codeshell"})
_LLAMA3_LIKE = frozenset({"llama-bpe", "llama3", "llama-v3"})
_QWEN2_LIKE = frozenset({"qwen2", "deepseek-r1-qwen"})

_ROUND_TRIP_TEXTS = (
    "Hello, world! It's 3.14 or 1234567, isn't it?",
    "two  spaces,\ttabs\nand\n\n  new lines \n",
    "Größe, naïve, Ελληνικά, 中文字符, العربية, 🙂👍🏽",
    'def f(x): return {"a": [x ** 2, None]}  # code',
)


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type` as the GGUF specification numbers it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a GGUF file says about its tokenizer; ids are positions in `tokens`."""

    model: str
    pre: str | None
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float] | None
    merges: Sequence[str] | None
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    padding_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Vocabulary:
        """Read the `tokenizer.ggml.*` entries.

        Raises ExportError when there is no tokenizer, or when an id points outside of it.
        """
        entries = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
        if "model" not in entries or "tokens" not in entries:
            raise ExportError("the GGUF file carries no tokenizer (tokenizer.ggml.model and .tokens)")
        tokens, model, pre = entries["tokens"], entries["model"], entries.get("pre")
        # llama.cpp's defaults, for files that do not say it.
        bos_by_default = model == "llama" or pre in _LLAMA3_LIKE
        vocabulary = cls(
            model=model,
            pre=pre,
            tokens=tokens,
            types=entries.get("token_type") or [TokenType.NORMAL] * len(tokens),
            scores=entries.get("scores"),
            merges=entries.get("merges"),
            bos_id=entries.get("bos_token_id"),
            eos_id=entries.get("eos_token_id"),
            unknown_id=entries.get("unknown_token_id"),
            padding_id=entries.get("padding_token_id"),
            add_bos=entries.get("add_bos_token", bos_by_default),
            add_eos=entries.get("add_eos_token", False),
            add_space_prefix=entries.get("add_space_prefix", True),
        )
        vocabulary._check()
        return vocabulary

    def token(self, token_id: int | None) -> str | None:
        """Return the text of a token id, None for None."""
        return None if token_id is None else self.tokens[token_id]

    def of_type(self, *types: TokenType) -> list[int]:
        """Return the ids of all tokens of these types, in order."""
        return [token_id for token_id, token_type in enumerate(self.types) if token_type in types]

    def _check(self) -> None:
        if len(self.types) != len(self.tokens):
            raise ExportError(f"the GGUF file has {len(self.tokens)} tokens but {len(self.types)} token types")
        for name in ("bos_id", "eos_id", "unknown_id", "padding_id"):
            token_id = getattr(self, name)
            if token_id is not None and not 0 <= token_id < len(self.tokens):
                raise ExportError(f"the GGUF file's {name} {token_id} is not one of its {len(self.tokens)} tokens")
        if (self.add_bos and self.bos_id is None) or (self.add_eos and self.eos_id is None):
            raise ExportError("the GGUF file asks for a BOS or EOS token that it does not name")


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Build the tokenizer that the vocabulary describes, and check that it gives texts back.

    Raises ExportError for a tokenizer model or pre-tokenizer that is not known, or when the check fails.
    """
    if vocabulary.model == "gpt2":
        tokenizer = _byte_level_bpe(vocabulary)
    elif vocabulary.model == "llama":
        tokenizer = _sentencepiece_bpe(vocabulary)
    else:
        raise ExportError(
            f"GGUF tokenizer model {vocabulary.model!r} is not supported",
            hint="known are gpt2 (byte-level BPE) and llama (SentencePiece BPE); use the model's Hugging Face folder",
        )
    _add_tokens(tokenizer, vocabulary)
    _add_bos_and_eos(tokenizer, vocabulary)
    check_round_trip(tokenizer, vocabulary)
    return tokenizer


def check_round_trip(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Raise ExportError unless texts and special tokens survive encode and decode."""
    for text in _ROUND_TRIP_TEXTS:
        back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        if back != text:
            raise ExportError(f"the tokenizer built from the GGUF file is wrong: {text!r} came back as {back!r}")
    for token_id in vocabulary.of_type(TokenType.CONTROL, TokenType.USER_DEFINED):
        token = vocabulary.tokens[token_id]
        ids = tokenizer.encode(token, add_special_tokens=False).ids
        if ids != [token_id]:
            raise ExportError(f"the tokenizer built from the GGUF file splits the token {token!r} into {ids}")


def _byte_level_bpe(vocabulary: Vocabulary) -> Tokenizer:
    if vocabulary.merges is None:
        raise ExportError("the GGUF file has a byte-level BPE tokenizer without tokenizer.ggml.merges")
    splits = _pre_tokenizer(vocabulary.pre)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(vocabulary.tokens)},
            merges=[_merge_pair(merge) for merge in vocabulary.merges],
            ignore_merges=vocabulary.pre in _LLAMA3_LIKE,
        )
    )
    if vocabulary.pre in _QWEN2_LIKE:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splits
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merge_pair(merge: str) -> tuple[str, str]:
    # From the second character on: the left part may itself begin with the separator.
    cut = merge.find(" ", 1)
    if cut < 0:
        raise ExportError(f"the GGUF file has a malformed BPE merge: {merge!r}")
    return merge[:cut], merge[cut + 1 :]


def _pre_tokenizer(pre: str | None) -> pre_tokenizers.PreTokenizer:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _GPT2_LIKE:
        return gpt2
    if pre in _DIGITS_FIRST:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if pre in _LLAMA3_LIKE:
        return _split_by(_WORDS_MODERN.format(digits="{1,3}"))
    if pre in _QWEN2_LIKE:
        return _split_by(_WORDS_MODERN.format(digits=""))
    if pre == "default":
        return _split_by(*_WORDS_DEFAULT)
    raise ExportError(
        "the GGUF file does not name its pre-tokenizer (tokenizer.ggml.pre)"
        if pre is None
        else f"GGUF pre-tokenizer {pre!r} is not supported",
        hint="use the model's Hugging Face folder instead of the GGUF file",
    )


def _split_by(*patterns: str) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece_bpe(vocabulary: Vocabulary) -> Tokenizer:
    if vocabulary.scores is None or len(vocabulary.scores) != len(vocabulary.tokens):
        raise ExportError("the GGUF file has a SentencePiece tokenizer without a score for each token")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(vocabulary.tokens)},
            merges=_merges_from_scores(vocabulary),
            unk_token=vocabulary.token(vocabulary.unknown_id),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    blanks = normalizers.Replace(" ", "▁")
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = blanks
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _merges_from_scores(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return the merges that give SentencePiece's order: of two possible merges, the one of the better score."""
    assert vocabulary.scores is not None
    pieces = {vocabulary.tokens[token_id]: token_id for token_id in vocabulary.of_type(TokenType.NORMAL)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, token_id in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                ranked.append((-vocabulary.scores[token_id], pieces[left], pieces[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    special = set(vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN))
    special |= {token_id for token_id in (vocabulary.bos_id, vocabulary.eos_id) if token_id is not None}
    tokenizer.add_special_tokens(
        [AddedToken(vocabulary.tokens[token_id], special=True, normalized=False) for token_id in sorted(special)]
    )
    tokenizer.add_tokens(
        [
            AddedToken(vocabulary.tokens[token_id], special=False, normalized=False)
            for token_id in vocabulary.of_type(TokenType.USER_DEFINED)
            if token_id not in special
        ]
    )


def _add_bos_and_eos(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    bos = [vocabulary.tokens[vocabulary.bos_id]] if vocabulary.add_bos and vocabulary.bos_id is not None else []
    eos = [vocabulary.tokens[vocabulary.eos_id]] if vocabulary.add_eos and vocabulary.eos_id is not None else []
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, *bos, "$B", *eos],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in sorted({*bos, *eos})],
        )

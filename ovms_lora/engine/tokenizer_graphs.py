"""The graphs openvino_tokenizer.xml and openvino_detokenizer.xml of a model folder, changed into what serving needs.

OpenVINO's converter writes a tokenizer as two graphs. As they stand they take and give string tensors (which Python
sees without trailing NULs), always add the special tokens, and may cut long texts. Owns these changes:

    text bytes ──► [SpecialTokensSplit ──► … ──► BPETokenizer] ──► Truncate ──► CombineSegments ──► ids of one row
                   └ inert: no pattern                           └ never        └ plain: adds nothing
    ids ──► VocabDecoder ──► … ──► text bytes
            └ skips the special tokens, or none

The operations are those of the openvino-tokenizers package. Runs nothing.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13
from openvino.utils.node_factory import NodeFactory

from ovms_lora.core.errors import ModelFolderError
from ovms_lora.engine.device import openvino_core

ENCODER_NAME = "openvino_tokenizer.xml"
DECODER_NAME = "openvino_detokenizer.xml"

_PACKAGE = "openvino_tokenizers"
_HINT = "export the tokenizer again, or put tokenizer.json into the folder"
_NO_LIMIT = 2_000_000_000
_BPE_INPUTS_WITH_ADDED_TOKENS = 18
_DECODER_INPUTS_WITH_SKIPPED = 5
_NOTHING = "((?!))"  # a pattern with one group, as the operation wants it, that matches nowhere
# One group of added tokens in the pattern, with or without the white space that they take away.
_GROUP = re.compile(r"((?:\(\?:\\s\*\))?)\(((?:\\.|[^()\\])*)\)((?:\(\?:\\s\*\))?)", re.DOTALL)
_ALTERNATIVE = re.compile(r"(?:\\.|[^|\\])+", re.DOTALL)
# What the converter makes of "split off digits, then split by GPT-2's pattern" (SmolLM2, StarCoder), and what is that:
# white space before a digit stays together, since the second step no longer sees the digit.
_GPT2_AND_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS_THEN_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


@dataclass(frozen=True, slots=True)
class TokenizerGraphs:
    """Both graphs of a folder as read; each method returns a changed copy."""

    encoder: ov.Model
    decoder: ov.Model

    @classmethod
    def from_folder(cls, folder: Path) -> TokenizerGraphs:
        """Read the graphs. Raises ModelFolderError when one is missing, broken, or of a kind that is not known."""
        graphs = cls(_read(folder / ENCODER_NAME), _read(folder / DECODER_NAME))
        for model, name, operations in (
            (graphs.encoder, ENCODER_NAME, ("StringTensorUnpack", "RaggedToDense")),
            (graphs.decoder, DECODER_NAME, ("VocabDecoder", "StringTensorPack")),
        ):
            for operation in operations:
                if len(_all(model, operation)) != 1:
                    raise ModelFolderError(
                        f"{folder / name} has not one {operation}: it is of no known kind", hint=_HINT
                    )
        return graphs

    def vocabulary(self) -> tuple[bytes, ...]:
        """Return the pieces by token id, added tokens included, as the decoder has them. Raises ModelFolderError."""
        _, begins, ends, letters, *_ = self._decoder_inputs()
        data = _constant(letters).tobytes()
        pairs = zip(_constant(begins).tolist(), _constant(ends).tolist(), strict=True)
        return tuple(data[begin:end] for begin, end in pairs)

    def special_ids(self) -> frozenset[int]:
        """Return the ids that are no part of a text."""
        *_, skipped = inputs = self._decoder_inputs()
        if len(inputs) == _DECODER_INPUTS_WITH_SKIPPED:
            return frozenset(_constant(skipped).tolist())
        return frozenset(_one(self.decoder, "VocabDecoder").get_attributes()["skip_tokens"])

    def _decoder_inputs(self) -> list[ov.Output]:
        inputs = _inputs(_one(self.decoder, "VocabDecoder"))
        if len(inputs) not in (_DECODER_INPUTS_WITH_SKIPPED - 1, _DECODER_INPUTS_WITH_SKIPPED):
            raise ModelFolderError(f"{DECODER_NAME} is of an older kind: it packs its vocabulary", hint=_HINT)
        return inputs

    @property
    def joins_pieces(self) -> bool:
        """Whether decoding is nothing but the pieces' bytes one after another."""
        plain = {"Parameter", "Constant", "Convert", "VocabDecoder", "FuzeRagged", "UTF8Validate", "StringTensorPack"}
        return {operation.get_type_name() for operation in self.decoder.get_ordered_ops()} <= plain | {"Result"}

    @property
    def falls_back_to_bytes(self) -> bool:
        """Whether pieces such as `<0x0A>` are bytes."""
        return bool(_all(self.decoder, "ByteFallback"))

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the encoder adds tokens that do not stand in the text."""
        return bool(_added_segments(self.encoder))

    def text_encoder(self, *, add_special_tokens: bool, inert: bool = False) -> ov.Model:
        """Return a graph from (begins i32[1], ends i32[1], bytes u8[N]) to (begins, ends, ids) of one row.

        `inert` leaves special tokens that stand in the text to be encoded as any other text.
        """
        model = self.encoder.clone()
        if not add_special_tokens:
            for operation, at in _added_segments(model):
                operation.input(at + 1).replace_source_output(operation.input_value(at))
        if inert:
            self._make_inert(model)
        _split_digits_first(model)
        _never_cut(model)
        return ov.Model(_inputs(_one(model, "RaggedToDense"))[:3], _bytes_in(model), "text_encoder")

    def text_decoder(self, *, skip_special_tokens: bool) -> ov.Model:
        """Return a graph from ids i64[1, N] to (begins, ends, bytes) of one text, which may be no valid UTF-8."""
        model = self.decoder.clone()
        decoder, pack = _one(model, "VocabDecoder"), _one(model, "StringTensorPack")
        if not skip_special_tokens:
            nothing = opset13.constant(np.array([], np.int32)).output(0)
            _replace(decoder, [*_inputs(decoder)[: _DECODER_INPUTS_WITH_SKIPPED - 1], nothing], skip_tokens=[])
        last = pack.input_value(0).get_node()
        text = last if last.get_type_name() == "UTF8Validate" else pack
        return ov.Model(_inputs(text)[:3], model.get_parameters(), "text_decoder")

    def _make_inert(self, model: ov.Model) -> None:
        """Take the special tokens out of the pattern and of what is looked up by name; other added tokens stay."""
        vocabulary, special_ids = self.vocabulary(), self.special_ids()
        special = {vocabulary[token_id].decode() for token_id in special_ids}
        for operation in _all(model, "SpecialTokensSplit"):
            _set_pattern(operation, without_tokens(_pattern(operation), special))
        for operation in _all(model, "BPETokenizer"):
            unknown = operation.get_attributes()["unk_token"].encode()  # looked up by its name
            hidden = [token_id for token_id in special_ids if vocabulary[token_id] != unknown]
            _replace(operation, _without_names(_inputs(operation), hidden))


def without_tokens(pattern: str, tokens: set[str]) -> str:
    """Return a pattern of added tokens, `(\\<a\\>|\\<b\\>)|(…)`, without some of them."""
    groups = []
    for before, body, after in _GROUP.findall(pattern):
        kept = [each for each in _ALTERNATIVE.findall(body) if re.sub(r"\\(.)", r"\1", each) not in tokens]
        if kept:
            groups.append(f"{before}({'|'.join(kept)}){after}")
    return "|".join(groups) or _NOTHING


def _without_names(inputs: list[ov.Output], token_ids: list[int]) -> list[ov.Output]:
    """Return the inputs of a BPETokenizer that finds these tokens under no name."""
    inputs = list(inputs)
    begins, ends = (_constant(value).copy() for value in inputs[5:7])
    ends[token_ids] = begins[token_ids]
    inputs[6] = opset13.constant(ends).output(0)
    if len(inputs) == _BPE_INPUTS_WITH_ADDED_TOKENS:
        kept = ~np.isin(_constant(inputs[-1]), token_ids)
        for at in (-4, -3, -1):  # begins, ends, ids; at -2 are the letters, which may hold more
            inputs[at] = opset13.constant(_constant(inputs[at])[kept]).output(0)
    return inputs


def _library() -> Path:
    """Return the library of the package openvino-tokenizers. Raises ModelFolderError when it is not installed."""
    # The package itself is not imported: it would replace methods of openvino.
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    library = next((path for folder in folders for path in (folder / "lib").glob(f"*{_PACKAGE}.*")), None)
    if library is None:
        raise ModelFolderError(
            "a model without tokenizer.json needs the package openvino-tokenizers",
            hint="install it in the version of openvino, or put tokenizer.json into the folder",
        )
    return library


@cache
def _operations() -> NodeFactory:
    """Make the tokenizers' operations known to the process's Core, and return what makes new ones.

    Raises ModelFolderError when openvino-tokenizers does not fit the installed openvino.
    """
    library, hint = _library(), "install openvino-tokenizers of the version of openvino"
    factory = NodeFactory()
    try:
        openvino_core().add_extension(str(library))
        factory.add_extension(library)
    except RuntimeError as error:
        raise ModelFolderError("openvino-tokenizers does not fit the installed openvino", hint=hint) from error
    return factory


def _read(path: Path) -> ov.Model:
    if not path.is_file():
        raise ModelFolderError(f"{path} is missing", hint=_HINT)
    _operations()
    try:
        return openvino_core().read_model(path)
    except RuntimeError as error:
        raise ModelFolderError(f"{path} cannot be read: {str(error).strip().splitlines()[-1]}", hint=_HINT) from error


def _pattern(operation: ov.Node) -> str:
    return _constant(operation.input_value(operation.get_input_size() - 1)).tobytes().decode()


def _set_pattern(operation: ov.Node, pattern: str) -> None:
    letters = opset13.constant(np.frombuffer(pattern.encode(), np.uint8)).output(0)
    _replace(operation, [*_inputs(operation)[:-1], letters])


def _replace(operation: ov.Node, inputs: list[ov.Output], **attributes: Any) -> None:
    """Put a new operation in the place of one, as operations keep what they have made of constant inputs."""
    new = _operations().create(operation.get_type_name(), inputs, {**operation.get_attributes(), **attributes})
    for old, output in zip(operation.outputs(), new.outputs(), strict=True):
        old.replace(output)


def _split_digits_first(model: ov.Model) -> None:
    """Correct the one pattern by which the converter stands in for two steps."""
    for operation in _all(model, "RegexSplit"):
        if _pattern(operation) == _GPT2_AND_DIGITS:
            _set_pattern(operation, _DIGITS_THEN_GPT2)


def _never_cut(model: ov.Model) -> None:
    """Lift the limit of the encoder: a prompt that is too long is refused, not cut in silence."""
    for operation in _all(model, "Truncate"):
        operation.input(operation.get_input_size() - 3).replace_source_output(_limit(()))
    for operation in _all(model, "Minimum"):  # how older converters wrote it
        for at, value in enumerate(_inputs(operation)):
            if value.get_node().get_type_name() == "Constant":
                operation.input(at).replace_source_output(_limit(tuple(value.get_shape())))


def _limit(shape: tuple[int, ...]) -> ov.Output:
    return opset13.constant(np.full(shape, _NO_LIMIT, np.int32)).output(0)


def _bytes_in(model: ov.Model) -> list[Any]:
    """Replace the string input by three parameters."""
    unpack = _one(model, "StringTensorUnpack")
    # Open shapes: the operations take the number of pieces of a text from them, not of texts.
    parameters = [opset13.parameter([-1], dtype) for dtype in (np.int32, np.int32, np.uint8)]
    for output, parameter in zip(unpack.outputs(), parameters, strict=True):
        output.replace(parameter.output(0))
    return parameters


def _added_segments(model: ov.Model) -> list[tuple[ov.Node, int]]:
    """Return where constant tokens join the text's: the operation and the first of their three inputs."""
    return [
        (operation, at)
        for operation in _all(model, "CombineSegments")
        for at in range(0, operation.get_input_size() - 1, 3)
        if all(operation.input_value(at + part).get_node().get_type_name() == "Constant" for part in range(3))
    ]


def _all(model: ov.Model, type_name: str) -> list[ov.Node]:
    return [operation for operation in model.get_ordered_ops() if operation.get_type_name() == type_name]


def _one(model: ov.Model, type_name: str) -> ov.Node:
    (operation,) = _all(model, type_name)
    return operation


def _inputs(operation: ov.Node) -> list[ov.Output]:
    return [operation.input_value(at) for at in range(operation.get_input_size())]


def _constant(output: ov.Output) -> npt.NDArray[Any]:
    node = output.get_node()
    if node.get_type_name() != "Constant":
        raise ModelFolderError(f"the tokenizer's graph computes its own {node.get_friendly_name()}", hint=_HINT)
    return np.asarray(node.data).reshape(-1)

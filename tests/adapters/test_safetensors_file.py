"""The container: a header that lies, wherever it lies, is refused with a code before a tensor is read."""

from __future__ import annotations

import json
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms_lora.adapters.adapter import Adapter, load_adapter
from ovms_lora.core.errors import AdapterError
from tests.adapters.adapter_files import (
    good_tensors,
    safetensors_bytes,
    safetensors_header,
    tiny_base,
    write_adapter,
)
from tests.processor_time import at_most

BASE = tiny_base(layers=1)
TENSORS = good_tensors(BASE)
FIRST = next(iter(TENSORS))
GOOD = safetensors_bytes(TENSORS)


def load(folder: Path) -> Adapter:
    return load_adapter(folder, BASE, max_lora_rank=64, lora_dtype=np.float32)


def refusal(folder: Path, weights: bytes) -> AdapterError:
    write_adapter(folder, weights=weights)
    with at_most(0.1), pytest.raises(AdapterError) as caught:
        load(folder)
    assert caught.value.message.isprintable()
    assert str(folder) not in caught.value.message
    return caught.value


def with_first(**changes: Any) -> bytes:
    """The good file, with another entry for the first tensor in its header."""
    header = safetensors_header(TENSORS)
    header[FIRST] = {**header[FIRST], **changes}
    return safetensors_bytes(TENSORS, header)


def with_header(change: Callable[[dict[str, Any]], Any]) -> bytes:
    header = safetensors_header(TENSORS)
    change(header)
    return safetensors_bytes(TENSORS, header)


def raw_header(text: bytes) -> bytes:
    return safetensors_bytes(TENSORS, text)


def test_the_good_file_is_read(tmp_path: Path) -> None:
    write_adapter(tmp_path, weights=GOOD)
    adapter = load(tmp_path)
    pair = adapter.layers["model.layers.0.self_attn.q_proj"]
    np.testing.assert_array_equal(pair.a, TENSORS[FIRST])
    assert not pair.a.flags.writeable


def test_padding_and_order_of_the_header_do_not_matter(tmp_path: Path) -> None:
    header = dict(reversed(safetensors_header(TENSORS).items()))
    write_adapter(tmp_path, weights=safetensors_bytes(TENSORS, json.dumps(header).encode() + b"   "))
    assert len(load(tmp_path).layers) == 2


def test_every_cut_is_refused(tmp_path: Path) -> None:
    codes = set()
    folder = write_adapter(tmp_path)
    for length in range(len(GOOD)):
        (folder / "adapter_model.safetensors").write_bytes(GOOD[:length])
        with pytest.raises(AdapterError) as caught:
            load(folder)
        codes.add(caught.value.code)
    assert codes == {"adapter_truncated"}


BAD = {
    "empty": (b"", "adapter_truncated"),
    "no length": (b"\x10\0\0", "adapter_truncated"),
    "length only": (struct.pack("<Q", 100), "adapter_truncated"),
    "length 0": (struct.pack("<Q", 0) + GOOD[8:], "adapter_header"),
    "length of all": (struct.pack("<Q", len(GOOD) - 8) + GOOD[8:], "adapter_header"),
    "length beyond": (struct.pack("<Q", len(GOOD)) + GOOD[8:], "adapter_truncated"),
    "length huge": (struct.pack("<Q", 1 << 40) + GOOD[8:], "adapter_header"),
    "length of 64 bits": (b"\xff" * 8 + GOOD[8:], "adapter_header"),
    "length too short": (struct.pack("<Q", 20) + GOOD[8:], "adapter_header"),
    "more behind": (GOOD + b"\0", "adapter_header"),
    "no object": (raw_header(b"[]"), "adapter_header"),
    "blank before": (raw_header(b" {}"), "adapter_header"),
    "not JSON": (raw_header(b"{x}"), "adapter_header"),
    "not UTF-8": (raw_header(b'{"\xff": 1}'), "adapter_header"),
    "no tensors": (safetensors_bytes({}, {}), "adapter_incomplete"),
    "metadata alone": (safetensors_bytes({}, {"__metadata__": {"format": "pt"}}), "adapter_incomplete"),
    "metadata no strings": (with_header(lambda h: h.update(__metadata__={"a": 1})), "adapter_header"),
    "metadata no object": (with_header(lambda h: h.update(__metadata__=[])), "adapter_header"),
    "entry no object": (with_header(lambda h: h.update(x=5)), "adapter_header"),
    "entry without dtype": (with_header(lambda h: h[FIRST].pop("dtype")), "adapter_header"),
    "entry with more": (with_first(more=1), "adapter_header"),
    "key twice": (raw_header(json.dumps(safetensors_header(TENSORS)).encode()[:-1] + b',"__metadata__":{}}'), None),
    "NaN": (with_first(shape=[float("nan"), 8]), "adapter_header"),
    "dtype F64": (with_first(dtype="F64"), "adapter_dtype"),
    "dtype I8": (with_first(dtype="I8"), "adapter_dtype"),
    "dtype F8": (with_first(dtype="F8_E4M3"), "adapter_dtype"),
    "dtype unknown": (with_first(dtype="float32"), "adapter_dtype"),
    "dtype no string": (with_first(dtype=["F32"]), "adapter_header"),
    "dtype lies": (with_first(dtype="F16"), "adapter_header"),
    "shape lies": (with_first(shape=[4, 8]), "adapter_header"),
    "shape of three": (with_first(shape=[1, 2, 8]), "adapter_shape"),
    "shape of one": (with_first(shape=[16]), "adapter_shape"),
    "shape empty": (with_first(shape=[]), "adapter_header"),
    "shape negative": (with_first(shape=[-2, -8]), "adapter_header"),
    "shape of floats": (with_first(shape=[2.0, 8]), "adapter_header"),
    "shape of booleans": (with_first(shape=[True, 16]), "adapter_header"),
    "shape no list": (with_first(shape="2x8"), "adapter_header"),
    "shape huge": (with_first(shape=[1 << 40, 8]), "adapter_shape"),
    "shape overflows": (with_first(shape=[1 << 63, 1 << 63]), "adapter_shape"),
    "shape of digits": (raw_header(b'{"x": {"shape": [' + b"9" * 100_000 + b"]}}"), "adapter_header"),
    "shape with 10000 sizes": (with_first(shape=[1] * 10_000), "adapter_shape"),
    "offsets reversed": (with_first(data_offsets=[64, 0]), "adapter_header"),
    "offsets of three": (with_first(data_offsets=[0, 32, 64]), "adapter_header"),
    "offsets negative": (with_first(data_offsets=[-64, 0]), "adapter_header"),
    "offsets overlap": (with_first(data_offsets=[16, 80]), "adapter_header"),
    "offsets outside": (with_first(data_offsets=[1 << 60, (1 << 60) + 64]), "adapter_header"),
    "a hole": (with_header(lambda h: h.pop(FIRST)), "adapter_header"),
    "all the same place": (with_header(lambda h: [e.update(data_offsets=[0, 64]) for e in h.values()]), None),
    "a rank bomb": (
        safetensors_bytes(
            {},
            {
                FIRST: {"dtype": "F32", "shape": [1 << 30, 8], "data_offsets": [0, 1 << 35]},
                FIRST.replace("_A", "_B"): {
                    "dtype": "F32",
                    "shape": [8, 1 << 30],
                    "data_offsets": [1 << 35, 1 << 36],
                },
            },
        ),
        "adapter_truncated",
    ),
    "oversized and true": (raw_header(b"{" + b" " * (3 << 20) + b"}"), "adapter_header"),
    "a million lists": (raw_header(b'{"a": [' + b"[]," * 600_000 + b"[]]}"), "adapter_header"),
    "a million objects": (raw_header(b'{"a": [' + b"{}," * 600_000 + b"{}]}"), "adapter_header"),
    "a million numbers": (raw_header(b'{"a": [' + b"1," * 1_000_000 + b"1]}"), "adapter_header"),
    "a shape of a million": (raw_header(b'{"a": {"shape": [' + b"1," * 990_000 + b"1]}}"), "adapter_header"),
    "many keys": (raw_header(json.dumps({f"a{n}": 0 for n in range(130_000)}).encode()), "adapter_header"),
    "much metadata": (
        raw_header(json.dumps({"__metadata__": {f"a{n}": "x" for n in range(110_000)}}).encode()),
        "adapter_header",
    ),
    "deep": (raw_header(b'{"a": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"), "adapter_header"),
    "deep enough": (raw_header(b'{"a": ' + b"[" * 10 + b"]" * 10 + b"}"), "adapter_header"),
    "many small tensors": (
        raw_header(
            json.dumps(
                {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(20_000)}
            ).encode()
        ),
        None,
    ),
    "a pickle": (pickle.dumps({"a": list(range(100))}), "adapter_format"),
    "a pickle of protocol 2": (pickle.dumps({"a": list(range(100))}, protocol=2), "adapter_format"),
    "a pickle of no length": (b"\x80\x04" + bytes(4096), "adapter_format"),
    "a pickle of nothing": (b"\x80\x04N.", "adapter_format"),
    "an empty zip": (b"PK\x05\x06" + bytes(18), "adapter_format"),
    "a GGUF file": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "adapter_format"),
    "text": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "adapter_header"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_such_container_is_refused_at_once(case: str, tmp_path: Path) -> None:
    weights, code = BAD[case]
    error = refusal(tmp_path, weights)
    assert code is None or error.code == code
    assert len(error.message) < 500


def test_a_zip_in_disguise_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    assert refusal(tmp_path / "adapter", (tmp_path / "archive").read_bytes()).code == "adapter_format"


def test_a_length_that_looks_like_a_pickle_is_only_a_length(tmp_path: Path) -> None:
    text = json.dumps(safetensors_header(TENSORS)).encode()
    assert len(text) < 0x0480
    weights = safetensors_bytes(TENSORS, text.ljust(0x0480))
    assert weights[:2] == b"\x80\x04"
    write_adapter(tmp_path, weights=weights)
    assert len(load(tmp_path).layers) == 2


def test_a_huge_sparse_file_costs_no_memory(tmp_path: Path) -> None:
    rank = 1 << 22
    names = [FIRST, FIRST.replace("_A", "_B")]
    entries = {
        names[0]: {"dtype": "F32", "shape": [rank, 8], "data_offsets": [0, rank * 32]},
        names[1]: {"dtype": "F32", "shape": [8, rank], "data_offsets": [rank * 32, rank * 64]},
    }
    write_adapter(tmp_path, weights=safetensors_bytes({}, entries))
    with (tmp_path / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) + rank * 64)
    tracemalloc.start()
    with pytest.raises(AdapterError) as caught:
        load(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.code == "adapter_rank"
    assert peak < 1 << 20


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_memory_is_that_of_the_tensors(dtype: Any, tmp_path: Path) -> None:
    base = tiny_base(layers=8, width=512)
    write_adapter(tmp_path, tensors=good_tensors(base, dtype=np.float32, rank=64), config=None)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"r": 64}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tracemalloc.start()
    adapter = load_adapter(tmp_path, base, max_lora_rank=64, lora_dtype=dtype)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert adapter.nbytes == 8 * (512 * 64 * 2 + 64 * (512 + 256)) * np.dtype(dtype).itemsize
    assert held < 1.1 * adapter.nbytes
    assert peak < 1.5 * adapter.nbytes


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_mutated_files_load_or_give_a_typed_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    header_end = 8 + int.from_bytes(GOOD[:8], "little")
    mutated = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header_end + 64))
        replacement = data.draw(
            st.one_of(st.binary(max_size=3), st.sampled_from([b"9", b"[", b'"', b"}", b"-1", b"e9"]))
        )
        mutated[at : at + data.draw(st.integers(0, 3))] = replacement
    if data.draw(st.booleans()):  # keep the length right, so that more of the header is read
        mutated[:8] = struct.pack("<Q", header_end - 8 + len(mutated) - len(GOOD))
    folder = tmp_path_factory.getbasetemp() / "mutated"
    write_adapter(folder, weights=bytes(mutated))
    try:
        adapter = load(folder)
    except AdapterError as error:
        assert error.message.isprintable()
    else:
        assert all(np.isfinite(pair.a).all() for pair in adapter.layers.values())

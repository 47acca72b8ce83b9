"""KeptGraph: a compiled graph without adapters, kept in CACHE_DIR so that the next start has less to simplify.

    compile ──► what the device writes: graph and constants ──► CACHE_DIR/plain-<digest of all that it depends on>/
    the next start: read as a model ──► head sizes noted anew ──► compile, which finds everything simplified

The CPU device of OpenVINO 2026.4 writes a compiled graph with paged attention, but does not read it: it leaves out the
head sizes in the runtime info of the attention nodes. As a model it is read, and they can be noted again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import openvino as ov

log = logging.getLogger(__name__)

# To be raised with every change of how a graph is made from an IR.
_FORM = 1
_DEVICE = "CPU"
_GRAPH, _CONSTANTS, _HEADS = "graph.xml", "graph.bin", "heads.json"
_ATTENTION = "PagedAttentionExtension"
_HEAD_SIZES = ("k_head_size", "v_head_size", "num_k_heads", "num_v_heads")

_Heads = Mapping[str, Mapping[str, int]]  # name of an attention node → its head sizes


@dataclass(frozen=True, slots=True)
class KeptGraph:
    """The graph of one IR on the CPU device: compiled from what is kept in `folder`, or from a model and then kept."""

    core: ov.Core
    properties: Mapping[str, Any]
    folder: Path

    @classmethod
    def of(cls, core: ov.Core, ir: Path, properties: Mapping[str, Any], cache: Path) -> KeptGraph:
        """Return the one of an IR with these properties of the device. Raises OSError when there is no IR."""
        weights = ir.with_suffix(".bin").stat()
        depends_on = [
            *(_FORM, ov.get_version(), core.get_property(_DEVICE, "FULL_DEVICE_NAME")),
            *(sorted(core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")), sorted(map(str, properties.items()))),
            *(hashlib.sha256(ir.read_bytes()).hexdigest(), weights.st_size, weights.st_mtime_ns),
        ]
        digest = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
        return cls(core, properties, cache / f"plain-{digest[:32]}")

    @property
    def is_there(self) -> bool:
        """Whether something is kept."""
        return self.folder.is_dir()

    def load(self) -> ov.CompiledModel | None:
        """Compile what is kept; None where that is of no use: then it is removed."""
        try:
            model = self.core.read_model(self.folder / _GRAPH)
            heads: _Heads = json.loads((self.folder / _HEADS).read_bytes())
            for node in _attention(model):
                for size in _HEAD_SIZES:
                    node.set_rt_info(heads[node.get_friendly_name()][size], size)
            return self.core.compile_model(model, _DEVICE, dict(self.properties))
        except (RuntimeError, OSError, ValueError, LookupError, TypeError) as error:
            log.warning("%s holds no usable graph, it is made anew: %s", self.folder, _reason(error))
            shutil.rmtree(self.folder, ignore_errors=True)
            return None

    def compile(self, model: ov.Model) -> ov.CompiledModel:
        """Compile a model and keep what comes of it, as far as that can be written.

        Raises RuntimeError when the device refuses it.
        """
        heads = {
            node.get_friendly_name(): {size: node.get_rt_info()[size].value for size in _HEAD_SIZES}
            for node in _attention(model)
        }
        written: list[bytes] = []

        def note(graph: bytes) -> bytes:
            written.append(graph)
            return graph

        # What the device writes is a file of its own kind. The graph in it passes through here to be encrypted.
        seen = {"CACHE_ENCRYPTION_CALLBACKS": [note, bytes]}
        compiled = self.core.compile_model(model, _DEVICE, {**self.properties, **seen})
        try:
            self._keep(compiled.export_model().getbuffer(), written[-1], heads)
        except (RuntimeError, OSError, ValueError, LookupError, MemoryError) as error:
            log.warning("the graph is not kept in %s: %s", self.folder.parent, _reason(error))
        return compiled

    def _keep(self, blob: memoryview, graph: bytes, heads: _Heads) -> None:
        end = len(blob) - len(graph)
        begin = end - _size_of_constants(graph)
        if begin < 0 or blob[end:] != graph:
            raise ValueError("the device writes it in a form that is not known here")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f"{self.folder.name}.", dir=self.folder.parent))
        try:
            for name, content in ((_GRAPH, graph), (_CONSTANTS, blob[begin:end]), (_HEADS, json.dumps(heads).encode())):
                _write(new / name, content)
            new.chmod(0o755)
            new.rename(self.folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)  # nothing is there any more once it is renamed


def _attention(model: ov.Model) -> Iterator[ov.Node]:
    return (node for node in model.get_ops() if node.get_type_name() == _ATTENTION)


def _size_of_constants(graph: bytes) -> int:
    """Return the bytes that the constants take, which stand right before the graph."""
    places = (data.attrib for data in ElementTree.fromstring(graph).iter("data"))
    return max(int(place["offset"]) + int(place["size"]) for place in places if "offset" in place)


def _write(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__

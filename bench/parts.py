"""The parts of the suite, in the order in which they run."""

from __future__ import annotations

from bench import (
    batches,
    http_streaming,
    lora_forms,
    memory,
    prefill,
    roofline,
    scaling,
    serving,
    side_by_side,
    startup,
    step_time,
)
from bench.part import Part

PARTS = (
    Part(
        "side_by_side", "ovms-lora, OpenVINO GenAI, llama.cpp and PEFT, those that are installed", side_by_side.measure
    ),
    Part("batches", "throughput and latency by size of batch, plain and with adapters", batches.measure),
    Part("prefill", "reading a prompt with an adapter and without", prefill.measure),
    Part("step_time", "the time of a step outside of the device", step_time.measure),
    Part("roofline", "bytes of a step, and how fast memory is read", roofline.measure),
    Part("lora_forms", "loop over rows, gathered weights, tiles", lora_forms.measure),
    Part("scaling", "by registered adapters, length of the prompt, and rank", scaling.measure),
    Part("serving", "open-loop arrivals over HTTP, adapters by Zipf", serving.measure),
    Part("http_streaming", "streams over HTTP against the engine asked directly", http_streaming.measure),
    Part("memory", "resident size by adapters", memory.measure),
    Part("startup", "start to ready, and imports", startup.measure),
)
NAMES = tuple(part.name for part in PARTS)

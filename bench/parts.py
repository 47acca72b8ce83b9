"""The parts of the suite, in the order in which they run; each is the module of its name."""

from __future__ import annotations

from bench.part import Part

PARTS = (
    Part("side_by_side", "ovms-lora beside OpenVINO GenAI, llama.cpp, vLLM and PEFT"),
    Part("batches", "throughput and latency by size of batch, plain and with adapters"),
    Part("prefill", "reading a prompt with an adapter and without"),
    Part("step_time", "the time of a step outside of the device"),
    Part("roofline", "what a step reads and computes, and how fast this machine does that"),
    Part("lora_forms", "loop over rows, gathered weights, tiles"),
    Part("scaling", "by registered adapters, length of the prompt, and rank"),
    Part("serving", "open-loop arrivals over HTTP, adapters by Zipf"),
    Part("http_streaming", "streams over HTTP against the engine asked directly"),
    Part("memory", "resident size by adapters"),
    Part("startup", "start to ready, and imports"),
)

"""All measurements, in their short form unless told otherwise.

python -m bench [--models smollm2,llama-1b] [--batches 8,16] [--rounds 5] [--tokens 64]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench import http_streaming
from bench.mixed_adapters import Case, measure
from bench.models import MODELS
from bench.workload import write_results


def main() -> None:
    """Run them one after another."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--models", default="smollm2", help=f"of {', '.join(MODELS)}; exported at first use")
    parser.add_argument("--batches", default="8,16", help="rows of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="generated for each row")
    options = parser.parse_args()
    for name in options.models.split(","):
        if name not in MODELS:
            parser.error(f"unknown model {name!r}; there are {', '.join(MODELS)}")
        for batch in map(int, options.batches.split(",")):
            print(f"\n{name}, batch {batch}, {options.tokens} tokens each")
            case = Case(MODELS[name](), batch=batch, tokens=options.tokens, rounds=options.rounds)
            with tempfile.TemporaryDirectory() as folder:
                print(write_results(f"mixed_adapters-{name}-b{batch}", measure(case, Path(folder))))
        print(f"\n{name}, 16 streams over HTTP")
        streamed = http_streaming.measure(MODELS[name](), streams=16, tokens=options.tokens, rounds=options.rounds)
        print(write_results(f"http_streaming-{name}", streamed))


if __name__ == "__main__":
    main()

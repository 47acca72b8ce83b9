"""Plots of results: one PNG for each part and model that has something to show.

python -m bench.plots FOLDER    draws what was measured last into another folder
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, no display

from matplotlib import pyplot
from matplotlib.ticker import ScalarFormatter

from bench.part import Row
from bench.results import RESULTS, Result, read_parts

_SIZE = (7.0, 4.2)
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def draw(results: Sequence[Result], folder: Path = RESULTS) -> list[Path]:
    """Draw all results that have a plot; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for result in results:
        for name, plot in _PLOTS.get(result.part, {}).items():
            path = folder / f"{name}-{result.model}.png"
            with pyplot.rc_context(_STYLE):
                figure, axes = pyplot.subplots(figsize=_SIZE, layout="constrained")
                plot(axes, result)
                axes.set_title(f"{axes.get_title()}\n{_machine(result)}", fontsize=10)
                figure.savefig(path, dpi=110)
                pyplot.close(figure)
            paths.append(path)
    return paths


def _machine(result: Result) -> str:
    machine = result.machine
    return f"{result.model} on {machine['cores']} cores of {machine['processor']}, {machine['date']}"


def _lines(axes: Any, rows: Sequence[Row], x: str, y: str, series: str) -> None:
    """Draw y over x, a line for each series; x doubles from tick to tick."""
    for name in dict.fromkeys(row[series] for row in rows):
        some = sorted((row for row in rows if row[series] == name), key=lambda row: row[x])
        axes.plot([row[x] for row in some], [row[y] for row in some], marker="o", markersize=4, label=name)
    ticks = sorted({row[x] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend()


def _throughput(axes: Any, result: Result) -> None:
    _lines(axes, result.rows, "batch", "tokens_per_second", "case")
    axes.set(title="Throughput by size of batch", xlabel="rows", ylabel="tokens/s", ylim=(0, None))


def _latency(axes: Any, result: Result) -> None:
    _lines(axes, result.rows, "batch", "itl_p95_ms", "case")
    axes.set(title="Time between tokens, 95th percentile", xlabel="rows", ylabel="ms", ylim=(0, None))


def _engines(axes: Any, result: Result) -> None:
    groups = list(dict.fromkeys((row["case"], row["batch"]) for row in result.rows))
    engines = list(dict.fromkeys(row["engine"] for row in result.rows))
    width = 0.8 / len(engines)
    for number, engine in enumerate(engines):
        for place, (case, batch) in enumerate(groups):
            for row in result.where(case=case, batch=batch, engine=engine):
                label = (
                    engine
                    if place == 0 or not result.where(case=groups[0][0], batch=groups[0][1], engine=engine)
                    else None
                )
                bar = axes.bar(place + number * width, row["tokens_per_second"], width, color=f"C{number}", label=label)
                axes.bar_label(bar, fmt="%.0f", fontsize=8)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(groups))], [f"{c}\nbatch {b}" for c, b in groups])
    axes.set(title="Engines side by side", ylabel="tokens/s")
    axes.grid(visible=False, axis="x")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys())


def _forms(axes: Any, result: Result) -> None:
    _lines(axes, result.rows, "batch", "step_ms", "form")
    axes.set(title="A row's own adapter, in three forms", xlabel="rows, 8 adapters in turn", ylabel="ms", yscale="log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())


def _over(axis: str, y: str, **labels: Any) -> Callable[[Any, Result], None]:
    def plot(axes: Any, result: Result) -> None:
        rows = [row for row in result.where(axis=axis) if row["value"]]
        _lines(axes, rows, "value", y, "case")
        for row in result.where(axis=axis, value=0):
            axes.axhline(row[y], linestyle=":", color="grey", label="plain")
            axes.legend()
        axes.set(**labels)
        axes.set_ylim(0, None)

    return plot


def _serving(axes: Any, result: Result) -> None:
    labels = [f"{row['registered']} registered\nload {row['load']}" for row in result.rows]
    for number, (name, column) in enumerate(
        (("TTFT p50", "ttft_p50_ms"), ("TTFT p95", "ttft_p95_ms"), ("e2e p50", "e2e_p50_ms"))
    ):
        places = [place + number * 0.27 for place in range(len(labels))]
        axes.bar(places, [row[column] for row in result.rows], 0.27, label=name)
    axes.set_xticks([place + 0.27 for place in range(len(labels))], labels)
    axes.set(title="Open-loop arrivals, adapters by Zipf, 8 resident", ylabel="ms")
    axes.grid(visible=False, axis="x")
    axes.legend()


def _memory(axes: Any, result: Result) -> None:
    rows = [row for row in result.rows if row["registered"]]
    marked = [{**row, "series": "none used" if not row["resident"] else "8 resident at most"} for row in rows]
    _lines(axes, marked, "registered", "megabytes", "series")
    for row in result.where(case="plain"):
        axes.axhline(row["megabytes"], linestyle=":", color="grey", label="plain")
    axes.legend()
    axes.set(title="Memory by registered adapters", xlabel="registered", ylabel="MB", ylim=(0, None))


_PLOTS: dict[str, dict[str, Callable[[Any, Result], None]]] = {
    "batches": {"throughput": _throughput, "latency": _latency},
    "side_by_side": {"side_by_side": _engines},
    "lora_forms": {"lora_forms": _forms},
    "scaling": {
        "registered": _over(
            "registered",
            "tokens_per_second",
            title="Adapters by Zipf, 8 resident",
            xlabel="registered",
            ylabel="tokens/s",
        ),
        "resident": _over(
            "resident",
            "ttft_ms",
            title="First token of 256, of one adapter among many",
            xlabel="resident",
            ylabel="ms",
        ),
        "prompt": _over("prompt", "ttft_ms", title="Time to the first token", xlabel="prompt tokens", ylabel="ms"),
        "rank": _over(
            "rank", "tokens_per_second", title="8 adapters in 16 rows, by rank", xlabel="rank", ylabel="tokens/s"
        ),
    },
    "serving": {"serving": _serving},
    "memory": {"memory": _memory},
}


def main() -> None:
    """Draw the present results into a folder."""
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description=__doc__)
    parser.add_argument("folder", type=Path)
    for path in draw(read_parts(), parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()

"""Write the generated parts of the documentation: `make docs`.

Owns: docs/cli.md from the argument parsers, docs/limits.md from the limits, config/config.schema.json from the
configuration's classes, docs/metrics.md from the metrics themselves. `tests/test_docs.py` compares these files with
what this module would write.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from bench.arguments import build_parser as bench_parser
from ovms_lora import cli
from ovms_lora.core.config import ServerConfig
from ovms_lora.core.errors import EngineError, QueueFullError
from ovms_lora.engine.engine import EngineStats
from ovms_lora.engine.lora_config import AdapterCard, LoraConfig
from ovms_lora.engine.speculation import SpeculationStats
from ovms_lora.export import repository_cli
from ovms_lora.export.arguments import build_parser
from ovms_lora.scale.flags import ray_parser
from ovms_lora.scale.plan.plan_cli import plan_parser
from ovms_lora.server.limit_flags import MEANINGS
from ovms_lora.server.metrics import Metrics
from ovms_lora.server.options import Limits
from ovms_lora.server.registry import ModelRegistry
from ovms_lora.server.serve_flags import serve_parser

ROOT = Path(__file__).resolve().parents[1]
_NOTE = "Written by `make docs`; do not edit."


def main() -> int:
    """Write every generated file that is not up to date; say which."""
    for path, text in generated().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)
    return 0


def generated() -> dict[Path, str]:
    """Return the text of each generated file."""
    parts: dict[str, Callable[[], str]] = {
        "docs/cli.md": command_line,
        "docs/metrics.md": metrics,
        "docs/limits.md": limits,
        "config/config.schema.json": config_schema,
    }
    return {ROOT / name: part() for name, part in parts.items()}


def command_line() -> str:
    """Return docs/cli.md."""
    exporter = build_parser("export_model.py")
    tasks = next(action for action in exporter._actions if isinstance(action, argparse._SubParsersAction))
    text = f"# Command line\n\n{_NOTE}\n\nEvery flag may be written with `_` or with `-`.\n"
    text += _command("ovms-lora serve", serve_parser())
    text += _ray_command()
    text += _command("ovms-lora check", cli._check_parser())
    text += _command("ovms-lora list", repository_cli.list_parser())
    text += _command("ovms-lora remove", repository_cli.remove_parser())
    text += _command("ovms-lora plan", plan_parser())
    text += _command("ovms-lora bench", bench_parser())
    text += _command("export_model.py text_generation", tasks.choices["text_generation"])
    return text + "\n`ovms-lora export text_generation` is the same command.\n"


def _ray_command() -> str:
    """Return what `ovms-lora ray` has beyond the flags of `ovms-lora serve`."""
    known = serve_parser()._option_string_actions
    rows = [_row(action) for action in ray_parser()._actions if action.option_strings[0] not in known]
    head = (
        "\n## ovms-lora ray\n\nAll flags of `ovms-lora serve`, and:\n\n| flag | value | what it does |\n|---|---|---|\n"
    )
    return head + "".join(rows)


def limits() -> str:
    """Return docs/limits.md."""
    rows = "".join(f"| `{field.name}` | {field.default:.7g} | {MEANINGS[field.name]} |\n" for field in fields(Limits))
    return (
        f"# Limits\n\n{_NOTE}\n\nEach is changed with `--limit NAME=NUMBER`. What else is bounded stands in "
        f"[SECURITY.md](../SECURITY.md).\n\n| name | default | bounds |\n|---|---|---|\n{rows}"
    )


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    """Return a table of a parser's flags; argparse's own help looks different in each version of Python."""
    rows = [_row(action) for action in parser._actions if action.dest != "help"]
    heading = f"\n## {name}\n" + (f"\n{parser.description}\n" if parser.description else "")
    return f"{heading}\n| flag | value | what it does |\n|---|---|---|\n" + "".join(rows)


def _row(action: argparse.Action) -> str:
    metavar = action.metavar or ("" if action.choices is None else ", ".join(map(str, action.choices)))
    value = "" if action.nargs == 0 else str(metavar)
    if action.nargs == "+":
        value += " …"
    if not action.option_strings:
        return f"| {value} | | {_cell(action.help or '')} |\n"
    return f"| `{action.option_strings[0]}` | {_cell(f'`{value}`' if value else '')} | {_cell(action.help or '')} |\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def config_schema() -> str:
    """Return config/config.schema.json."""
    schema = {"$comment": _NOTE, **ServerConfig.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def metrics() -> str:
    """Return docs/metrics.md, from the metrics that a server shows after one call of each ending."""
    rows = [_metric_row(family) for family in _families()]
    head = f"# Metrics\n\n{_NOTE}\n\n`GET /metrics` gives them in Prometheus's text format.\n\n"
    return head + "| name | type | labels | what it counts |\n|---|---|---|---|\n" + "".join(rows)


def _families() -> Iterator[Metric]:
    measured = Metrics(cast(ModelRegistry, _Models()))
    with measured.lora.loading("sql", is_known=True):
        pass
    for ending in (None, QueueFullError("full"), EngineError("failed")):
        call = measured.begin("V3", "m", streamed=False)
        call.use(["sql"], 1)
        call.end(ending)
    for family in text_string_to_metric_families(measured.exposition().decode()):
        if not family.name.endswith("_created"):
            yield family


def _metric_row(family: Metric) -> str:
    labels = dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")
    name = f"{family.name}_total" if family.type == "counter" else family.name
    kind = "counter" if family.type == "unknown" else family.type  # OVMS's counters have no suffix, hence no type
    return f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {family.documentation} |\n"


class _Models:
    """A registry of one model with one adapter, whose engine has done nothing."""

    def __init__(self) -> None:
        counts: dict[str, Any] = dict.fromkeys((field.name for field in fields(EngineStats)), 0)
        stats = EngineStats(**counts | {"speculation": SpeculationStats()})
        model = SimpleNamespace(
            engine=SimpleNamespace(stats=lambda: stats),
            lora=SimpleNamespace(
                cards=lambda: [AdapterCard("sql", "loras/sql")], loading_path=None, graphs=SimpleNamespace(brought_in=0)
            ),
        )
        self.served = [SimpleNamespace(name="m", model=model, spec=SimpleNamespace(lora=LoraConfig()))]


if __name__ == "__main__":
    raise SystemExit(main())

"""Asks for the known weaknesses of all locked packages: `make audit`.

pip-audit passes over what its service does not know, and so finds nothing behind a mirror without advisories. Here a
package that could not be looked up is told, and is no success.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCKS = Path(__file__).parent
OPTIONS = ("--disable-pip", "--no-deps", "--progress-spinner", "off", "--format", "json")


def audited(lock: Path) -> dict[str, dict[str, Any]]:
    """Return what pip-audit says of each package; where it could not ask at all, why not, under the list's name."""
    command = [sys.executable, "-m", "pip_audit", *OPTIONS, "--requirement", str(lock)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = json.loads(run.stdout)["dependencies"]
    except ValueError:
        reason = (run.stderr.strip().splitlines() or ["no answer"])[-1]
        return {lock.name: {"skip_reason": reason[:300]}}
    return {f"{each['name']} {each.get('version', '')}".strip(): each for each in found}


def judge(packages: dict[str, dict[str, Any]]) -> tuple[list[str], int]:
    """Return what is to be said, and the exit code: 1 for a weakness, and for anything that could not be looked up."""
    lines = [
        f"{name}: {weakness['id']}, repaired in {', '.join(weakness['fix_versions']) or 'no version yet'}"
        for name, package in sorted(packages.items())
        for weakness in package.get("vulns", ())
    ]
    skipped = [name for name, package in sorted(packages.items()) if "skip_reason" in package]
    lines.append(f"{len(packages) - len(skipped)} packages looked up, {len(lines)} weaknesses known")
    if skipped:
        lines.append(f"error: {len(skipped)} not looked up: {', '.join(skipped[:5])}{', …' * (len(skipped) > 5)}")
        lines.append(f"hint: {packages[skipped[0]]['skip_reason']}; pypi.org itself must be reachable")
    return lines, 1 if skipped or len(lines) > 1 else 0


def main() -> int:
    """Audit the locks that are named, or all."""
    locks = [Path(name) for name in sys.argv[1:]] or sorted(LOCKS.glob("*.txt"))
    packages: dict[str, dict[str, Any]] = {}
    for lock in locks:  # one at a time: not all of them are of one environment
        packages |= audited(lock)
    lines, code = judge(packages)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())

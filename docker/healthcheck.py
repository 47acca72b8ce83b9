"""The image's health: exit 0 while the server of this container takes requests, 1 while it does not.

Owns: finding the server's address in the command line of process 1. Does not know: what makes a server ready.
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

_SECONDS = 4  # below the timeout of HEALTHCHECK, so that the reason is printed
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def main(command_line: Path = Path("/proc/1/cmdline")) -> int:
    """Ask the server that `command_line` started, print what it says, return the exit code."""
    url = ready_url(command_line.read_text(encoding="utf-8").split("\0"))
    # Never through a proxy that the environment names.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_SECONDS) as answer:
            print(f"{url}: {answer.status}")
            return 0
    except urllib.error.HTTPError as error:
        print(f"{url}: {error.code}")
    except OSError as error:
        print(f"{url}: {error}")
    return 1


def ready_url(words: Sequence[str]) -> str:
    """Return where to ask the server of a command line, which an init process may stand before."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--rest_port", "--rest-port", default="8000")
    parser.add_argument("--rest_bind_address", "--rest-bind-address", default="127.0.0.1")
    flags, _ = parser.parse_known_args([word for word in words if word != "--"])
    host = _ANY.get(flags.rest_bind_address, flags.rest_bind_address)
    return f"http://{f'[{host}]' if ':' in host else host}:{flags.rest_port}/v2/health/ready"


if __name__ == "__main__":
    sys.exit(main())

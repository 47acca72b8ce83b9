"""A real S3 protocol server for tests: moto's, on loopback, which counts requests and can be out of order."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class _Quiet(WSGIRequestHandler):  # type: ignore[misc]
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


class ObjectStore:
    """The server. While `down`, every request is answered 503; while not `flowing`, weights come by half."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self._buckets = 0
        # Not checked, but without it a request is a stranger's.
        signature = {"Authorization": "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request"}
        self._client = httpx.Client(base_url=self.url, headers=signature, trust_env=False)
        self.requests: list[tuple[str, str]] = []
        self.flowing = threading.Event()
        self.heal()

    def heal(self) -> None:
        """Put the server in order."""
        self.down = self.denied = False
        self.slow = 0.0
        self.flowing.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing-key",
            "AWS_SECRET_ACCESS_KEY": "testing-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    def bucket(self) -> str:
        """Make a bucket of its own; return its name."""
        self._buckets += 1
        name = f"bucket-{self._buckets}"
        self._client.put(f"/{name}").raise_for_status()
        return name

    def put(self, key: str, content: bytes) -> None:
        """Store an object under `bucket/key`."""
        self._client.put(f"/{key}", content=content).raise_for_status()

    def upload(self, folder: Path, key: str) -> None:
        """Store the files of a folder; what is there beside them stays."""
        for path in sorted(folder.iterdir(), reverse=True):
            self.put(f"{key}/{path.name}", path.read_bytes())

    def remove(self, key: str, *names: str) -> None:
        for name in names or ("adapter_config.json", "adapter_model.safetensors"):
            self._client.delete(f"/{key}/{name}").raise_for_status()

    @contextmanager
    def counted(self) -> Iterator[Counter[tuple[str, str]]]:
        """Count the requests within."""
        counts: Counter[tuple[str, str]] = Counter()
        begun = len(self.requests)
        yield counts
        counts.update(self.requests[begun:])

    def stop(self) -> None:
        self._client.close()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        of_client = "aiobotocore" in environ.get("HTTP_USER_AGENT", "")
        if of_client:
            self.requests.append((environ["REQUEST_METHOD"], path))
            time.sleep(self.slow)
            if self.denied:
                start("403 Forbidden", [("Content-Type", "application/xml")])
                return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
            if self.down:
                start("503 Service Unavailable", [("Content-Type", "application/xml")])
                return [b"<Error><Code>ServiceUnavailable</Code><Message>down</Message></Error>"]
        answer: Iterable[bytes] = self._app(environ, start)
        if of_client and path.endswith(".safetensors") and not self.flowing.is_set():
            return self._halves(b"".join(answer))
        return answer

    def _halves(self, content: bytes) -> Iterator[bytes]:
        yield content[: len(content) // 2]
        self.flowing.wait(60)
        yield content[len(content) // 2 :]

"""What Ray and Serve raise when something is not there or breaks: their own errors, and those of gRPC below them."""

from __future__ import annotations

from grpc import RpcError
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

RAY_ERRORS = (RayError, RayServeException, RpcError)

"""A connection to a master: calls with a deadline, errors as typed exceptions."""

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
from kvstore_proto import admin_pb2, admin_pb2_grpc

from kvstore.errors import (
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
    error_from_code,
)

CALL_TIMEOUT_S = 30.0
MESSAGE_BYTES_MAX = 64 << 20
_PERMISSION_DENIED = "Permission denied"  # what gRPC says of a Unix socket


class Admin:
    """The Admin service of one master."""

    def __init__(self, address: str, channel: grpc.Channel) -> None:
        self.address = address
        self._stub = admin_pb2_grpc.AdminStub(channel)

    def call(self, method: str, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """The answer to ``request``; raises a KVStoreError with a message for people."""
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise PreconditionError(
                    f"what answers at {self.address} is a node, not a master (or a master of "
                    "another version); name the master with --master or KVSTORE_MASTER"
                ) from None
            if _PERMISSION_DENIED in (error.details() or ""):
                raise PreconditionError(
                    f"permission denied: {self.address} belongs to another user; run this command "
                    "as the user who runs the master"
                ) from None
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise UnavailableError(
                    f"no master answers at {self.address}; start one with `kvstore up`, or name "
                    "it with --master or KVSTORE_MASTER"
                ) from None
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                text = f"the master at {self.address} did not answer within {timeout_s:g} s"
                raise error_from_code(error.code().value[0], text) from None
            raise error_from_code(error.code().value[0], error.details() or "") from None

    def namespaces(self) -> list[admin_pb2.NamespaceInfo]:
        """Every namespace that the master knows."""
        return list(self.call("ListNamespaces", admin_pb2.ListNamespacesRequest()).namespaces)

    def namespace(self, prefix: str) -> admin_pb2.NamespaceInfo:
        """The one namespace whose root begins with these hex digits."""
        if not prefix or set(prefix.lower()) - set("0123456789abcdef"):
            raise InvalidArgumentError(f"namespace {prefix!r}: a root is given by its hex digits")
        found = [n for n in self.namespaces() if n.root.hex().startswith(prefix.lower())]
        if not found:
            raise NotFoundError(f"no namespace begins with {prefix}; `kvstore status` lists them")
        if len(found) > 1:
            raise InvalidArgumentError(
                f"{len(found)} namespaces begin with {prefix}; give more digits"
            )
        return found[0]

    def root(self, prefix: str) -> bytes:
        """Root of the namespace that is meant; empty where none is named."""
        return self.namespace(prefix).root if prefix else b""


@contextlib.contextmanager
def connect(address: str) -> Iterator[Admin]:
    """A connection for one command."""
    options = [("grpc.max_receive_message_length", MESSAGE_BYTES_MAX)]
    with grpc.insecure_channel(address, options=options) as channel:
        yield Admin(address, channel)

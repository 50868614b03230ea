import grpc
import pytest
from grpc.aio import AioRpcError, Metadata
from kvstore.errors import InternalError, KVStoreError, NotFoundError, UnavailableError
from kvstore_client.wire import error_of_call


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, "no such block", NotFoundError),
        (grpc.StatusCode.INTERNAL, "commit failed by a bug", InternalError),
        # A node that is killed while a session opens; it was seen as this in one of 400 kills.
        (grpc.StatusCode.INTERNAL, "Internal error from Core", UnavailableError),
    ],
)
def test_the_status_of_a_call_becomes_a_typed_error(
    code: grpc.StatusCode, details: str, kind: type[KVStoreError]
) -> None:
    error = error_of_call(AioRpcError(code, Metadata(), Metadata(), details))
    assert type(error) is kind

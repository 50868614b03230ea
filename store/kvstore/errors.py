"""The one exception tree of kvstore; ``code`` is the number of the gRPC status it maps to."""


class KVStoreError(Exception):
    """Base of every error that kvstore raises on purpose; the message names the remedy."""

    code = 2  # UNKNOWN


class InvalidArgumentError(KVStoreError, ValueError):
    """A value that can never be right."""

    code = 3  # INVALID_ARGUMENT


class ConfigError(InvalidArgumentError):
    """A daemon's configuration cannot be used; commands exit with 2."""


class PreconditionError(KVStoreError):
    """Right in itself, but not in this state: another protocol version, no session yet."""

    code = 9  # FAILED_PRECONDITION


class NotFoundError(KVStoreError, LookupError):
    """The named thing does not exist. A missing block is a miss, not this."""

    code = 5  # NOT_FOUND


class ResourceExhaustedError(KVStoreError):
    """A limit was reached: space, entries, streams, message size."""

    code = 8  # RESOURCE_EXHAUSTED


class UnavailableError(KVStoreError, ConnectionError):
    """The peer cannot be reached now; trying again later may succeed."""

    code = 14  # UNAVAILABLE


class DeadlineError(KVStoreError, TimeoutError):
    """The call's time was over before its answer came."""

    code = 4  # DEADLINE_EXCEEDED


class CorruptError(KVStoreError):
    """Bytes on a medium are not what was written there."""

    code = 15  # DATA_LOSS


class StaleEpochError(KVStoreError):
    """The caller acts under an older cluster epoch."""

    code = 10  # ABORTED


class InternalError(KVStoreError):
    """A bug in kvstore; the daemon's log has the traceback."""

    code = 13  # INTERNAL


_BY_CODE: dict[int, type[KVStoreError]] = {
    1: UnavailableError,  # CANCELLED
    2: InternalError,  # UNKNOWN
    3: InvalidArgumentError,
    4: DeadlineError,
    5: NotFoundError,
    6: PreconditionError,  # ALREADY_EXISTS
    7: PreconditionError,  # PERMISSION_DENIED
    8: ResourceExhaustedError,
    9: PreconditionError,
    10: StaleEpochError,
    11: InvalidArgumentError,  # OUT_OF_RANGE
    12: PreconditionError,  # UNIMPLEMENTED: a peer of another version
    13: InternalError,
    14: UnavailableError,
    15: CorruptError,
    16: PreconditionError,  # UNAUTHENTICATED
}


def error_from_code(code: int, message: str) -> KVStoreError:
    """The typed error for the number of a gRPC status code, 1 to 16."""
    return _BY_CODE.get(code, InternalError)(message)

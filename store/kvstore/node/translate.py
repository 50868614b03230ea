"""Between the core's words and protobuf messages; nothing else is done here."""

from collections.abc import Callable
from typing import Any

from kvstore_proto import common_pb2, master_pb2, node_pb2

from kvstore.core import effects as fx
from kvstore.core.spec import CacheSpec
from kvstore.core.types import Namespace, SlotRun, TierUsage
from kvstore.errors import KVStoreError

Response = node_pb2.SessionResponse
RUN_BYTES = 80  # of memory, in a message


def number(value: int) -> Any:
    """An enum's number, which is the protocol's; the stubs give each enum a type of its own."""
    return int(value)


def spec_from_message(message: common_pb2.CacheSpec) -> CacheSpec:
    """The spec that a client names; InvalidArgumentError if it can be none."""
    return CacheSpec(
        model=message.model,
        weights_fingerprint=message.weights_fingerprint,
        weights_epoch=message.weights_epoch,
        kv_dtype=message.kv_dtype,
        format_version=message.format_version,
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        attention=message.attention,
        rope=message.rope,
        block_tokens=message.block_tokens,
        block_bytes=message.block_bytes,
    )


def spec_to_message(spec: CacheSpec) -> common_pb2.CacheSpec:
    """The message of a spec."""
    return common_pb2.CacheSpec(
        model=spec.model,
        weights_fingerprint=spec.weights_fingerprint,
        weights_epoch=spec.weights_epoch,
        kv_dtype=spec.kv_dtype,
        format_version=spec.format_version,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        attention=spec.attention,
        rope=spec.rope,
        block_tokens=spec.block_tokens,
        block_bytes=spec.block_bytes,
    )


def namespace_to_message(namespace: Namespace) -> master_pb2.NamespaceReport:
    """What the master, and the SSD index, keep of a namespace."""
    spec = None if namespace.spec is None else spec_to_message(namespace.spec)
    return master_pb2.NamespaceReport(root=namespace.root, spec=spec, tenant=namespace.tenant)


def usage_to_message(usage: TierUsage) -> common_pb2.TierUsage:
    """The message of a tier's space."""
    return common_pb2.TierUsage(
        tier=number(usage.tier),
        capacity_bytes=usage.capacity_bytes,
        free_bytes=usage.free_bytes,
        live_bytes=usage.live_bytes,
        pending_bytes=usage.pending_bytes,
        quarantined_bytes=usage.quarantined_bytes,
        blocks=usage.blocks,
    )


def error_response(request_id: int, error: KVStoreError) -> Response:
    """The answer to a request that failed; the session goes on."""
    return Response(id=request_id, error=node_pb2.SessionError(code=error.code, message=str(error)))


def reply_to_message(reply: fx.Reply) -> Response:
    """The message of one of the core's answers."""
    return _BY_BODY[type(reply.body)](reply.request_id, reply.body)


def answer_bytes(body: fx.Body) -> int:
    """About how much memory an answer takes until it is written."""
    match body:
        case fx.Granted():
            return RUN_BYTES * len(body.runs) + len(body.generations)
        case fx.Reserved():
            return RUN_BYTES * len(body.runs) + len(body.generations) + len(body.statuses)
        case fx.Committed():
            return len(body.levels)
        case fx.Matched():
            return len(body.tiers)
    return 0


def _runs(runs: list[SlotRun]) -> list[node_pb2.SlotRun]:
    return [
        node_pb2.SlotRun(
            first=run.first,
            count=run.count,
            offset=run.offset,
            stride=run.stride,
            source=number(run.source),
        )
        for run in runs
    ]


def _granted(request_id: int, body: fx.Granted) -> Response:
    granted = node_pb2.Granted(runs=_runs(body.runs), generations=body.generations)
    return Response(id=request_id, granted=granted)


def _end(request_id: int, body: fx.End) -> Response:
    return Response(
        id=request_id, end=node_pb2.End(granted=body.granted, reason=number(body.reason))
    )


def _reserved(request_id: int, body: fx.Reserved) -> Response:
    reserved = node_pb2.Reserved(
        statuses=body.statuses, runs=_runs(body.runs), generations=body.generations
    )
    return Response(id=request_id, reserved=reserved)


def _committed(request_id: int, body: fx.Committed) -> Response:
    return Response(id=request_id, committed=node_pb2.Committed(levels=body.levels))


def _aborted(request_id: int, body: fx.Aborted) -> Response:
    return Response(id=request_id, aborted=node_pb2.Aborted(count=body.count))


def _prefetched(request_id: int, body: fx.Prefetched) -> Response:
    return Response(id=request_id, prefetched=node_pb2.Prefetched(started=body.started))


def _matched(request_id: int, body: fx.Matched) -> Response:
    return Response(id=request_id, matched=node_pb2.Matched(tiers=body.tiers))


def _failed(request_id: int, body: fx.Failed) -> Response:
    return error_response(request_id, body.error)


_BY_BODY: dict[type, Callable[[int, Any], Response]] = {
    fx.Granted: _granted,
    fx.End: _end,
    fx.Reserved: _reserved,
    fx.Committed: _committed,
    fx.Aborted: _aborted,
    fx.Prefetched: _prefetched,
    fx.Matched: _matched,
    fx.Failed: _failed,
}

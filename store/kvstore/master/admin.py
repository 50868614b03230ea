"""The Admin service: what the kvstore command asks."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
from kvstore_proto import admin_pb2, admin_pb2_grpc, common_pb2, master_pb2

import kvstore
from kvstore.core.keys import block_keys, join_keys, salt_extra, split_keys
from kvstore.core.place_sets import Place
from kvstore.core.types import Tier
from kvstore.errors import (
    InvalidArgumentError,
    KVStoreError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from kvstore.master.cluster import Cluster
from kvstore.master.membership import PROTOCOL_VERSION, Node, NodeState
from kvstore.master.messages import check_root, clamped, end_value, run_message, tier_value

LIST_ROWS = 100
LIST_ROWS_MAX = 10_000
PROMPT_TOKENS_MAX = 1 << 21  # that a message has room for
PROMPT_BLOCKS_MAX = 131_072
DIRECTIVE_TIMEOUT_S = 60.0

Context = grpc.aio.ServicerContext[Any, Any]


class AdminService(admin_pb2_grpc.AdminServicer):
    """Answers from the cluster's parts; removals are asked of the nodes, which own the blocks."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def Status(  # noqa: N802
        self, request: admin_pb2.StatusRequest, context: Context
    ) -> admin_pb2.StatusResponse:
        """The cluster in a few figures."""
        del request, context
        cluster = self._cluster
        ready = cluster.members.in_state(NodeState.READY)
        now = time.monotonic()
        return admin_pb2.StatusResponse(
            version=kvstore.__version__,
            cluster_epoch=cluster.epoch,
            uptime_s=int(now - cluster.started),
            indexed_blocks=cluster.locations.entries,
            index_bytes=cluster.locations.memory_bytes(),
            nodes_ready=len(ready),
            nodes_lost=len(cluster.members.in_state(NodeState.LOST)),
            tiers=_sum_tiers(ready, self._hbm_blocks()),
            namespaces=len(cluster.namespaces),
            leader=True,
            problems=[
                f"{n.known.node_id}: {text}"
                for n in cluster.members.connected()
                for text in n.problems_at(now)
            ],
            ssd_admissions=sorted({n.ssd_admission for n in ready} - {""}),
        )

    async def ListNodes(  # noqa: N802
        self, request: admin_pb2.ListNodesRequest, context: Context
    ) -> admin_pb2.ListNodesResponse:
        """Every known node, lost ones included."""
        del request, context
        now = time.monotonic()
        nodes = sorted(self._cluster.members.nodes.items())
        return admin_pb2.ListNodesResponse(nodes=[self._node_info(node, now) for _, node in nodes])

    async def ForgetNode(  # noqa: N802
        self, request: admin_pb2.ForgetNodeRequest, context: Context
    ) -> admin_pb2.ForgetNodeResponse:
        """Takes a node that will not come back off the list, durably."""
        del context
        await self._cluster.forget_node(request.node_id)
        return admin_pb2.ForgetNodeResponse()

    def _node_info(self, node: Node, now: float) -> admin_pb2.NodeInfo:
        # A node that has not been here since the master's start was last seen before that.
        seen = self._cluster.started if node.last_seen is None else node.last_seen
        return admin_pb2.NodeInfo(
            node_id=node.known.node_id,
            address=node.known.address,
            hostname=node.known.hostname,
            version=node.known.version,
            state=node.state.value,
            last_seen_ms=int((now - seen) * 1000),
            sessions=node.sessions,
            tiers=node.tiers,
            problems=node.problems_at(now),
            ssd_admission=node.ssd_admission,
        )

    async def ListNamespaces(  # noqa: N802
        self, request: admin_pb2.ListNamespacesRequest, context: Context
    ) -> admin_pb2.ListNamespacesResponse:
        """Every known namespace, empty ones included."""
        del request, context
        blocks = self._cluster.locations.namespace_keys()
        return admin_pb2.ListNamespacesResponse(
            namespaces=[
                admin_pb2.NamespaceInfo(
                    root=root, spec=report.spec, tenant=report.tenant, blocks=blocks.get(root, 0)
                )
                for root, report in sorted(self._cluster.namespaces.items())
            ]
        )

    async def ListBlocks(  # noqa: N802
        self, request: admin_pb2.ListBlocksRequest, context: Context
    ) -> admin_pb2.ListBlocksResponse:
        """Blocks in the order of their keys. A page ends with the last row of a block, so it may
        exceed its limit where one block alone has more copies than that.
        """
        del context
        limit = request.limit or LIST_ROWS
        if limit > LIST_ROWS_MAX:
            raise InvalidArgumentError(f"limit is {limit}; take 1 to {LIST_ROWS_MAX}")
        if request.root:
            self._namespace(request.root)
        if request.node_id:
            self._nodes(request.node_id)
        # Sorting may take a while: it works on a copy, off the event loop.
        page = await asyncio.to_thread(
            self._cluster.locations.pager(), _wanted(request), request.after, limit
        )
        sizes = {root: r.spec.block_bytes for root, r in self._cluster.namespaces.items()}
        return admin_pb2.ListBlocksResponse(
            blocks=[
                admin_pb2.BlockInfo(
                    key=key,
                    root=place.root,
                    node_id=place.node_id,
                    tier=tier_value(place.tier),
                    engine_id=place.engine_id,
                    bytes=sizes.get(place.root, 0),
                )
                for key, places in page.rows
                for place in places
            ],
            next=page.next,
        )

    async def LocatePrompt(  # noqa: N802
        self, request: admin_pb2.LocatePromptRequest, context: Context
    ) -> admin_pb2.LocatePromptResponse:
        """Every copy of the leading blocks of a prompt."""
        del context
        report = self._namespace(request.root) if request.root else self._only_namespace()
        if len(request.tokens) > PROMPT_TOKENS_MAX:
            raise InvalidArgumentError(f"a prompt has at most {PROMPT_TOKENS_MAX} tokens here")
        block_tokens = report.spec.block_tokens
        if not block_tokens:
            raise PreconditionError(
                f"no node has told how many tokens a block of namespace {report.root.hex()} has; a "
                "client that opens it tells its node"
            )
        if (blocks := len(request.tokens) // block_tokens) > PROMPT_BLOCKS_MAX:
            raise InvalidArgumentError(
                f"the prompt has {blocks} blocks of {block_tokens} tokens; at most "
                f"{PROMPT_BLOCKS_MAX} are located at once"
            )
        salt = salt_extra(request.cache_salt or None)
        keys = await asyncio.to_thread(block_keys, report.root, request.tokens, block_tokens, salt)
        located = self._cluster.locations.copies(join_keys(keys))
        return admin_pb2.LocatePromptResponse(
            blocks=len(keys),
            found=located.found,
            runs=[run_message(run) for run in located.runs],
            block_tokens=block_tokens,
            end=end_value(located.reason),
        )

    async def Evict(  # noqa: N802
        self, request: admin_pb2.EvictRequest, context: Context
    ) -> admin_pb2.RemovalResponse:
        """Asks one node, or each connected one in turn, to evict; a limit in bytes holds for all
        together.
        """
        if int(request.tier) not in (Tier.DRAM, Tier.SSD):
            raise InvalidArgumentError(f"blocks are evicted from DRAM or SSD, not {request.tier}")
        split_keys(request.keys)
        answer = admin_pb2.RemovalResponse()
        members = self._cluster.members
        nodes = self._nodes(request.node_id) if request.node_id else members.connected()
        for node in nodes:
            if request.bytes and answer.bytes >= request.bytes:
                break
            order = master_pb2.EvictBlocks(
                tier=request.tier,
                keys=request.keys,
                bytes=max(request.bytes - answer.bytes, 0),
                drop=request.drop,
            )
            await self._order(node, master_pb2.Directive(evict=order), answer, context)
        return answer

    async def Purge(  # noqa: N802
        self, request: admin_pb2.PurgeRequest, context: Context
    ) -> admin_pb2.RemovalResponse:
        """Asks every node to forget a namespace, or all of them."""
        if bool(request.root) == request.all:
            raise InvalidArgumentError("name the root of one namespace to purge, or ask for all")
        roots = list(self._cluster.namespaces)
        if request.root:
            roots = [self._namespace(request.root).root]
        for root in roots:
            self._cluster.locations.expect_purge(root)
        answer = admin_pb2.RemovalResponse()
        for node in self._nodes(""):
            order = master_pb2.PurgeNamespace(root=request.root)
            await self._order(node, master_pb2.Directive(purge=order), answer, context)
        return answer

    async def Version(  # noqa: N802
        self, request: admin_pb2.VersionRequest, context: Context
    ) -> admin_pb2.VersionResponse:
        """Of this master."""
        del request, context
        return admin_pb2.VersionResponse(
            version=kvstore.__version__, protocol_version=PROTOCOL_VERSION
        )

    async def _order(
        self,
        node: Node,
        directive: master_pb2.Directive,
        answer: admin_pb2.RemovalResponse,
        context: Context,
    ) -> None:
        """Has one node carry out a directive, and adds what came of it to ``answer``."""
        left_s = context.time_remaining()
        timeout_s = min(DIRECTIVE_TIMEOUT_S, DIRECTIVE_TIMEOUT_S if left_s is None else left_s)
        try:
            if node.link is None:
                raise UnavailableError("not connected; what it holds on SSD stays as it is")
            result = await node.link.ask(directive, timeout_s)
        except KVStoreError as error:
            self._note_error(node, str(error), answer)
            return
        answer.blocks = clamped(answer.blocks + result.blocks)
        answer.bytes = clamped(answer.bytes + result.bytes)
        answer.pinned = clamped(answer.pinned + result.pinned)
        if result.error:
            self._note_error(node, result.error, answer)
            return
        answer.nodes += 1
        self._cluster.metrics.directives.labels("done").inc()

    def _hbm_blocks(self) -> int:
        """Blocks in the pages of engines, whose space no node accounts for."""
        counts = self._cluster.locations.counts()
        return sum(blocks for place, blocks in counts.items() if place.tier is Tier.HBM)

    def _note_error(self, node: Node, error: str, answer: admin_pb2.RemovalResponse) -> None:
        answer.errors.append(f"{node.known.node_id}: {error}")
        self._cluster.metrics.directives.labels("failed").inc()

    def _nodes(self, node_id: str) -> list[Node]:
        """One node, or all of them in the order of their ids if ``node_id`` is empty."""
        nodes = self._cluster.members.nodes
        if not node_id:
            return [node for _, node in sorted(nodes.items())]
        if node_id not in nodes:
            raise NotFoundError(f"no node {node_id!r}; `kvstore nodes` lists them")
        return [nodes[node_id]]

    def _namespace(self, root: bytes) -> master_pb2.NamespaceReport:
        check_root(root)
        if (report := self._cluster.namespaces.get(root)) is None:
            raise NotFoundError(f"no namespace {root.hex()}; `kvstore status` lists them")
        return report

    def _only_namespace(self) -> master_pb2.NamespaceReport:
        known = self._cluster.namespaces
        if not known:
            raise NotFoundError("there is no namespace yet: no client has opened one")
        if len(known) > 1:  # those without blocks are left over, and cannot be meant
            filled = self._cluster.locations.namespace_keys()
            known = {root: report for root, report in known.items() if filled.get(root)}
        if not known:
            raise NotFoundError("nothing is cached: no namespace has a block")
        if len(known) == 1:
            return next(iter(known.values()))
        listed = ", ".join(
            f"{root.hex()[:12]} ({report.spec.model})" for root, report in sorted(known.items())
        )
        raise InvalidArgumentError(
            f"there are several namespaces, name one of them with --namespace: {listed}"
        )


def _wanted(request: admin_pb2.ListBlocksRequest) -> Callable[[Place], bool]:
    def wanted(place: Place) -> bool:
        return (
            request.root in (b"", place.root)
            and request.node_id in ("", place.node_id)
            and int(request.tier) in (Tier.UNSPECIFIED, place.tier)
        )

    return wanted


def _sum_tiers(nodes: list[Node], hbm_blocks: int) -> list[common_pb2.TierUsage]:
    """Usage of each tier over all nodes, in the order of the tiers; of HBM only its blocks."""
    names = [f.name for f in common_pb2.TierUsage.DESCRIPTOR.fields if f.name != "tier"]
    sums: dict[int, Counter[str]] = {}
    if hbm_blocks:
        sums[Tier.HBM] = Counter(blocks=hbm_blocks)
    for usage in (usage for node in nodes for usage in node.tiers):
        sums.setdefault(usage.tier, Counter()).update({n: getattr(usage, n) for n in names})
    return [
        common_pb2.TierUsage(tier=tier, **{n: clamped(v) for n, v in sums[tier].items()})  # type: ignore[arg-type]
        for tier in sorted(sums)
    ]

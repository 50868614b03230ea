"""When all is mended: every block that is there reads right, and what was promised is there."""

from typing import TYPE_CHECKING

from kvstore.core.effects import Body, End, Granted
from kvstore.core.types import EndReason

from tests.sim.oracle import Broken, must
from tests.sim.scenery import Space

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.node import Node

READER = 1_000_000  # a session that no client has


class _Reader:
    """Reads through the core, with the answers taken from its effects."""

    def __init__(self, cluster: "Cluster", node: "Node") -> None:
        self.cluster = cluster
        self.node = node
        self.answers: dict[int, list[Body]] = {}
        self._requests = 0
        node.core.open_session(READER)
        node.listen(READER, lambda request, body: self.answers[request].append(body))

    def read(self, space: Space, keys: tuple[bytes, ...]) -> End:
        """The leading blocks; checks their bytes and lets them go."""
        node, world = self.node, self.cluster.world
        self._requests += 1
        request = self._requests
        answers = self.answers[request] = []
        namespace = node.namespaces[space.tenant, space.spec].id
        core = node.core
        joined = b"".join(keys)
        node.apply(core.acquire(READER, request, namespace, joined, b"", 60.0, world.now))
        while not answers or not isinstance(answers[-1], End):
            world.step()
        index = 0
        for body in answers:
            for run in body.runs if isinstance(body, Granted) else ():
                for at in range(run.count):
                    offset = run.offset + at * run.stride
                    data = bytes(node.pool[offset : offset + space.spec.block_bytes])
                    right = self.cluster.oracle.is_right(space.tenant, keys[index], data)
                    must(right, "I1", f"{keys[index].hex()[:16]} reads wrong after all is mended")
                    index += 1
        node.apply(core.release(READER, request, 0, 0, world.now))
        end = answers[-1]
        assert isinstance(end, End)
        return end

    def close(self) -> None:
        """Leaves."""
        self.node.apply(self.node.core.session_settled(READER, self.cluster.world.now))
        while not self.node.core.idle():
            self.cluster.world.step()


def final_reads(cluster: "Cluster", node: "Node") -> None:
    """Reads every chain, and then each block that was acknowledged as synced by itself."""
    reader = _Reader(cluster, node)
    synced = set(cluster.oracle.synced[node.node_id])
    for space in cluster.spaces:
        for chain in space.chains:
            reader.read(space, chain.keys)
            for key in chain.keys:
                if (space.root, key) in synced:
                    end = reader.read(space, (key,))
                    gone = (space.root, key) not in cluster.oracle.synced[node.node_id]
                    # A DRAM that is full of its own ancestors, which are nowhere else, may refuse.
                    if end.reason not in (EndReason.COMPLETE, EndReason.NO_SPACE) and not gone:
                        raise Broken("I3", f"a synced block ends with {end.reason.name}", lost=True)
    reader.close()

"""Who stores what: tenants, their chains of keys, and the shape of a cluster, drawn by a seed."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

from kvstore.core import keys
from kvstore.core.spec import CacheSpec

from tests.sim.world import World

TENANTS = {"red": b"secret of red", "blue": b"secret of blue"}
BLOCK_TOKENS = 4
CHAIN_BLOCKS = 8
SMALL = CacheSpec.raw("small", block_bytes=256, block_tokens=BLOCK_TOKENS)
LARGE = CacheSpec.raw("large", block_bytes=4096 + 256, block_tokens=BLOCK_TOKENS)


@dataclass(frozen=True)
class Chain:
    """Keys in their order; a block of it is filled by ``shards`` clients together."""

    keys: tuple[bytes, ...]
    shards: int = 1

    @cached_property
    def joined(self) -> bytes:
        """As one wire field."""
        return b"".join(self.keys)


@dataclass
class Space:
    """One spec of one tenant, with the chains that its clients store."""

    tenant: str
    spec: CacheSpec
    root: bytes
    chains: list[Chain] = field(default_factory=list)


def twin(chain: Chain) -> Chain:
    """Other keys that begin with the same 64 bits."""
    return Chain(tuple(k[:8] + hashlib.blake2b(k, digest_size=24).digest() for k in chain.keys))


def spaces(world: World, root_of: dict[tuple[str, CacheSpec], bytes]) -> list[Space]:
    """The same tokens for both tenants: only the roots, which nodes gave, tell them apart."""
    made = []
    prompts = [
        [world.random.randrange(1 << 16) for _ in range(BLOCK_TOKENS * CHAIN_BLOCKS)]
        for _ in range(3)
    ]
    half = BLOCK_TOKENS * CHAIN_BLOCKS // 2
    for spec in (SMALL, LARGE):
        for tenant in TENANTS:
            root = root_of[tenant, spec]
            space = Space(tenant, spec, root)
            for prompt in prompts[: 2 if spec is SMALL else 1]:
                space.chains.append(Chain(tuple(keys.block_keys(root, prompt, BLOCK_TOKENS))))
            if spec is SMALL:
                fork = prompts[0][:half] + prompts[2][half:]
                space.chains.append(Chain(tuple(keys.block_keys(root, fork, BLOCK_TOKENS))))
                space.chains.append(twin(space.chains[0]))
                together = keys.block_keys(root, prompts[2], BLOCK_TOKENS)
                space.chains.append(Chain(tuple(together[:4]), shards=2))
            made.append(space)
    return made

"""The connector's thread: one event loop, one client, connected again whenever it was lost."""

import asyncio
import hashlib
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from kvstore.core.keys import namespace_root
from kvstore.core.spec import CacheSpec
from kvstore.core.types import EndReason
from kvstore.errors import KVStoreError, PreconditionError, UnavailableError

from kvstore_connector.counters import Counters
from kvstore_connector.store import Client, Connect, Namespace

log = logging.getLogger(__name__)

BACKOFF_S_MIN = 0.2
BACKOFF_S_MAX = 2.0
PROBE_INTERVAL_S = 0.5
CLOSE_S_MAX = 3.0
_PROBE_KEY = hashlib.sha256(b"kvstore connector probe").digest()


async def end_of_chain(namespace: Namespace, key: bytes, parent: bytes | None) -> EndReason:
    """Why the node has no ``key``: COMPLETE if it has, TIMED_OUT if it did not answer."""
    lease = await namespace.acquire([key], parent=parent, timeout_s=0)
    try:
        await lease.wait()
    finally:
        lease.release()
    return lease.reason or EndReason.UNSPECIFIED


class Link:
    """Keeps a namespace open at the node; ``namespace`` is None while the store is of no use.

    The engine loop only reads ``namespace`` and calls ``submit``; everything else happens in the
    link's thread. A node that let a deadline pass is left alone until it answers a probe, so that
    a stalled node costs one deadline and not one for each request.
    """

    def __init__(
        self,
        connect: Connect,
        spec: CacheSpec,
        tenant: str,
        counters: Counters,
        *,
        on_up: Callable[[], None] = lambda: None,
        on_down: Callable[[], None] = lambda: None,
    ) -> None:
        self.namespace: Namespace | None = None
        self.root = namespace_root(spec)
        self.loop = asyncio.new_event_loop()
        self._connect = connect
        self._spec = spec
        self._tenant = tenant
        self._counters = counters
        self._on_up = on_up
        self._on_down = on_down
        self._client: Client | None = None
        self._probe: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lost = asyncio.Event()
        self._attempted = threading.Event()
        self._root_fixed = False
        self._trouble = ""
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kvstore-link", daemon=True)

    def start(self, wait_s: float) -> None:
        """Starts the thread; waits up to ``wait_s`` for the first attempt to connect.

        From then on the root is fixed: the node's, or, with no node, what it follows from.
        """
        self._thread.start()
        if not self._attempted.wait(wait_s):
            log.warning("the kvstore node has not answered yet; going on without it")
        self._root_fixed = True

    def submit(self, call: Callable[..., Any], *args: Any) -> bool:
        """Runs ``call`` in the link's thread; False once the link is closed."""
        if self._closing:
            return False
        try:
            self.loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            return False
        return True

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs ``work`` as a task of the link's loop. Call in the link's thread."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def missed_deadline(self, namespace: Namespace) -> None:
        """The node did not answer in time: keep away until it does. In the link's thread."""
        if self.namespace is not namespace:
            return
        self.namespace = None
        log.warning("the kvstore node let a deadline pass; not asking it until it answers again")
        self._probe = self.loop.create_task(self._probe_until_answered(namespace))

    def close(self) -> None:
        """Ends the tasks, says goodbye, stops the thread; a few seconds at most."""
        if self._closing:
            return
        self._closing = True
        self.namespace = None
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._main.cancel)
            self._thread.join(CLOSE_S_MAX + 1)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self._main = self.loop.create_task(self._keep_connected())
        try:
            self.loop.run_until_complete(self._main)
        except asyncio.CancelledError:
            self.loop.run_until_complete(self._shut_down())
        finally:
            self.loop.close()

    async def _keep_connected(self) -> None:
        backoff_s = BACKOFF_S_MIN
        while True:
            try:
                client = await self._connected()
                namespace = await client.open_namespace(self._spec, tenant=self._tenant)
                self._check_root(namespace)
                self._up(namespace)
                backoff_s = BACKOFF_S_MIN
                while not client.closed:
                    self._lost.clear()
                    await self._lost.wait()
                log.warning("the session with the kvstore node is lost; connecting again")
                self._counters.add("connector_sessions_lost")
            except KVStoreError as error:
                self._report(str(error))
            except Exception:
                log.exception("no session with the kvstore node")
            self._down()
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_S_MAX)

    async def _connected(self) -> Client:
        """The client, with a session. A new one waits until nothing of the old one is in use."""
        if self._client is None:
            self._client = await self._connect(self._lost.set)
        elif self._client.closed:
            await self._client.reconnect()
        return self._client

    def _check_root(self, namespace: Namespace) -> None:
        if namespace.root == self.root:
            return
        if self._root_fixed:
            raise PreconditionError(
                f"the node's root for tenant {self._tenant!r} is not the one that this engine's "
                "keys start from; restart the engine to use this node"
            )
        self.root = namespace.root

    def _report(self, trouble: str) -> None:
        """Once, not at each of the attempts that follow."""
        if trouble != self._trouble:
            log.warning("no session with the kvstore node, going on without it: %s", trouble)
        self._trouble = trouble

    def _up(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self._trouble = ""
        log.info("the session with the kvstore node is open")
        self._counters.add("connector_sessions")
        self._attempted.set()
        self._on_up()

    def _down(self) -> None:
        self.namespace = None
        self._attempted.set()
        if self._probe is not None:
            self._probe.cancel()
            self._probe = None
        self._on_down()

    async def _probe_until_answered(self, namespace: Namespace) -> None:
        """Asks at once, as a slow medium is no stalled node, and from then on now and again."""
        try:
            while await end_of_chain(namespace, _PROBE_KEY, None) == EndReason.TIMED_OUT:
                self._counters.add("connector_stalls")
                await asyncio.sleep(PROBE_INTERVAL_S)
        except UnavailableError:
            return  # a new session follows
        except KVStoreError as error:
            log.debug("the node refused a probe, and so is there: %s", error)
        self._probe = None
        self.namespace = namespace

    async def _shut_down(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S_MAX)
        self._down()
        if self._client is not None:
            try:
                async with asyncio.timeout(CLOSE_S_MAX):
                    await self._client.close()
            except (KVStoreError, TimeoutError) as error:
                log.debug("closing the session: %s", error)

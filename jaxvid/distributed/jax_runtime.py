"""JAX's distributed runtime. All uses of its private API are in this file.

This use was checked with jax 0.10.2 and 0.11.2: `jax._src.xla_bridge.backends_are_initialized`,
`jax._src.distributed.global_state`, the constructor of the distributed client in
`jax._src.lib._jax`, and the client's key-value functions, which release the GIL and raise
JaxRuntimeError if process 0 cannot be reached.
"""

import ctypes
import dataclasses
import platform
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed, xla_bridge
from jax._src.lib import _jax

from jaxvid.distributed.exits import end_at_exit, exit_code
from jaxvid.distributed.relay import Relay
from jaxvid.distributed.store import Store
from jaxvid.errors import InputError

_relay: Relay | None = None


def devices_are_used() -> bool:
    """Return whether JAX has started a backend, which fixes XLA's flags."""
    return xla_bridge.backends_are_initialized()


class JaxStore:
    """The `Store` of JAX's distributed client."""

    def __init__(self, client: Any):
        self._client = client

    def set(self, key: str, value: str) -> None:
        """See `Store`."""
        self._client.key_value_set(key, value, allow_overwrite=True)

    def set_first(self, key: str, value: str) -> None:
        """See `Store`."""
        try:
            self._client.key_value_set(key, value)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def get(self, key: str, seconds: float) -> str | None:
        """See `Store`."""
        try:
            return self._client.blocking_key_value_get(key, int(1000 * seconds))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        return None

    def list(self, prefix: str) -> dict[str, str]:
        """See `Store`."""
        return dict(self._client.key_value_dir_get(prefix))

    def delete(self, key: str) -> None:
        """See `Store`."""
        self._client.key_value_delete(key)


@dataclasses.dataclass(frozen=True)
class Connection:
    """Connection of this process to the other processes of the run.

    Attributes:
        store: The key-value store that all processes share.
        index: Index of this process.
        count: Number of processes.
        lost: Set once the connection to process 0 is lost; None in process 0.
        host: Name of this machine; empty: unknown.
    """

    store: Store
    index: int
    count: int
    lost: threading.Event | None
    host: str = ""


def connection() -> Connection | None:
    """Return the connection to the other processes, or None if this process runs alone."""
    state = distributed.global_state
    if state.client is None:
        return None
    lost = _relay.lost if _relay else None
    store = JaxStore(state.client)
    return Connection(store, state.process_id, state.num_processes, lost, platform.node())


def detach() -> None:
    """Let this process exit without waiting for the others, which must have finished as well.

    JAX's exit handler would wait for the other processes once more. If process 0 ends before it has
    answered, this process would wait forever, because `Relay` hides that the connection is broken.
    """
    state = distributed.global_state
    for connection_end in (state.client, state.service):
        # It is never destroyed: its destructor would wait for the other processes or abort.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection_end))
    state.client = state.service = None


class _Joining:
    """State of a call of `join`.

    Attributes:
        relay: Relay from this process to process 0; None in process 0.
        missing: Description of the process that the call is waiting for, for messages.
        given_up: Whether the thread that connects to process 0 shall stop waiting.

    Args:
        make: JAX's constructor of a distributed client.
    """

    def __init__(self, make: Callable):
        self._make = make
        self.relay: Relay | None = None
        self.missing = "another process"
        self.given_up = False

    def make_client(self, address: str, process: int, *args: Any, **options: Any) -> Any:
        """Make JAX's distributed client. Processes other than the first connect through a relay."""
        count = distributed.global_state.num_processes
        others = f"process {1 - process}" if count == 2 else f"one of the {count - 1} others"
        if process:
            self.missing, self.relay = f"process 0 at {address}", Relay(address)
            while not self.relay.finds_coordinator():
                if self.given_up:
                    raise ConnectionError(address)
                time.sleep(0.2)
            address = self.relay.address
        self.missing = others
        return self._make(address, process, *args, **options)


def join(initialize: Callable[[], None], seconds: float) -> None:
    """Join the other processes of the run.

    JAX's call waits in C++ and aborts the process after its timeout. Therefore it runs in another
    thread, with a timeout that is never reached, and this function measures the time. Signals are
    then handled, and a timeout is reported in one line.

    Args:
        initialize: Calls `jax.distributed.initialize`.
        seconds: Maximum time to wait for the other processes.

    Raises:
        InputError: Some processes did not join in time.
        Exception: Whatever `initialize` raises.
    """
    global _relay
    make, errors = _jax.get_distributed_runtime_client, []
    joining, deadline = _Joining(make), time.monotonic() + seconds

    def run() -> None:
        try:
            initialize()
        except BaseException as error:
            errors.append(error)

    _jax.get_distributed_runtime_client = joining.make_client
    try:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            if time.monotonic() > deadline:
                raise InputError(
                    f"{joining.missing} did not join within {seconds:.0f} s; start all processes "
                    "with the same --coordinator within --join_seconds"
                )
            thread.join(0.1)
    except BaseException as error:
        joining.given_up = True
        end_at_exit(exit_code(error))  # the thread cannot be stopped
        raise
    finally:
        _jax.get_distributed_runtime_client = make
    if errors:
        raise errors[0]
    _relay = joining.relay
    if _relay is not None:
        _relay.joined = True

"""The key-value store that the processes of a run share."""

import contextlib
import threading
import time
from typing import Protocol

import jax


class Store(Protocol):
    """A key-value store that all processes share."""

    def set(self, key: str, value: str) -> None:
        """Set a value, even if the key exists."""

    def set_first(self, key: str, value: str) -> None:
        """Set a value if the key does not exist yet; otherwise, do nothing."""

    def get(self, key: str, seconds: float) -> str | None:
        """Return a value, or None if the key does not exist after `seconds` of waiting."""

    def list(self, prefix: str) -> dict[str, str]:
        """Return all keys that start with `prefix`, and their values."""

    def delete(self, key: str) -> None:
        """Delete a key."""


def set_last_key(store: Store, key: str, lost: threading.Event, seconds: float) -> None:
    """Set a key that allows the process that hosts the store to end. Its value is empty.

    If that process ends before it has answered, `Store.set` never returns, because the client does
    not notice that the connection is broken. It is therefore called in another thread.

    Args:
        store: The store.
        key: The key.
        lost: Is set once the connection is broken.
        seconds: Maximum time to wait.
    """

    def set_key() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            store.set(key, "")

    thread = threading.Thread(target=set_key, daemon=True)
    deadline = time.monotonic() + seconds
    thread.start()
    while thread.is_alive() and not lost.wait(0.02) and time.monotonic() < deadline:
        pass

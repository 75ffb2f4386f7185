"""The key-value store that the processes of a run share."""

from typing import Protocol

import jax


class Store(Protocol):
    """A key-value store that all processes share."""

    def set(self, key: str, value: str) -> None:
        """Set or overwrite a value."""

    def set_first(self, key: str, value: str) -> None:
        """Set a value unless there is one."""

    def get(self, key: str, seconds: float) -> str | None:
        """Wait for a value; None: there is none yet."""

    def list(self, prefix: str) -> dict[str, str]:
        """Return all keys below a prefix, and their values."""

    def delete(self, key: str) -> None:
        """Delete a key."""


class JaxStore:
    """The store of JAX's distributed client.

    The client is private API (checked with jax 0.10.2). Its functions release the GIL and raise
    JaxRuntimeError where process 0 cannot be reached.
    """

    def __init__(self, client):
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

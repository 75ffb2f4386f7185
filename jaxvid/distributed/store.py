"""The key-value store that the processes of a run share."""

from typing import Protocol


class Store(Protocol):
    """A key-value store that all processes share."""

    def set(self, key: str, value: str) -> None:
        """Set or overwrite a value."""

    def set_first(self, key: str, value: str) -> None:
        """Set a value unless the key exists."""

    def get(self, key: str, seconds: float) -> str | None:
        """Wait up to `seconds` for a value; None: the key does not exist yet."""

    def list(self, prefix: str) -> dict[str, str]:
        """Return all keys that start with `prefix`, and their values."""

    def delete(self, key: str) -> None:
        """Delete a key."""

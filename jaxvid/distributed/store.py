"""The interface of the key-value store that the processes of a run share."""

from typing import Protocol


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

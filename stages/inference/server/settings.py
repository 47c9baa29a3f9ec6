"""What can be set about a server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Raises ValueError for values that mean nothing."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any free one."""
    api_key: str | None = None
    """Asked of every request but those for the page's own files, /health and /ready."""
    slots: int = 64
    """Answers written together."""
    queue: int = 128
    """Answers that may wait for a slot."""
    max_prompt_tokens: int = 4096
    max_new_tokens: int = 1024
    """Of one answer."""
    max_body_bytes: int = 1 << 20
    unread_seconds: float = 60.0
    """How long a part of an answer may wait for a caller who reads nothing; then the connection is closed."""
    drain_seconds: float = 30.0
    """How long answers under way may go on once the server was asked to stop."""

    def __post_init__(self) -> None:
        for name in ("slots", "max_prompt_tokens", "max_new_tokens", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.queue < 0:
            raise ValueError(f"queue must be at least 0, not {self.queue}")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must lie in [0, 65535], not {self.port}")
        if not 0 < self.unread_seconds < float("inf"):
            raise ValueError(f"unread_seconds must be a finite number above 0, not {self.unread_seconds}")
        if not 0 <= self.drain_seconds < float("inf"):
            raise ValueError(f"drain_seconds must be 0 or a finite number above, not {self.drain_seconds}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ValueError("the API key must be printable ASCII and not empty")

    @property
    def only_this_machine(self) -> bool:
        """Whether nobody else can reach the server."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

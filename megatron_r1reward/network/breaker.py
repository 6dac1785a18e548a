"""A circuit breaker: stop asking a service that does not answer, and find out cheaply when it is back."""

from __future__ import annotations

from typing import Literal

BreakerState = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """Opens after `threshold` failures in a row. When open, `half_open` lets exactly one trial through.

    A success closes it from any state; a failed trial opens it again. Not thread-safe: one event loop uses it.
    """

    def __init__(self, threshold: int) -> None:
        assert threshold > 0
        self._threshold = threshold
        self._failures = 0
        self._trials = 0
        self.state: BreakerState = "closed"

    def half_open(self) -> None:
        """Allow one trial if the circuit is open."""
        if self.state == "open":
            self.state, self._trials = "half_open", 1

    def admits(self) -> bool:
        """Whether a call may be made now; a trial is used up by asking."""
        if self.state == "half_open" and self._trials > 0:
            self._trials -= 1
            return True
        return self.state == "closed"

    def success(self) -> None:
        self._failures = 0
        self.state = "closed"

    def failure(self) -> None:
        self._failures += 1
        if self.state == "half_open" or self._failures >= self._threshold:
            self.state = "open"

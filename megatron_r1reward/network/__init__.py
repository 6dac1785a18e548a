"""What clients and servers of this package share: event loop thread, retry policy, circuit breaker, bearer tokens."""

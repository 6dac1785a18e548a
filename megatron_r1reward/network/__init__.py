"""What clients and servers of this package share: event loop thread, circuit breaker, bearer tokens and their
guard, and how servers are asked for health and administration."""

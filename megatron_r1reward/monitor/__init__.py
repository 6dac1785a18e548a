"""What a run reports: the table of metric names, the sinks they go to, and phase timers."""

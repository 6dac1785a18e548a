"""HTTP services for programs that are not this one."""

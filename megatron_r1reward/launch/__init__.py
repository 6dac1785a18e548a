"""A stage on its machines: the supervisor, the job steps that it starts, and how a life ended."""

"""The run file: schema and loading."""

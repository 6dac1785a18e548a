"""The report of a finished run: one page for people, one file for programs."""

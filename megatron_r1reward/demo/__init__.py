"""The demo: handwritten digits as preference data, models of a few hundred kilobytes, the pipeline on one machine."""

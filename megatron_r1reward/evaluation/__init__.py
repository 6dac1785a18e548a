"""Judging a reward model: both answer orders, exact voting, intervals, difficulty annotation, the report page."""

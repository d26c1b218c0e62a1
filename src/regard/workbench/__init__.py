"""Measuring and telling: `compare` mixers on a task, `verify` systems against their papers, and the reports of both."""

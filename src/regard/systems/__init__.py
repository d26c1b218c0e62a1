"""One module a paper: `systems/<area>/<slug>.py` holds its mechanism, its model, its published variants and its card."""

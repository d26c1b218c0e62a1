"""How tokens are arranged in groups, and back: windows, grids, shifts, neighborhoods, ragged batches, graphs.

Every arrangement here is a pair of functions that undo each other, or a table of indices computed from sizes alone.
"""

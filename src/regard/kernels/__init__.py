"""What makes ops fast: the registry of paths that can compute an op, and the choice among them.

`explain("neighborhood_attention", q, k, v, kernel_size=7)` says which path a call would take and why.
"""

from regard.kernels.dispatch import OpPath, backends, explain, register, run

__all__ = ["OpPath", "backends", "explain", "register", "run"]

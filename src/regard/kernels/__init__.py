"""What makes ops fast: the registry of paths that can compute an op, and the choice among them.

`cpu` holds this library's own kernels; `flex` says an op as a FlexAttention; `natten`, `flash` and `fla` hand over to
libraries of these names where they are installed.

`explain("neighborhood_attention", q, k, v, kernel_size=7)` says which path a call would take and why;
`with taken() as paths:` which were taken; `with using("torch"):` makes every op take that one.
"""

from regard.kernels.dispatch import OpPath, backends, explain, register, run, taken, using

__all__ = ["OpPath", "backends", "explain", "register", "run", "taken", "using"]

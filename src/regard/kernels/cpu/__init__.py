"""Kernels for CPUs: C++ that is compiled on first use, forward and backward, float32 and bfloat16.

`lanes.h` (vectors as wide as the machine has them) and `core.h` (three small products) carry all of them; the other
sources say which rows meet. `build.py` compiles, `paths.py` gives the dispatcher its functions.
"""

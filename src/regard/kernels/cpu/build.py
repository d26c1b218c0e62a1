"""Compiles the kernels once for this machine, keeps the result, and says why where that cannot be."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_FLAGS = ["-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# Without it at::parallel_for, a template, compiles to a plain loop. Apple's compiler comes without OpenMP: one thread there.
_OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]


def _name() -> str:
    """A name that changes with the sources, the flags, PyTorch, and what kind of processor this is."""
    parts = [path.read_bytes() for path in sorted([*_HERE.glob("*.h"), *_HERE.glob("*.cpp")])]
    machine = (platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.__version__, *_flags())
    return "regard_" + hashlib.sha256(b"".join(parts) + repr(machine).encode()).hexdigest()[:12]


def _flags() -> list[str]:
    extra = os.environ.get("REGARD_KERNEL_FLAGS", "").split()  # -fsanitize=address, say
    return [*_FLAGS, *_OPENMP, *extra]


def _library() -> Path:
    name = _name()
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "regard"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", default)) / name / f"{name}.so"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the system gives the lock back when its holder dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "compiling", "w") as file:
        try:
            import fcntl
        except ImportError:  # not on this system: two processes may then do the same work
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(library: Path) -> None:
    """Compile beside the library's place and move the result there, so that a library that is there is whole."""
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler ({compiler!r}) was found")
    path = os.environ.get("PATH", "")
    print("regard: compiling the CPU kernels for this machine (once, about a minute) ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        try:
            # ninja comes as a package: its program lies beside Python, which need not be on the path.
            os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), path])
            cpp_extension.load(
                library.stem,
                sorted(str(source) for source in _HERE.glob("*.cpp")),
                extra_cflags=_flags(),
                extra_ldflags=[flag for flag in _flags() if flag.startswith(("-fsanitize", "-fopenmp"))],
                build_directory=folder,
                is_python_module=False,
            )
        finally:
            os.environ["PATH"] = path
        os.replace(Path(folder) / library.name, library)


@lru_cache(maxsize=1)
def load() -> str | None:
    """Load the kernels, compiled if need be: None, or why there are none. REGARD_KERNELS=off leaves them out."""
    if os.environ.get("REGARD_KERNELS", "").lower() == "off":
        return "REGARD_KERNELS=off"
    try:
        library = _library()
        if not library.exists():
            with _alone(library.parent):
                if not library.exists():
                    _compile(library)
        if not hasattr(torch.ops.regard, "window_attention"):  # compiling has loaded it already
            torch.ops.load_library(str(library))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"regard's CPU kernels could not be built ({reason}); plain PyTorch runs instead. A C++17 compiler and "
            "ninja are needed; REGARD_KERNELS=off silences this.",
            stacklevel=2,
        )
        return f"the kernels could not be built: {reason}"
    from regard.kernels.cpu import gradients

    gradients.register()
    return None

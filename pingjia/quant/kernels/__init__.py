"""The compiled CPU kernels: loading them, and saying why when they cannot be had. Imports no torch.

The C++ files beside this one are built by `setup.py` into one library with a plain C interface. What calls it with
tensors is `pingjia/quant/native.py`; the arithmetic and its layout are described in `kernels.h`.
"""

from __future__ import annotations

import ctypes
import os
import sysconfig
from functools import cache
from pathlib import Path

from pingjia.errors import ModelError

_VERSION = 3
_FIX = "run `pip install --editable .` in the source folder (needs a C++ compiler: g++ or clang++)"


class CMatrix(ctypes.Structure):
    """A packed matrix as the C side takes it. The caller keeps the tensors behind the pointers alive."""

    _fields_ = (
        ("bits", ctypes.c_int32),
        ("scale_bits", ctypes.c_int32),
        ("n", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("tiles", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


_INT, _LONG, _POINTER, _TEXT = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "pj_version": (_INT, []),
    "pj_isa": (_TEXT, []),
    "pj_isa_names": (_TEXT, []),
    "pj_choose_isa": (_INT, [_TEXT]),
    "pj_num_threads": (_INT, []),
    "pj_set_num_threads": (None, [_INT]),
    "pj_tile_bytes": (_LONG, [_INT, _LONG, _LONG]),
    "pj_scale_count": (_LONG, [_LONG, _LONG, _LONG]),
    "pj_pack": (None, [_INT, _INT, _LONG, _LONG, _POINTER, _POINTER]),
    "pj_unpack": (None, [_INT, _INT, _LONG, _LONG, _POINTER, _POINTER]),
    "pj_rows": (None, [_POINTER, _POINTER, _LONG, _POINTER, _LONG]),
    "pj_read_all": (ctypes.c_uint64, [_POINTER, _LONG]),
    "pj_matmul": (None, [_POINTER, _POINTER, _LONG, _LONG, _INT, _POINTER, _LONG]),
    "pj_round_block": (None, [_POINTER]),
    "pj_search_scales": (None, [_POINTER]),
}


def path() -> Path:
    """Where the built library is looked for."""
    return Path(__file__).parent / f"libpingjia{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or the reason there is none."""
    if os.environ.get("PINGJIA_KERNELS") == "off":
        return "PINGJIA_KERNELS=off"
    if not path().exists():
        return f"the kernels were not built ({path()} does not exist); {_FIX}"
    try:
        library = ctypes.CDLL(str(path()))
    except OSError as error:
        return f"the kernels do not load: {error}; {_FIX}"
    return _checked(library)


def _checked(library: ctypes.CDLL) -> ctypes.CDLL | str:
    if library.pj_version() != _VERSION:
        return f"the kernels were built from other sources (version {library.pj_version()}, not {_VERSION}); {_FIX}"
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    asked, names = os.environ.get("PINGJIA_KERNELS"), library.pj_isa_names().decode()
    if asked and asked not in names.split(","):
        raise ModelError(f"PINGJIA_KERNELS={asked}: this processor and build have {names.replace(',', ', ')}; or `off`")
    return library


def available() -> bool:
    """Whether products run in compiled kernels."""
    return not isinstance(_load(), str)


def why_not() -> str | None:
    """Why there are no kernels and what to do about it; None when there are."""
    found = _load()
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL:
    """The loaded library. Raises ModelError with the reason where there is none."""
    found = _load()
    if isinstance(found, str):
        raise ModelError(f"no compiled kernels: {found}")
    return found


def isa() -> str:
    """The instruction set in use: avx512, avxvnni, avx2, neondot, neon, portable; "off" without kernels."""
    return library().pj_isa().decode() if available() else "off"


def isa_names() -> list[str]:
    """Every instruction set that this build and processor can run, best first."""
    return library().pj_isa_names().decode().split(",")


def choose_isa(name: str) -> None:
    """Use another instruction set from now on, in the whole process. For tests and benchmarks."""
    if not library().pj_choose_isa(name.encode()):
        raise ModelError(f"instruction set {name}: this processor and build have {', '.join(isa_names())}")


def num_threads() -> int:
    """Threads of a product, the caller's included."""
    return int(library().pj_num_threads())


def set_num_threads(count: int) -> None:
    """Replace the thread team. No product may be running in another thread."""
    library().pj_set_num_threads(count)

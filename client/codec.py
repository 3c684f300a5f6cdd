"""Values as users have them, and as they lie in a store: buffers, NumPy arrays, lz4.

An array is stored as its bytes in C order; its dtype and shape are the block's meta, so that the
bytes go from the array into the store without a copy.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import mmap
import sys
from typing import TYPE_CHECKING, Any

import msgpack

from memfaas._native import FLAG_ARRAY
from memfaas.errors import UsageError, ValueCorrupt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from memfaas._native import Value

_SMALL = 16 << 10
_HUGE = 4 << 20
_PAGE = mmap.PAGESIZE
_MADV_HUGEPAGE = 14


def flatten(value: Value) -> tuple[memoryview, bytes, int]:
    """The bytes of a value, its meta and its flags. Raises UsageError for what has no bytes."""
    numpy = _imported_numpy()
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        return _flatten_array(value)
    return view_bytes(value), b"", 0


def _imported_numpy() -> Any:
    """Who has no arrays need not wait for the import, nor does anybody have one while it is under way."""
    numpy: Any = sys.modules.get("numpy")
    return numpy if hasattr(numpy, "ndarray") and hasattr(numpy, "generic") else None


def view_bytes(value: Any) -> memoryview:
    """The bytes of any object with a buffer; copied only where they do not lie in one piece."""
    try:
        view = memoryview(value)
    except TypeError:
        raise UsageError(
            f"a value is bytes, another object with a buffer, or a NumPy array; not {type(value).__name__}"
            + ("; encode it first" if isinstance(value, str) else "")
        ) from None
    if not view.c_contiguous:
        return memoryview(view.tobytes())
    try:
        return view.cast("B")
    except (TypeError, ValueError):  # formats, or shapes with a zero, that cast does not know
        import numpy as np

        whole: Any = value
        return _view(np.frombuffer(whole, np.uint8)) if view.nbytes else memoryview(b"")


def view_writable(buffer: Value) -> memoryview:
    """The bytes of a buffer to fill. Raises UsageError when it can't be written, or has gaps."""
    numpy = _imported_numpy()
    if numpy is not None and isinstance(buffer, numpy.ndarray):
        if not (buffer.flags.c_contiguous and buffer.flags.writeable) or buffer.dtype.hasobject:
            raise UsageError("the array to fill must be writable, C-contiguous, and not of Python objects")
        return _view(buffer.reshape(-1).view(numpy.uint8)) if buffer.nbytes else memoryview(bytearray())
    view = _view(buffer)
    if view.readonly or not view.c_contiguous:
        raise UsageError("the buffer to fill must be writable and contiguous")
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def _view(flat: Any) -> memoryview:
    return memoryview(flat)  # the stubs know only from Python 3.12 on that an array has a buffer


# --- arrays -------------------------------------------------------------------------------------


def _flatten_array(value: Any) -> tuple[memoryview, bytes, int]:
    import numpy as np

    array = value if type(value) is np.ndarray else _plain(value)
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    meta = _meta(array.dtype, array.shape)
    if array.nbytes == 0:
        return memoryview(b""), meta, FLAG_ARRAY
    return _view(array.reshape(-1).view(np.uint8)), meta, FLAG_ARRAY


def _plain(value: Any) -> Any:
    import numpy as np

    if isinstance(value, np.ma.MaskedArray):
        raise UsageError("a masked array would lose its mask; store its data and its mask as two values")
    return np.asarray(value)


@functools.lru_cache(256)
def _meta(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    packed: bytes = msgpack.packb([_describe(dtype), shape])
    return packed


def _describe(dtype: np.dtype[Any]) -> str:
    import numpy as np

    if dtype.hasobject:
        raise UsageError(f"an array of {dtype} holds Python objects, which have no bytes of their own; pickle them")
    if dtype.isbuiltin == 1:
        return dtype.str
    try:
        descr: Any = np.lib.format.dtype_to_descr(dtype)
        known = np.lib.format.descr_to_dtype(descr) == dtype
    except (ValueError, TypeError) as error:
        raise UsageError(f"cannot describe the dtype {dtype}: {error}") from error
    if not known:
        raise UsageError(f"cannot describe the dtype {dtype}; store a view of the array with a NumPy dtype")
    return descr if isinstance(descr, str) else repr(descr)


def shape_array(flat: NDArray[np.uint8], meta: bytes) -> NDArray[Any]:
    """The array of these bytes, without a copy. Raises ValueCorrupt when the two do not fit."""
    import numpy as np

    try:
        dtype, shape = _parse(meta)
        if dtype.itemsize == 0:
            return np.empty(shape, dtype)
        return flat.view(dtype).reshape(shape)
    except Exception as error:  # meta comes from another process
        raise ValueCorrupt(f"the stored array makes no sense: {error}") from error


@functools.lru_cache(256)
def _parse(meta: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    import numpy as np

    described, shape = msgpack.unpackb(meta)
    descr = ast.literal_eval(described) if described[:1] in ("[", "(") else described
    return np.lib.format.descr_to_dtype(descr), tuple(shape)


# --- fresh memory ---------------------------------------------------------------------------------


def fresh_memory(length: int) -> memoryview:
    """Memory for an array, not filled with zeros first."""
    import numpy as np

    return _view(np.empty(length, np.uint8))


def fresh_bytes(length: int) -> tuple[bytes, memoryview]:
    """A new bytes object, and a view to fill it through before anyone else sees it.

    Python shares objects of one byte and none; then the view is of memory of its own.
    """
    if length <= 1:
        return bytes(length), memoryview(bytearray(length))
    whole = bytes(length)  # large ones come from the system as zero pages: nothing is written twice
    flat = _own(whole)
    if length >= _HUGE:
        _prefer_huge_pages(flat.ctypes.data, length)
    return whole, _view(flat)


def _prefer_huge_pages(address: int, length: int) -> None:
    """As NumPy does for its arrays. Without, most of the time of a large get goes into page faults."""
    start, end = -(-address // _PAGE) * _PAGE, (address + length) // _PAGE * _PAGE
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_HUGEPAGE)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class _Owner:
    """Exports the memory of a bytes object to NumPy as writable, and keeps it alive."""

    def __init__(self, value: bytes, interface: dict[str, Any]) -> None:
        self.value = value
        self.__array_interface__ = interface


def _own(value: bytes) -> NDArray[np.uint8]:
    import numpy as np

    interface = dict(np.frombuffer(value, np.uint8).__array_interface__)
    interface["data"] = (interface["data"][0], False)
    owned: NDArray[np.uint8] = np.asarray(_Owner(value, interface))
    return owned


def thaw(value: bytes) -> NDArray[np.uint8]:
    """A writable array of a bytes object that was just made and that nobody else has.

    The native core gives values as bytes; a copy of each array, only for the right to write into
    it, would cost as much as the transfer.
    """
    import numpy as np

    # Of small ones a copy is made faster; and Python shares objects of one byte.
    return np.frombuffer(bytearray(value), np.uint8) if len(value) <= _SMALL else _own(value)

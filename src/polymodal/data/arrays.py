"""Arrays on disk that grow row by row, and are mapped into memory to be read."""

from pathlib import Path

import numpy as np
from numpy.lib import format as npy


class GrowingArray:
    """Writes an .npy file row by row; the header's room for the number of rows is filled in at the end."""

    def __init__(self, path: Path, dtype: str, row: tuple[int, ...] = ()) -> None:
        self.dtype, self.row, self.rows = np.dtype(dtype), row, 0
        self._file = path.open("wb")
        self._header()

    def append(self, values: np.ndarray) -> None:
        """Append rows: [n, *row]."""
        block = np.ascontiguousarray(values, dtype=self.dtype).reshape(-1, *self.row)
        self._file.write(block.tobytes())
        self.rows += len(block)

    def close(self) -> None:
        """Write the final header and close the file."""
        end = self._file.tell()
        self._file.seek(0)
        length = self._header()
        assert end == length + self.rows * self.dtype.itemsize * int(np.prod(self.row, initial=1))
        self._file.close()

    def _header(self) -> int:
        # NumPy pads the header so that its length does not depend on the number of rows.
        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.rows, *self.row)}
        npy.write_array_header_1_0(self._file, header)
        return self._file.tell()


def open_array(path: Path) -> np.ndarray:
    """Map an .npy file into memory, for reading."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except ValueError:  # nothing can be mapped of an array without rows
        return np.load(path, allow_pickle=False)  # type: ignore[no-any-return]

"""A Parquet file -> raw rows, row group by row group. The line of a row is its number, from 1.

null counts as missing, also inside objects, because Parquet gives every object of a list the same fields. Values that
JSON does not know become text. Needs pyarrow.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pingjia.data.csv_rows import BadCell, judge_columns, parse_cells
from pingjia.data.raw import MAX_ROW_BYTES, MAX_SHOWN, Fault, Row, shown

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_BATCH_ROWS = 256  # a packed column can unfold to any size; rows of the largest size allowed would be 4 GiB
_BUFFER_BYTES = 1 << 16


def read_parquet(path: Path) -> Iterator[Row | Fault]:
    """Rows and faults in order. What cannot be read of a row group is a fault of the file (line 0) with its rows."""
    try:
        import pyarrow.parquet
    except ImportError:
        yield Fault(0, "file", "Parquet needs pyarrow; run: pip install 'pingjia[data]'")
        return
    try:
        # pre_buffer would hold a whole row group: 239 MB of a million rows in one, where this holds 6.
        file = pyarrow.parquet.ParquetFile(
            path, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
        )
    except _errors() as e:
        yield Fault(0, "file", f"cannot be read as Parquet: {_brief(e)}")
        return
    with file:
        if fault := judge_columns(file.schema_arrow.names):
            yield fault
        elif not file.metadata.num_rows:
            yield Fault(0, "file", "holds no row")
        else:
            yield from _read_groups(file)


def _errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises for damaged files; KeyError and OverflowError for values that Python cannot hold."""
    import pyarrow

    return (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError, NotImplementedError)


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _read_groups(file: pyarrow.parquet.ParquetFile) -> Iterator[Row | Fault]:
    first = 1  # row of the group
    for group in range(file.metadata.num_row_groups):
        num_rows = file.metadata.row_group(group).num_rows
        line = first
        try:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], use_threads=False):
                yield from _read_batch(batch, line)
                line += batch.num_rows
        except _errors() as e:
            lost = f"rows {line:,} to {first + num_rows - 1:,} cannot be read"
            yield Fault(0, "file", f"{lost} (row group {group}): {_brief(e)}")
        first += num_rows


def _read_batch(batch: pyarrow.RecordBatch, line: int) -> Iterator[Row | Fault]:
    try:
        batch = _without_nanoseconds(batch)
        if batch.nbytes > MAX_ROW_BYTES:
            raise ValueError("one of the rows may be too long")
        values = batch.to_pylist(maps_as_pydicts="strict")
    except _errors():
        yield from (_read_alone(batch.slice(i, 1), line + i) for i in range(batch.num_rows))
        return
    for i, value in enumerate(values):
        yield _row(value, line + i)


def _without_nanoseconds(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Python's times know no nanoseconds. Only columns of times are looked at, not lists and objects of them."""
    for index, field in enumerate(batch.schema):
        if str(field.type).startswith(("timestamp[ns", "time64[ns", "duration[ns")):
            column = batch.columns[index].cast(_microseconds(field.type), safe=False)
            batch = batch.set_column(index, field.name, column)
    return batch


def _microseconds(kind: pyarrow.DataType) -> pyarrow.DataType:
    import pyarrow

    if pyarrow.types.is_timestamp(kind):
        return pyarrow.timestamp("us", kind.tz)
    return pyarrow.duration("us") if pyarrow.types.is_duration(kind) else pyarrow.time64("us")


def _read_alone(batch: pyarrow.RecordBatch, line: int) -> Row | Fault:
    """The only row of a batch, which may hold what cannot be read."""
    if batch.nbytes > MAX_ROW_BYTES:
        reason = f"has {batch.nbytes:,} bytes; the limit is {MAX_ROW_BYTES:,}"
        return Fault(line, "row", reason, text=_text(batch)[:MAX_SHOWN])
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.to_pylist(maps_as_pydicts="strict")
        except UnicodeDecodeError:
            return Fault(line, name, "holds bytes that are no UTF-8 text", text=_text(batch))
        except _errors() as e:
            return Fault(line, name, f"a value of type {column.type} cannot be read: {_brief(e)}", text=_text(batch))
    return _row(batch.to_pylist(maps_as_pydicts="strict")[0], line)


def _text(batch: pyarrow.RecordBatch) -> str:
    """The only row of a batch as far as it can be written down."""
    columns = zip(batch.schema.names, batch.columns, strict=True)
    return ", ".join(f"{name}: {_shown(column)}" for name, column in columns)


def _shown(column: pyarrow.Array) -> str:
    import pyarrow

    try:
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            return shown(column.cast(pyarrow.large_binary())[0].as_py() or b"")
        return str(column[0].as_py())
    except _errors():
        return f"({column.type})"


def _row(value: dict[str, Any], line: int) -> Row | Fault:
    row = _plain(value)
    try:
        return Row(line, parse_cells(row))
    except BadCell as e:
        return Fault(line, e.column, e.reason, text=json.dumps(row, ensure_ascii=False))


def _plain(value: Any) -> Any:
    """A value as JSON has it: null and NaN are missing, bytes and dates are text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) or math.isinf(value) else value
    if isinstance(value, dict):
        pairs = ((str(k), _plain(v)) for k, v in value.items())
        return {k: v for k, v in pairs if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")  # half surrogates, which are a fault where they are read
    return str(value)

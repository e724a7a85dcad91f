"""Files of prompts from which single rows are read quickly, wherever they stand.

A pool is read in small draws from random places. A Parquet file answers that badly: a reader decodes a whole row group to
get at one row, and small groups make a footer of more than a hundred megabytes for a million rows. An Arrow file of
record batches of four rows answers it well: its footer holds 24 bytes a batch, and a row costs one read of some three to
twelve kilobytes. Of a large pool nearly every row that is drawn lies in a batch of its own. Smaller batches would save
little time, and take more space. The buffers are packed with LZ4, because zstd takes longer to unpack than the disk takes to
read. The file is read, not mapped into memory: the pages of a mapped file around each row would count as memory of the
process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
from numpy.typing import NDArray

from selfplay.storage import folders, seals, tables
from selfplay.types import Prompt

BATCH_ROWS = 4  # of files that are written; those of earlier versions have batches of eight or sixteen
ARROW, PARQUET = ".arrow", ".parquet"


def write(path: Path, table: pa.Table, batch_rows: int = BATCH_ROWS, sealed: bool = False) -> None:
    """Write a table as an Arrow file, whole or not at all. Every record batch but the last has `batch_rows` rows.

    sealed: with its hash beside it.
    """
    with writing(path, table.schema, sealed) as file:
        file.write_table(table.combine_chunks(), max_chunksize=batch_rows)


def filled(table: pa.Table) -> pa.Table:
    """The columns of a table of prompts that have a value in any row; `take` gives the others back.

    A column takes two buffers of every batch or more, and a buffer takes as long to unpack however little it holds.
    """
    rows = table.num_rows
    return table.drop_columns([name for name in table.column_names if table[name].null_count == rows > 0])


@contextlib.contextmanager
def writing(path: Path, layout: pa.Schema, sealed: bool = False) -> Iterator[ipc.RecordBatchFileWriter]:
    """Yield a writer of an Arrow file, to which record batches are added; it appears whole or not at all."""
    whole = seals.whole if sealed else folders.whole
    with whole(path) as partial, ipc.new_file(partial, layout, options=_packed()) as file:
        yield file


def columns(path: Path, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of an Arrow file, a record batch at a time; of the others nothing is read."""
    with pa.OSFile(str(path)) as source:
        layout = ipc.open_file(source).schema
        wanted = [layout.get_field_index(name) for name in names]
        with ipc.open_file(source, options=ipc.IpcReadOptions(included_fields=wanted, use_threads=False)) as file:
            for number in range(file.num_record_batches):
                yield file.get_batch(number).select(list(names))


def metadata(path: Path) -> dict[bytes, bytes]:
    """What an Arrow file says of itself."""
    with pa.OSFile(str(path)) as source:
        return dict(ipc.open_file(source).schema.metadata or {})


def count(path: Path) -> int:
    """Rows of a file of prompts, without reading them."""
    if path.suffix == PARQUET:
        return tables.count_rows(path)
    with ipc.open_file(pa.OSFile(str(path))) as file:
        batches = file.num_record_batches
        return (batches - 1) * _batch_rows(file) + file.get_batch(batches - 1).num_rows if batches else 0


def take(path: Path, numbers: NDArray[np.int64]) -> pa.Table:
    """Rows of a file of prompts by their numbers, which ascend and may repeat, as a table with the columns of `Prompt`.

    A column that the file does not have is null.
    """
    if path.suffix == PARQUET:
        with tables.RowReader(path, tables.schema(Prompt).names, Prompt) as reader:
            return reader.take(numbers)
    found: list[pa.RecordBatch] = []
    with ipc.open_file(pa.OSFile(str(path)), options=ipc.IpcReadOptions(use_threads=False)) as file:
        each = _batch_rows(file) if len(numbers) else 1
        last, batch = -1, None
        for number in numbers.tolist():
            if number // each != last:
                last = number // each
                batch = file.get_batch(last)
            assert batch is not None
            found.append(batch.slice(number % each, 1))
        # Combined, the rows leave the batches behind that they were read in.
        table = pa.Table.from_batches(found, file.schema).combine_chunks()
    return tables.completed(table, tables.schema(Prompt).names, Prompt)


def _batch_rows(file: ipc.RecordBatchFileReader) -> int:
    """Rows of every record batch of a file but the last, which may have fewer."""
    return int(file.get_batch(0).num_rows)


def _packed() -> ipc.IpcWriteOptions:
    return ipc.IpcWriteOptions(compression="lz4", use_threads=False)

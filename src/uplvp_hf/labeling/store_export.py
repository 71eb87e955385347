"""Pseudo-label stores for other tools: COCO JSON, Parquet, a `datasets.Dataset`. No mask is decoded on the way."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from ..data.arrow import has_text_ids, row_features, row_tables, rows_to_dataset
from ..data.coco import write_coco
from ..data.hf_objects import CATEGORIES_KEY
from ..data.store_reader import read_header, stream_store
from ..files import replacing

if TYPE_CHECKING:
    import datasets

HEADER_KEY = b"uplvp_header"  # of the metadata of a Parquet file: the store's header as JSON


def export_coco(store: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write the store in folder `store` as a COCO instance file, every annotation with its `score`, in one step.

    Memory holds one shard at a time, and the image ids. `file_name` is what the store's rows call it: the path in the
    folder that was labeled. Raises DataError as `read_store` does, OSError when the file cannot be written.
    """
    write_coco(stream_store(store), path)


def export_parquet(store: str | os.PathLike[str], path: str | os.PathLike[str], embed_images: bool = False) -> None:
    """Write the store in folder `store` as one Parquet file, in one step.

    `datasets.load_dataset("parquet", data_files=path)` reads it, with images, RLEs and class names, and so does
    `load_dataset_rows`, with the original category ids. The header is kept in the file's metadata (`uplvp_header`).
    Memory holds some hundred rows at a time.

    embed_images: with the images themselves, for another machine or the Hub, instead of their absolute paths.
    Raises DataError as `read_store` does, OSError when a file cannot be read or written.
    """
    import pyarrow.parquet

    rows = stream_store(store)
    features = row_features(has_text_ids(rows), rows.categories)
    own = {CATEGORIES_KEY: json.dumps(rows.categories), HEADER_KEY: json.dumps(read_header(store))}
    schema = features.arrow_schema
    schema = schema.with_metadata({**(schema.metadata or {}), **own})
    with replacing(path, "wb") as stream, pyarrow.parquet.ParquetWriter(stream, schema) as writer:
        for table in row_tables(rows, features, rows.categories, embed_images):
            writer.write_table(table.replace_schema_metadata(schema.metadata))


def store_to_dataset(store: str | os.PathLike[str]) -> datasets.Dataset:
    """The store in folder `store` as a `datasets.Dataset`: images are opened when they are read, masks stay RLEs.

    The RLEs are held in memory; for a store beyond that, stream what `export_parquet` writes. Raises DataError as
    `read_store` does.
    """
    rows = stream_store(store)
    return rows_to_dataset(rows, has_text_ids(rows), rows.categories)

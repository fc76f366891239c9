"""Prepared corpora that the tests of this folder share."""

from pathlib import Path

import pytest
from small_corpora import small_config, write_documents

from esolm_megatron.data.prepare import prepare


@pytest.fixture(scope="session")
def documents(tmp_path_factory) -> tuple[Path, list[str]]:
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    return path, write_documents(path, 541)


@pytest.fixture(scope="session")
def prepared(documents, tmp_path_factory) -> Path:
    """Byte-level tokens of the documents: several tasks, shards and blocks, short blocks at the end of each task."""
    folder = tmp_path_factory.mktemp("tokens") / "out"
    prepare(small_config(documents[0], folder), progress=False)
    return folder

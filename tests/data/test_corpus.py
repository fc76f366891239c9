import json

import pytest

from esolm_megatron.cli import main
from esolm_megatron.config import ConfigError
from esolm_megatron.data.corpus import python_library_documents, write_corpus


def test_library_is_sorted_text_without_tests():
    documents = list(python_library_documents())
    names = [name for name, _ in documents]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py", "asyncio/tasks.py"} <= {*names}
    assert not [name for name in names if {"test", "tests", "site-packages", "idlelib"} & {*name.split("/")}]
    assert sum(len(text) for _, text in documents) > 5_000_000
    assert "def literal_eval" in dict(documents)["ast.py"]


def test_corpus_keeps_to_its_size_and_spreads_over_the_library(tmp_path):
    size = write_corpus(tmp_path, 400_000)
    lines = [json.loads(line) for line in (tmp_path / "python.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 350_000 < size == sum(len(line["text"].encode()) for line in lines) <= 400_000
    assert len({line["name"][0] for line in lines}) > 10
    texts = dict(python_library_documents())
    assert all(texts[line["name"]] == line["text"] for line in lines)
    with pytest.raises(ConfigError, match="max_bytes = 1"):
        write_corpus(tmp_path, 1)


def test_a_word_for_the_folder_is_not_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "corpus", "output=text"]) == 2
    assert "output=text: give the folder alone: esolm data corpus text" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

import json

import pytest

from esolm_megatron.config import ConfigError
from esolm_megatron.data.corpus import cut, find_files, python_library_documents, read_documents, write_corpus


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


@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 10_000])
def test_each_line_is_in_one_piece(tmp_path, piece_bytes):
    path = tmp_path / "a.jsonl"
    texts = ["x" * n + "é" for n in (1, 0, 60, 3, 200, 5)]
    path.write_text("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts), encoding="utf-8")
    found = [document[0] for piece in cut(path, piece_bytes) for document in read_documents(piece, "text")]
    assert found == texts


def test_find_files(tmp_path):
    for name in ("b/x.py", "b/.hidden/y.py", "a/z.md", "a/z.bin", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("t")
    folder = str(tmp_path)
    names = [p.relative_to(tmp_path).as_posix() for p in find_files([f"{folder}/c.txt", folder, f"{folder}/*/z.*"])]
    assert names == ["c.txt", "a/z.md", "b/x.py"]
    with pytest.raises(ConfigError) as error:
        find_files([f"{folder}/none/*.txt", f"{folder}/a/z.bin", folder])
    assert [line.split(" = ")[0] for line in str(error.value).splitlines()] == ["inputs.0", "inputs.1"]

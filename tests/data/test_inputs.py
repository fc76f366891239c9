import json
from pathlib import Path

import pytest

from esolm_megatron.config import ConfigError
from esolm_megatron.data.inputs import cut, find_inputs, read_documents


@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 10_000])
def test_each_line_is_in_one_piece(tmp_path, piece_bytes):
    path = tmp_path / "a.jsonl"
    texts = ["x" * n + "é" for n in (1, 0, 60, 3, 200, 5)]
    path.write_text("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts), encoding="utf-8")
    found = [document[0] for piece in cut(path, piece_bytes) for document in read_documents(piece, "text")]
    assert found == texts


def test_find_inputs(tmp_path):
    for name in ("b/x.py", "b/.hidden/y.py", "a/z.md", "a/z.bin", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("t")
    folder = str(tmp_path)
    names = [Path(p).relative_to(tmp_path).as_posix() for p in find_inputs([f"{folder}/c.txt", folder, f"{folder}/*/z.*"])]
    assert names == ["c.txt", "a/z.md", "b/x.py"]
    with pytest.raises(ConfigError) as error:
        find_inputs([f"{folder}/none/*.txt", f"{folder}/a/z.bin", folder])
    assert [line.split(" = ")[0] for line in str(error.value).splitlines()] == ["inputs.0", "inputs.1"]

import fcntl
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from small_corpora import folder_bytes, small_config, stored_documents, write_documents

from esolm_megatron.cli import main
from esolm_megatron.config import ConfigError
from esolm_megatron.data.prepare import PrepareConfig, load_prepare_config, prepare
from esolm_megatron.data.prepare.inputs import cut, find_inputs
from esolm_megatron.data.prepare.tasks import SCAN_DTYPE, Rules, Task, tokenize
from esolm_megatron.data.shards import ShardReader
from esolm_megatron.data.tokenizer import TokenizerError, load_tokenizer, train_tokenizer
from esolm_megatron.errors import DataError


def test_every_document_once_and_shuffled(prepared, documents):
    train, validation = stored_documents(prepared, "train"), stored_documents(prepared, "validation")
    texts = documents[1]
    assert sorted(train + validation) == sorted(texts)
    assert train != [text for text in texts if text in {*train}]
    manifest = ShardReader(prepared).manifest
    assert manifest.documents == {
        "read": 541,
        "kept": 541,
        "unreadable": 0,
        "too_short": 0,
        "too_long": 0,
        "duplicate": 0,
    }
    assert (manifest.splits["train"].documents, manifest.splits["validation"].documents) == (
        len(train),
        len(validation),
    )
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert sum(split.tokens for split in manifest.splits.values()) == manifest.text_bytes + 541
    assert len(manifest.shards) > 9


def test_split_belongs_to_the_document(prepared, documents, tmp_path):
    """Other neighbours, another seed, another order: the same documents validate."""
    validation = {*stored_documents(prepared, "validation")}
    assert 25 < len(validation) < 90
    half = documents[1][::-2]
    (tmp_path / "half.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in half))
    prepare(small_config(tmp_path / "half.jsonl", tmp_path / "out", seed=5), progress=False)
    assert {*stored_documents(tmp_path / "out", "validation")} == validation & {*half}


def test_same_bytes_for_every_number_of_processes(prepared, documents, tmp_path):
    summary = prepare(small_config(documents[0], tmp_path / "out", num_processes=3), progress=False)
    assert folder_bytes(tmp_path / "out") == folder_bytes(prepared)
    assert summary.tasks > 4
    assert summary.tasks_resumed == 0


SCRIPT = """
import sys
from pathlib import Path
from small_corpora import small_config
from esolm_megatron.data.prepare import prepare
if __name__ == "__main__":
    prepare(small_config(Path(sys.argv[1]), Path(sys.argv[2]), num_processes=2, **eval(sys.argv[3])), progress=False)
"""


def test_killed_run_continues_to_the_same_bytes(tmp_path):
    """SIGKILL to all its processes, in the scan and among the tasks, then one that runs through."""
    text, changes = tmp_path / "text.jsonl", {"task_bytes": 40_009}
    write_documents(text, 10_007)
    prepare(small_config(text, tmp_path / "whole", **changes), progress=False)
    (tmp_path / "run.py").write_text(SCRIPT)
    folder, kills = tmp_path / "killed", 0
    command = [sys.executable, str(tmp_path / "run.py"), str(text), str(folder), repr(changes)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    for pattern in ("work/scan-*.npy", "work/task-*.json"):
        process = subprocess.Popen(command, start_new_session=True, env=environment)
        while process.poll() is None and not list(folder.glob(pattern)):
            time.sleep(0.001)
        kills += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (folder / "manifest.json").exists()
        with pytest.raises(DataError, match=r"manifest\.json: No such file.*finish an interrupted prepare"):
            ShardReader(folder)
    assert kills == 2
    (folder / "shards" / "train-00000-000.tar.tmp.1").write_bytes(b"half a shard")
    summary = prepare(small_config(text, folder, num_processes=2, **changes), progress=False)
    assert 0 < summary.tasks_resumed < summary.tasks
    assert folder_bytes(folder) == folder_bytes(tmp_path / "whole")


def test_finished_folder_is_left_alone(prepared, documents):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()}
    summary = prepare(small_config(documents[0], prepared, num_processes=2), progress=False)
    assert summary.tasks_resumed == summary.tasks
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()} == before


def test_folder_of_another_configuration_is_refused(prepared, documents, tmp_path):
    with pytest.raises(ConfigError, match=r"another configuration: seed: was 0, now 1; .*choose another folder"):
        prepare(small_config(documents[0], prepared, seed=1), progress=False)
    write_documents(tmp_path / "a.jsonl", 7)
    with pytest.raises(ConfigError, match=r"inputs: was '1 files, .*', now '1 files"):
        prepare(small_config(tmp_path / "a.jsonl", prepared), progress=False)
    with pytest.raises(ConfigError, match=r"holds other files, as a\.jsonl; choose a new folder"):
        prepare(small_config(documents[0], tmp_path), progress=False)


def test_left_out_documents_are_counted(tmp_path):
    texts = ["one", "two two", "one", "", "x" * 51, "three", "two two"]
    lines = [json.dumps({"body": text}) for text in texts]
    lines[4:4] = ['{"body": 5}', "{broken", '{"other": "t"}', '{"body": "\\ud800"}', "   "]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    (tmp_path / "b.md").write_text("three")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    config = small_config(
        tmp_path, tmp_path / "out", text_field="body", max_document_chars=50, validation_fraction=0, task_bytes=3
    )
    summary = prepare(config, progress=False)
    assert summary.manifest.documents == {
        "read": 13,
        "kept": 3,
        "unreadable": 5,
        "too_short": 1,
        "too_long": 1,
        "duplicate": 3,
    }
    assert sorted(stored_documents(tmp_path / "out", "train")) == ["one", "three", "two two"]
    assert "3 duplicate" in str(summary)
    both = prepare(config.model_copy(update={"output": str(tmp_path / "all"), "deduplicate": False}), progress=False)
    assert both.manifest.documents["kept"] == 6


def test_counts_of_each_source_and_limits_in_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("éé", "abcd", "abc", "abcdef"))
    )
    (tmp_path / "b.txt").write_text("abcd")
    (tmp_path / "c.md").write_text("other")
    inputs = (str(tmp_path / "a"), str(tmp_path / "b.txt"), str(tmp_path / "c.md"))
    config = small_config(tmp_path, tmp_path / "out", min_document_bytes=4, max_document_bytes=5, validation_fraction=0)
    summary = prepare(config.model_copy(update={"inputs": inputs}), progress=False)
    sources = ShardReader(tmp_path / "out").manifest.sources
    assert [source.name for source in sources] == ["a", "b.txt", "c.md"]
    assert [source.text_bytes for source in sources] == [8, 0, 5]
    none = {"read": 0, "kept": 0, "unreadable": 0, "too_short": 0, "too_long": 0, "duplicate": 0}
    assert [source.documents for source in sources] == [
        {**none, "read": 4, "kept": 2, "too_short": 1, "too_long": 1},
        {**none, "read": 1, "duplicate": 1},
        {**none, "read": 1, "kept": 1},
    ]
    assert summary.manifest.documents == {**none, "read": 6, "kept": 3, "too_short": 1, "too_long": 1, "duplicate": 1}
    assert "from a: 2 kept, 0 unreadable, 1 too short, 1 too long, 0 duplicate" in str(summary)
    assert sorted(stored_documents(tmp_path / "out", "train")) == ["abcd", "other", "éé"]


def test_a_dataset_through_all_of_prepare_and_standard_input_of_the_command_line(tmp_path):
    import datasets

    texts = [f"{n} a text of its own" for n in range(97)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    config = small_config(tmp_path, tmp_path / "out", validation_fraction=0, task_bytes=500)
    summary = prepare(config.model_copy(update={"inputs": (f"hf://{tmp_path}/saved", "-")}), False, io.BytesIO(b"\n"))
    assert summary.tasks > 3
    assert [source.name for source in summary.manifest.sources] == ["hf://saved", "-"]
    assert sorted(stored_documents(tmp_path / "out", "train")) == sorted(texts)
    (tmp_path / "p.yaml").write_text(f"inputs: ['-']\noutput: {tmp_path}/two\nvalidation_fraction: 0\n")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    command = [sys.executable, "-m", "esolm_megatron", "data", "prepare", str(tmp_path / "p.yaml"), "num_processes=1"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert sorted(stored_documents(tmp_path / "two", "train")) == sorted(texts)


def test_progress_shows_speed_and_time_left(tmp_path, capfd):
    write_documents(tmp_path / "a.jsonl", 541)
    prepare(small_config(tmp_path / "a.jsonl", tmp_path / "out"), progress=True)
    said = capfd.readouterr().err
    for name in ("scan", "tokenize"):
        assert re.search(rf"{name} .*B/s .*\d:\d\d:\d\d", said), said


def test_progress_moves_within_a_task(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{n} " + "x" * 5000}) + "\n" for n in range(2000)))
    config = small_config(
        tmp_path / "a.jsonl",
        tmp_path / "out",
        deduplicate=False,
        task_bytes=1 << 30,
        block_tokens=1 << 16,
        shard_tokens=1 << 24,
    )
    (tmp_path / "out" / "shards").mkdir(parents=True)
    (tmp_path / "out" / "work").mkdir()
    seen = []
    task = Task(0, tuple(cut(tmp_path / "a.jsonl", 1 << 30)))
    tokenize(task, seen.append, Rules.of(config), tmp_path / "out", load_tokenizer("bytes").encoder)
    assert len(seen) > 20
    assert seen == sorted(seen)
    assert seen[0] < task.bytes / 10
    assert seen[-1] == task.bytes


def test_nothing_left_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError, match=r"no document is left of 1: .*1 too short"):
        prepare(small_config(tmp_path / "a.txt", tmp_path / "out", min_document_chars=6), progress=False)


def test_input_that_is_cut_is_an_error_that_names_it(tmp_path):
    data = gzip.compress(b"".join(json.dumps({"text": f"{n} text"}).encode() + b"\n" for n in range(9000)))
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    (tmp_path / "b.txt").write_text("b")
    for processes in (1, 2):
        config = small_config(tmp_path, tmp_path / "out", num_processes=processes, task_bytes=1)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read to its end: .*repair it or leave it out"):
            prepare(config, progress=False)


def test_folder_is_written_by_one_prepare_at_a_time(documents, tmp_path):
    config = small_config(documents[0], tmp_path)
    lock = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another prepare is writing it"):
            prepare(config, progress=False)
    finally:
        os.close(lock)
    prepare(config, progress=False)


def test_input_that_changes_meanwhile_is_an_error(tmp_path):
    """Killed after the scan; then the file is edited without a change of size."""
    text = tmp_path / "a.jsonl"
    write_documents(text, 31)
    config = small_config(text, tmp_path / "out")
    prepare(config, progress=False)
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "work").mkdir()
    np.save(tmp_path / "out" / "work" / "scan-00000.npy", np.zeros(31, SCAN_DTYPE))
    with pytest.raises(DataError, match=r"a\.jsonl: changed while they were prepared"):
        prepare(config, progress=False)


def test_all_problems_of_a_configuration_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "t"}\n')
    path = tmp_path / "prepare.yaml"
    path.write_text(f"inputs: ['{tmp_path}/a.jsonl']\noutput: out\nblock_token: 5\nseed: -1\n")
    with pytest.raises(ConfigError) as error:
        load_prepare_config(path, ["task_bytes=many"])
    text = str(error.value)
    assert text.startswith(f"{path}:\n")
    assert "block_token = 5: no such field; did you mean block_tokens?" in text
    assert "seed = -1: " in text
    assert "task_bytes = 'many': " in text
    path.write_text(f"inputs: ['{tmp_path}/a.jsonl']\noutput: out\nshard_tokens: 7\ntokenizer: nowhere\n")
    with pytest.raises(ConfigError) as error:
        load_prepare_config(path, ["max_document_chars=3", "min_document_chars=4"])
    for part in (
        "shard_tokens = 7: must be block_tokens = 1048576 or more",
        "max_document_chars = 3: must be min_document_chars = 4 or more",
        "text_field = 'text': the first 100 lines of",
        "but the fields content",
        "tokenizer = 'nowhere'",
    ):
        assert part in str(error.value)


def test_example_configuration_is_complete(tmp_path, monkeypatch):
    path = Path(__file__).parents[3] / "configs" / "data" / "python.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    config = load_prepare_config(path, ["inputs=[a.txt]"])
    assert config.model_fields_set == {*PrepareConfig.model_fields}


def prepared_from(tmp_path, files, **options):
    """(texts that are kept, the summary) of a folder of files with these bytes."""
    for name, data in files.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    out = tmp_path / f"out{len([*tmp_path.glob('out*')])}"
    summary = prepare(small_config(tmp_path / "in", out, **({"validation_fraction": 0} | options)), progress=False)
    return sorted(stored_documents(out, "train")), summary


def test_a_byte_order_mark_is_no_text(tmp_path):
    line = '{"text": "beta"}\n{"text": "gamma"}\n'
    files = {
        "a.txt": "\ufeffalpha",
        "b.jsonl": "\ufeff" + line,
        "c.jsonl.gz": gzip.compress(("\ufeff" + line * 2).encode()),
    }
    kept, summary = prepared_from(tmp_path, files)
    assert kept == ["alpha", "beta", "gamma"]
    assert summary.manifest.documents["duplicate"] == 4
    for encoding in ("UTF-8", "utf8", "utf-8-sig"):
        assert prepared_from(tmp_path, {}, encoding=encoding)[0] == kept
    (tmp_path / "in" / "a.txt").write_bytes("\ufeffalpha".encode("utf-16-le"))
    assert prepared_from(tmp_path, {}, encoding="utf-16-le")[0] == kept


def test_linked_folders_and_endings_in_any_case_are_read_and_the_rest_is_named(tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "c.txt").write_text("gamma")
    (other / "around").symlink_to(tmp_path / "in")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(other)
    files = {
        "a.TXT": "alpha",
        "b.txt.gz": gzip.compress(b"beta"),
        "d.json": "{}",
        "e.tar.bz2": b"x",
        "f.json": "{}",
        "README": "r",
    }
    kept, summary = prepared_from(tmp_path, files)
    assert kept == ["alpha", "beta", "gamma"]
    assert "not read, of other kinds: 4 files (.json 2, no ending 1, .tar.bz2 1), as " in str(summary)
    assert json.loads(json.dumps(summary.as_dict(), default=str))["notes"] == list(summary.notes) != []


def test_settings_of_folders_and_fields_are_named_before_the_work(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "alpha"}\n')
    words = [["train-tokenizer", str(path), f"output={path}/t"], ["corpus", f"{path}/c"]]
    words += [["train-tokenizer", str(path), f"output={tmp_path}/t", "text_field=body"]]
    words += [["train-tokenizer", f"{tmp_path}/none", f"output={tmp_path}/t"]]
    said = [f"output = '{path}/t': Not a directory", f"PATH = '{path}/c': Not a directory"]
    said += ["text_field = 'body': ", f"PATH = '{tmp_path}/none': no file there"]
    for word, start in zip(words, said, strict=True):
        assert main(["data", *word]) == 2
        assert capsys.readouterr().err.startswith(f"esolm data: {start}")
    assert not (tmp_path / "t").exists()


def test_globs_go_through_links_and_what_leads_nowhere_is_named(tmp_path):
    """A folder goes by its own name, and by a link only if it has none here; a circle ends."""
    for name in ("in/b/x.txt", "in/.c/y.txt", "other/z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for link, there in (("in/a", "b"), ("in/d", "../other"), ("other/circle", "../in"), ("in/b/lost.txt", "nowhere")):
        (tmp_path / link).symlink_to(there)
    (tmp_path / "in" / "itself.txt").symlink_to("itself.txt")

    def found(entry):
        inputs = find_inputs([f"{tmp_path}/{entry}"])
        return [[Path(p).relative_to(tmp_path).as_posix() for p in some] for some in (inputs.files, inputs.skipped)]

    lost = ["in/b/lost.txt", "in/itself.txt"]
    assert found("in") == [["in/b/x.txt", "in/d/z.txt"], lost]
    assert found("in/**/*.txt") == [["in/.c/y.txt", "in/b/x.txt", "in/d/z.txt"], lost]
    assert found("*/d/**/*.txt") == [["in/d/circle/.c/y.txt", "in/d/circle/b/x.txt", "in/d/z.txt"],
                                     ["in/d/circle/b/lost.txt", "in/d/circle/itself.txt"]]  # fmt: skip
    assert "2 files (links to nothing 2), as " in str(find_inputs([f"{tmp_path}/in"]))
    with pytest.raises(ConfigError, match=r"inputs.0 = '.*a\*\*': cannot be searched: Invalid pattern"):
        find_inputs([f"{tmp_path}/a**"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_an_error(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "a.txt").write_text("alpha")
    with pytest.raises(ConfigError, match=r"inputs.0 = .*: cannot be searched: .*Permission denied: '.*/closed'"):
        find_inputs([str(tmp_path)])


def test_a_document_of_blanks_is_empty(tmp_path):
    texts = ["", " ", "\n\t\u3000", "alpha"]
    kept, summary = prepared_from(
        tmp_path, {"a.jsonl": "".join(json.dumps({"text": t}) + "\n" for t in texts), "b.txt": "\n\n"}
    )
    assert kept == ["alpha"]
    assert summary.manifest.documents["too_short"] == 4


def test_what_is_unreadable_is_counted_by_reason_with_its_first_place(tmp_path):
    lines = [
        '{"text": "alpha"}',
        "no json",
        '{"text": null}',
        '{"text": 5}',
        '{"body": "x"}',
        '{"text": null}',
        '{"text": "\\ud800"}',
    ]
    files = {
        "a.jsonl": "\n".join(lines).encode() + b'\n{"text": "caf\xe9"}',
        "b.txt": "café".encode("latin-1"),
        "c.txt": "été".encode("latin-1"),
    }
    kept, summary = prepared_from(tmp_path, files)
    assert kept == ["alpha"]
    assert summary.manifest.documents["unreadable"] == 9
    folder = tmp_path / "in"
    for line in (
        f"1 no JSON; the first: {folder}/a.jsonl, line 2, ",
        f"2 field 'text' is null; the first: {folder}/a.jsonl, line 3",
        f"1 field 'text' is no text, but a int; the first: {folder}/a.jsonl, line 4",
        f"1 no field 'text'; the first: {folder}/a.jsonl, line 5",
        f"1 half of a surrogate pair; the first: {folder}/a.jsonl, line 7",
        f"1 bytes that are no UTF-8; the first: {folder}/a.jsonl, line 8, byte 13 of it is 0xe9",
        f"2 not utf-8, set encoding; the first: {folder}/b.txt, byte 3 is 0xe9",
    ):
        assert line in str(summary)
    kept, summary = prepared_from(tmp_path, {"a.jsonl": lines[0]}, encoding="latin-1")
    assert kept == ["alpha", "café", "été"]
    (tmp_path / "in" / "a.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"no document is left of 2: .*\n2 not utf-8, set encoding; the first: .*b.txt, byte 3 is 0xe9"
    ):
        prepared_from(tmp_path, {})
    for encoding in ("latin9000", "hex"):
        with pytest.raises(ConfigError, match=f"encoding = '{encoding}': Python knows none of that name"):
            prepared_from(tmp_path, {}, encoding=encoding)


def test_text_within_records_and_of_several_fields(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"content": {"text": "alpha"}, "title": "A"}, {"content": {"text": None}, "title": "B"}, {"title": "C"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    kept, _ = prepared_from(tmp_path, {"a.jsonl": lines}, text_field="content.text")
    assert kept == ["alpha"]
    kept, _ = prepared_from(tmp_path, {}, text_field=("title", "content.text"))
    assert kept == ["A\nalpha", "B", "C"]
    (tmp_path / "in" / "a.jsonl").unlink()
    table = pyarrow.table({"content": [row.get("content") for row in rows], "title": ["A", "B", "C"]})
    parquet.write_table(table, tmp_path / "in" / "a.parquet")
    kept, summary = prepared_from(tmp_path, {}, text_field="content.text")
    assert kept == ["alpha"]
    assert f"1 field 'content.text' is null; the first: {tmp_path}/in/a.parquet, row 1" in str(summary)
    assert f"1 no field 'content.text'; the first: {tmp_path}/in/a.parquet, row 2" in str(summary)
    kept, _ = prepared_from(tmp_path, {}, text_field=("title", "content.text"))
    assert kept == ["A\nalpha", "B", "C"]
    path = tmp_path / "p.yaml"
    path.write_text(f"inputs: [{tmp_path}/in]\noutput: {tmp_path}/o\n")
    assert load_prepare_config(path, ["text_field=[title, content.text]"]).text_field == ("title", "content.text")
    assert load_prepare_config(path, ["text_field=title"]).text_field == "title"
    with pytest.raises(
        ConfigError, match=r"text_field = 'content.body': .*no such text, but the fields content \(no text\), title"
    ):
        load_prepare_config(path, ["text_field=content.body"])


def test_a_first_line_without_text_is_counted_like_any_other(tmp_path):
    kept, summary = prepared_from(tmp_path, {"a.jsonl": '{"text": null}\n{"text": "alpha"}\n'})
    assert kept == ["alpha"]
    assert summary.manifest.documents["unreadable"] == 1


def test_a_document_that_the_fast_engine_refuses_is_named(tmp_path):
    train_tokenizer(["a b  c"], 300, tmp_path / "tokenizer")
    text = "a" + " " * 1_000_001 + "b"
    kept, summary = prepared_from(
        tmp_path,
        {"a.jsonl": json.dumps({"text": "x"}) + "\n" + json.dumps({"text": text})},
        tokenizer=str(tmp_path / "tokenizer"),
    )
    assert kept == [text, "x"]
    assert f"1 encoded by the slow engine, for tiktoken refuses it; the first: {tmp_path}/in/a.jsonl, line 2" in str(
        summary
    )


def test_a_document_that_no_engine_encodes_ends_the_run_or_is_left_out(tmp_path):
    """A Unigram tokenizer without an unknown token refuses what it does not know, even the name of its own end."""
    engine = tokenizers.Tokenizer(tokenizers.models.Unigram([(letter, -1.0) for letter in "ab \n"]))
    engine.decoder = tokenizers.decoders.Fuse()
    engine.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "tokenizer").mkdir()
    engine.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("ab", "a ba", "a poison", "b", "é"))
    options = {"tokenizer": str(tmp_path / "tokenizer"), "deduplicate": False}
    files = {"a.jsonl": lines, "b.txt": "aab"}
    for processes in (1, 2):
        with pytest.raises(
            DataError, match=r"a.jsonl, line 3: cannot be encoded: .*unk_id.*; repair it, or set on_error="
        ):
            prepared_from(tmp_path, files, task_bytes=len(lines), num_processes=processes, **options)
    kept, summary = prepared_from(tmp_path, {}, on_error="skip", **options)
    assert kept == ["a ba", "aab", "ab", "b"]
    documents = summary.manifest.documents
    assert (documents["read"], documents["kept"], documents["unreadable"]) == (6, 4, 2)
    assert summary.manifest.text_bytes == sum(map(len, kept))
    assert f"2 that no engine can encode; the first: {tmp_path}/in/a.jsonl, line 3, Exception: " in str(summary)


def test_a_document_that_the_library_panics_at_is_named_too(tmp_path):
    """Patterns of tokenizers have a bound; what is raised then is no Exception. Llama 3's meets it at ten million blanks."""
    engine = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("((a+)+)+$"), "isolated")
    engine.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "tokenizer").mkdir()
    engine.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    bad = "a" * 40 + "!"
    files = {"a.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in ("a", bad, "aa"))}
    options = {"tokenizer": str(tmp_path / "tokenizer")}
    for processes in (1, 2):
        with pytest.raises(DataError, match=r"a.jsonl, line 2: cannot be encoded: .*Regex search error"):
            prepared_from(tmp_path, files, num_processes=processes, **options)
    _, summary = prepared_from(tmp_path, {}, on_error="skip", **options)
    assert (summary.manifest.documents["kept"], summary.manifest.documents["unreadable"]) == (2, 1)
    with pytest.raises(TokenizerError, match="gave up: .*Regex search error"):
        load_tokenizer(tmp_path / "tokenizer").encode(bad)


def test_a_folder_that_cannot_be_made_is_named_with_its_setting(tmp_path):
    (tmp_path / "a.txt").write_text("alpha")
    with pytest.raises(
        ConfigError, match="output = '.*a.txt/out': cannot be made: Not a directory; choose another folder"
    ):
        prepare(small_config(tmp_path / "a.txt", tmp_path / "a.txt" / "out"), progress=False)


def test_a_tokenizer_that_drops_letters_is_said(tmp_path):
    from tokenizers import Tokenizer as Engine
    from tokenizers import models, trainers

    engine = Engine(models.BPE())
    engine.train_from_iterator(
        ["a text of é"], trainers.BpeTrainer(vocab_size=40, special_tokens=["<|endoftext|>"], show_progress=False)
    )
    engine.save(str(tmp_path / "tokenizer.json"))
    _, summary = prepared_from(tmp_path, {"a.txt": "a text of é and 東"}, tokenizer=str(tmp_path / "tokenizer.json"))
    assert "the tokenizer does not keep 東 я ع 🚀 and the like: texts lose them" in str(summary)
    _, summary = prepared_from(tmp_path, {})
    assert "does not keep" not in str(summary)


def test_a_split_that_no_document_fell_to_is_said(tmp_path):
    """A text file is one document: a corpus of one has one split only, whatever the fraction."""
    said = [
        str(prepared_from(tmp_path / str(fraction), {"a.txt": "alone"}, validation_fraction=fraction)[1])
        for fraction in (0, 0.001, 0.999)
    ]
    assert ["no document for" in text for text in said] == [False, True, True]
    assert "no document for validation: the hash of a document decides, and of 1 none fell there" in said[1]
    assert "no document for train" in said[2]

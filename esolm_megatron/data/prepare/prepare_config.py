"""What `esolm data prepare` is told: the fields of its YAML file, checked as a whole."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from esolm_megatron.config.section import Section, field_problems, nearest
from esolm_megatron.data.prepare.inputs import check_input, find_inputs
from esolm_megatron.data.prepare.text_field import TextField
from esolm_megatron.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from esolm_megatron.errors import ConfigError, shown


class PrepareConfig(Section):
    """How documents become shards of tokens."""

    inputs: tuple[str, ...] = Field(min_length=1)
    """Files, folders and globs of .txt, .txt.gz, .txt.zst, .py, .md (a document each), .jsonl, .jsonl.gz, .jsonl.zst (a document
    a line) and .parquet (a document a row); hf://NAME?config=C&split=S&revision=R, a Hugging Face dataset; -, standard input."""
    output: str = Field(min_length=1)
    """Folder that is written."""
    tokenizer: str = "bytes"
    """bytes, a folder of the tokenizers or transformers library, or hf://NAME of the Hugging Face hub."""
    end_of_text: str | None = None
    """Token that ends each document; null means the one that the tokenizer's folder names, or <|endoftext|>."""
    text_field: str | tuple[str, ...] = "text"
    """Field or column that holds the text; content.text is one inside another; [title, body] are put together, a line each."""
    encoding: str = "utf-8"
    """Of files that are a document, as latin-1; JSON is UTF-8."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a document that no engine can encode does: end the run, or be left out and counted."""
    stdin_format: Literal["jsonl", "text"] = "jsonl"
    """What standard input holds: a document in each line, or one document."""
    validation_fraction: float = Field(0.005, ge=0, lt=1)
    """Share of the documents kept for validation, chosen by their hash."""
    block_tokens: int = Field(1 << 20, ge=2, lt=1 << 31)
    """Tokens in a block: make it a multiple of seq_length, for a row lies within a block."""
    shard_tokens: int = Field(1 << 27, ge=2)
    """Tokens after which a new shard starts."""
    task_bytes: int = Field(1 << 26, ge=1)
    """Text that a process takes, shuffles and commits at once; it holds about three times that in memory."""
    num_processes: int | None = Field(None, ge=1)
    """Processes; null means one for each usable core. Changes no byte of the result."""
    seed: int = Field(0, ge=0)
    """Seed of the order of documents within a task."""
    min_document_chars: int = Field(1, ge=1)
    """Shorter documents are left out."""
    max_document_chars: int | None = Field(None, ge=1)
    """Longer documents are left out; null means none."""
    min_document_bytes: int = Field(1, ge=1)
    """Documents of fewer bytes of UTF-8 are left out."""
    max_document_bytes: int | None = Field(None, ge=1)
    """Documents of more bytes of UTF-8 are left out; null means none."""
    deduplicate: bool = True
    """Leave out all but the first of equal documents. Takes a byte of memory a document, and at most 2 GB."""


def load_prepare_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> PrepareConfig:
    """The checked configuration of a YAML file with overrides `field=value`.

    Raises:
        ConfigError: with every problem, one a line, headed by the file's name.
    """
    from esolm_megatron.config.tree import read_tree  # which `prepare` can do without

    tree = read_tree(path, overrides, PrepareConfig)
    try:
        config, problems = PrepareConfig.model_validate(tree), []
    except ValidationError as error:
        config, problems = None, field_problems(error, _hint)
    problems += checked(config)[0] if config is not None else []
    if config is None or problems:
        raise ConfigError("\n".join([f"{path}:", *problems]))
    return config


def _hint(path: tuple[str, ...]) -> str:
    near = nearest(path[-1], PrepareConfig.model_fields)
    return f"did you mean {near}?" if near else f"known here: {', '.join(PrepareConfig.model_fields)}"


def checked(config: PrepareConfig) -> tuple[list[str], Tokenizer | None]:
    """What is wrong with the configuration, and its tokenizer if there is one."""
    c, out = config, []
    if c.shard_tokens < c.block_tokens:
        out.append(f"shard_tokens = {c.shard_tokens}: must be block_tokens = {c.block_tokens} or more")
    for unit in ("chars", "bytes"):
        least, most = getattr(c, f"min_document_{unit}"), getattr(c, f"max_document_{unit}")
        if most is not None and most < least:
            out.append(f"max_document_{unit} = {most}: must be min_document_{unit} = {least} or more")
    try:
        with suppress(UnicodeError):
            b"text".decode(c.encoding)
    except (LookupError, ValueError):
        out.append(f"encoding = {shown(c.encoding)}: Python knows none of that name; as utf-8, latin-1, cp1252, utf-16")
    if not c.text_field or not all(TextField.of(c.text_field).names):
        out.append(f"text_field = {c.text_field!r}: name a field")
    try:
        for path in find_inputs(c.inputs).files:
            check_input(path, TextField.of(c.text_field))
    except ConfigError as error:
        out.append(str(error))
    try:
        return out, load_tokenizer(c.tokenizer, c.end_of_text)
    except TokenizerError as error:
        return [*out, f"tokenizer = {c.tokenizer!r}: {error}"], None

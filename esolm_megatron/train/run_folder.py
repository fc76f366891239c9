"""What is in a run's folder before its first step: settings, tokenizer, and the checkpoint that it continues from."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from esolm_megatron.checkpoint import Checkpoint, CheckpointError
from esolm_megatron.checkpoint import folder as checkpoint
from esolm_megatron.config import Config, dump
from esolm_megatron.data.shards import ShardMissing
from esolm_megatron.data.shards.format import LocalTrouble
from esolm_megatron.data.shards.shard_cache import open_folder
from esolm_megatron.data.stream.mixture import sources_of
from esolm_megatron.parallel.engine import Engine
from esolm_megatron.train import preflight
from esolm_megatron.train.course import origin
from esolm_megatron.train.feed import Feed
from esolm_megatron.train.guard import batches_done


def prepare_run_folder(config: Config) -> None:
    """Write what makes the run reproducible: the resolved configuration and the tokenizer."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint.prune(config.run_dir, config.checkpoint.keep_last, config.checkpoint.keep_every, remove_unfinished=True)
    (config.run_dir / "config.yaml").write_text(dump(config))
    place = open_folder(next(iter(sources_of(config.data).values())).path, config.data)
    if (config.run_dir / "tokenizer").exists():
        return
    if place.remote:
        files = {"tokenizer.json": place.read("tokenizer/tokenizer.json", "copy the whole folder again")}
        with suppress(ShardMissing, LocalTrouble):  # tokenizers whose end is <|endoftext|> have none
            files["tokenizer_config.json"] = place.read("tokenizer/tokenizer_config.json", "")
        (config.run_dir / "tokenizer").mkdir()
        for name, data in files.items():
            (config.run_dir / "tokenizer" / name).write_bytes(data)
    elif (place.path / "tokenizer").is_dir():
        shutil.copytree(place.path / "tokenizer", config.run_dir / "tokenizer")


def resume(config: Config, engine: Engine, feed: Feed) -> int:
    """Load the newest whole checkpoint, if there is one; returns the steps already done.

    Raises:
        ConfigError: the checkpoint was trained on other data, or with other weights of its sources,
            or the run starts from weights of another network.
    """
    step, error = -1, None
    if engine.is_first_rank:  # one rank verifies, and tells the others which checkpoint is whole
        try:
            whole = checkpoint.newest(config.run_dir, verify=True, move_damaged=True)
            step = -1 if whole is None else whole.step
        except CheckpointError as problem:
            error = problem
    if engine.any_rank(error is not None):
        raise error or CheckpointError(f"{config.run_dir}: the first rank found no checkpoint to continue from")
    step = engine.all_ranks(step)[0]
    if step < 0:
        return _begin(config, engine)
    found = Checkpoint.open(checkpoint.step_folder(config.run_dir, step))
    numbers = found.manifest["numbers"]
    if "converted_from" in found.manifest:
        preflight.refuse_other_model(config, found.config_tree["model"])
    else:
        feed.check_same(found.manifest, batches_done(found.step, (numbers.get("guard") or {}).get("skipped", ())))
        feed.restore(numbers)
    engine.restore(found)
    return found.step


def _begin(config: Config, engine: Engine) -> int:
    """Take the weights that `start_from` names, if it does; returns 0, the steps of a new run."""
    folder, error = origin(config), None
    if folder is None:
        return 0
    try:
        found = Checkpoint.open(folder, verify=engine.is_first_rank)
    except CheckpointError as problem:
        error = problem
    if engine.any_rank(error is not None):
        raise error or CheckpointError(f"start_from = {config.start_from}: the first rank found it damaged")
    preflight.refuse_other_model(config, found.config_tree["model"])
    engine.restore(found, new_optimizer=config.optimizer == "new")
    return 0


def set_aside(run_dir: Path, steps: Sequence[int], number: int) -> None:
    """Rename the checkpoints that the run went back over: it will save these steps again.

    Those of an earlier rollback make room: what a run leaves does not grow with its rollbacks.
    """
    parent = checkpoint.step_folder(run_dir, 0).parent
    for old in parent.glob("*.rolled_back-*"):
        shutil.rmtree(old, ignore_errors=True)
    for step in steps:
        folder = checkpoint.step_folder(run_dir, step)
        folder.rename(folder.with_name(f"{folder.name}.rolled_back-{number}"))

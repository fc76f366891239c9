"""What can be refused before any process starts or any file is written. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from esolm_megatron.config import Config, ConfigError, with_values, world_problems
from esolm_megatron.config.yaml_text import read_mapping
from esolm_megatron.data.stream import TokenStream
from esolm_megatron.data.stream.mixture import sources_of
from esolm_megatron.train.course import legs, origin
from esolm_megatron.train.schedule import learning_rate

_FREE_TO_CHANGE = {
    "runs_dir": None,
    "train": {"num_steps", "micro_batch_size", "log_every_steps", "device", "peak_tflops", "compile", "cuda_graphs",
              "kernels"},
    "parallel": None,
    "evaluate": None,
    "checkpoint": None,
    "log": None,
    "guard": None,
    "watchdog": None,
    "data": {
        "path", "prefetch_batches", "cache_dir", "cache_gb", "prefetch_shards", "retries", "timeout_s", "min_mb_per_s",
        "on_corrupt", "max_corrupt_rows", "sources", "weight_changes",
    },
}  # fmt: skip
"""What a resumed run may change: it alters speed, length or reports, not what is trained. Data and the weights of its sources
are compared when the run resumes."""


def resolve(config: Config) -> Config:
    """`config` with what the prepared data decides filled in.

    Raises:
        ConfigError: the data's vocabulary is not the model's.
    """
    stream = TokenStream(config.data, seq_length=config.model.seq_length, global_batch_size=1)
    vocab_size = stream.vocab_size
    stream.close()
    if config.model.vocab_size is None:
        return with_values(config, model={"vocab_size": vocab_size})
    if config.model.vocab_size != vocab_size:
        where = next(iter(sources_of(config.data).values())).path
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size}: {where} has {vocab_size} tokens with the mask; "
            "set it to that, or to null"
        )
    return config


def refuse_other_run(config: Config) -> None:
    """Raise ConfigError if the run folder holds a run that trains something else."""
    file = config.run_dir / "config.yaml"
    if not file.exists():
        return
    old, new = read_mapping(file, "sections"), config.model_dump(mode="json")
    with suppress(ValidationError):
        old = Config.model_validate(old).model_dump(mode="json")  # fields newer than the file get their defaults
    changed = []
    done = max(
        (int(x.parent.name[5:]) for x in config.run_dir.glob("checkpoints/step_????????/manifest.json")), default=0
    )
    for section, value in new.items():
        free = _FREE_TO_CHANGE.get(section, set())
        if free is None or old.get(section) == value:
            continue
        if section == "phases" and _begun(old.get(section, []), done) == _begun(value, done):
            continue
        if not isinstance(value, dict):
            changed.append(f"{section}: was {old.get(section)!r}, now {value!r}")
            continue
        fields = type(getattr(config, section)).model_fields  # a field that is new since then had its default
        was = {name: field.default for name, field in fields.items()} | old.get(section, {})
        changed += [f"{section}.{key}: was {a!r}, now {b!r}" for key, a, b in _unlike(was, value, free)]
    if changed:
        raise ConfigError(
            f"{config.run_dir} holds a run with other settings; choose another name, restore these, or see --change:\n"
            + "\n".join(changed)
        )


def _begun(phases: Sequence[Mapping[str, Any]], steps: int) -> list[Mapping[str, Any]]:
    """Those that some of the first `steps` steps were trained in."""
    return [phase for phase in phases if phase["from_step"] < steps]


def rate_jump(config: Config, step: int) -> str | None:
    """What to say of a run that goes on from `step` with another number of steps, if its learning rate changes by that.

    Ask before the run folder gets the new configuration.
    """
    file = config.run_dir / "config.yaml"
    if not step or not file.exists():
        return None
    steps = config.train.num_steps
    old = read_mapping(file, "sections").get("train", {}).get("num_steps", steps)
    before, now = (learning_rate(step, config.optim, number) for number in (old, steps))
    if abs(now - before) <= 1e-3 * before:
        return None
    return (
        f"train.num_steps was {old:,} and is {steps:,}: by optim.schedule = {config.optim.schedule} the learning rate of step "
        f"{step:,} is {now:.4g}, and would have been {before:.4g}; constant, and wsd before its decay, go on without a jump"
    )


def refuse_other_model(config: Config, model: Mapping[str, Any]) -> None:
    """Raise ConfigError if `config` trains another network than the one whose weights the run starts from."""
    mine = config.model.model_dump(mode="json")
    other = _unlike(mine, model, {"dropout", "init_std", "seq_length"})
    changed = [f"model.{key} = {a!r}: the weights need {b!r}" for key, a, b in other]
    if changed:
        raise ConfigError(
            f"{config.run_dir} starts from weights of another network; name its model.yaml, if it has one, as base, or set:\n"
            + "\n".join(changed)
        )


def _unlike(a: Mapping[str, Any], b: Mapping[str, Any], free: set[str]) -> list[tuple[str, Any, Any]]:
    """(name, value in a, value in b) of the fields of `b` that differ and are not `free` to."""
    return [(name, a.get(name), value) for name, value in b.items() if name not in free and a.get(name) != value]


def check_run(config: Config, world_size: int) -> None:
    """Raise ConfigError if `config` cannot run, or continue, on `world_size` processes."""
    config = resolve(config)
    refuse_other_run(config)
    legs(config)
    if (folder := origin(config)) is not None:
        refuse_other_model(config, json.loads((folder / "manifest.json").read_text())["config"]["model"])
    problems = world_problems(config, world_size, config.train.device)
    if problems:
        raise ConfigError("\n".join(problems))

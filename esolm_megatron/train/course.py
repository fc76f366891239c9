"""A run's course: settings that alter what is trained from some step on, changed by `--change` and written down.

RUN/changes.jsonl has a line for each change: the step of the checkpoint that it goes on from, and each setting's value before
and after. A run that continues gets them on top of its YAML file, so the file may stay as it was. No torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esolm_megatron.config import Config, ConfigError, check, dump, with_values
from esolm_megatron.config.yaml_text import read_mapping, value_of
from esolm_megatron.train.lease import Lease

FILE = "changes.jsonl"
_MAY_CHANGE: dict[str, set[str] | None] = {
    "optim": None, "objective": None, "model": {"dropout"}, "train": {"fp8", "fp8_skip_blocks"},
}  # fmt: skip
"""Section -> fields, None for all: what a later step may be trained with and an earlier one without."""


def recorded(run_dir: Path) -> list[dict[str, Any]]:
    """The changes of a run, in their order: step, time, and set: name -> [before, after]."""
    file = run_dir / FILE
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def with_changes(config: Config) -> Config:
    """`config` with what was changed in its run; a setting that has another value than before the change stays as it is."""
    for change in recorded(config.run_dir):
        for name, (before, after) in change["set"].items():
            section, _, field = name.partition(".")
            if config.model_dump(mode="json")[section][field] == before:
                config = with_values(config, **{section: {field: after}})
    return config


def change(config: Config, words: Sequence[str]) -> Config:
    """`config` with `section.field=value` changed from the run's newest checkpoint on; the run folder says so from now on.

    Raises:
        ConfigError: there is no such run yet, a setting that no run can change on its way, or a value that does not fit.
        UserError: a process writes the run.
    """
    if not words:
        return config
    if not (config.run_dir / "config.yaml").exists():
        raise ConfigError(
            f"--change {words[0]}: {config.run_dir} holds no run yet; set it in the YAML file, or as an override"
        )
    old = config.model_dump(mode="json")
    for word in words:
        section, field = _named(word)
        config = with_values(config, **{section: {field: value_of(word, Config)}})
    new = config.model_dump(mode="json")
    names = [_named(word) for word in words]
    found = {f"{s}.{f}": [old[s][f], new[s][f]] for s, f in names if old[s][f] != new[s][f]}
    with Lease(config.run_dir):
        steps = [int(path.parent.name[5:]) for path in config.run_dir.glob("checkpoints/step_????????/manifest.json")]
        line = json.dumps({"step": max(steps, default=0), "time": round(time.time()), "set": found})
        if found:  # into the folder's own settings: the data has decided some of them
            file = config.run_dir / "config.yaml"
            kept = check(read_mapping(file, "sections"))
            for name, (_, after) in found.items():
                kept = with_values(kept, **{name.partition(".")[0]: {name.partition(".")[2]: after}})
            file.write_text(dump(kept), encoding="utf-8")
            with (config.run_dir / FILE).open("a", encoding="utf-8") as log:
                log.write(line + "\n")
    return config


def _named(word: str) -> tuple[str, str]:
    name, separator, _ = word.partition("=")
    section, _, field = name.partition(".")
    if not separator or not field:
        raise ConfigError(f"--change {word}: is written section.field=value")
    known = Config.model_fields.get(section)
    fields = getattr(known.annotation, "model_fields", {}) if known else {}
    if field not in fields:
        raise ConfigError(f"--change {word}: there is no setting {name}")
    may = _MAY_CHANGE.get(section, set())
    if may is not None and field not in may:
        listed = ", ".join(f"{s}.*" if f is None else f"{s}.{{{', '.join(sorted(f))}}}" for s, f in _MAY_CHANGE.items())
        raise ConfigError(
            f"--change {word}: not on a run's way: rows, their order or the network would be others; what may change: {listed}. "
            "Speed and reports change without it; for the rest start another run from these weights (esolm convert --to training)"
        )
    return section, field

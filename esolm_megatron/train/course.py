"""A run's course: where it starts from, and settings that alter what is trained from some step on.

They are declared in `phases`, or changed by `--change` and written down: RUN/changes.jsonl has a line for each change, with the
step of the checkpoint that it goes on from, and each setting's value before and after. A run that continues gets them on top
of its YAML file, so the file may stay as it was. No torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Leg:
    """The part of a run from step `first` to step `until` that is trained with one configuration, which has no phases."""

    first: int
    until: int
    config: Config

    def holds(self, step: int) -> bool:
        """Whether a run that has done `step` steps goes on, or has ended, in this leg."""
        return self.first <= step and (step < self.until or self.until == self.config.train.num_steps)


def legs(config: Config) -> list[Leg]:
    """What `phases` make of a run: at least one leg; the last one ends with it.

    Raises:
        ConfigError: steps that do not rise, or a setting that cannot change on a run's way, or not to this.
    """
    begins, now, last = [0], config.model_copy(update={"phases": ()}), config.train.num_steps
    configs = [now]
    for number, phase in enumerate(config.phases):
        where = f"phases[{number}]"
        if phase.from_step <= begins[-1]:
            raise ConfigError(
                f"{where}.from_step = {phase.from_step}: must be above {begins[-1]}, where what is before it begins"
            )
        changed: dict[str, dict[str, Any]] = {}
        for name, value in phase.set.items():
            section, field = _named(name, f"{where}.set: {name}")
            changed.setdefault(section, {})[field] = value
        try:
            now = with_values(now, **changed)
        except ConfigError as error:
            raise ConfigError(f"{where}.set: {error}") from None
        begins.append(phase.from_step)
        configs.append(now)
    ends = [*(min(step, last) for step in begins[1:]), last]
    found = zip(begins, ends, configs, strict=True)
    return [Leg(*leg) for leg in found if leg[0] < last or leg[0] == 0]


def origin(config: Config) -> Path | None:
    """The folder of the checkpoint that a new run starts from; None without `start_from`.

    Raises:
        ConfigError: there is none, or it is the run's own.
    """
    if config.start_from is None:
        return None
    text, said = config.start_from, f"start_from = {config.start_from}"
    path, at, step = text.rpartition("@")
    run = Path(path if at and step.isdigit() else text)
    if run.resolve() == config.run_dir.resolve():
        raise ConfigError(f"{said}: is this run itself; choose another name")
    steps = sorted(int(file.parent.name[5:]) for file in run.glob("checkpoints/step_????????/manifest.json"))
    if not steps:
        raise ConfigError(f"{said}: {run} holds no checkpoint of a run; name a run's folder, or RUN@STEP")
    chosen = int(step) if run != Path(text) else steps[-1]
    if chosen not in steps:
        raise ConfigError(f"{said}: there is no checkpoint of step {chosen}; there are {', '.join(map(str, steps))}")
    return run / "checkpoints" / f"step_{chosen:08d}"


def recorded(run_dir: Path) -> list[dict[str, Any]]:
    """The changes of a run, in their order: step, time, and set: name -> [before, after]."""
    file = run_dir / FILE
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def turns(run_dir: Path, steps: int) -> list[tuple[int, dict[str, Any]]]:
    """(step, settings from then on) of all changes of a run that has done `steps` steps."""
    found = [(x["step"], {name: after for name, (_, after) in x["set"].items()}) for x in recorded(run_dir)]
    file = run_dir / "config.yaml"
    phases = read_mapping(file, "sections").get("phases", []) if file.exists() else []
    return sorted([*found, *((x["from_step"], x["set"]) for x in phases if x["from_step"] < steps)], key=lambda x: x[0])


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
        section, field = _of_word(word)
        config = with_values(config, **{section: {field: value_of(word, Config)}})
    new = config.model_dump(mode="json")
    names = [_of_word(word) for word in words]
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


def _of_word(word: str) -> tuple[str, str]:
    name, separator, _ = word.partition("=")
    if not separator or "." not in name:
        raise ConfigError(f"--change {word}: is written section.field=value")
    return _named(name, f"--change {word}")


def _named(name: str, said: str) -> tuple[str, str]:
    """Section and field of a setting that may change on a run's way."""
    section, _, field = name.partition(".")
    known = Config.model_fields.get(section)
    fields = getattr(known.annotation, "model_fields", {}) if known else {}
    if field not in fields:
        raise ConfigError(f"{said}: there is no setting {name}")
    may = _MAY_CHANGE.get(section, set())
    if may is not None and field not in may:
        listed = ", ".join(f"{s}.*" if f is None else f"{s}.{{{', '.join(sorted(f))}}}" for s, f in _MAY_CHANGE.items())
        raise ConfigError(
            f"{said}: not on a run's way: rows, their order or the network would be others; what may change: {listed}. "
            "Speed and reports change without it; for the rest start another run from these weights: start_from=RUN"
        )
    return section, field

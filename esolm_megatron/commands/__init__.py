"""The verbs of the command line, and what they share: options written `field=value`, and results for people or programs.

Each verb imports what it needs when it runs, so that planning and help start at once and without torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from esolm_megatron.config import ConfigError, Section
from esolm_megatron.config.yaml_text import value_of
from esolm_megatron.terminal import Terminal

Options = TypeVar("Options", bound=Section)


class Placed(Section):
    """Where a converted model is put, and in which type."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto takes a GPU where there is one."""
    dtype: Literal["fp64", "fp32", "bf16", "fp16"] = "fp32"
    """Type of the weights."""
    weights: Literal["full", "int8"] = "full"
    """int8 holds the matrices of blocks in 8 bits: less memory, and less to read where few texts are written."""

    def load(self, folder: str, *, split: bool = False, each: bool = False) -> Any:
        """The model in `folder`. split: cut over the processes of this start, if there are several. each: whole in each of them.

        Raises:
            ConfigError: there is no such device.
        """
        import torch

        from esolm_megatron import load_pretrained

        kinds = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        count = torch.cuda.device_count()
        several, place = split and int(os.environ.get("WORLD_SIZE", 1)) > 1, self.device
        if place == "auto":
            place = "cuda" if count else "cpu"
        if several and place == "cuda":
            place = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        if each and place == "cuda":
            place = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % max(count, 1)}"
        device = torch.device(place)
        if device.type == "cuda" and (device.index or 0) >= count:
            raise ConfigError(
                f"device = {self.device!r}: torch sees {count} GPUs here; use device=cpu, or see esolm doctor"
            )
        if several:
            from esolm_megatron.inference.tensor_parallel import load_split

            if device.type == "cuda":
                torch.cuda.set_device(device)
            if self.weights != "full":
                raise ConfigError(f"weights = {self.weights}: of one process only; leave it out, or --processes")
            return load_split(folder, kinds[self.dtype], device)
        return load_pretrained(folder, kinds[self.dtype], device, weights=self.weights)


def options(kind: type[Options], overrides: Sequence[str]) -> Options:
    """`field=value` words as a checked group of fields; every problem at once."""
    values, problems = {}, []
    for word in overrides:
        name, separator, _ = word.partition("=")
        if not separator:
            problems.append(f"{word!r}: an option is written field=value")
            continue
        try:
            value = value_of(word, kind)
        except ConfigError as error:
            problems.append(str(error))
            continue
        values[name] = value.replace("\\n", "\n") if isinstance(value, str) else value
    try:
        checked = kind.model_validate(values)
    except ValidationError as error:
        known = ", ".join(kind.model_fields)
        for item in error.errors():
            name = ".".join(str(p) for p in item["loc"])
            hint = f"; known here: {known}" if item["type"] == "extra_forbidden" else ""
            problems.append(f"{name}: {item['msg']}{hint}")
        raise ConfigError("\n".join(problems)) from None
    if problems:
        raise ConfigError("\n".join(problems))
    return checked


def show(result: Any, as_dict: Callable[[], Any], as_json: bool) -> None:
    """Print a result for a person, or as one JSON document."""
    if as_json:
        print(json.dumps(as_dict(), indent=1, default=str))
    else:
        Terminal().print(result)

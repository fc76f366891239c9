"""Writes checkpoints as the reference implementation and its libraries do."""

import json

from parity import LENGTH, NUM_HEADS
from safetensors.torch import save_file


def write_folder(folder, state, **config):
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"n_heads": NUM_HEADS, "length": LENGTH} | config))
    return folder


class Opaque:
    """A class that only the writer of a checkpoint has, shaped as OmegaConf's containers and leaves are."""

    def __init__(self, **state):
        self.__dict__.update(state)


def omega(value, parent=None):
    node = Opaque(_parent=parent, _metadata=Opaque(ref_type=dict, flags={}))
    if isinstance(value, dict):
        node._content = {key: omega(item, node) for key, item in value.items()}
    else:
        node._val = value
    return node

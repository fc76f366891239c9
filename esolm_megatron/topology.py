"""Which process does what: global ranks and their (pipeline, data, context, tensor) coordinates, the layers of a stage.

Tensor ranks are neighbours, so that they share a node; then come context ranks, data ranks, and pipeline stages:

    world 8 = pipeline 2 x data 2 x tensor 2      rank  0 1 | 2 3 || 4 5 | 6 7
                                                  tensor 0 1   0 1    0 1   0 1
                                                  data    0     1      0     1
                                                  stage       0            1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

VOCAB_MULTIPLE = 128
"""Of rows of the vocabulary on a rank: the products of other sizes run at half speed or less on GPUs (docs/performance.md)."""


@dataclass(frozen=True)
class Topology:
    """The coordinates of one process in the grid of all."""

    rank: int = 0
    world_size: int = 1
    tensor_size: int = 1
    pipeline_size: int = 1
    context_size: int = 1

    @property
    def data_size(self) -> int:
        """Replicas of the model: groups of ranks that read rows of their own."""
        return self.world_size // (self.tensor_size * self.context_size * self.pipeline_size)

    @property
    def tensor_rank(self) -> int:
        """Place among the ranks that share every matrix."""
        return self.rank % self.tensor_size

    @property
    def context_rank(self) -> int:
        """Place among the ranks that share the tokens of a micro-batch."""
        return self.rank // self.tensor_size % self.context_size

    @property
    def data_rank(self) -> int:
        """Which replica."""
        return self.rank // (self.tensor_size * self.context_size) % self.data_size

    @property
    def stage(self) -> int:
        """Pipeline stage."""
        return self.rank // (self.tensor_size * self.context_size * self.data_size)

    @property
    def token_multiple(self) -> int:
        """What the packed tokens of a micro-batch must be a multiple of, so that every rank gets as many."""
        return self.tensor_size * self.context_size


@cache
def balanced_stages(
    num_layers: int, num_stages: int, num_chunks: int = 1, *, first_load: float = 0.0, last_load: float = 0.0
) -> tuple[int, ...]:
    """Layers of each stage, so that the slowest stage is as fast as it can be.

    first_load, last_load: work of the embedding and of the head, in layers; negative where the last layer has less to do.
    Each stage gets at least one layer for each of its chunks; where two splits are as fast, the later stage, which keeps
    fewer activations, gets the layer.
    """
    layers = [num_chunks] * num_stages
    load = [float(num_chunks)] * num_stages
    load[0] += first_load
    load[-1] += last_load
    for _ in range(num_layers - num_chunks * num_stages):
        lightest = min(range(num_stages), key=lambda stage: (load[stage], -stage))
        layers[lightest] += 1
        load[lightest] += 1
    return tuple(layers)


def layers_of_chunk(stages: Sequence[int], stage: int, chunk: int = 0, num_chunks: int = 1) -> range:
    """Global indices of the layers in one chunk of a stage; chunks of a stage lie one chunk of every stage apart.

    stages: layers of each stage. Chunks of a stage that cannot be equal have one layer more in the first ones.
    """
    sizes = [count // num_chunks + (c < count % num_chunks) for c in range(num_chunks) for count in stages]
    place = chunk * len(stages) + stage
    start = sum(sizes[:place])
    return range(start, start + sizes[place])


def padded_vocab(vocab_size: int, tensor_size: int) -> int:
    """`vocab_size` rounded up so that each tensor rank has a multiple of VOCAB_MULTIPLE rows.

    The added rows stay 0: they enter no loss, gradient norm, checkpoint, export or count of parameters.
    """
    multiple = VOCAB_MULTIPLE * tensor_size
    return -(-vocab_size // multiple) * multiple

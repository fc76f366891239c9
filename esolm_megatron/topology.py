"""Which process does what: global ranks and their (pipeline, data, tensor) coordinates, and the layers of a stage.

Tensor ranks are neighbours, so that they share a node; then come data ranks, then pipeline stages:

    world 8 = pipeline 2 x data 2 x tensor 2      rank  0 1 | 2 3 || 4 5 | 6 7
                                                  tensor 0 1   0 1    0 1   0 1
                                                  data    0     1      0     1
                                                  stage       0            1
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """The coordinates of one process in the grid of all."""

    rank: int = 0
    world_size: int = 1
    tensor_size: int = 1
    pipeline_size: int = 1

    @property
    def data_size(self) -> int:
        """Replicas of the model."""
        return self.world_size // (self.tensor_size * self.pipeline_size)

    @property
    def tensor_rank(self) -> int:
        """Place among the ranks that share every matrix."""
        return self.rank % self.tensor_size

    @property
    def data_rank(self) -> int:
        """Which replica."""
        return self.rank // self.tensor_size % self.data_size

    @property
    def stage(self) -> int:
        """Pipeline stage."""
        return self.rank // (self.tensor_size * self.data_size)


def layers_of_chunk(num_layers: int, stage: int, num_stages: int, chunk: int = 0, num_chunks: int = 1) -> range:
    """Global indices of the layers in one chunk of a stage; chunks of a stage lie `num_stages` chunks apart."""
    size = num_layers // (num_stages * num_chunks)
    start = (chunk * num_stages + stage) * size
    return range(start, start + size)


def padded_vocab(vocab_size: int, tensor_size: int) -> int:
    """`vocab_size` rounded up to a multiple of `tensor_size`; the added rows never enter a loss or a checkpoint."""
    return -(-vocab_size // tensor_size) * tensor_size

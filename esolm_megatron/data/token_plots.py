"""What prepared tokens look like: rank-frequency of the tokens, and lengths of the documents, in one PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from esolm_megatron.config import ConfigError
from esolm_megatron.errors import of_setting, optional


def draw(path: str | Path, title: str, token_counts: np.ndarray, document_lengths: dict[str, np.ndarray]) -> None:
    """Write the picture.

    token_counts: (vocab,) how often each token occurs. document_lengths: tokens of each document, by split.

    Raises:
        ConfigError: matplotlib is not installed, or the name does not end in .png.
    """
    if Path(path).suffix != ".png":
        raise ConfigError(f"plot = {str(path)!r}: must end in .png")
    figure = optional("matplotlib.figure", f"plot = {str(path)!r}").Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    counts = np.sort(token_counts[token_counts > 0])[::-1]
    left.loglog(np.arange(1, len(counts) + 1), counts, ".", markersize=3)
    left.set(xlabel="rank of the token", ylabel="occurrences")
    left.set_title(f"tokens: {len(counts):,} of {len(token_counts):,} occur", fontsize=10)
    longest = max((int(lengths.max()) for lengths in document_lengths.values() if len(lengths)), default=1)
    bins = np.unique(np.geomspace(1, longest + 1, 61).astype(np.int64))
    for split, lengths in document_lengths.items():
        if len(lengths):
            right.hist(
                lengths, bins, histtype="step", label=f"{split}: {len(lengths):,}, median {np.median(lengths):,.0f}"
            )
    right.set(xscale="log", yscale="log", xlabel="tokens in a document, end of text included", ylabel="documents")
    right.set_title("lengths of documents", fontsize=10)
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with of_setting("plot", str(path)):
        figure.savefig(path, dpi=110)

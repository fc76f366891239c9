r"""The texts on which the reference tells zero-shot perplexity, and how it undoes their tokenization before its own.

Names, splits and rules are those of the reference (https://github.com/s-sahoo/Eso-LMs, dataloader.py); other rules give other
perplexities. Rules are applied in order; \x is a replacement by `re.sub`, the others replace text as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from esolm_megatron.config import ConfigError
from esolm_megatron.data.prepare.inputs import find_inputs, read_texts
from esolm_megatron.data.prepare.text_field import TextField

Rule = tuple[str | re.Pattern[str], str]

_WIKITEXT: tuple[Rule, ...] = (
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), r"/'[0-9]/"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    (re.compile(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r"\"\s*([^\"]*?)\s*\""), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    *((" ".join("=" * n), "=" * n) for n in (4, 3, 2)),
    (" \u00b0 ", "\u00b0"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)
_PTB: tuple[Rule, ...] = (
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    *[(" N ", " 1 ")] * 10,  # neighbours share a space
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
)
_LM1B: tuple[Rule, ...] = (
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" \'(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" \!$"), "!"),
    *((f" {mark} ", f"{mark} ") for mark in ",:;"),
    (" / ", "/"),
    (re.compile(r"\" ([^\"]+) \""), r'"\1"'),
    (re.compile(r"\' ([^\']+) \'"), r"'\1'"),
    (re.compile(r"\( ([^\(\)]+) \)"), r"(\1)"),
    (re.compile(r"\[ ([^\[\]]+) \]"), r"[\1]"),
    ("$ ", "$"),
    ("\u00a3 ", "\u00a3"),
)
_LAMBADA: tuple[Rule, ...] = (
    ("\u201c", '"'),
    ("\u201d", '"'),
    (re.compile(r"\A\s+|\s+\Z"), ""),
    (re.compile(r"\A"), "\n"),
)


@dataclass(frozen=True)
class ZeroShotSet:
    """field: that holds a document. split: the one evaluated. rules: that make plain text of it. dataset: its name on the Hub."""

    field: str
    split: str
    rules: tuple[Rule, ...]
    dataset: str

    def plain(self, text: str) -> str:
        """The text without its tokenization."""
        for pattern, new in self.rules:
            text = text.replace(pattern, new) if isinstance(pattern, str) else pattern.sub(new, text)
        return text


SETS = {
    "wikitext2": ZeroShotSet("text", "validation", _WIKITEXT, "wikitext, wikitext-2-raw-v1"),
    "wikitext103": ZeroShotSet("text", "validation", _WIKITEXT, "wikitext, wikitext-103-raw-v1"),
    "ptb": ZeroShotSet("sentence", "validation", _PTB, "ptb_text_only"),
    "lm1b": ZeroShotSet("text", "test", _LM1B, "lm1b"),
    "lambada": ZeroShotSet("text", "test", _LAMBADA, "lambada_test.jsonl of OpenAI"),
    "ag_news": ZeroShotSet("text", "test", (), "ag_news"),
    "scientific_papers_arxiv": ZeroShotSet("article", "validation", _WIKITEXT + _LM1B, "scientific_papers, arxiv"),
    "scientific_papers_pubmed": ZeroShotSet("article", "validation", _WIKITEXT + _LM1B, "scientific_papers, pubmed"),
}
"""Name as the reference has it -> the set."""


def documents(name: str, where: str) -> Iterator[str]:
    """Plain documents of the set, from a file, a glob, hf://, or the files of its split in a folder.

    Raises:
        ConfigError: no such set, or there is nothing of its split.
    """
    if name not in SETS:
        raise ConfigError(f"zero_shot = {name!r}: must be one of {', '.join(SETS)}")
    found = SETS[name]
    texts: Iterable[str]
    if Path(where).is_dir():
        mine = re.compile(
            rf"(?<![a-z]){'valid(ation)?' if found.split == 'validation' else found.split}(?![a-z])", re.IGNORECASE
        )
        files = [path for path in find_inputs([where], "text").files if mine.search(str(Path(path).relative_to(where)))]
        if not files:
            raise ConfigError(
                f"text = {where!r}: zero_shot={name} reads the {found.split} split of {found.dataset}, "
                "and no file there has that in its name"
            )
        texts = (text for path in files for text in read_texts(path, "text", TextField.of(found.field)))
    else:
        texts = read_texts(where, "text", TextField.of(found.field))
    return (found.plain(text) for text in texts)

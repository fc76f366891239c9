"""Documents as rows: every token counts once, with what is given before it; the reference's sets, as it reads them."""

import json

import pytest

from esolm_megatron.config import ConfigError
from esolm_megatron.evaluation import TextRows
from esolm_megatron.evaluation.zero_shot import SETS, documents


def letters(text):
    return [ord(c) for c in text]


def seen(rows):
    """Each row as (given, counted) text."""
    out = []
    for tokens, valid, scored in zip(rows.tokens, rows.valid, rows.scored, strict=True):
        assert not (scored & ~valid).any()
        out.append(tuple("".join(chr(x) for x in tokens[mine]) for mine in (valid & ~scored, scored)))
    return out


def test_each_document_is_by_itself():
    assert seen(TextRows.of(["abcdefg", "", "xyz"], letters, 3, 99)) == [
        ("", "abc"),
        ("", "def"),
        ("", "g"),
        ("", "xyz"),
    ]


def test_windows_slide_and_count_each_token_once():
    rows = TextRows.of(["abcdefghij", "xy"], letters, 4, 99, stride=3)
    assert seen(rows) == [("", "abcd"), ("d", "efg"), ("g", "hij"), ("", "xy")]
    assert seen(TextRows.of(["abcdefgh"], letters, 4, 99, stride=3))[-1] == ("efg", "h")
    assert seen(TextRows.of(["abcdef"], letters, 4, 99, stride=1)) == [("", "abcd"), ("bcd", "e"), ("cde", "f")]
    text = "".join(chr(97 + n % 26) for n in range(301))
    for stride in (1, 3, 7, 16):
        assert "".join(new for _, new in seen(TextRows.of([text], letters, 16, 999, stride=stride))) == text
    for stride in (0, 5):
        with pytest.raises(ConfigError, match=f"stride = {stride}: must be 1 to 4"):
            TextRows.of(["abcdef"], letters, 4, 99, stride=stride)


def test_a_stream_lies_between_ends_as_in_the_reference():
    rows = TextRows.of(["abc", "de", "fghi"], letters, 5, 99, ends=ord("."))
    assert seen(rows) == [("", ".abc."), ("", "..de."), ("", "..fg."), ("", ".hi..")]
    assert len(TextRows.of(["abc", "de", "fgh"], letters, 5, 99, ends=ord(".")).tokens) == 3, "the rest is left out"
    assert (rows.num_tokens, rows.num_words, rows.num_bytes) == (12, 3, 9), "an end after each document counts"
    with pytest.raises(ConfigError, match="its 4 tokens fill no row of 9"):
        TextRows.of(["abc"], letters, 9, 99, ends=ord("."))
    with pytest.raises(ConfigError, match="seq_length = 2"):
        TextRows.of(["abc"], letters, 2, 99, ends=ord("."))


def test_no_more_is_read_than_is_needed():
    asked = iter(["abc", "def", "ghi"])
    assert len(TextRows.of(asked, letters, 2, 3).tokens) == 4
    assert next(asked) == "ghi"
    for texts in (["", ""], []):
        with pytest.raises(ConfigError, match="every document is empty"):
            TextRows.of(texts, letters, 5, 1)


WIKITEXT = " Senj\u014d ( Japanese : X ) , the 1 @.@ 5 @,@ 000 @-@ ton ' best ' \" game 's \" N [ sic ] { a } . It 20 \u00b0 C ! \n"
LM1B = "The U.S. , said \" no \" : it 's http : / / x.org / y ( really ) ' so ' [ 1 ] $ 5 \u00a3 6 won ? yes ! end ."


@pytest.mark.parametrize(
    ("name", "text", "plain"),
    [
        ("wikitext2", WIKITEXT,
         " Senj\u014d (Japanese: X), the 1.5,000-ton 'best' \"game's\" 1 [sic] {a}. It 20\u00b0C!\n"),
        ("wikitext103", " = = Plot = = \n = = = = Deep = = = = \n", " == Plot ==\n==== Deep ====\n"),
        ("ptb", "mr. <unk> of n.v. N N the group 's do n't rise \\/ fall $ N billion # N players ' union \n next",
         "mr. ? of n.v. 1 1 the group's don't rise / fall $1 billion #1 players' union\nnext"),
        ("lm1b", LM1B, "The U.S., said \"no\": it's http://x.org/y (really) 'so' [1] $5 \u00a36 won? yes! end."),
        ("lm1b", "He asked why ?", "He asked why?"),
        ("lambada", " \u201cWell,\u201d he said. \n", '\n"Well," he said.'),
        ("ag_news", LM1B, LM1B),
        ("scientific_papers_arxiv", LM1B,
         "The U.S., said \"no\": it's http:// x.org/y (really)'so' [1] $5 \u00a36 won? yes! end."),
    ],
)  # fmt: skip
def test_rules_give_what_the_reference_gives(name, text, plain):
    """What its functions returned for these texts (dataloader.py, 2026-11-27); 160,000 random ones were compared, too."""
    assert SETS[name].plain(text) == plain


def test_a_set_is_read_from_its_split_and_field(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test", "invalid"):
        lines = [{"sentence": f"the {split} 's {n}", "text": "no"} for n in range(2)]
        (tmp_path / "data" / f"{split}-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(documents("ptb", str(tmp_path))) == ["the validation's 0", "the validation's 1"]
    assert next(documents("ptb", str(tmp_path / "data" / "test-00000.jsonl"))) == "the test's 0"
    (tmp_path / "data" / "test-00000.jsonl").unlink()
    with pytest.raises(ConfigError, match="reads the test split of ag_news, and no file there has that in its name"):
        documents("ag_news", str(tmp_path))
    with pytest.raises(ConfigError, match="article"):
        list(documents("scientific_papers_arxiv", str(tmp_path)))
    assert {name for name, x in SETS.items() if x.split == "test"} == {"lm1b", "lambada", "ag_news"}

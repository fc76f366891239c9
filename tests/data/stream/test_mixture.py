"""Mixtures: exact proportions at any sample, whatever changes when, and the same batches for every number of ranks."""

import json
import shutil
from fractions import Fraction

import numpy as np
import pytest
import yaml
from small_corpora import small_config, write_documents

from esolm_megatron.config import ConfigError, DataConfig, check
from esolm_megatron.data.prepare import prepare
from esolm_megatron.data.shards.identity import changes
from esolm_megatron.data.stream import TokenStream, ValidationSet
from esolm_megatron.data.stream.mixture import Mixture, Pattern, first_difference, phases_of, sources_of
from esolm_megatron.errors import DataError

B = 12


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Three folders of other documents, of other sizes."""
    folder = tmp_path_factory.mktemp("sources")
    for name, count in (("a", 301), ("b", 97), ("c", 41)):
        write_documents(folder / f"{name}.jsonl", count, seed=count)
        prepare(small_config(folder / f"{name}.jsonl", folder / name), progress=False)
    return folder


def mixed(folder, weights=None, changes=(), **fields):
    weights = {"a": 5, "b": 2, "c": 1} if weights is None else weights
    return DataConfig(
        sources={name: {"path": str(folder / name), "weight": weight} for name, weight in weights.items()},
        weight_changes=[{"step": step, "weights": new} for step, new in changes],
        **{"num_lanes": 3, "shuffle_window": 5, **fields},
    )


def stream(config, **options):
    return TokenStream(config, **{"seq_length": 37, "global_batch_size": B, "seed": 5, **options})


@pytest.mark.parametrize(
    "weights",
    [
        (1,),
        (0, 7),
        (1, 1),
        (97, 3),
        (5, 2, 1),
        (1, 1, 1, 1, 1, 1, 1),
        (50, 1, 1, 1, 0, 4),
        (33, 33, 20, 14),
        (899, 1, 100),
    ],
)
def test_each_source_has_its_share_after_any_number_of_samples(weights):
    pattern = Pattern(tuple(Fraction(w, sum(weights)) for w in weights))
    shares = np.array(weights) / sum(weights)
    samples = np.arange(3 * pattern.period + 5)
    which, numbers = pattern.deal(samples)
    counts = np.cumsum(which[:, None] == np.arange(len(weights)), axis=0)
    assert np.abs(counts - (samples[:, None] + 1) * shares).max() < 1
    assert np.array_equal(numbers, counts[samples, which] - 1), "each source's own samples come one after the other"
    assert counts[pattern.period - 1].tolist() == pattern.quotas
    for n in (0, 1, pattern.period // 2, pattern.period, 2 * pattern.period + 3):
        assert pattern.counts(n) == (counts[n - 1].tolist() if n else [0] * len(weights))


def test_weights_that_no_pattern_holds_are_refused():
    with pytest.raises(ConfigError, match=r"data.sources: weights 0.333333, 0.666667 .*round them"):
        Pattern((Fraction(333333, 10**6), Fraction(666667, 10**6)))


def test_changes_of_weights_hold_from_their_batch_on(sources):
    config = mixed(sources, changes=[(7, {"a": 0, "c": 0.5}), (20, {"a": 1.5, "b": 0})])
    weights = [{"a": 5, "b": 2, "c": 1}] * 7 + [{"b": 2, "c": 0.5}] * 13 + [{"a": 1.5, "c": 0.5}] * 30
    mixture = Mixture(config, B)
    seen, since = dict.fromkeys("abc", 0), {}
    for batch, now in enumerate(weights):
        if batch in (0, 7, 20):
            since = dict.fromkeys("abc", 0)
        which, numbers = mixture.deal(batch, np.arange(B))
        for source, number in zip(which.tolist(), numbers.tolist(), strict=True):
            name = mixture.names[source]
            assert number == seen[name], "no sample of a source is left out or comes twice, over all changes"
            seen[name] += 1
            since[name] += 1
            dealt, total = sum(since.values()), sum(now.values())
            assert all(abs(count - dealt * now.get(n, 0) / total) < 1 for n, count in since.items())
        assert mixture.counts(batch + 1) == seen
    far = mixture.counts(10**9)
    assert sum(far.values()) == 10**9 * B
    assert abs(far["a"] - seen["a"] - (10**9 - 50) * B * 0.75) < 1


def test_a_batch_is_the_same_for_every_number_of_ranks_and_every_prefetch(sources):
    config = mixed(sources, changes=[(3, {"a": 1})])
    whole = stream(config, global_batch_size=16)
    with whole.prefetch(0, 8, depth=3) as ahead:
        batches = list(ahead)
    for size in (1, 2, 4, 8):
        for rank in range(size):
            part = stream(config, global_batch_size=16, data_rank=rank, data_size=size)
            with part.prefetch(0, 8, depth=1 + rank) as ahead:
                for batch, mine in zip(batches, ahead, strict=True):
                    assert np.array_equal(mine.tokens, batch.tokens[rank::size])
                    assert np.array_equal(mine.samples, batch.samples[rank::size])
                    assert [d.tolist() for d in mine.documents] == [d.tolist() for d in batch.documents[rank::size]]


def rows_of(folder, name):
    """All rows of a lone source, sorted."""
    data = TokenStream(folder / name, seq_length=37, global_batch_size=1)
    count = data.sources["data"].num_sequences
    return sorted(data.batch(step).tokens[0].tolist() for step in range(count))


def test_every_sample_of_a_source_comes_once_an_epoch(sources):
    data = stream(mixed(sources))
    texts = {name: rows_of(sources, name) for name in "abc"}
    sizes = {name: source.num_sequences for name, source in data.sources.items()}
    assert {name: len(rows) for name, rows in texts.items()} == sizes
    dealt = {name: [] for name in "abc"}
    for step in range(2 * sizes["a"] * 8 // 5 // B + 2):
        batch = data.batch(step)
        for name, chosen, _ in data._dealt(step, data._places(step, batch.rows)):
            order = np.argsort(batch.samples[chosen])
            dealt[name] += batch.tokens[chosen[order]].tolist()
    for name, rows in dealt.items():
        n = sizes[name]
        assert len(rows) >= 2 * n
        first, second = rows[:n], rows[n : 2 * n]
        assert sorted(first) == sorted(second) == texts[name]
        assert first != second


def test_any_step_of_two_epochs_at_once(sources):
    config = mixed(sources, changes=[(9, {"b": 6}), (31, {"a": 0})])
    old = stream(config)
    batches = [old.batch(step) for step in range(2 * old.sources["a"].num_sequences // B)]
    for step in reversed(range(len(batches))):
        new = stream(config).batch(step)
        assert np.array_equal(new.tokens, batches[step].tokens)
        assert np.array_equal(new.samples, batches[step].samples)


def test_rows_of_a_batch_are_not_tied_to_sources(sources):
    """Half and half in turns, a lone rank of two would otherwise see one source only."""
    config = mixed(sources, {"a": 1, "b": 1})
    rank = stream(config, data_rank=0, data_size=2)
    seen = [
        chosen.size for step in range(40) for _, chosen, _ in rank._dealt(step, rank._places(step, np.arange(0, B, 2)))
    ]
    assert len(seen) > 60, "both sources in most of its shares"


def test_one_source_is_as_the_path_alone(sources):
    alone = TokenStream(sources / "a", seq_length=37, global_batch_size=B, seed=5, num_lanes=3, shuffle_window=5)
    named = stream(mixed(sources, {"a": 3}))
    assert all(np.array_equal(alone.batch(s).tokens, named.batch(s).tokens) for s in range(40))
    assert not np.array_equal(stream(mixed(sources)).batch(0).tokens, alone.batch(0).tokens)


def test_counts_are_those_of_the_batches(sources):
    data = stream(mixed(sources, changes=[(5, {"c": 4})]))
    found = dict.fromkeys("abc", 0)
    for step in range(30):
        for name, chosen, _ in data._dealt(step, np.arange(B)):
            found[name] += len(chosen)
    counts = data.counts(30)
    assert {name: count["samples"] for name, count in counts.items()} == found
    assert counts["c"]["epochs"] == round(found["c"] / data.sources["c"].num_sequences, 6)
    assert counts["a"]["tokens"] == found["a"] * 37


def test_validation_takes_turns_by_weight_until_one_source_ends(sources):
    data = ValidationSet(mixed(sources, {"a": 3, "b": 1, "c": 0}), seq_length=37)
    lone = {name: ValidationSet(sources / name, seq_length=37) for name in "ab"}
    batch = data.rows(range(len(data)))
    shares = {
        n: [r for r in lone[n].rows(range(len(lone[n]))).tokens.tolist() if r in batch.tokens.tolist()] for n in "ab"
    }
    assert sum(map(len, shares.values())) == len(data)
    assert abs(len(shares["a"]) - 0.75 * len(data)) < 1
    assert len(shares["a"]) == len(lone["a"]) or len(shares["b"]) == len(lone["b"])


def test_sources_of_other_tokenizers_are_refused(sources, tmp_path):

    shutil.copytree(sources / "b", tmp_path / "b")
    shutil.copytree(sources / "a", tmp_path / "a")
    path = tmp_path / "b" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_fingerprint": "0" * 64}))
    with pytest.raises(DataError, match=r"data.sources: a has tokenizer_fingerprint \w{64}, b has 0{64}"):
        stream(mixed(tmp_path, {"a": 1, "b": 1}))


def test_what_has_changed_is_said(sources, tmp_path):
    config = mixed(sources)
    facts = stream(config).facts()
    assert changes(facts, stream(mixed(sources, {"c": 1, "a": 5, "b": 2})).facts()) == [], "their order means nothing"
    without = {name: facts[name] for name in "ab"}
    assert changes(facts, without) == ["source c is gone"]
    assert changes(without, facts) == [], "a source may join; the weights it had are another question"
    assert changes({"a": facts["a"]}, facts) == ["source b is new", "source c is new"]
    assert changes({"data": facts["a"]}, {"a": facts["a"]}) == []
    write_documents(tmp_path / "b.jsonl", 98, seed=97)
    prepare(small_config(tmp_path / "b.jsonl", tmp_path / "b"), progress=False)
    other = {**facts, "b": TokenStream(tmp_path / "b", seq_length=37, global_batch_size=1).facts()["data"]}
    (line,) = changes(facts, other)
    assert line.startswith("source b: fingerprint was ")
    assert f"tokens was {facts['b']['tokens']}, now {other['b']['tokens']}" in line
    assert "shards differ" in line
    assert changes({"data": {"fingerprint": "x" * 64}}, {"data": facts["a"]})[0].startswith(
        "source data: fingerprint was xxx"
    )


def test_only_weights_of_batches_to_come_may_change(sources):
    def compared(one, two):
        return first_difference(phases_of(one), list(sources_of(one)), phases_of(two), list(sources_of(two)))

    base = mixed(sources, changes=[(10, {"a": 1})])
    assert compared(base, mixed(sources, {"a": 10, "b": 4, "c": 2}, changes=[(10, {"a": 2})])) is None
    assert compared(base, mixed(sources, changes=[(10, {"a": 1}), (50, {"b": 9})])) == 50
    assert compared(base, mixed(sources)) == 10
    assert compared(base, mixed(sources, {"a": 6, "b": 2, "c": 1}, changes=[(10, {"a": 1})])) == 0
    joined = mixed(sources, {"a": 5, "b": 2, "c": 0}, changes=[(30, {"c": 1})])
    assert compared(mixed(sources, {"a": 5, "b": 2}), joined) == 30


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "data.path: missing; give it a value"),
        ({"path": "x", "sources": {"a": {"path": "y"}}}, "data.path = x: data.sources is given too; give one of them"),
        ({"path": "x", "weight_changes": [{"step": 1, "weights": {}}]}, "data.weight_changes: needs data.sources"),
        ({"sources": {"a": {"path": "y", "weight": 0}}}, "data.sources: all weights are 0; give one of them a weight"),
        ({"sources": {"a": {"path": "y"}}, "weight_changes": [{"step": 3, "weights": {"b": 1}}]},
         "data.weight_changes: step 3 names 'b'; data.sources has a"),
        ({"sources": {"a": {"path": "y"}}, "weight_changes": [{"step": 3, "weights": {"a": 0}}]},
         "data.weight_changes: from step 3 on all weights are 0"),
        ({"sources": {"a": {"path": "y"}}, "weight_changes": [{"step": 3, "weights": {}}, {"step": 3, "weights": {}}]},
         "data.weight_changes: steps [3, 3] must rise"),
        ({"path": "https://x/y"},
         "data.cache_dir = null: https://x/y is not on this machine; give a folder on a local disk for its shards"),
        ({"path": "pipe:cat x", "cache_dir": "c"}, "pipe:cat x: the command must have {name} where the file's name belongs"),
    ],
)  # fmt: skip
def test_sections_that_do_not_fit_together(data, message):
    tree = {
        "name": "x", "model": {"num_layers": 1, "hidden_size": 4, "num_heads": 1, "seq_length": 8},
        "objective": {"alpha_0": 1.0}, "train": {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        "optim": {"warmup_steps": 0}, "data": data,
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        check(tree)
    assert message in str(caught.value).splitlines()


def test_mix_tells_what_a_run_will_read(sources, tmp_path, capsys):
    from esolm_megatron.cli import main

    tree = {
        "name": "x", "model": {"num_layers": 1, "hidden_size": 4, "num_heads": 1, "seq_length": 37},
        "objective": {"alpha_0": 1.0}, "train": {"num_steps": 40, "global_batch_size": B, "micro_batch_size": 1},
        "optim": {"warmup_steps": 0},
        "data": mixed(sources, changes=[(10, {"a": 1}), (99, {"a": 7})]).model_dump(mode="json"),
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    words = ["data", "mix", str(tmp_path / "run.yaml"), "train.num_steps=50", f"plot={tmp_path / 'mix.png'}"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_steps"], found["phases"]) == (50, [0, 10])
    by_name = {source["name"]: source for source in found["sources"]}
    assert by_name["b"]["weights"] == [0.25, 0.5]
    data = stream(mixed(sources, changes=[(10, {"a": 1})]))
    for name, count in data.counts(50).items():
        assert by_name[name]["samples"] == count["samples"]
        assert by_name[name]["epochs"] == count["epochs"]
        assert by_name[name]["tokens"] == data.sources[name].reader.manifest.splits["train"].tokens
    assert (tmp_path / "mix.png").stat().st_size > 10_000
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "share from" in said
    assert "62.50%" in said

import itertools
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from scipy import stats

from tossup.supernet.data import IGNORED, DataConfig, MQARConfig, TextConfig, build_data
from tossup.supernet.errors import ConfigError

SMALL = MQARConfig(vocab_size=12, length=16, pairs=2, random_non_queries=False)


def queries_of(tokens, labels, pairs):
    """For one sequence {key: (position of its query, its label)}."""
    positions = (labels != IGNORED).nonzero().flatten().tolist()
    return {tokens[p].item(): (p, labels[p].item()) for p in positions}


@pytest.mark.parametrize("random_non_queries", [True, False])
@pytest.mark.parametrize(
    ("vocab_size", "length", "pairs", "power_a"),
    [(8192, 64, 8, 0.01), (96, 48, 8, 0.01), (12, 8, 2, 1.0), (10, 17, 4, 2.0), (4, 4, 1, 0.1)],
)
def test_every_query_is_answered_by_the_value_that_followed_its_key(
    vocab_size, length, pairs, power_a, random_non_queries
):
    config = MQARConfig(
        vocab_size=vocab_size,
        length=length,
        pairs=pairs,
        power_a=power_a,
        random_non_queries=random_non_queries,
    )
    data = build_data(config, seed=5)
    assert (data.vocab_size, data.length) == (vocab_size, length)
    tokens, labels = data.batch(step=2, batch_size=50)
    assert tokens.dtype == labels.dtype == torch.int64
    assert tokens.shape == labels.shape == (50, length)
    assert tokens.is_contiguous() and labels.is_contiguous()
    assert tokens.min() >= 0 and tokens.max() < vocab_size
    for row, label in zip(tokens, labels, strict=True):
        keys, values = row[: 2 * pairs : 2].tolist(), row[1 : 2 * pairs : 2].tolist()
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(0 < key < vocab_size // 2 for key in keys)
        assert all(vocab_size // 2 <= value for value in values)
        answers = {key: answer for key, (_, answer) in queries_of(row, label, pairs).items()}
        assert answers == dict(zip(keys, values, strict=True))
        assert (label != IGNORED).sum() == pairs
        assert (label[: 2 * pairs] == IGNORED).all()
        if not random_non_queries:
            others = (label == IGNORED)[2 * pairs :]
            assert (row[2 * pairs :][others] == 0).all()


def test_random_non_queries_cover_the_vocabulary():
    config = SMALL.model_copy(update={"random_non_queries": True})
    tokens, labels = build_data(config, 0).batch(0, 4000)
    noise = tokens[:, 4:][labels[:, 4:] == IGNORED]
    assert stats.chisquare(np.bincount(noise, minlength=12)).pvalue > 1e-4


@pytest.mark.parametrize("power_a", [0.01, 1.0])
def test_slots_of_queries_follow_the_power_law(power_a):
    """The joint law of both queries' slots: one after another, without replacement."""
    config = SMALL.model_copy(update={"power_a": power_a})
    tokens, labels = build_data(config, seed=1).batch(0, 20000)
    slots, weight = range(6), np.arange(1.0, 7.0) ** (power_a - 1)
    p = weight / weight.sum()
    law = {(a, b): p[a] * p[b] / (1 - p[a]) for a, b in itertools.permutations(slots, 2)}
    seen: Counter = Counter()
    for row, label in zip(tokens, labels, strict=True):
        found = queries_of(row, label, 2)
        seen[tuple((found[row[i].item()][0] - 4) // 2 for i in (0, 2))] += 1
    assert set(seen) <= set(law)
    expected = [20000 * law[pair] for pair in law]
    assert stats.chisquare([seen[pair] for pair in law], expected).pvalue > 1e-4


def test_keys_and_values_take_every_arrangement_equally_often():
    tokens, _ = build_data(SMALL, seed=2).batch(0, 20000)
    for columns, choices in (((0, 2), range(1, 6)), ((1, 3), range(6, 12))):
        seen = Counter(map(tuple, tokens[:, columns].tolist()))
        arrangements = list(itertools.permutations(choices, 2))
        assert set(seen) == set(arrangements)
        assert stats.chisquare([seen[pair] for pair in arrangements]).pvalue > 1e-4


@pytest.fixture
def corpus(tmp_path):
    """Twenty files, the i-th holding nothing but byte i, so that a token tells its file."""
    for index in range(20):
        folder = tmp_path / "corpus" / ("a" if index % 2 else "b/c")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.txt").write_bytes(bytes([index]) * (20 + 10 * index))
    (tmp_path / "corpus" / "ignored.bin").write_bytes(b"\xff" * 10000)
    return tmp_path / "corpus"


def text(*paths, **options):
    return TextConfig(paths=tuple(map(str, paths)), **{"length": 8, **options})


@pytest.fixture(params=["mqar", "text"])
def config(request):
    if request.param == "mqar":
        return MQARConfig(vocab_size=1000, length=48)
    return text(request.getfixturevalue("corpus"), held_out=0.5)


def test_a_batch_depends_on_seed_and_step_alone(config):
    data, again = build_data(config, 3), build_data(config, 3)
    data.evaluation(2, 5)
    first = [data.batch(step, 6) for step in (0, 1, 10**12)]
    backwards = [again.batch(step, 6) for step in (10**12, 1, 0)][::-1]
    for one, other in zip(first, backwards, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], build_data(config, 4).batch(0, 6)[0])


def test_evaluation_is_frozen_and_a_prefix_of_longer_ones(config):
    data = build_data(config, 3)
    short, long = data.evaluation(2, 5), data.evaluation(4, 5)
    assert len(short) == 2 and len(long) == 4
    for one, other in zip(short, long, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(long[0][0], long[1][0])


def test_training_and_evaluation_draw_from_different_streams():
    data = build_data(MQARConfig(), seed=0)
    training = {row for step in range(20) for row in map(tuple, data.batch(step, 8)[0].tolist())}
    held_out = {row for tokens, _ in data.evaluation(20, 8) for row in map(tuple, tokens.tolist())}
    assert len(training) == len(held_out) == 160
    assert training.isdisjoint(held_out)


def test_text_windows_lie_in_one_file_and_the_split_is_by_file(corpus):
    data = build_data(text(corpus, held_out=0.25), seed=0)
    training, labels = data.batch(0, 20000)
    assert data.vocab_size == 256
    assert (training == training[:, :1]).all() and (labels == training[:, :1]).all()
    files = set(training[:, 0].tolist())
    held_out = {i for tokens, _ in data.evaluation(10, 200) for i in tokens[:, 0].tolist()}
    assert len(held_out) == 5 and len(files) == 15
    assert files | held_out == set(range(20))
    windows = {index: 20 + 10 * index - 8 for index in files}
    seen = Counter(training[:, 0].tolist())
    expected = [20000 * count / sum(windows.values()) for count in windows.values()]
    assert stats.chisquare([seen[index] for index in windows], expected).pvalue > 1e-4


def test_text_reaches_the_first_and_the_last_window_of_a_file(tmp_path):
    (tmp_path / "one.txt").write_bytes(bytes(range(12)))
    (tmp_path / "two.txt").write_bytes(bytes(range(100, 112)))
    data = build_data(text(tmp_path), seed=0)
    for tokens, labels in (data.batch(0, 400), data.evaluation(1, 400)[0]):
        assert torch.equal(tokens + 1, labels)
        starts = set(tokens[:, 0].tolist())
        assert starts in ({0, 1, 2, 3}, {100, 101, 102, 103})
    assert tokens.is_contiguous() and labels.dtype == torch.int64


def test_packed_text_is_every_window_of_all_files_and_tells_them_apart(corpus):
    """Also files shorter than a sample, of which unpacked text has no window."""
    data = build_data(text(corpus, length=100, packed=True, held_out=0.25), seed=0)
    tokens, labels, seq_idx = data.batch(0, 20000)
    assert tokens.shape == labels.shape == seq_idx.shape == (20000, 100)
    follows = tokens[:, 1:] != tokens[:, :-1]  # a byte tells its file
    assert torch.equal(seq_idx.diff(dim=1), follows.long()) and not seq_idx[:, 0].any()
    inside = labels != IGNORED
    assert torch.equal(labels[inside], tokens[inside])
    assert torch.equal(inside[:, :-1], ~follows)
    order = list(dict.fromkeys(token for row in tokens.tolist() for token in row))
    held_out = {i for batch in data.evaluation(20, 200) for i in batch[0].unique().tolist()}
    assert len(held_out) == 5 and set(order) | held_out == set(range(20))
    sizes = {index: 20 + 10 * index for index in order}
    assert min(sizes.values()) < 100
    windows = sum(sizes.values()) - 100
    after = {a: b for row in tokens.tolist() for a, b in itertools.pairwise(row) if a != b}
    first = (set(order) - set(after.values())).pop()
    content = []
    while first is not None:
        content += [first] * sizes[first]
        first = after.get(first)
    assert len(content) == windows + 100
    # A window begins in a file as often as it has bytes, but for the last ones of all
    begins = Counter(content[:windows])
    seen = Counter(tokens[:, 0].tolist())
    assert set(seen) == set(begins)
    expected = [20000 * count / windows for count in begins.values()]
    assert stats.chisquare([seen[index] for index in begins], expected).pvalue > 1e-4


def test_packed_text_passes_over_empty_files(tmp_path):
    for index in range(8):
        content = b"" if index % 2 else bytes([index]) * 5
        (tmp_path / f"{index}.txt").write_bytes(content)
    (tmp_path / "first.txt").write_bytes(b"x" * 30)
    data = build_data(text(tmp_path, packed=True, length=4, held_out=0.4), 0)
    tokens, _, seq_idx = data.batch(0, 500)
    assert torch.equal(seq_idx.diff(dim=1).bool(), tokens.diff(dim=1) != 0)


def test_text_of_the_standard_library():
    data = build_data(TextConfig(paths=("python-stdlib",), length=64), seed=0)
    root = Path(sysconfig.get_path("stdlib"))
    sources = [
        file.read_bytes()
        for file in root.rglob("*.py")
        if not {"site-packages", "dist-packages", "test", "tests"} & set(file.parts)
    ]
    for tokens, labels in (data.batch(0, 3), *data.evaluation(2, 2)):
        for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
            assert row[1:] == label[:-1]
            assert any(bytes([row[0], *label]) in source for source in sources)


def test_text_split_does_not_depend_on_where_the_files_are(corpus, tmp_path, monkeypatch):
    moved = corpus.rename(tmp_path / "elsewhere")
    fingerprint = build_data(text(moved), 0).fingerprint()
    assert build_data(text(moved / "**" / "*.txt"), 0).fingerprint() == fingerprint
    monkeypatch.chdir(moved)
    assert build_data(text("."), 0).fingerprint() == fingerprint
    assert build_data(text(".", moved), 0).fingerprint() == fingerprint  # twice the same files


def test_text_cap(corpus):
    sizes = []
    for cap in (600, 601):
        parts = build_data(text(corpus, max_bytes=cap), 0)._parts.values()
        sizes.append(sum(len(part._bytes) for part in parts))
    assert sizes == [600, 601]


def test_fingerprints_follow_everything_that_defines_the_data(corpus):
    prints = [
        build_data(config, seed).fingerprint()
        for config, seed in (
            (MQARConfig(), 0),
            (MQARConfig(), 1),
            (MQARConfig(power_a=0.02), 0),
            (MQARConfig(pairs=7), 0),
            (text(corpus), 0),
            (text(corpus), 1),
            (text(corpus, length=9), 0),
            (text(corpus, held_out=0.5), 0),
            (text(corpus, max_bytes=700), 0),
            (text(corpus, packed=True), 0),
        )
    ]
    (corpus / "a" / "19.txt").write_bytes(bytes([19]) * 209 + b"!")
    prints.append(build_data(text(corpus), 0).fingerprint())
    assert len(set(prints)) == len(prints)
    assert build_data(MQARConfig(), 0).fingerprint() == prints[0]


def test_text_without_files(tmp_path):
    for path in (tmp_path, tmp_path / "missing", tmp_path / "*.txt"):
        with pytest.raises(ConfigError, match="has no files; it takes a file, a glob"):
            build_data(text(path), 0)
    (tmp_path / "only.txt").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match=r"no training file is longer .* \(0 training files\)"):
        build_data(text(tmp_path), 0)
    (tmp_path / "other.txt").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match="no evaluation file is longer than length = 100 bytes"):
        build_data(text(tmp_path, length=100), 0)
    with pytest.raises(ConfigError, match="all evaluation files together are no longer than"):
        build_data(text(tmp_path, length=100, packed=True), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 31}, r"length is 31, but 8 pairs and their queries take .* = 32 positions"),
        ({"vocab_size": 17}, r"vocab_size is 17, but 8 distinct keys take .* = 18 tokens"),
        ({"pairs": 0}, "greater than or equal to 1"),
        ({"power_a": 0}, "greater than 0"),
        ({"gap": 1}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_mqar_values(options, message):
    with pytest.raises(ValidationError, match=message):
        MQARConfig(**options)
    assert MQARConfig(length=32, vocab_size=18).pairs == 8


def test_configurations_are_told_apart_by_type():
    adapter = TypeAdapter(DataConfig)
    assert adapter.validate_python({"type": "mqar", "length": 128}) == MQARConfig(length=128)
    found = adapter.validate_python({"type": "text", "paths": ["python-stdlib"]})
    assert found == TextConfig(paths=("python-stdlib",))
    for wrong in ({"type": "image"}, {"length": 64}, {"type": "text", "paths": []}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)
    with pytest.raises(ValidationError, match="frozen"):
        found.length = 3

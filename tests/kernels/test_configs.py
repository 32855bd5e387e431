"""Launch configurations: exact, nearest, heuristic; files, and what is wrong with them."""

import json
import threading
from contextlib import ExitStack

import pytest
import torch

from tests.support import only_triton, route_of
from tossup.kernels import configs
from tossup.kernels.causal_conv1d import causal_conv1d
from tossup.kernels.causal_conv1d_update import causal_conv1d_update
from tossup.kernels.configs.file import Entry, Key, read, written
from tossup.kernels.flash_attention import flash_attention
from tossup.kernels.linear import linear
from tossup.kernels.repeat_groups import repeat_groups
from tossup.kernels.rotary import rotary, rotary_angles
from tossup.kernels.selective_scan import selective_scan
from tossup.kernels.selective_state_update import selective_state_update

HEURISTIC = {"BLOCK": 64, "num_warps": 4}
FACTS = {"dtype": "torch.bfloat16", "busy": False}


def entry(config, kernel="op.forward", facts=FACTS, **sizes) -> Entry:
    key = Key(kernel, tuple(facts.items()), tuple(sizes.items()))
    return Entry(key, config, "op", 1.0, 2.0, 0.01, "2.13.0", "3.9.0", "2026-11-24")


MOST = 2**20


def block(size: int) -> dict[str, int]:
    return {"BLOCK": size, "num_warps": 8}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A GPU's file; launches are for that GPU."""
    monkeypatch.setenv("TOSSUP_CONFIGS", str(tmp_path))
    configs.forget()
    with configs.of_gpu("some_gpu"):
        yield tmp_path / "some_gpu.json"
    configs.forget()


def choose(facts=FACTS, kernel="op.forward", **sizes):
    capped = {name: (size, MOST) for name, size in sizes.items()}
    return configs.choose(kernel, facts, capped, HEURISTIC)


def test_an_exact_entry_goes_before_a_near_one_and_that_before_the_heuristic(file):
    entries = [entry(block(n), rows=n, columns=64) for n in (256, 1024, 4096)]
    file.write_text(written("Some GPU", entries))
    assert choose(rows=1024, columns=64) == block(1024)
    assert choose(rows=1500, columns=64) == block(1024)  # half a doubling, and one and a half
    assert choose(rows=3000, columns=64) == block(4096)
    assert choose(rows=16384, columns=256) == block(4096)  # two doublings each
    assert choose(rows=16385, columns=64) is HEURISTIC
    assert choose(rows=1024, columns=512) is HEURISTIC
    assert choose(rows=0, columns=64) is HEURISTIC


def test_larger_sizes_count_as_the_largest(file):
    file.write_text(written("Some GPU", [entry(block(32), rows=MOST)]))
    assert choose(rows=1000 * MOST) == block(32)


def test_facts_must_be_the_same_in_any_order(file):
    file.write_text(written("Some GPU", [entry(block(32), rows=64)]))
    assert choose(dict(reversed(FACTS.items())), rows=64) == block(32)
    assert choose(FACTS | {"busy": True}, rows=64) is HEURISTIC
    assert choose(kernel="op.backward", rows=64) is HEURISTIC


def test_where_the_heuristic_was_fastest_it_stays_and_is_a_neighbour_too(file):
    entries = [entry(None, rows=64), entry(block(128), rows=256)]
    file.write_text(written("Some GPU", entries))
    assert choose(rows=64) is HEURISTIC and choose(rows=100) is HEURISTIC
    assert choose(rows=200) == block(128)


def test_an_unknown_gpu_and_no_gpu_take_the_heuristic(file):
    file.write_text(written("Some GPU", [entry(block(32), rows=64)]))
    for gpu in ("another_gpu", None):
        with configs.of_gpu(gpu):
            assert choose(rows=64) is HEURISTIC
    assert choose(rows=64) == block(32)


def test_files_are_read_once_until_they_are_forgotten(file):
    file.write_text(written("Some GPU", [entry(block(32), rows=64)]))
    assert choose(rows=64) == block(32)
    file.write_text(written("Some GPU", [entry(block(16), rows=64)]))
    assert choose(rows=64) == choose(rows=65) == block(32)
    configs.forget()
    assert choose(rows=64) == block(16)


def test_a_gpus_file_has_its_name():
    assert configs.slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"
    assert configs.slug("NVIDIA H200") == "nvidia_h200"


def test_what_is_written_is_read_and_an_entry_is_a_line(file):
    entries = [entry(block(32), rows=64), entry(None, rows=128)]
    file.write_text(written('A "GPU"', entries))
    assert list(read(file)) == entries
    assert json.loads(file.read_text())["gpu"] == 'A "GPU"'
    assert len(file.read_text().splitlines()) == 7


def test_forced_configurations_win_in_every_thread_and_nest(file):
    file.write_text(written("Some GPU", [entry(block(32), rows=64)]))
    seen = []
    with configs.forced("op.forward", block(8)):
        with configs.forced("op.forward", block(4)):
            thread = threading.Thread(target=lambda: seen.append(choose(rows=64)))
            thread.start()
            thread.join()
        assert choose(rows=64) == block(8)
        assert choose(kernel="op.backward", rows=64) is HEURISTIC
    assert seen == [block(4)] and choose(rows=64) == block(32)


def test_asked_lists_keys_and_heuristics():
    with configs.asked() as outer:
        choose(rows=3)
        with configs.asked() as inner:
            choose(rows=5)
    key = Key("op.forward", tuple(FACTS.items()), (("rows", 3),))
    assert outer == [(key, HEURISTIC)]
    assert [key.sizes for key, _ in inner] == [(("rows", 5),)]


VALUES = json.loads(written("Some GPU", [entry(block(32), rows=64)]))["entries"][0]
BROKEN = {
    "[": "is not JSON",
    "[]": "takes a mapping with a list of entries",
    json.dumps({"entries": [3]}): "entry 0 takes kernel, facts, .* got 3",
    json.dumps({"entries": [VALUES | {"speed": 1}]}): "entry 0 takes kernel, .*, date, got .*speed",
    json.dumps({"entries": [VALUES, VALUES | {"noise": "low"}]}): "entry 1: noise .* got 'low'",
    json.dumps({"entries": [VALUES | {"facts": {"dtype": []}}]}): "facts takes .* got .. for dtype",
    json.dumps({"entries": [VALUES | {"config": {"BLOCK": -1}}]}): "whole numbers .* -1 for BLOCK",
    json.dumps({"entries": [VALUES | {"sizes": {"rows": 0}}]}): "whole numbers .* 0 for rows",
    json.dumps({"entries": [VALUES | {"sizes": {"rows": 1.5}}]}): "whole numbers .* 1.5 for rows",
    json.dumps({"entries": [VALUES | {"sizes": {"lines": 64}}]}): "op.forward are rows, got lines",
}


@pytest.mark.parametrize("text, message", BROKEN.items(), ids=range(len(BROKEN)))
def test_a_malformed_file_gets_one_sentence_that_names_it(file, text, message):
    file.write_text(text)
    with pytest.raises(ValueError, match=f"some_gpu.json.* {message}") as raised:
        choose(rows=64)
    assert len(str(raised.value).splitlines()) == 1


def test_a_configuration_of_other_keys_is_refused(file):
    file.write_text(written("Some GPU", [entry({"BLOCK": 32}, rows=64)]))
    expected = "a configuration of op.forward takes BLOCK, num_warps, got BLOCK$"
    with pytest.raises(ValueError, match=expected):
        choose(rows=64)


@pytest.mark.parametrize("path", sorted(configs.path_of("x").parent.glob("*.json")))
def test_every_file_that_ships_can_be_read_and_is_named_by_its_gpu(path):
    assert path.stem == configs.slug(json.loads(path.read_text())["gpu"])
    assert list(read(path))


def attend(x, **options):
    heads = x.unflatten(-1, (2, 16))
    return flash_attention(heads, heads, heads, causal=True, **options)


def decode(x, **options):
    heads = x.unflatten(-1, (2, 16))
    return flash_attention(heads[:, :3], heads, heads, causal=True, **options)


def scan(x, **options):
    states = x[..., :4].unsqueeze(2)
    rates = -torch.arange(1.0, 129).view(32, 4) / 64
    return selective_scan(x, x, rates, states, states, delta_softplus=True, **options)


def convolve(x, **options):
    return causal_conv1d(x, x[0, :4].t(), **options)


def multiply(x, **options):
    return linear(x, x[0, :32], **options)


def turn(x, **options):
    heads = x.unflatten(-1, (2, 16))
    return rotary(heads, *rotary_angles(torch.arange(36), 12), **options)


def repeat(x, **options):
    return repeat_groups(x, 4, 3, **options)


def update_state(x, **options):
    """The output and the state, side by side."""
    state = x.detach()[:, :4].transpose(1, 2).contiguous()
    states, rates = x[:, 4:6, :4], -torch.arange(1.0, 129).view(32, 4) / 64
    out = selective_state_update(state, x[:, 6], x[:, 7], rates, states, states, **options)
    return torch.cat((out.unsqueeze(-1), state), -1)


def update_window(x, **options):
    window = x.detach()[:, :3].clone()
    out = causal_conv1d_update(x[:, 3:8], window, x[0, :4].t(), **options)
    return torch.cat((out, window), 1)


# For each op, other configurations of its kernels than the heuristic's
OTHERS = {
    attend: {
        "flash_attention.forward": dict(
            BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=1, described=0
        ),
        "flash_attention.dq": dict(BLOCK_M=64, BLOCK_N=16, num_warps=4, num_stages=1, described=0),
        "flash_attention.dkdv": dict(
            BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=1, described=0
        ),
    },
    decode: {
        "flash_attention.decode": dict(
            BLOCK_M=16, BLOCK_N=16, num_warps=2, num_stages=1, described=0
        ),
        "flash_attention.dq": dict(BLOCK_M=64, BLOCK_N=16, num_warps=4, num_stages=1, described=0),
        "flash_attention.dkdv": dict(
            BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=1, described=0
        ),
    },
    scan: {
        "selective_scan.forward": dict(BLOCK_DIM=64, TOKENS=8, num_warps=2),
        "selective_scan.backward": dict(BLOCK_DIM=16, TOKENS=4, num_warps=2),
    },
    convolve: {
        "causal_conv1d.forward": dict(BLOCK_T=8, BLOCK_DIM=16, num_warps=2),
        "causal_conv1d.backward": dict(BLOCK_T=32, BLOCK_DIM=16, num_warps=2),
    },
    multiply: {
        "linear.forward": dict(
            rows=16, columns=16, inner=16, warps=4, stages=2, programs=1, described=0
        ),
        "linear.weight_gradient": dict(
            rows=32, columns=16, inner=16, warps=4, stages=2, programs=1, described=0
        ),
    },
    turn: {"rotary.forward": dict(ROWS=4, num_warps=1)},
    repeat: {
        "repeat_groups.repeat": dict(BLOCK_T=8, BLOCK_DIM=16, num_warps=2),
        "repeat_groups.add_up": dict(BLOCK_T=4, BLOCK_DIM=32, num_warps=1),
    },
    update_state: {"selective_state_update.update": dict(BLOCK_DIM=8, num_warps=1)},
    update_window: {"causal_conv1d_update.update": dict(BLOCK_DIM=16, num_warps=2)},
}


@only_triton
@pytest.mark.parametrize("op", OTHERS)
def test_kernels_ask_and_other_configurations_give_the_same_results(op, impl):
    x = torch.linspace(-1, 1, 2 * 36 * 32).view(2, 36, 32).sin()
    route = route_of(1, batch=2)

    def run():
        mine = x.clone().requires_grad_()
        out = op(mine, route=route, impl=impl)[[1]]
        if not out.requires_grad:
            return (out,)
        (gradient,) = torch.autograd.grad(out.square().sum(), mine)
        return out.detach(), gradient[[1]]

    with configs.asked() as keys:
        expected = run()
    heuristics = {key.kernel: heuristic for key, heuristic in keys}
    assert heuristics.keys() == OTHERS[op].keys()
    with ExitStack() as stack:
        for kernel, config in OTHERS[op].items():
            assert config != heuristics[kernel]
            stack.enter_context(configs.forced(kernel, config))
        for ours, theirs in zip(run(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@only_triton
def test_tokens_that_do_not_divide_a_chunk_are_refused(impl):
    config = {"BLOCK_DIM": 32, "TOKENS": 64, "num_warps": 1}
    with configs.forced("selective_scan.forward", config):
        with pytest.raises(ValueError, match=r"TOKENS of selective_scan\.forward must divide 32"):
            scan(torch.ones(1, 4, 32), impl=impl)

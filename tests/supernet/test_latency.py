"""Latency tables: rooflines by hand, measurements, calibration, and a search that uses them."""

import json
from functools import partial

import pytest
import torch
import yaml

from tests.supernet.tiny import model_values, run_values
from tossup.autotune.latency import Latency, LatencyTable, measure, read_table
from tossup.autotune.peaks import PEAKS
from tossup.autotune.roofline import estimate
from tossup.autotune.timing import CpuStopwatch
from tossup.autotune.workloads import Workload
from tossup.supernet import latency
from tossup.supernet.cli import main
from tossup.supernet.config import LatencyConfig, ModelConfig
from tossup.supernet.errors import ConfigError
from tossup.supernet.latency import write_latencies
from tossup.supernet.loader import validate
from tossup.supernet.mixers import Attention, GroupedMamba, Mamba

H200 = "NVIDIA H200"


def config_of(tmp_path, **own) -> LatencyConfig:
    return validate(run_values(tmp_path) | own, LatencyConfig)


def table_of(milliseconds: dict[str, float], **own) -> LatencyTable:
    mixers = {n: Latency(milliseconds=m, error=0.01, about="") for n, m in milliseconds.items()}
    shape = {"batch": 4, "seqlen": 16, "dtype": "float32", "direction": "forward"}
    model = latency.described(ModelConfig.model_validate(model_values()))
    values = {
        "source": "measured",
        "device": H200,
        "versions": {},
        "mixers": mixers,
        "model": model,
    }
    return LatencyTable(**values | {"model": model} | shape | own)


def written(path, table: LatencyTable):
    path.write_text(table.text())
    return str(path)


def test_a_roofline_is_the_sum_of_the_floors_of_what_runs(tmp_path):
    """By hand, where matrix products bind, and bytes where heads turn: a multiprocessor does 4096
    FLOPs per cycle. Attention's backward pass takes 14 products' FLOPs where its forward pass takes
    4. Of one token, the bytes of weights and of the cache bind."""
    values = run_values(tmp_path)
    values["model"] |= {"hidden_size": 4096}
    values["model"]["mixer"]["mixers"] = {
        "attention": {"type": "attention", "heads": 32, "kv_heads": 8, "head_dim": 128}
    }
    values |= {"gpu": H200, "batch": 8, "seqlen": 4096, "dtype": "bfloat16"}
    rate = 4096 * 132 * 1.98e9
    projections = 2 * 8 * 4096 * 4096 * (4096 + 1024 + 1024 + 4096)
    scores = 4 * 128 * 32 * 8 * (4096 * 4097 / 2)
    turning = 8 * 4096 * (32 + 8) * 128 * 4 / 4.8e12
    weights, cache = 2 * 4096 * (4096 + 1024 + 1024 + 4096), 2 * 2 * 8 * 4096 * 8 * 128
    for direction, expected in (
        ("forward", (projections + scores) / rate + turning),
        ("decode", (weights + cache) / 4.8e12),
        ("forward+backward", (3 * projections + 4.5 * scores) / rate + 2 * turning),
    ):
        _, table = write_latencies(validate(values | {"direction": direction}, LatencyConfig))
        found = table.mixers["attention"]
        assert found.milliseconds == pytest.approx(1e3 * expected, rel=0.005)
        assert found.error is None and "uncalibrated: not measured" in found.about


ATTENTION = Attention(32, heads=4, kv_heads=2, window_size=8)
GROUPED = GroupedMamba(32, d_inner=64, d_xb=32, state_size=8, repeat_kv_before_conv=False)


def in_short(op: Workload) -> str:
    """Its name without the batch and dtype, which all have here, and without words for the keys."""
    assert (op.batch, op.dtype) == (2, "bf16")
    kind, *pairs = op.name.split()
    values = (pair.split("=")[1] for pair in pairs if not pair.startswith(("batch", "dtype")))
    return " ".join((kind, *values))


@pytest.mark.parametrize(
    "mixer, decoding, expected",
    [
        (
            ATTENTION,
            False,
            ["linear 16 32 32", "linear 16 32 16", "linear 16 32 16", "linear 16 32 32",
             "rotary 16 4 8", "rotary 16 2 8", "attention 16 4 2 8 7"],
        ),
        (
            Mamba(32),
            False,
            ["linear 16 32 128", "linear 16 64 34", "linear 16 2 64", "linear 16 64 32",
             "causal_conv1d 16 64 4", "selective_scan 16 64 16 1"],
        ),
        (
            GROUPED,
            False,
            ["linear 16 32 192", "linear 16 32 2", "linear 16 2 64", "linear 16 64 32",
             "causal_conv1d 16 32 4", "selective_scan 16 64 8 4", "repeat_groups 16 32 8 2"],
        ),
        (
            ATTENTION,
            True,
            ["linear 1 32 32", "linear 1 32 16", "linear 1 32 16", "linear 1 32 32",
             "rotary 1 4 8", "rotary 1 2 8", "attention 16 4 2 8 7 1"],
        ),
        (
            Mamba(32),
            True,
            ["linear 1 32 128", "linear 1 64 34", "linear 1 2 64", "linear 1 64 32",
             "causal_conv1d_update 1 64 4", "selective_state_update 64 16 1"],
        ),
        (
            GROUPED,
            True,
            ["linear 1 32 192", "linear 1 32 2", "linear 1 2 64", "linear 1 64 32",
             "causal_conv1d_update 1 32 4", "selective_state_update 64 8 4",
             "repeat_groups 1 32 8 2"],
        ),
    ],
)  # fmt: skip
def test_mixers_name_what_they_run(mixer, decoding, expected):
    ops = mixer.workloads(batch=2, seqlen=16, dtype="bf16", decoding=decoding)
    assert [in_short(op) for op in ops] == expected


@pytest.mark.parametrize("mixer", [ATTENTION, Mamba(32), GROUPED])
def test_what_decodes_is_the_last_token_behind_the_others(mixer, monkeypatch):
    monkeypatch.setattr(latency, "PROMPT", 4)
    x = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = mixer(x, **latency.extra_of(mixer, torch.arange(11)))[:, -1:]
    torch.testing.assert_close(latency.decoding_of(mixer, x)(), expected)


def test_a_factor_carries_over_and_its_error_is_stated():
    assert estimate(0.001, []).milliseconds == 1.0
    alone = estimate(0.001, [3.0])
    assert alone.milliseconds == pytest.approx(3.0) and alone.error is None
    assert "3 × the floor, as measured at 1 shape; the error is not known" in alone.about
    several = estimate(0.001, [2.0, 8.0])
    assert several.milliseconds == pytest.approx(4.0)
    assert several.error == pytest.approx(1.0)  # twice, and half


def test_tables_of_other_shapes_calibrate_a_roofline(tmp_path):
    plain = config_of(tmp_path, gpu=H200)
    _, floors = write_latencies(plain)
    paths: list[str] = []
    for factor, shape in ((2.0, {}), (2.0, {"batch": 64, "seqlen": 512})):
        _, other = write_latencies(config_of(tmp_path, gpu=H200, **shape))
        took = {n: factor * m.milliseconds for n, m in other.mixers.items()}
        paths.append(written(tmp_path / f"{len(paths)}.json", table_of(took, **shape)))
    path, table = write_latencies(config_of(tmp_path, gpu=H200, measured=paths))
    assert path == tmp_path / "roofline-nvidia_h200.json" and read_table(path) == table
    decoded, _ = write_latencies(config_of(tmp_path, gpu=H200, direction="decode"))
    assert decoded == tmp_path / "roofline-nvidia_h200-decode.json"
    for name, floor in floors.mixers.items():
        assert table.mixers[name].milliseconds == pytest.approx(2 * floor.milliseconds)
        assert table.mixers[name].error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("direction", ["forward", "forward+backward", "decode"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mixers_are_measured_where_the_run_trains(tmp_path, monkeypatch, direction, dtype):
    monkeypatch.setattr("tossup.autotune.latency.ROUNDS", (3, 3))
    path, table = write_latencies(config_of(tmp_path, direction=direction, dtype=dtype))
    assert (table.source, table.batch, table.seqlen) == ("measured", 4, 16)
    assert list(table.mixers) == ["attention", "mamba"] and table.versions
    assert all(mixer.milliseconds > 0 for mixer in table.mixers.values())
    assert "median of 3 runs, by clock" in table.mixers["mamba"].about
    assert read_table(path) == table


def test_what_is_measured_is_told_in_milliseconds(monkeypatch):
    monkeypatch.setattr("tossup.autotune.latency.ROUNDS", (3, 3))
    now = [0.0]

    def call(seconds):
        now[0] += seconds

    calls = {"slow": partial(call, 0.25), "fast": partial(call, 0.003)}
    found = measure(calls, CpuStopwatch(lambda: now[0]))
    assert found["slow"].milliseconds == pytest.approx(250)
    assert found["fast"].milliseconds == pytest.approx(3)


def test_a_mixers_time_goes_to_its_name(tmp_path, monkeypatch):
    def slowly(calls, stopwatch):
        times = {name: len(call()) for name, call in calls.items()}  # results of a gradient
        return {n: Latency(milliseconds=t, error=0, about="") for n, t in times.items()}

    monkeypatch.setattr(latency, "measure", slowly)
    _, table = write_latencies(config_of(tmp_path, direction="forward+backward"))
    assert table.mixers["attention"].milliseconds == 1 + 4
    assert table.mixers["mamba"].milliseconds == 1 + 9


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"gpu takes .*NVIDIA H200, got 'H200'"):
        write_latencies(config_of(tmp_path, gpu="H200"))
    with pytest.raises(ConfigError, match="measured takes a roofline: name its gpu"):
        config_of(tmp_path, measured=["x"])
    with pytest.raises(ConfigError, match="direction decode takes a seqlen of 2 or more"):
        config_of(tmp_path, direction="decode", seqlen=1)
    fits = {"attention": 1.0, "mamba": 1.0}
    for table, message in (
        (table_of(fits, device="NVIDIA A100"), "tables measured on NVIDIA H200, float32, forward;"),
        (table_of(fits, source="roofline"), "is roofline: NVIDIA H200"),
        (table_of({"attention": 1.0}), "takes a latency of mamba, and lacks it"),
        (table_of(fits, model={"hidden_size": 8}), "takes a table of hidden_size 16, got 8"),
        (table_of(fits, model={"hidden_size": 16}), "takes a table of attention .*, got None"),
    ):
        path = written(tmp_path / "table.json", table)
        with pytest.raises(ConfigError, match=message):
            write_latencies(config_of(tmp_path, gpu=H200, measured=[path]))
    (tmp_path / "table.json").write_text('{"unit": "hours"}')
    with pytest.raises(ConfigError, match=r"measured: .*table.json is no latency table: unit: "):
        write_latencies(config_of(tmp_path, gpu=H200, measured=[tmp_path / "table.json"]))
    with pytest.raises(ConfigError, match=r"measured: cannot read .*none.json: No such file"):
        write_latencies(config_of(tmp_path, gpu=H200, measured=[tmp_path / "none.json"]))


def test_a_search_weighs_quality_against_latency(tmp_path, capsys):
    values = run_values(tmp_path / "run", steps=2)
    values["search"] = {
        "budgets": [1], "score_metric": "accuracy", "batches": 1, "batch_size": 2,
        "method": "exhaustive",
    }  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    assert main(["train", str(file)]) == 0
    assert main(["latency", str(file), f"gpu={H200}"]) == 0
    assert "mamba: " in capsys.readouterr().out

    assert main(["search", str(file)]) == 0
    by_flops = json.loads((tmp_path / "run/search.json").read_text())
    assert by_flops["config"]["cost_unit"] == "forward FLOPs per token, 16 tokens"

    path = written(tmp_path / "table.json", table_of({"attention": 5.0, "mamba": 0.25}))
    by_latency = ["search", str(file), "search.cost=latency", f"search.latency_table={path}"]
    assert main(by_latency) == 2  # by flops is another search
    assert "whose cost_unit is forward FLOPs per token" in capsys.readouterr().err
    by_latency.insert(2, f"search.output_path={tmp_path}/latency.json")
    assert main(by_latency) == 0
    found = json.loads((tmp_path / "latency.json").read_text())
    assert found["final_configuration"]["cost"] == 5.25
    assert found["config"]["cost_unit"] == (
        "milliseconds that a placement's mixers take, measured: NVIDIA H200, float32, forward, "
        "batch 4, 16 tokens"
    )
    assert found["beam"][0]["score"] == by_flops["beam"][0]["score"]

    written(tmp_path / "table.json", table_of({"attention": 6.0, "mamba": 0.25}))
    assert main(by_latency) == 2  # by other figures too
    assert "holds a search whose cost_table is" in capsys.readouterr().err

    assert main(by_latency[:-1]) == 2
    assert "cost latency takes a latency_table" in capsys.readouterr().err
    written(tmp_path / "table.json", table_of({"attention": 5.0}))
    assert main(by_latency) == 2
    assert "mamba, and lacks it" in capsys.readouterr().err


def test_every_known_gpu_has_a_roofline(tmp_path):
    for gpu in PEAKS:
        _, table = write_latencies(config_of(tmp_path, gpu=gpu))
        assert all(mixer.milliseconds > 0 for mixer in table.mixers.values())

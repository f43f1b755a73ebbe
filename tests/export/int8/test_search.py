"""The search for what to quantise: a pure choice, and its measurement."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from onnx import helper
from torch import nn

from modelops.base.errors import ExportError, UsageError
from modelops.base.seeding import numpy_generator
from modelops.export.calibration import TrajectoryRows
from modelops.export.int8.ranges import Calibration
from modelops.export.int8.search import (
    GroupCost,
    choose_groups,
    order_of_measuring,
    search_groups,
)
from modelops.export.int8.sensitivity import order_of_interest, plot_sensitivity, scan_groups
from modelops.export.int8.variants import Variants, multiply_adds
from modelops.export.onnx.writer import write_graph
from modelops.export.runtimes.onnxruntime import OrtGraph
from modelops.models.pipelines.signatures import Example
from small_graphs import Transformer, random_rows, shared_network


def _cost(group: str, squared: float, ms: float, spread: float = 0.1) -> GroupCost:
    return GroupCost(group, 1, squared, ms, ms - spread, ms + spread)


TABLE = [
    _cost("heavy", 0.0010, 20.0),
    _cost("edge", 0.0030, 0.5),
    _cost("middle", 0.0020, 5.0),
    _cost("slower", 0.0000, -3.0),
]


@pytest.mark.parametrize(
    ("budget", "fp32"),
    [
        (0.1, ["slower"]),
        (0.07, ["edge", "slower"]),
        (0.055, ["edge", "slower"]),
        (0.04, ["edge", "middle", "slower"]),
        (0.0, ["edge", "middle", "slower"]),  # something stays in INT8; the caller's gates say no
    ],
)
def test_the_choice_from_numbers(budget: float, fp32: list[str]) -> None:
    table = choose_groups(TABLE, squared_error=0.006, budget=budget)
    assert [row.cost for row in table] == TABLE
    assert [row.cost.group for row in table if not row.int8] == fp32
    assert all(row.why for row in table)


@pytest.mark.parametrize(
    ("squared", "ms", "spread", "given_up"),
    [
        (0.0010, 0.02, 0.1, True),
        (0.0001, 0.02, 0.1, False),  # its error is too little to matter
        (0.0010, 0.02, 0.01, False),  # little, but surely faster
        (0.0010, 0.2, 0.3, False),  # perhaps worth something
    ],
)
def test_what_saves_nothing_does_not_add_an_error(
    squared: float, ms: float, spread: float, given_up: bool
) -> None:
    costs = [_cost("heavy", 0.001, 20.0), _cost("embeddings", squared, ms, spread)]
    table = choose_groups(costs, squared_error=0.01, budget=0.2, least_ms=0.05)
    assert [row.int8 for row in table] == [True, not given_up]
    alone = choose_groups(costs[1:], squared_error=0.01, budget=0.2, least_ms=0.05)
    assert alone[0].int8  # the last one stays: a graph without any is the caller's to refuse


def test_the_choice_does_not_depend_on_the_order_of_the_table() -> None:
    expected = {row.cost.group: row.int8
                for row in choose_groups(TABLE, squared_error=0.006, budget=0.05)}  # fmt: skip
    for order in itertools.permutations(TABLE):
        table = choose_groups(order, squared_error=0.006, budget=0.05)
        assert {row.cost.group: row.int8 for row in table} == expected


def test_the_greedy_choice_is_close_to_the_best_of_all_sets() -> None:
    generator = numpy_generator(0, "search")
    for _ in range(20):
        squares, times = generator.exponential(1e-3, 8), generator.exponential(5.0, 8) + 0.2
        costs = [_cost(f"g{i}", float(squares[i]), float(times[i])) for i in range(8)]
        budget = float(np.sqrt(0.4 * squares.sum()))
        table = choose_groups(costs, squared_error=float(squares.sum()), budget=budget)
        kept = np.array([row.int8 for row in table])
        assert squares[kept].sum() <= budget**2
        best = max(
            times[list(chosen)].sum()
            for size in range(1, 9)
            for chosen in itertools.combinations(range(8), size)
            if squares[list(chosen)].sum() <= budget**2
        )
        assert times[kept].sum() >= 0.75 * best


def test_a_light_group_adds_no_error_whatever_its_timing_says() -> None:
    light = [replace(_cost(name, error, 5.0), light=True) for name, error in
             (("edge", 0.0010), ("exact", 0.0001))]  # fmt: skip
    table = choose_groups([*light, _cost("heavy", 0.0050, 9.0)], squared_error=0.0061, budget=1.0)
    assert [(row.cost.group, row.int8) for row in table] == [
        ("edge", False), ("exact", True), ("heavy", True)
    ]  # fmt: skip
    assert "next to nothing of the work" in table[0].why


def test_light_groups_are_those_with_little_work_and_few_weights(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    class Timed(nn.Module):
        """x [N, 200, 64] at timestep [N]: two layers for every token, and small and large ones for
        each row."""

        def __init__(self) -> None:
            super().__init__()
            self.time_embedding, self.modulation = nn.Linear(1, 16), nn.Linear(16, 2048)
            self.blocks = nn.ModuleList([nn.Linear(64, 256), nn.Linear(256, 64)])
            self.proj_out = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            condition = self.modulation(torch.relu(self.time_embedding(timestep[:, None])))
            x = self.blocks[1](torch.relu(self.blocks[0](x))) + condition[:, None, :64]
            result: torch.Tensor = self.proj_out(x) + condition.sum()
            return result

    folder = tmp_path_factory.mktemp("light")
    example: Example = {
        "x": (torch.randn(2, 200, 64), {0: "batch"}), "timestep": (torch.rand(2), {0: "batch"})
    }  # fmt: skip
    write_graph(Timed().eval(), example, folder / "model.onnx", opset=20, outputs={"out": {}})
    feeds = {name: tensor.numpy() for name, (tensor, _) in example.items()}
    rows = TrajectoryRows(feeds, np.array([0.2, 0.8]), {})
    found = Variants(
        folder / "model.onnx", folder, Calibration(rows, folder / "table.json"), held_out=rows
    )
    assert found.light == {"embeddings"}  # the modulation has too many weights
    assert {"embeddings", "modulation"} < set(found.groups)


def test_multiply_adds_of_layers() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2])
    assert multiply_adds(node, (2, 8, 6, 10), 16 * 8 * 9) == 2 * 3 * 5 * 16 * 8 * 9
    grouped = helper.make_node("Conv", ["x", "w"], ["y"])
    assert multiply_adds(grouped, (1, 8, 6, 10), 8 * 1 * 9) == 60 * 8 * 9
    assert multiply_adds(helper.make_node("MatMul", ["x", "w"], ["y"]), (2, 7, 5), 15) == 14 * 15
    turned = helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)
    assert multiply_adds(turned, (5, 7), 15) == 7 * 15


def test_what_was_not_timed_goes_last_and_bad_tables_are_refused() -> None:
    unknown = GroupCost("unknown", 3, 0.001)
    table = choose_groups([unknown, _cost("known", 0.001, 9.0)], squared_error=0.002, budget=0.04)
    assert [row.int8 for row in table] == [True, False]
    assert table[0].why == "not measured: out of time"
    with pytest.raises(UsageError, match="twice"):
        choose_groups([unknown, unknown], squared_error=0.002, budget=0.1)
    for budget in (-0.1, float("nan")):
        with pytest.raises(UsageError, match="budget"):
            choose_groups(TABLE, squared_error=0.006, budget=budget)


def make_variants(tmp_path_factory: pytest.TempPathFactory, *, rows: int = 16) -> Variants:
    folder = tmp_path_factory.mktemp("search")
    source = shared_network(Transformer(), tmp_path_factory)
    return Variants(
        source, folder, Calibration(random_rows(Transformer(), 16, 0), folder / "table.json"),
        held_out=random_rows(Transformer(), rows, 1), max_groups=7,
    )  # fmt: skip


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Variants:
    return make_variants(tmp_path_factory)


def test_errors_of_a_slow_network_are_measured_on_fewer_rows(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    variants = make_variants(tmp_path_factory, rows=37)
    assert len(variants.held_out) == len(variants.few) == 32  # the last batch is not full
    every, sigmas = variants.rounding_errors(), variants.held_out.sigmas
    variants.limit_rows(1e6)
    np.testing.assert_array_equal(variants.rounding_errors(), every)
    variants.limit_rows(0.0)
    assert len(variants.few) == 8
    with variants.written() as path:
        np.testing.assert_array_equal(variants.row_errors(OrtGraph(path)), every)
    picks = np.searchsorted(sigmas, variants.few.sigmas)
    assert picks[0] == 0 and picks[-1] == 31 and (np.diff(picks) >= 4).all()
    np.testing.assert_allclose(variants.rounding_errors(), every[picks], rtol=1e-3)
    search = search_groups(variants, budget=1.0, time_limit_s=1e-9)
    assert (search.rows, search.group_rows) == (32, 8)
    assert search.error_all_int8 == pytest.approx(np.sqrt(np.mean(every**2)))
    scan = scan_groups(variants)
    assert [band["rows"] for band in scan["bands"]] == [2, 2, 2, 2]


def test_edges_are_measured_first_then_the_largest_groups() -> None:
    sizes = {"conv_in": 1, "middle": 8, "large": 24, "time": 4, "small": 5, "conv_out": 1}
    order = order_of_interest({name: ["node"] * size for name, size in sizes.items()})
    assert order == ["time", "conv_in", "conv_out", "large", "middle", "small"]


def test_groups_that_add_much_alone_are_measured_before_the_rest() -> None:
    groups = {name: ["node"] * size for name, size in {"a": 8, "b": 9, "conv_in": 1}.items()}
    assert order_of_measuring(groups, {}) == order_of_interest(groups) == ["conv_in", "b", "a"]
    assert order_of_measuring(groups, {"a": 0.2, "b": 0.1, "conv_in": 0.1})[0] == "a"
    assert order_of_measuring(groups, {"conv_in": 0.1, "a": 0.2}) == ["b", "a", "conv_in"]


def test_a_search_short_of_time_times_less_and_takes_errors_from_the_scan(
    variants: Variants,
) -> None:
    assert 0 < len(variants.light) < len(variants.groups)
    short = search_groups(variants, budget=1.0, batch=8, rounds=9, time_limit_s=1e-9)
    assert (short.batch, short.rounds, short.rows) == (1, 5, 16)
    assert {row.cost.ms_saved for row in short.table} == {None}
    equal = {row.cost.squared_error for row in short.table}
    assert len(equal) == 1
    errors = {group: 0.01 * number for number, group in enumerate(variants.groups, 1)}
    known = search_groups(variants, budget=1.0, rounds=3, time_limit_s=1e-9, alone=errors)
    for row in known.table:
        assert row.cost.squared_error == pytest.approx(errors[row.cost.group] ** 2)
    assert known.rounds == 3


def test_the_scan_of_groups_and_bands(variants: Variants) -> None:
    alone, left_out = (scan_groups(variants, mode=mode) for mode in ("alone", "left_out"))
    assert list(alone["groups"]) == list(variants.groups) == list(left_out["groups"])
    assert alone["all_int8"] == left_out["all_int8"]
    for record in (alone, left_out):
        assert [band["rows"] for band in record["bands"]] == [4, 4, 4, 4]
        for row in (record["all_int8"], *record["groups"].values()):
            together = np.sqrt(np.mean(np.square(row["bands"])))
            assert row["error"] == pytest.approx(together)
    # rounding errors of groups add up in squares, roughly
    total = np.sqrt(sum(row["error"] ** 2 for row in alone["groups"].values()))
    assert total == pytest.approx(alone["all_int8"]["error"], rel=0.4)
    short = scan_groups(variants, time_limit_s=0.0)
    assert len(short["not_measured"]) == len(variants.groups)
    with pytest.raises(UsageError, match="unknown mode"):
        scan_groups(variants, mode="guess")  # type: ignore[arg-type]


def test_the_plot_is_a_picture_with_a_row_for_every_group() -> None:
    from PIL import Image

    bands = [{"sigma_low": 0.0, "sigma_high": 0.5, "rows": 2},
             {"sigma_low": 0.5, "sigma_high": 1.0, "rows": 2}]  # fmt: skip
    row = {"error": 0.1, "bands": [0.1, 0.1], "nodes": 1}
    record = {"mode": "alone", "bands": bands, "all_int8": row}
    heights = []
    for count in (1, 6):
        groups = {f"group {index}": row for index in range(count)}
        png = plot_sensitivity({**record, "groups": groups})
        with Image.open(io.BytesIO(png)) as image:
            heights.append(image.height)
    assert heights[1] > heights[0] + 100
    assert png == plot_sensitivity({**record, "groups": groups})
    with pytest.raises(ExportError, match="nothing to plot"):
        plot_sensitivity({**record, "groups": {}})


def test_the_search_measures_what_it_chose(variants: Variants) -> None:
    everything = search_groups(variants, budget=1.0, batch=2, rounds=3)
    costs = {row.cost.group: row.cost for row in everything.table}
    assert set(costs) == set(variants.groups)
    assert all(cost.ms_low <= cost.ms_saved <= cost.ms_high for cost in costs.values())  # type: ignore[operator]
    assert everything.within_budget
    assert everything.error_floor < 1e-6
    budget = 0.8 * everything.error_all_int8
    result = search_groups(variants, budget=budget, batch=2, rounds=3)
    assert result.within_budget
    assert result.error <= budget
    assert result.keep_fp32
    measured = float(np.sqrt(np.mean(variants.rounding_errors(result.keep_fp32) ** 2)))
    assert measured == pytest.approx(result.error)
    assert set(result.ms) == {"unquantised", "all_int8", "chosen"}
    assert {row["decision"] for row in result.as_record()["table"]} == {"int8", "fp32"}


def test_a_search_out_of_time_or_below_its_floor_says_so(variants: Variants) -> None:
    result = search_groups(variants, budget=1.0, batch=2, rounds=3, time_limit_s=0.0)
    assert {row.why for row in result.table} == {"not measured: out of time"}
    impossible = search_groups(variants, budget=0.0, batch=2, rounds=3, time_limit_s=0.0)
    assert not impossible.within_budget
    assert "off by" in impossible.why

"""The benchmark's three ways agree, its work is counted right, and its fits are fits."""

import json

import pytest

from tools import benchmark, benchmark_scaling, benchmark_work
from tools.benchmark import Row, table, time_row
from tools.benchmark_scaling import exponent
from tools.benchmark_timing import matmul_rate
from tools.benchmark_work import block_macs, chunks

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    monkeypatch.setattr(benchmark_work, "N_PROMPTS", 2)
    monkeypatch.setattr(benchmark_work, "N_REPEATS", 2)


@pytest.fixture
def works(random_gpt2, random_gpt2_hf):
    pair = (random_gpt2, random_gpt2_hf)
    to = benchmark_work.receivers(random_gpt2)[:1]
    sites = ("z", "q", "k", "resid_pre")
    return [
        *(benchmark_work.patching_work(*pair, site, 0.1, site, "s2_io", False) for site in sites),
        benchmark_work.paths_work(random_gpt2, "logits", (), False),
        benchmark_work.paths_work(random_gpt2, "queries", to, False),
        benchmark_work.ablation_work(*pair, False),
    ]


def test_the_three_ways_agree_on_every_row(random_gpt2, works):
    for work in works:
        row = time_row(random_gpt2, work)
        assert row.timed_references == row.patches == len(work.patches), work.name
        assert row.timed in (2 * row.patches, 3 * row.patches), work.name  # whole sweeps
        assert row.max_abs_diff < 5e-3, work.name  # effects are of order 1 to 100
        assert row.ours_s > 0 and row.transformer_lens_s > 0 and row.limit_ratio > 0


def test_a_way_that_differs_shows(random_gpt2, works):
    right = works[0].hugging_face
    works[0].hugging_face = lambda patches: right(patches) + 1
    assert time_row(random_gpt2, works[0]).max_abs_diff == pytest.approx(1, abs=1e-2)


def test_chunks_hold_every_patch_and_a_sample_has_the_mean_depth():
    patches = [(layer, head) for layer in range(30) for head in range(3)]
    whole = chunks(patches, 30, quick=False)
    assert all(ours == patches for ours, _ in whole)
    assert sorted(patch for _, references in whole for patch in references) == patches
    ((ours, few),) = chunks(patches, 30, quick=True)
    assert set(few) < set(ours) < set(patches)
    assert sum(layer for layer, _ in ours) / len(ours) == 14.5
    assert len({head for _, head in few}) == 3


def test_multiply_adds_are_those_of_the_weights(random_gpt2, random_gpt2_hf):
    block = random_gpt2_hf.transformer.h[0]
    sizes = [sum(p.numel() for p in m.parameters() if p.ndim == 2) for m in (block.mlp, block.attn)]
    assert list(block_macs(random_gpt2)) == sizes
    assert matmul_rate(random_gpt2) > 1e6


def test_exponents():
    assert exponent([1, 2, 4], (3.0, 12.0, 48.0)) == pytest.approx(2)


def test_report(tmp_path, monkeypatch, random_gpt2, works, capsys):
    """The command from end to end, on two rows of a small model."""
    monkeypatch.setattr(benchmark, "BUILD", tmp_path)
    monkeypatch.setattr(benchmark, "smollm2_works", lambda quick: (random_gpt2, works[:1]))
    monkeypatch.setattr(benchmark, "gpt2_works", lambda quick: (random_gpt2, works[-1:]))
    small = {"layers": 2, "positions": 4, "prompts": 2, "patches": 2}
    monkeypatch.setattr(benchmark_scaling, "BASE", small)
    monkeypatch.setattr("sys.argv", ["benchmark", "--quick"])
    benchmark.main()
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert set(report) == {"machine", "quick", "rows", "scaling", "clicks_ms"}
    assert set(report["clicks_ms"]) == {"training", "text", "sentence", "threshold"}
    row = report["rows"][0]
    keys = "work ours_s transformer_lens_s ratio target max_abs_diff limit_ratio"
    assert set(keys.split()) <= set(row)
    assert row["ratio"] == pytest.approx(row["ours_s"] / row["transformer_lens_s"])
    assert set(report["scaling"]) == set(small)
    page = (tmp_path / "benchmark.html").read_text()
    assert "Plotly.newPlot" in page and "cdn.plot.ly/plotly" not in page  # opens without a network
    rows = [Row(**row) for row in report["rows"]]
    assert table(rows, report["scaling"]) in capsys.readouterr().out

    wrong = works[-1].hugging_face
    works[-1].hugging_face = lambda patches: wrong(patches) + 0.1
    with pytest.raises(SystemExit, match=f"differ by 0.001 or more in: {works[-1].name}"):
        benchmark.main()
    assert (tmp_path / "benchmark.json").exists()

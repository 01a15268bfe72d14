"""The census: rows written exactly once whatever is killed, grids, training, models, reports."""

import errno
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time

import census_work
import pandas as pd
import pytest
import torch
from census_work import task
from huggingface_hub import constants
from stand_in_hub import COMMIT, REFUSING, a_hub
from test_faults import connect  # noqa: F401

from census import __main__ as command
from census import costs, grid, known, measure, report, rows, training
from census.rows import Results
from census_claims import CLAIMS, figures
from utils import toy
from utils.checks import generator_of
from utils.session import ROOT

TINY = grid.CENTRE._replace(n_steps=6, batch=4)


@pytest.fixture(scope="module")
def run():
    """`census.run`, with Ray started for two tasks at once."""
    path = os.environ.get("PYTHONPATH")
    from census import run

    patch = pytest.MonkeyPatch()
    patch.setattr(run, "ROOT", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")  # on the workers' path
    patch.setenv("PYTHONPATH", path or "")
    run.start(None, 2)
    patch.setattr(run, "ELSEWHERE", 0.1)
    yield run
    run.ray.shutdown()
    patch.undo()


@pytest.fixture
def results(tmp_path):
    (tmp_path / "marks").mkdir()
    found = Results(tmp_path / "census")
    found.prepare()
    return found


def marks(tmp_path):
    return sorted(path.name.split(".")[0] for path in (tmp_path / "marks").iterdir())


def tasks(tmp_path, *names):
    return [task(name, str(tmp_path / "marks")) for name in names]


# Rows on disk


def test_a_row_is_there_whole_or_not_at_all(results, monkeypatch):
    lock = results.take("a")
    assert lock is not None and results.take("a") is None  # in somebody's hands
    results.write({"key": "a", "state": rows.DONE, "steps": [1, 2]})
    lock.release()
    assert results.take("a") is None and results.has("a")
    assert [list(row["steps"]) for row in results] == [[1, 2]]

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(OSError, match="No space left"):
        results.write({"key": "b", "state": rows.DONE})
    assert not results.has("b") and len(list(results.rows.iterdir())) == 1


def test_what_cannot_be_written_is_said_before_anything_starts(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"results: .* cannot be written"):
        Results(tmp_path / "file" / "census").prepare()
    monkeypatch.setattr(rows, "FREE", 2**62)
    with pytest.raises(ValueError, match="results: no space left"):
        Results(tmp_path / "full").prepare()


# Running


def test_every_task_gets_a_row_once_and_a_second_run_does_nothing(run, results, tmp_path, capfd):
    todo = tasks(tmp_path, *"abcdef")
    assert run.run(todo, results, census_work.quick) == 0
    assert marks(tmp_path) == list("abcdef")
    table = results.table().set_index("key")
    assert set(table["state"]) == {"done"} and (table["seconds"] > 0).all()
    assert table.loc["a", "torch"] == torch.__version__.split("+")[0] or table.loc["a", "torch"]
    assert "6 done, 0 failed, 0 left" in capfd.readouterr().err
    assert run.run(todo, results, census_work.quick) == 0
    assert marks(tmp_path) == list("abcdef")


def test_a_task_that_fails_three_times_is_a_row_and_the_others_go_on(run, results, tmp_path):
    assert run.run(tasks(tmp_path, "bad", "good"), results, census_work.fails) == 1
    assert marks(tmp_path) == ["bad"] * 3 + ["good"]
    table = results.table().set_index("key")
    assert table.loc["bad", "error"] == "ValueError: no such thing"
    assert (table.loc["bad", "state"], table.loc["good", "state"]) == ("failed", "done")
    assert results.forget_failed() == 1 and not results.has("bad") and results.has("good")


def test_a_worker_that_is_killed_is_replaced(run, results, tmp_path):
    assert run.run(tasks(tmp_path, "mortal", "b", "c"), results, census_work.dies_once) == 0
    assert marks(tmp_path) == ["b", "c", "mortal", "mortal"]
    assert len(results.table()) == 3


@pytest.mark.nightly
def test_a_task_that_kills_every_worker_is_a_row(run, results, tmp_path):
    assert run.run(tasks(tmp_path, "mortal", "b"), results, census_work.dies) == 1
    error = results.table().set_index("key").loc["mortal", "error"]
    assert error.startswith("WorkerCrashedError")
    assert marks(tmp_path) == ["b"] + ["mortal"] * 3


def test_two_drivers_share_a_folder(run, results, tmp_path):
    todo = tasks(tmp_path, *"abcdefgh")
    drivers = [
        threading.Thread(target=run.run, args=(todo, Results(results.folder), census_work.slow))
        for _ in range(2)
    ]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(timeout=60)
    assert marks(tmp_path) == list("abcdefgh")
    assert len(results.table()) == 8


DRIVER = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from pathlib import Path
import census_work
from census import run
from census.rows import Results
run.ROOT = sys.argv[1] + ":" + sys.argv[1] + "/tests"
run.start(None, 1)
names = [f"task{i}" for i in range(40)]
todo = [census_work.task(name, sys.argv[3]) for name in names]
run.run(todo, Results(Path(sys.argv[2])), census_work.slow)
"""


def test_after_kill_9_of_the_driver_the_next_does_what_is_missing(run, results, tmp_path):
    arguments = [str(ROOT), str(results.folder), str(tmp_path / "marks")]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], start_new_session=True)
    until = time.monotonic() + 150
    while len(list(results.rows.glob("*.parquet"))) < 2 and time.monotonic() < until:
        assert driver.poll() is None
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait(timeout=10)
    before = {path.name: path.stat().st_mtime_ns for path in results.rows.glob("*.parquet")}
    assert 2 <= len(before) < 40
    todo = [task(f"task{i}", str(tmp_path / "marks")) for i in range(40)]
    assert run.run(todo, results, census_work.quick) == 0
    assert len(results.table()) == 40
    after = {path.name: path.stat().st_mtime_ns for path in results.rows.glob("*.parquet")}
    assert {name: after[name] for name in before} == before
    ran = marks(tmp_path)
    assert len(ran) - len(set(ran)) <= 3  # those that were in flight


NODES = """
import sys, threading, time
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from pathlib import Path
import census_work
from census import run
from census.rows import Results
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
run.ray.init(cluster.address, log_to_driver=False, logging_level="error")
results = Results(Path(sys.argv[2]))
todo = [census_work.task(f"task{i}", sys.argv[3]) for i in range(40)]

def kill():
    while len(list(results.rows.glob("*.parquet"))) < 5:
        time.sleep(0.05)
    cluster.remove_node(nodes[0], allow_graceful=False)
    print("killed")

threading.Thread(target=kill).start()
sys.exit(run.run(todo, results, census_work.slow))
"""


@pytest.mark.nightly
def test_a_node_that_is_killed_costs_its_tasks_in_flight(results, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    arguments = [str(ROOT), str(results.folder), str(tmp_path / "marks")]
    driver = [sys.executable, "-c", NODES, *arguments]
    said = subprocess.run(driver, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0 and "killed" in said.stdout, said.stderr
    assert sorted(results.table()["key"]) == sorted(f"task{i}" for i in range(40))
    assert len(marks(tmp_path)) <= 40 + 4  # tasks run again, but each has one row


@pytest.mark.nightly
def test_two_workers_are_nearly_twice_as_fast_as_one(tmp_path):
    """Each with a Ray of its own; the machine must have two cores free."""
    seconds = []
    for workers in (1, 2):
        code = DRIVER.replace("run.start(None, 1)", f"run.start(None, {workers}); import time")
        code = code.replace("todo = ", "began = time.monotonic(); todo = ").replace("slow", "busy")
        code += "print(time.monotonic() - began)"
        folder = tmp_path / str(workers)
        (folder / "marks").mkdir(parents=True)
        Results(folder / "census").prepare()
        arguments = [str(ROOT), str(folder / "census"), str(folder / "marks")]
        driver = [sys.executable, "-c", code, *arguments]
        said = subprocess.run(driver, capture_output=True, text=True, timeout=300)
        seconds.append(float(said.stdout.split()[-1]))
    assert seconds[0] / seconds[1] > 1.8, seconds


def test_rows_do_not_depend_on_how_many_run_at_once(run, results):
    todo = [grid.Task(f"seed{seed}", TINY._replace(seed=seed)) for seed in range(3)]
    assert run.run(todo, results, measure.work) == 0
    got, threads = results.table().set_index("key"), torch.get_num_threads()
    for one in todo:
        for name, value in measure.work(one).items():
            here = got.loc[one.key, name]
            same = list(here) == value if isinstance(value, list) else here == value
            assert same or (isinstance(value, float) and math.isnan(value) and math.isnan(here))
    torch.set_num_threads(threads)


@pytest.mark.nightly
def test_two_thousand_quick_tasks_leave_the_driver_small(run, results, tmp_path):
    import psutil

    todo = tasks(tmp_path, *(f"t{i}" for i in range(2000)))
    process, sizes = psutil.Process(), []
    run.run(todo[:200], results, census_work.quick)
    sizes.append(process.memory_info().rss)
    began = time.monotonic()
    run.run(todo, results, census_work.quick)
    assert (time.monotonic() - began) / 1800 < 0.05
    sizes.append(process.memory_info().rss)
    assert sizes[1] < sizes[0] + 50e6


def test_tasks_that_no_node_could_run_are_refused(run):
    with pytest.raises(ValueError, match="gpus: tasks want 64, the largest node here has 0"):
        run.check_resources([grid.Task("a", grid.Model("b"), gpus=64)])


# The grid


def test_the_grid():
    settings = grid.settings()
    assert len(settings) == 33 and settings[0] == grid.CENTRE
    assert len(grid.toys()) == 132 and len({one.key for one in grid.toys()}) == 132
    for setting in settings:
        training.check_toy(setting)
    plane = {(s.batch, s.context) for s in settings if s.context == 1 + 2 * s.longest}
    assert len(plane) == 20
    assert len(list(grid.pythia())) == 1540
    assert len(grid.toys(1, ["batch=16,32", "longest=23"])) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--choose", "batch=7"], "choose: no setting of the grid has batch=7"),
        (["--choose", "colour=7"], "choose: got 'colour=7', want one of n_layers"),
        (["--choose", "batch=x"], "choose: 'x' are no values of batch"),
        (["--models", "a/b", "a/b"], "models: a/b comes twice"),
        (["--models", " "], "models: the list is empty"),
        (["--models", "nonsense"], "models: 'nonsense' is no model"),
        (["--models", "a/b", "--pythia"], "give one of --models, --list, --pythia"),
        (["--models", "a/b", "--gpus", "-1"], "gpus must be 0 or more"),
        (["--workers", "0"], "workers must be at least 1, got 0"),
        (["--list", "/no/such/file"], "No such file"),
        (["--report"], "report: no rows in"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, says, tmp_path, capsys):
    assert command.main([*arguments, "--results", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("census: ") and says in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(n_layers=0), "n_layers must be at least 1"),
        (dict(longest=64, context=129), "within 2..63, got 8 to 64"),
        (dict(context=46), "context must hold two segments, 47 tokens, got 46"),
        (dict(lr=0.0), "lr must be positive"),
    ],
)
def test_a_setting_that_cannot_be_trained(change, says):
    with pytest.raises(ValueError, match=says):
        training.train(TINY._replace(**change))


def test_dry_run_says_what_it_would_cost(capsys):
    assert command.main(["--dry-run", "--workers", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 133
    assert re.fullmatch(r"132 tasks, 2 at once: about \d+ minutes, .* of memory at most", lines[-1])
    sizes = "EleutherAI/pythia-1.4b@step0 a/pythia-70m-deduped b/model".split()
    assert list(map(costs.n_parameters, sizes)) == [1.4e9, 70e6, None]
    assert costs.cost(grid.models(["b/model"])[0]).seconds is None


# Training


@pytest.mark.parametrize("change", [{}, {"smeared": True}, {"n_layers": 3, "n_heads": 2}])
def test_the_quick_loss_trains_as_the_plain_one(change):
    setting = grid.CENTRE._replace(**change)
    losses = []
    for loss_of in (training.loss_of, lambda m, tokens: m(tokens, return_type="loss")):
        model = toy.build_toy(setting.n_layers, setting.smeared, n_heads=setting.n_heads)
        optimiser = torch.optim.AdamW(model.parameters(), lr=setting.lr)
        generator = generator_of(0)
        found = []
        for _ in range(50 if not change else 10):
            with torch.enable_grad():
                loss = loss_of(model, toy.toy_batch(generator))
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
            found.append(loss.item())
        losses.append(torch.tensor(found))
    assert (losses[0] - losses[1]).abs().max() < 1e-4


def test_the_centre_is_the_toy_of_the_notebook():
    s = grid.CENTRE
    ours = toy.build_toy(s.n_layers, s.smeared, s.seed, s.n_heads, s.d_model, s.context)
    assert all(map(torch.equal, ours.parameters(), toy.build_toy(2).parameters()))
    batch = toy.toy_batch(generator_of(3), s.batch, s.shortest, s.longest, s.context)
    assert torch.equal(batch, toy.toy_batch(generator_of(3)))
    on_held_out = toy.train_toy(2, n_steps=1).steps, training.train(s._replace(n_steps=1))["steps"]
    assert on_held_out[0].tolist() == on_held_out[1] == [0, 1]


def test_a_row_sums_up_the_curves():
    steps = torch.arange(0, 110, 10)
    rise = (steps - 50).sigmoid().float()
    curves = {"second_loss": 4 - 3 * rise, "prefix": 0.9 * rise, "icl": -2 * rise}
    row = training.summary(TINY._replace(n_steps=100, batch=2), steps, curves)
    assert row["formed"] and row["emergence_step"] == 50
    assert row["emergence_tokens"] == 50 * 2 * 47
    assert row["icl_in_window"] > 0.9 and row["final_prefix"] == pytest.approx(0.9)
    row = training.summary(TINY, steps, curves | {"prefix": 0.1 * rise})
    assert not row["formed"] and math.isnan(row["emergence_step"])


# Models


def test_what_is_measured_of_a_model(random_gpt2):
    row = measure.measure(random_gpt2)
    n_layers, n_heads = random_gpt2.cfg.n_layers, random_gpt2.cfg.n_heads
    for name in ("induction", "previous_token", "duplicate_token", "prefix"):
        assert len(row[f"{name}_scores"]) == n_layers * n_heads
    assert row["best_induction"] == pytest.approx(max(row["induction_scores"]))
    assert all(math.isfinite(row[name]) for name in ("first_loss", "second_loss", "ioi_logit_diff"))
    assert len(row["name_movers"]) == 3 and 0 <= row["ioi_accuracy"] <= 1


@pytest.fixture
def revisions(tmp_path, random_gpt2_folder):
    """Two repositories of a hub, each with two revisions: weights of their own."""
    import shutil

    from transformers import GPT2LMHeadModel

    found = {}
    for i, (repo_id, revision) in enumerate((r, s) for r in "ab" for s in ("step0", "step8")):
        folder = tmp_path / f"hub-{i}"
        shutil.copytree(random_gpt2_folder, folder)
        model = GPT2LMHeadModel.from_pretrained(folder)
        with torch.no_grad():
            model.transformer.wte.weight.mul_(1 + i / 10)
        model.save_pretrained(folder)
        found[f"someone/{repo_id}", revision] = f"{i}" + COMMIT[1:], folder
    return found


def test_revisions_of_a_hub(connect, monkeypatch, random_gpt2_folder, revisions):  # noqa: F811
    with a_hub(random_gpt2_folder, [], revisions=revisions) as endpoint:
        connect(endpoint)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        names = [f"{repo_id}@{revision}" for repo_id, revision in revisions]
        known.check_models(names)
        with pytest.raises(ValueError, match="someone/a has no revision 'step9' on the hub"):
            known.check_models(["someone/a@step9"])
        with pytest.raises(ValueError, match="no nobody/x on the hub"):
            known.check_models(["nobody/x"])
        found = [measure.work(one) for one in grid.models(names[:2])]
        assert [row["digest"][0] for row in found] == ["0", "1"]
        assert found[0]["first_loss"] != found[1]["first_loss"]
    connect(REFUSING)
    known.check_models(names[:2])  # in the cache by now
    with pytest.raises(ConnectionError, match="someone/b is not in the local cache"):
        known.check_models(names[2:])


# Reports


def toy_rows(tmp_path, n_seeds=2):
    """Rows of a census as the rules hope for: steps ~ batch^-0.5 context^0.5."""
    found = []
    for one in grid.toys(n_seeds):
        s = one.setting
        formed = s.n_layers > 1 or s.smeared
        step = 900 * s.batch**-0.5 * s.context**0.5 if formed else math.nan
        step *= 1 + 0.02 * ((7 * s.seed + s.batch) % 3 - 1)
        row = {"key": one.key, "kind": "toy", "state": "done", "error": "", **s._asdict()}
        row |= {"formed": formed, "emergence_step": step, "seconds": 1.0, "n_parameters": s.d_model}
        row |= {"emergence_tokens": step * s.batch * s.context, "icl_in_window": 0.95}
        found.append(row | {"final_prefix": 0.9 if formed else 0.05, "final_icl": -2.0})
    return pd.DataFrame(found)


def test_a_row_gives_its_setting_back(tmp_path):
    settings = [one.setting for one in grid.toys(2)]
    found = [grid.toy_of(row) for _, row in toy_rows(tmp_path).iterrows()]
    assert found == settings and type(found[0].batch) is int


def test_a_report_of_part_of_a_census(results, tmp_path):
    table = toy_rows(tmp_path)
    for _, row in table.head(40).iterrows():
        results.write(row.to_dict())
    failed = {"key": "x", "kind": "toy", "state": "failed", "error": "ValueError: <b>no</b>"}
    results.write({**grid.CENTRE._asdict(), **failed})
    parquet, page = report.write(results, tmp_path / "report")
    assert len(pd.read_parquet(parquet)) == 41
    text = page.read_text("utf-8")
    assert "40 done, 1 failed" in text and "&lt;b&gt;no&lt;/b&gt;" in text and "<b>no" not in text
    assert "steps to the sharpest drop" in text


def test_the_claims_read_the_rows(tmp_path):
    found = figures(toy_rows(tmp_path, n_seeds=4))
    assert set(found) == {claim for claim in CLAIMS if claim != "census.pythia"}
    assert found["census.one_layer"] == (0.05, 4) and found["census.smeared"] == (0.9, 4)
    assert found["census.quadratic"][0].mean == pytest.approx(0.5, abs=0.1)
    assert found["census.predicts"][0].mean > 0.95 and found["census.predicts"][1] == 20
    assert found["census.same_tokens"][0].mean == pytest.approx(1, abs=0.1)
    holds = {claim: CLAIMS[claim].holds(*found[claim]) for claim in found}
    fails = {"census.quadratic", "census.same_tokens"}
    assert {claim for claim, verdict in holds.items() if verdict is False} == fails
    rows = toy_rows(tmp_path, n_seeds=2)
    without = figures(rows.assign(formed=rows["formed"] & (rows["context"] > 33)))
    assert without["census.predicts"][1] == 15  # settings in which no head formed do not count
    few = figures(toy_rows(tmp_path).head(1))
    assert math.isnan(few["census.quadratic"][0].mean)


def test_pythia_is_read_once_two_sizes_are_there(tmp_path):
    names = [f"EleutherAI/pythia-{n}@step{s}" for n in ("70m", "160m") for s in (512, 1000)]
    models = pd.DataFrame({"name": names, "best_induction": [0.1, 0.9, 0.5, 0.9]})
    models = models.assign(kind="model", state="done")
    both = pd.concat([toy_rows(tmp_path), models])
    assert figures(both)["census.pythia"] == (1000 / 512, 2)

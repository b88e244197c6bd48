"""search.py: the space, options, resuming, failures, the sampler, importance and report."""

import csv
import errno
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from concurrent.futures import CancelledError, Future
from pathlib import Path
from subprocess import PIPE, Popen
from types import SimpleNamespace
from unittest.mock import Mock

import blocks
import data
import search
from data import SMALL_SETS, UsageError, cpu_count
from model import MODELS, create_model
from search import Options, Search, read_json
from train import RECIPES, RunError, parse
from train import Options as TrainOptions

import numpy as np
import pytest
import search_targets as targets
import torch
from ConfigSpace import ConfigurationSpace
from distributed import LocalCluster
from PIL import Image
from smac import HyperparameterOptimizationFacade, MultiFidelityFacade, RandomFacade, Scenario
from smac.runhistory.runhistory import RunHistory


def start(out, trials, target=targets.formula, choices=None, **options):
    """Open a search with the budgets of digits: 1, 3 and 9."""
    options = {"data": "digits", "out": str(out), "trials": trials, **options}
    return Search(Options(**options), choices, target)


def told(opened, trials, target=targets.formula):
    """Run the next trials of a search in this process, one at a time."""
    while len(opened.rows) < trials and (trial := opened.next_trial()) is not None:
        cost, _ = target(trial.config, 1, trial.budget)
        costs, now = cost if isinstance(cost, list) else [cost], time.time()
        outcome = {"status": "success", "cost": costs, "info": {}, "start": now, "end": now}
        job = SimpleNamespace(trial=trial, seed=1, time_limit=1)
        opened.finished = lambda found=(job, outcome): [found]
        opened.collect()
        opened.save()
    return opened


def jobs_of(opened, monkeypatch):
    """Return the jobs of the first trials that a search submits, without running them."""
    jobs = []
    monkeypatch.setattr(search, "schedule", lambda job, workers: jobs.append(job) or Future())
    opened.fill()
    return jobs


@pytest.fixture(autouse=True, scope="module")
def few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "RESAMPLES", 12)
        patch.setattr(search, "SHUFFLES", 3)
        yield


@pytest.fixture
def tiny(monkeypatch):
    """A clutter data set whose epoch takes a moment."""
    monkeypatch.setattr(data, "CLUTTER_EPOCH", 64)
    monkeypatch.setattr(data, "CLUTTER_HELD_OUT", 100)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished search of 60 trials on two workers."""
    out = tmp_path_factory.mktemp("search") / "run"
    assert start(out, 60, workers=2).run() == 0
    return out, search.rows_of(out)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A search that stopped after 20 trials, in its second round of brackets."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "RANDOM_START", 40)  # no model, which takes time for each trial
        told(start(out, 20), 20).journal.close()
    return out


# The space and the options


def test_the_space_is_the_papers():
    """61,440 configurations (plus those of added values); each value gives another network."""
    space, points = search.current_space(), search.points()
    positions = {"none", "1", "2", "3", "12", "13", "23", "123"}
    papers = {
        "stem": {"conv", "patchify"}, "kernel": {"3", "5", "7", "9", "mixed"},
        "pooling": {"max", "conv", "blur"}, "block": {"xception", "bottleneck"}, "se": {"yes", "no"},
        "activation": {"relu", "gelu", "elu", "celu"}, "activation_positions": positions,
        "norm": {"batch", "layer"}, "norm_positions": positions,
    }  # fmt: skip
    assert math.prod(map(len, papers.values())) == 61_440
    assert papers.keys() == space.keys() and all(papers[name] <= set(space[name]) for name in space)
    size = math.prod(map(len, space.values()))
    assert search.configspace().estimate_size() == size
    assert len(np.unique(search.whole_space(tuple(map(len, space.values()))), axis=0)) == size
    assert search.network_config(points["NEXcepTion"], "nexception_t") == MODELS["nexception_t"]
    assert search.network_config(points["Xception"], "xception") == MODELS["xception"]
    assert points["NEXcepTion"]["activation_positions"] == "2" and points["Xception"]["se"] == "no"
    first = {name: values[0] for name, values in space.items()}
    for name, values in space.items():
        networks = {search.network_config({**first, name: value}, "nexception_nano") for value in values}
        assert len(networks) == len(values)
    configs = search.configspace(seed=2).sample_configuration(500)
    assert len({search.short(dict(c)) for c in configs}) == len({tuple(c.values()) for c in configs})


def test_budgets_times_and_defaults(monkeypatch):
    budgets = [search.check_budgets(*ends) for ends in ((1, 9), (5, 45), (4, 4))]
    assert budgets == [[1, 3, 9], [5, 15, 45], [4]]
    for lowest, highest, nearest in ((2, 53, "18 and 54"), (5, 14, "5 and 15"), (5, 4, "5 and 15")):
        with pytest.raises(UsageError, match=nearest):
            search.check_budgets(lowest, highest)
    texts = ("90s", "10m", "1.5h", "3d", "7")
    assert [search.seconds(text, "--walltime") for text in texts] == [90, 600, 5400, 259200, 7]
    assert [search.clock(s) for s in (4.24, 200, 600, 7400)] == ["4.2 s", "3:20", "10:00", "2:03:20"]
    monkeypatch.setitem(SMALL_SETS, "new", SMALL_SETS["digits"])
    assert search.defaults("new") == search.defaults("digits") != search.defaults("clutter")
    assert search.defaults("/photos") == search.defaults("cifar100")  # the paper's


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "digits", "--max-epochs", "10"], "9 and 27"),
        (["--walltime", "soon"], "90s, 10m, 12h or 3d"),
        (["--walltime", "0s"], "90s, 10m, 12h or 3d"),
        (["--objectives", "macs"], "accuracy first"),
        (["--sampler", "hyperband", "--max-epochs", "9"], "needs several budgets, as --min-epochs"),
        (["--objectives", "accuracy,beauty"], "throughput, macs, parameters"),
        (["--model", "resnet"], "invalid choice"),
        (["--memory-limit", "-1"], "above 0"),
        (["--tirals", "3"], "unrecognized"),
        (["--data", "nowhere"], "nowhere"),
        (["--device", "gpu"], "--device gpu"),
        (["--batch", "1"], "at least 2"),
        (["--scheduler", "tcp://127.0.0.1:9"], "no Dask scheduler"),
        (["--out", "file"], "--out file"),
        (["--out", "x" * 300], "name too long"),
        (["importance"], "importance|report|status RUN"),
        (["statsu", "run"], "importance|report|status RUN"),
        (["--seed", "1", "status", "run"], "importance|report|status RUN"),
        (["status", "nowhere"], "not the folder of a search"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "SCHEDULER_PATIENCE", 1)
    Path("file").touch()
    assert search.main(arguments) == 2
    error = capsys.readouterr().err
    assert words.lower() in error.lower()
    assert len(error.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == ["file"]


# The run folder


def test_a_search_runs_the_trials_asked_for(finished):
    out, rows = finished
    assert len(rows) == len({(json.dumps(row["config"]), row["budget"]) for row in rows}) == 60
    assert {row["budget"] for row in rows} == {1, 3, 9}
    given = [row for row in rows if row["origin"] in search.points()]
    assert {row["origin"]: row["config"] for row in given} == search.points()
    assert [row["budget"] for row in given] == [9, 9] and all(row in rows[:4] for row in given)
    assert {type(value) for row in rows for value in row["config"].values()} == {str}
    best = read_json(out / "incumbent.json")
    assert best["block"] == "bottleneck" and best["kernel"] in (5, 7)
    proposed = {json.dumps(row["config"]): row["config"] for row in rows if row["origin"] == "model"}
    costs = [targets.formula(config, 0, 0)[0] for config in proposed.values()]
    assert len(costs) > 20 and np.mean(costs) < 0.31  # the mean of the space is 0.335


def test_the_folder_is_a_smac3_run_folder_with_the_same_incumbent(finished):
    out, rows = finished
    folder = out / "smac/0"
    history = RunHistory()
    history.load(folder / "runhistory.json", ConfigurationSpace.from_json(folder / "configspace.json"))
    assert history.finished == len(history) == 60 and history.running == 0
    assert sorted(value.cost for value in history.values()) == sorted(row["cost"][0] for row in rows)
    costs = {json.dumps(row["config"], sort_keys=True): row["cost"] for row in rows if row["budget"] == 9}
    best = search.best_rows(rows, 9)[0]["cost"]
    incumbent = read_json(folder / "intensifier.json")["incumbent_ids"][0]
    config = read_json(folder / "runhistory.json")["configs"][str(incumbent)]
    assert best == min(costs.values()) == costs[json.dumps(config, sort_keys=True)]


def test_a_folder_of_another_search_or_of_none_is_refused(interrupted, tmp_path):
    changes = ({"max_epochs": 27}, {"data": "cifar10"}, {"seed": 5}, {"objectives": "accuracy,macs"})
    for changed in (*changes, {"points": False}, {"sampler": "random"}):
        options = {"min_epochs": 1, "max_epochs": 9, "model": "nexception_nano", **changed}
        with pytest.raises(UsageError, match="holds another search"):
            start(interrupted, 60, **options)
    with pytest.raises(UsageError, match="space kernel now without 7, 9"):
        start(interrupted, 60, choices={**search.current_space(), "kernel": ["3", "5"]})
    added = {**search.current_space(), "kernel": [*search.current_space()["kernel"], "11"]}
    with pytest.raises(UsageError, match=r"another search \(space kernel now with 11; points"):
        start(interrupted, 60, choices=added)
    (tmp_path / "last.pt").touch()
    with pytest.raises(UsageError, match="not the folder of a search"):
        start(tmp_path, 3)
    (tmp_path / "last.pt").rename(tmp_path / "trials.jsonl")  # as left by a kill at the start
    start(tmp_path, 3).journal.close()
    shutil.copy(interrupted / "trials.jsonl", tmp_path)
    (tmp_path / "search.json").unlink()
    with pytest.raises(UsageError, match=r"no readable search\.json"):
        start(tmp_path, 3)
    first = start(interrupted, 60)
    with pytest.raises(UsageError, match="another search is running"):
        start(interrupted, 60)
    assert f", running as process {os.getpid()}\n" in search.status_text(interrupted)
    first.journal.close()
    assert "not running on this machine" in search.status_text(interrupted)


# Kills, signals and failures


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("trials.jsonl", lambda old: old + b'{"config": {"stem": "conv", "ker'),
        ("state.json", lambda old: old[:50]),
        ("smac/0/runhistory.json", lambda old: old[:500]),
        ("state.json", None),
    ],
)
def test_damage_is_repaired(file, damage, interrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "RANDOM_START", 40)
    out = tmp_path / "run"
    shutil.copytree(interrupted, out)
    before, path = search.rows_of(interrupted), out / file
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    opened = start(out, 30)
    assert opened.rows == before
    history = opened.sampler.smac.runhistory
    assert history.finished == len(history) == 20
    told(opened, 30)
    rows = search.rows_of(out)
    assert rows[:20] == before
    assert len(rows) == len({(json.dumps(row["config"]), row["budget"]) for row in rows}) == 30


@pytest.mark.parametrize("sampler", search.SAMPLERS)
def test_a_resumed_search_asks_for_the_same_trials(sampler, tmp_path):
    """Equal to a search that never stopped; with a model, only until it is first fitted."""
    trials = 15 if sampler in ("smac", "forest") else 26  # two points, then the first bracket
    whole = told(start(tmp_path / "whole", 40, sampler=sampler), trials)
    parts = tmp_path / "parts"
    for count in (3, 4, 10, 14, trials):
        part = told(start(parts, 40, sampler=sampler), count)
        part.next_trial()  # it never finishes
        part.save()
        part.journal.close()
    kept = [(row["config"], row["budget"]) for row in search.rows_of(parts)]
    assert kept == [(row["config"], row["budget"]) for row in whole.rows]
    assert len({json.dumps(row["config"]) for row in whole.rows}) > 10
    assert ({row["budget"] for row in whole.rows} == {9}) == (sampler == "random")


def test_sigkill_loses_nothing(tmp_path):
    """One kill at a random moment; `KILLS=30 python -m pytest -n 0 -k sigkill` does it thirty times."""
    out, rng, announced, kills = tmp_path / "run", random.Random(6), set(), int(os.environ.get("KILLS", 1))
    for kill in range(kills + 1):
        process, lines = targets.start(out, 20 * kills, 2), []
        if kill < kills:
            # Two thirds of the kills come during the trials, one third at any time after the start.
            for line in process.stdout if rng.random() < 2 / 3 else ():
                lines.append(line)
                if targets.finished_line(line):
                    break
            time.sleep(rng.uniform(0, 4))
            process.kill()
        lines += process.communicate()[0].splitlines()
        announced |= {targets.finished_line(line) for line in lines} - {None}
        assert process.returncode == (-signal.SIGKILL if kill < kills else 0), lines[-5:]
    rows = search.rows_of(out)
    kept = {f"{search.short(row['config'])} {row['budget']}" for row in rows}
    assert len(rows) == len(kept) == 20 * kills and announced <= kept
    stats = read_json(out / "smac/0/runhistory.json")["stats"]
    assert (stats["finished"], stats["running"]) == (len(rows), 0)
    assert any(line.startswith("incumbent: ") for line in lines)


def test_ctrl_c_ends_with_the_incumbent(tmp_path):
    process = targets.start(tmp_path / "run", 1000, 2)
    lines = [process.stdout.readline() for _ in range(25)]
    status = search.status_text(tmp_path / "run")
    assert f"running as process {process.pid}\n" in status and "now: " in status
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    announced = sum(bool(targets.finished_line(line)) for line in [*lines, *rest.splitlines()])
    assert process.returncode == 130
    assert "incumbent: " in rest and "repeat the command" in rest and "Traceback" not in rest
    assert announced == len(search.rows_of(tmp_path / "run"))


def test_the_first_signal_ends_a_search_and_a_second_ctrl_c_does_at_once(tmp_path, capsys):
    """SLURM's and the terminal's."""
    opened, before = start(tmp_path / "run", 5), signal.getsignal(signal.SIGINT)
    opened.fill = lambda: signal.raise_signal(signal.SIGUSR1)
    assert opened.run() == 128 + signal.SIGUSR1 and "no incumbent yet" in capsys.readouterr().out
    opened.fill = lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        opened.run()
    assert signal.getsignal(signal.SIGINT) == before


def test_every_failure_is_recorded_and_the_search_goes_on(tmp_path):
    kernels = ("3", "5", "7", "9", "mixed")
    space = {"kernel": kernels, "block": ("xception", "bottleneck"), "norm_positions": "1"}
    options = {"time_limit": "10s", "memory_limit": 1.2, "workers": 2, "max_epochs": 1}
    assert start(tmp_path / "run", 0, targets.moody, space, walltime="1h", **options).run() == 0
    rows = search.rows_of(tmp_path / "run")
    assert len(rows) == 10  # every configuration of this space
    expected = dict(zip(kernels, ("crashed", "crashed", "crashed", "memoryout", "timeout"), strict=True))
    for row in rows:
        config = row["config"]
        failed = config["block"] == "xception"
        assert row["status"] == (expected[config["kernel"]] if failed else "success"), row
        assert row["cost"] == [1.0] if failed else row["cost"][0] < 0.5
    errors = {row["config"]["kernel"]: row["info"].get("error") for row in rows if row["status"] != "success"}
    assert "diverged" in errors["3"] and "wants out" in errors["5"] and "status 7" in errors["7"]
    assert "--memory-limit" in errors["9"] and "--time-limit" in errors["mixed"]
    text = search.status_text(tmp_path / "run")
    assert "5 failed" in text and "1 epoch: not finished within --time-limit" in text


def test_loader_processes_count_for_the_memory_limit(tmp_path):
    options = {"max_epochs": 1, "memory_limit": 1.2, "time_limit": "60s"}
    opened = start(tmp_path / "run", 1, targets.hoarding_loader, workers=1, **options)
    with pytest.raises(RunError, match="no trial has succeeded after 1 epoch: see"):
        opened.run()
    assert opened.rows[0]["status"] == "memoryout" and "--memory-limit" in opened.rows[0]["info"]["error"]


def test_a_full_disk_is_one_sentence(tmp_path):
    opened = start(tmp_path / "run", 3)
    opened.journal = Mock()
    opened.journal.write.side_effect = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(RunError, match=r"cannot write to .*/run: No space left"):
        told(opened, 3)


def test_a_search_whose_first_trials_all_fail_stops_with_the_first_error(tmp_path):
    opened = start(tmp_path / "run", 50, targets.broken, workers=1)
    with pytest.raises(RunError, match=r"first 5 trials all failed.*\n(.*\n)*.*data set is not where"):
        opened.run()
    assert len((tmp_path / "run/failed.jsonl").read_text().splitlines()) == 5
    assert start(tmp_path / "run", 50, targets.broken).rows == []


def test_a_dask_cluster_runs_trials_that_fork_loader_workers(tmp_path):
    settings = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "protocol": "tcp"}
    with LocalCluster(**settings, dashboard_address="127.0.0.1:0") as cluster:
        address = cluster.scheduler_address
        opened = start(tmp_path / "run", 6, targets.loading, workers=2, scheduler=address)
        assert opened.run() == 0
    assert [row["status"] for row in opened.rows] == ["success"] * 6


def test_a_lost_dask_cluster_is_one_sentence(tmp_path):
    """The scheduler dies during the search, so that cleaning up fails as well."""
    opened, lost = start(tmp_path / "run", 5, workers=1), Future()
    lost.set_exception(CancelledError("scheduler-connection-lost"))
    opened.client = Mock()
    opened.client.get_executor.return_value.submit.return_value = lost
    opened.client.close.side_effect = OSError("cannot reach the scheduler")
    with pytest.raises(RunError, match=r"lost the Dask cluster.*scheduler-connection-lost.*repeat"):
        opened.run()
    assert opened.client.close.called and not opened.client.run.called  # which would wait for ever


def test_a_trial_ended_by_the_wall_time_is_not_recorded(tmp_path, capsys):
    opened = start(tmp_path / "run", None, targets.endless, walltime="2s", time_limit="1h", workers=1)
    with pytest.raises(RunError, match=r"no trial has succeeded after 9 epochs: .*--walltime 2s; .* 7m"):
        opened.run()
    assert opened.rows == [] and "runs again" in capsys.readouterr().out
    opened.journal.close()
    assert start(tmp_path / "run", 1, targets.endless).next_trial().origin == "NEXcepTion"


def test_the_comparison_trains_each_network_three_times_and_resumes(tmp_path, monkeypatch):
    """Resumed, it repeats nothing; each training has a seed of its own."""
    opened, path, jobs = start(tmp_path / "run", 1, workers=2), tmp_path / "run/final.json", []
    best = {**search.points()["NEXcepTion"], "kernel": "9"}
    networks = {"found 1": best, **search.points()}
    tops = {"9": [71.0, 71.5, 72.0], "5": [70.5, 72.0, 71.0], "3": [60.0, 61.0, 60.5]}
    tops = {kernel: itertools.cycle(values) for kernel, values in tops.items()}

    def schedule(job, workers):
        kernel, future = job.trial.config["kernel"], Future()
        jobs.append((kernel, job.seed))
        top1 = next(tops[kernel])
        info = {"top1": top1, "val_top1": top1 + 5 * (kernel == "3"), "split": split}
        future.set_result({"status": "success", "info": info})
        opened.stop = SimpleNamespace(signal=signal.SIGINT if len(jobs) == interrupt else 0)
        return future

    monkeypatch.setattr(search, "schedule", schedule)
    split, interrupt = "test", 4
    opened.compare(networks)
    assert len(read_json(path)) == len(jobs) == 4
    opened.stop = interrupt = None
    opened.compare(networks)
    assert len(set(jobs)) == len(jobs) == len(read_json(path)) == 9
    assert search.trial_seed(opened.options.seed, best) not in [seed for _, seed in jobs]
    text, name = search.comparison(opened.folder, networks)
    assert "(trainings) on the test split" in text and "71.50%  71.50% ± 0.50 (3)" in text
    assert "65.50%  60.50% ± 0.50 (3)" in text and name == "found 1"
    assert re.search(r"found 1 - NEXcepTion: \+0.33 points, not more than", text)
    assert "found 1 - Xception: +11.00 points, more than the noise between seeds" in text
    split, jobs[:] = "val", []
    path.unlink()
    opened.compare(search.points())
    assert len(jobs) == 6
    text, name = search.comparison(opened.folder, search.points())
    assert "on the validation split, which the search has seen" in text and name == "NEXcepTion"


def compared(folder, networks, *top1s):
    """Compare as if each network had reached its top-1 on both splits in every training."""
    scored = {}
    for config, top1 in zip(networks.values(), top1s, strict=True):
        result = {"top1": top1, "val_top1": top1, "split": "test"} if top1 else {"error": "diverged\nx"}
        scored |= {search.repeat_name(config, repeat): result for repeat in range(1, search.REPEATS + 1)}
    (folder / "final.json").write_text(json.dumps(scored))
    return search.comparison(folder, networks)


@pytest.mark.filterwarnings("error")
def test_the_comparison_names_the_best_without_nan_or_warnings(tmp_path):
    """Equal scores, scores without deviation, failures, and a damaged file."""
    best = {**search.points()["NEXcepTion"], "kernel": "9"}
    networks = {"found 1": best, "found 2": {**best, "kernel": "7"}, **search.points()}
    text, name = compared(tmp_path, networks, 70.0, 60.0, 70.0, 60.0)
    assert name == "found 1" and "found 1 - NEXcepTion: equal\n" in text and "p < 0.001" in text
    text, name = compared(tmp_path, networks, None, 70.0, 72.0, None)
    assert name == "NEXcepTion" and "NEXcepTion's choices, not what the search found\nfound 2 - NEX" in text
    assert text.count("no result (0)" + "  diverged" * search.REPEATS) == 2
    for damage in (b'{"a', b"\xff"):
        (tmp_path / "final.json").write_bytes(damage)
        text, name = search.comparison(tmp_path, networks)
        assert name == "found 1" and text.count("no result (0)") == 4


def test_the_best_of_ten_trials_each_are_compared(finished):
    """At most five, none of them the paper's, best first; with several objectives the most accurate."""
    out, rows = finished
    done = [row for row in search.successes(rows, 9) if row["origin"] not in search.points()]
    order = [row["config"] for row in sorted(done, key=lambda row: row["cost"])]
    settings = search.settings_of(out)
    for trials, count in ((8, 1), (20, 2), (300, 5)):
        repeated = (done * 300)[:trials]
        networks = search.finalists(repeated, settings)
        assert list(networks) == [*(f"found {i + 1}" for i in range(count)), *search.points()]
    assert search.finalists(done, settings)["found 1"] == order[0]
    settings["objectives"] = ["accuracy", "macs"]
    assert len(search.finalists(repeated, settings)) == 3


# The sampler


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("sampler", search.SAMPLERS)
def test_small_spaces_end_with_all_their_configurations_at_the_highest_budget(sampler, workers, tmp_path):
    """Each runs there once, also in spaces that run out amid Hyperband's brackets."""
    for values in (1, 2, 4, 6):
        space = {"x": [str(i) for i in range(values)], "z": ["a", "b"]}

        def target(config, seed, budget, bad="0" if values > 1 else None):
            return 1.0 if config["x"] == bad else 0.1, {}

        _, trials = targets.play(tmp_path / str(values), sampler, space, workers=workers, target=target)
        had = [(trial.config["x"], trial.config["z"]) for trial in trials if trial.budget == 9]
        assert sorted(had) == list(itertools.product(*space.values()))


@pytest.mark.parametrize("highest", [3**power for power in range(7)])
def test_hyperband_has_the_brackets_of_its_paper(highest, tmp_path):
    """SMAC's floor(log(243) / log(3)) is 4, and its first bracket of 1 to 729 ends with 0 configurations."""
    settings = {"space": search.current_space(), "seed": 0, "objectives": ["accuracy"]}
    budgets = search.check_budgets(1, highest)
    hyperband = search.Smac(tmp_path, settings | {"budgets": budgets}).smac.intensifier
    hyperband.runhistory = RunHistory()
    hyperband.__post_init__()
    for bracket, stages in hyperband._budgets_in_stage.items():
        n = math.ceil(len(budgets) * 3 ** (len(stages) - 1) / len(stages) - 1e-9)
        assert hyperband._n_configs_in_stage[bracket] == [n // 3**i for i in range(len(stages))]
        assert stages == budgets[bracket:]
    assert len(hyperband._budgets_in_stage) == len(budgets)


def test_a_sampler_of_ten_lines(tmp_path, monkeypatch):
    """It mutates the best of three random configurations; the search tells it what it proposes twice."""

    class Evolution(search.RandomSearch):
        best = None

        def ask(self):
            trial, best = super().ask(), (self.best or {"config": {}})["config"]
            kept = {n: v for n, v in best.items() if self.rng.random() < 2 / 3}
            return search.Trial(trial.config | kept, trial.budget, "child")

        def tell(self, trial, row):
            self.best = min(self.best or row, row, key=lambda row: row["cost"])

    monkeypatch.setitem(search.SAMPLERS, "evolution", Evolution)
    rows = told(start(tmp_path, 60, sampler="evolution"), 60).rows
    assert len({json.dumps(row["config"]) for row in rows}) == 60
    assert [row["origin"] for row in rows] == ["NEXcepTion", "Xception", *["child"] * 58]
    assert search.best_rows(rows, 9)[0]["cost"] == pytest.approx([0.132])  # the optimum
    assert not (tmp_path / "smac").exists()


def test_training_seeds_depend_on_configuration_and_search_seed(tmp_path, monkeypatch):
    seeds = {}
    for seed in (0, 1):
        opened = start(tmp_path / str(seed), 12, seed=seed)
        opened.devices *= 12
        seeds[seed] = {search.short(job.trial.config): job.seed for job in jobs_of(opened, monkeypatch)}
        assert len(set(seeds[seed].values())) == len(seeds[seed]) == 12
    both = set(seeds[0]) & set(seeds[1])
    assert both and all(seeds[0][name] != seeds[1][name] for name in both)


def test_searches_repeat_under_any_hash_seed():
    program = (
        "import search, search_targets, tempfile\n"
        "for trial in search_targets.play(tempfile.mkdtemp(), trials=30)[1]:\n"
        "    print(search.short(trial.config), trial.budget)\n"
    )
    env = {"PYTHONPATH": f"{targets.REPOSITORY}:{targets.REPOSITORY / 'tests'}"}
    command = {"args": [sys.executable, "-c", program], "stdout": PIPE, "text": True}
    processes = [Popen(**command, env={**env, "PYTHONHASHSEED": seed}) for seed in "12"]
    first, second = (process.communicate()[0] for process in processes)
    assert len(set(first.splitlines())) == 30
    assert first == second


def test_two_objectives_end_with_the_pareto_front(tmp_path):
    out = tmp_path / "run"
    opened = told(start(out, 26, objectives="accuracy,throughput"), 26, targets.two_costs)
    rows, front = opened.rows, search.best_rows(opened.rows, 9)
    done = [row["cost"] for row in rows if row["budget"] == 9]
    for row in front:
        assert not any(a[0] < row["cost"][0] and a[1] < row["cost"][1] for a in done)
    assert len(front) > 1 and "model" in {row["origin"] for row in rows}
    opened.conclude()
    page = (out / "report.md").read_text()
    for number, row in enumerate(front, start=1):
        (line,) = [line for line in page.splitlines() if line.endswith(f"front {number} |")]
        assert f"{search.top1(row):.2f}%" in line and f"{-row['cost'][1]:,.0f} images/s" in line
        network = create_model(str(out / ("incumbent.json" if number == 1 else f"front-{number}.json")))
        assert network.config == search.network_config(row["config"], "nexception_nano")
    assert "](front.png" in page and (out / "front.png").exists()


def test_a_search_that_finds_nothing_better_recommends_the_best_it_compared(tmp_path, capsys):
    opened, papers = told(start(tmp_path / "run", 6, sampler="random"), 6), search.points()
    opened.default_target = True
    compared(opened.folder, search.finalists(opened.rows, opened.settings), 60.0, 65.0, 70.0)
    opened.conclude()
    assert f"--model {tmp_path / 'run/incumbent.json'}" in capsys.readouterr().out
    expected = search.network_config(papers["Xception"], "nexception_nano")
    assert create_model(str(tmp_path / "run/incumbent.json")).config == expected


# Importance and report


def importances_of(function, sizes, noise):
    """Return {kind: (4, P)} of 400 random configurations whose costs are a function of their codes."""
    rng = np.random.default_rng(4)
    codes = rng.integers(0, sizes, (400, len(sizes)))
    costs = np.array([function(*row) for row in codes]) + noise * rng.normal(size=400)
    found = search.importances(
        codes, costs, {name: [*range(n)] for name, n in zip("abc", sizes, strict=True)}
    )
    assert found.pop("trials") == 400
    return {kind: np.array([*choices.values()]).T for kind, choices in found.items()}


def test_importances_of_known_functions():
    """a + b: variances 2/3 and 1/4, losses 1.5 and 1 by other values, 3 by default; xor: no main effects."""
    result = importances_of(lambda a, b, c: 3 - a - b, [3, 2, 4], noise=0.05)
    shares = [8 / 11, 3 / 11, 0]
    for kind, truth in {"local": shares, "fanova": shares, "improvement": [1 / 2, 1 / 3, 0]}.items():
        estimate, low, high, noise = result[kind]
        assert np.allclose(estimate, truth, atol=0.05), kind
        assert (low > noise).tolist() == [True, True, False], kind
        assert (low <= estimate).all() and (estimate <= high).all(), kind
    result = importances_of(lambda a, b, c: 1 - (a ^ b), [2, 2, 3], noise=0.1)
    assert np.allclose(result["local"][0], [0.5, 0.5, 0], atol=0.03)
    assert np.allclose(result["fanova"][0], 0, atol=0.03)


def test_importance_of_a_run(finished, interrupted, tmp_path):
    """Two hundred random trials show both effects, with or without failed trials among them."""
    out, rows = finished
    template = next(row for row in rows if row["budget"] == 1)
    drawn = [dict(config) for config in search.configspace(seed=0).sample_configuration(200)]
    known = [{**template, "config": config, "cost": [targets.formula(config, 0, 1)[0]]} for config in drawn]
    crashes = [{**row, "status": "crashed", "cost": [1.0], "info": {"error": "x"}} for row in known]
    shutil.copy(out / "search.json", tmp_path)
    found = []
    for rows in (known, [*crashes, *known]):
        (tmp_path / "trials.jsonl").write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))
        found.append(search.importance(tmp_path))
    assert found[0] == found[1] and set(found[0]) == {1}
    local = found[0][1]["local"]
    assert sorted(local, key=local.get)[-2:] == ["kernel", "block"]
    clear = {name for name, (_, low, _, noise) in local.items() if low > noise}
    assert {"kernel", "block"} <= clear and not clear & {"stem", "se", "pooling", "activation"}
    assert "~" in next(line for line in search.importance_text(found[0]).splitlines() if "stem" in line)
    assert read_json(tmp_path / "importance.json")["1"]["trials"] == 200
    with pytest.raises(UsageError, match="importance needs 18 successful trials"):
        search.importance(interrupted)


def test_the_report_and_the_table_have_all_trials(finished):
    out, rows = finished
    assert search.main(["report", str(out)]) == 0
    page = (out / "report.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(lines) == 12  # two of the head and the ten best
    assert "bottleneck" in lines[2] and "60 success" in page
    for name in ("progress.png", "importance.png", "marginals.png"):
        assert f"]({name})" in page and (out / name).read_bytes().startswith(b"\x89PNG")
    table = list(csv.DictReader((out / "trials.csv").open()))
    assert len(table) == 60
    assert [row["kernel"] for row in table] == [row["config"]["kernel"] for row in rows]
    assert [float(row["budget"]) for row in table] == [row["budget"] for row in rows]


# Real folders and trainings


def test_all_trials_use_the_precision_recorded_at_the_start(tmp_path, monkeypatch):
    """Also on a machine that would choose another."""
    opened = start(tmp_path / "run", 2, search.train_config, device="cpu")
    told(opened, 1).journal.close()
    path = tmp_path / "run/search.json"
    assert '"amp": "off"' in path.read_text()
    path.write_text(path.read_text().replace('"amp": "off"', '"amp": "bf16"'))
    opened = start(tmp_path / "run", 2, search.train_config, device="cpu", workers=1)
    (job,) = jobs_of(opened, monkeypatch)
    assert job.settings["amp"] == "bf16"
    assert job.settings["workers"] == cpu_count()  # loader processes of the only concurrent trial
    assert search.trial_options(job.settings, 9, 1, torch.device("cpu")).amp == "bf16"


def test_trials_on_a_folder_use_the_recipe_of_train_py(tmp_path, monkeypatch):
    """So few images do not get ImageNet's; the folder's path may change."""
    for split, name in itertools.product(("train", "val"), ("ant", "bee")):
        for i in range(4):
            path = tmp_path / f"photos/{split}/{name}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (9 * i, 0, 0)).save(path)
    options = {"out": tmp_path / "run", "trials": 2, "target": search.train_config, "batch": 2}
    monkeypatch.chdir(tmp_path)
    opened = told(start(**options, data="photos", min_epochs=1, max_epochs=1), 1)
    assert opened.settings["recipe"] == "small-folder" and opened.settings["images"] == {"train": 8, "val": 8}
    opened.journal.close()
    (tmp_path / "photos").rename("elsewhere")
    opened = start(**options, data="./elsewhere/", min_epochs=1, max_epochs=1, workers=1)
    (job,) = jobs_of(opened, monkeypatch)
    usual = search.trial_options(job.settings, 1, 0, torch.device("cpu"))
    assert usual.lr == RECIPES["small-folder"].values["lr"] and usual.data == "./elsewhere/"
    opened.journal.close()
    (tmp_path / "elsewhere/val/bee/0.png").unlink()
    with pytest.raises(UsageError, match=r"another search \(images val was 8, is now 7\)"):
        start(**options, data="elsewhere", min_epochs=1, max_epochs=1)


@pytest.mark.parametrize(
    "facade, budgets",
    [
        (HyperparameterOptimizationFacade, {}),
        (RandomFacade, {}),
        (MultiFidelityFacade, {"min_budget": 0.3, "max_budget": 1}),
    ],
)
def test_every_facade_trains_an_activation_added_at_run_time(facade, budgets, monkeypatch, tmp_path, tiny):
    """Some pass no budget; at least one epoch is trained."""
    before, values = search.configspace().estimate_size(), len(blocks.ACTIVATIONS)
    monkeypatch.setitem(blocks.ACTIVATIONS, "added", torch.nn.Hardswish)
    space = search.configspace({**search.current_space(), "activation": ["added"]})
    assert search.configspace().estimate_size() == before // values * (values + 1)
    scenario = Scenario(space, deterministic=True, output_directory=tmp_path, n_trials=1, **budgets)
    smac = facade(scenario, search.train_config, overwrite=True, logging_level=False)
    smac.optimize()
    (outcome,) = smac.runhistory.values()
    assert outcome.status.name == "SUCCESS", outcome.additional_info
    assert 0 < outcome.cost == pytest.approx(1 - outcome.additional_info["top1"] / 100)
    assert len(outcome.additional_info["losses"]) == (
        1 if budgets else search.defaults("clutter")["max_epochs"]
    )


def test_settings_of_a_trial(tiny):
    """Several objectives give as many costs; unknown settings are refused by name."""
    settings = {"objectives": ["accuracy", "throughput"], "split": "test"}
    costs, info = search.train_config(search.points()["Xception"], budget=1, settings=settings)
    assert costs == [1 - info["top1"] / 100, -info["inference_images_per_second"]] and costs[1] < 0
    assert info["split"] == "test"
    with pytest.raises(UsageError, match="dat; they are data, root"):
        search.train_config(search.points()["Xception"], settings={"dat": "digits"})


def test_a_real_search_of_digits(tmp_path, monkeypatch, capsys):
    """Two trials of an epoch, the comparison on the test split, and the network for train.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "REPEATS", 2)
    arguments = "--data digits --trials 2 --max-epochs 1 --workers 2 --model nexception_pico --grow tp"
    arguments = [*arguments.split(), "--out", "my run"]
    assert search.main(arguments) == 0
    said = capsys.readouterr().out
    rows = search.rows_of(Path("my run"))
    assert {row["origin"] for row in rows} == {"NEXcepTion", "Xception"}
    (row,) = search.best_rows(rows, 1)
    info = row["info"]
    network = create_model(search.network_config(row["config"], "nexception_pico"), num_classes=10)
    assert info["parameters"] == sum(p.numel() for p in network.parameters())
    assert info["top1"] == pytest.approx(100 - 100 * row["cost"][0])
    assert len(info["losses"]) == 1 and 0 < info["losses"][0] < 5
    assert info["macs"] > 0 and info["training_images_per_second"] > 0 and info["peak_rss_mb"] > 100
    scored = read_json(Path("my run/final.json"))
    assert {search.repeat_name(config, 2) for config in search.points().values()} <= set(scored)
    assert {score["split"] for score in scored.values()} == {"test"} and "on the test split" in said
    found = re.search(r"json: 2\d M parameters\ntrain it in full: python (train.py .*)", said)
    script, *words = shlex.split(found[1])
    options = parse(TrainOptions, words, script)
    assert options.out == "my run/full"
    grown = create_model("my run/incumbent.json", num_classes=10)
    assert grown.config.layout == "pyramid" and grown.config.widths == MODELS["nexception_tp"].widths
    assert create_model(options.model).config.widths == grown.config.widths
    assert search.main(arguments) == 0  # nothing left to do: trains nothing again
    assert read_json(Path("my run/final.json")) == scored

"""search.py: the space, options, resuming, failures, the sampler, importance and report."""

import csv
import errno
import itertools
import json
import math
import os
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
from sklearn.ensemble import RandomForestRegressor
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
        job = SimpleNamespace(seed=1, time_limit=1)
        opened.finished = lambda found=(trial, job, outcome): [found]
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
        patch.setattr(search, "RANDOM_START", 40)  # no forest, which takes a second per trial
        told(start(out, 20), 20).journal.file.close()
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


def test_budgets_and_times():
    budgets = [search.check_budgets(*ends) for ends in ((1, 9), (5, 45), (4, 4))]
    assert budgets == [[1, 3, 9], [5, 15, 45], [4]]
    for lowest, highest, nearest in ((2, 53, "18 and 54"), (5, 14, "5 and 15"), (5, 4, "5 and 15")):
        with pytest.raises(UsageError, match=nearest):
            search.check_budgets(lowest, highest)
    texts = ("90s", "10m", "1.5h", "3d", "7")
    assert [search.seconds(text, "--walltime") for text in texts] == [90, 600, 5400, 259200, 7]
    assert [search.clock(s) for s in (4.24, 200, 600, 7400)] == ["4.2 s", "3:20", "10:00", "2:03:20"]


def test_defaults_depend_on_the_data(monkeypatch):
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
    assert [row["budget"] for row in given] == [9, 9]
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
    start(tmp_path, 3).journal.file.close()
    shutil.copy(interrupted / "trials.jsonl", tmp_path)
    (tmp_path / "search.json").unlink()
    with pytest.raises(UsageError, match=r"no readable search\.json"):
        start(tmp_path, 3)
    first = start(interrupted, 60)
    with pytest.raises(UsageError, match="another search is running"):
        start(interrupted, 60)
    assert f", running as process {os.getpid()}\n" in search.status_text(interrupted)
    first.journal.file.close()
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


@pytest.mark.parametrize("sampler", ["smac", "hyperband", "random"])
def test_a_resumed_search_asks_for_the_same_trials(sampler, tmp_path):
    """Equal to a search that never stopped; with the forest, only until it is first fitted."""
    trials = 15 if sampler == "smac" else 26  # two points, then the first bracket
    whole = told(start(tmp_path / "whole", 40, sampler=sampler), trials)
    parts = tmp_path / "parts"
    for count in (3, 4, 10, 14, trials):
        part = told(start(parts, 40, sampler=sampler), count)
        part.next_trial()  # it never finishes
        part.save()
        part.journal.file.close()
    kept = [(row["config"], row["budget"]) for row in search.rows_of(parts)]
    assert kept == [(row["config"], row["budget"]) for row in whole.rows]
    assert len({json.dumps(row["config"]) for row in whole.rows}) > 10
    assert ({row["budget"] for row in whole.rows} == {9}) == (sampler == "random")


def test_sigkill_loses_nothing(tmp_path):
    """One kill; `search_targets.py kill` runs the same with thirty."""
    result = targets.survive(tmp_path / "run", trials=20, workers=2, kills=1, seed=11)
    assert result["exit_status"] == 0
    assert result["finished"] == result["in_smac_run_folder"] == 20
    assert result["announced_and_lost"] == result["run_twice"] == result["still_running_there"] == 0
    assert result["incumbent"]


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


def test_a_second_signal_ends_at_once(tmp_path, monkeypatch):
    """SLURM's and the terminal's."""
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    opened, before = start(tmp_path / "run", 5), signal.getsignal(signal.SIGINT)
    with opened.signals():
        signal.raise_signal(signal.SIGUSR1)
        assert opened.signal == signal.SIGUSR1 and not exits
        signal.raise_signal(signal.SIGINT)
    assert exits == [130] and signal.getsignal(signal.SIGINT) == before


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
    opened.journal.append = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
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


def test_lost_dask_workers_are_reported_and_a_lost_cluster_is_one_sentence(tmp_path, capsys):
    """The scheduler dies during the search, so that cleaning up fails as well."""
    opened, lost = start(tmp_path / "run", 5, workers=1), Future()
    lost.set_exception(CancelledError("scheduler-connection-lost"))
    opened.client, opened.cluster = Mock(), {"tcp://b"}
    opened.client.get_executor.return_value.submit.return_value = lost
    opened.client.scheduler_info.return_value = {"workers": {}}
    opened.client.close.side_effect = OSError("cannot reach the scheduler")
    with pytest.raises(RunError, match=r"lost the Dask cluster.*scheduler-connection-lost.*repeat"):
        opened.run()
    assert opened.client.close.called
    assert "lost the Dask worker at tcp://b" in capsys.readouterr().out


def test_a_trial_ended_by_the_wall_time_is_not_recorded(tmp_path, capsys):
    opened = start(tmp_path / "run", None, targets.endless, walltime="2s", time_limit="1h", workers=1)
    with pytest.raises(RunError, match=r"no trial has succeeded after 9 epochs: .*--walltime 2s; .* 7m"):
        opened.run()
    assert opened.rows == [] and "runs again" in capsys.readouterr().out
    opened.journal.file.close()
    assert start(tmp_path / "run", 1, targets.endless).next_trial().origin == "NEXcepTion"


def test_the_comparison_trains_each_network_three_times_and_resumes(tmp_path, capsys, monkeypatch):
    """Resumed, it repeats nothing; each training has a seed of its own."""
    opened, path, jobs = start(tmp_path / "run", 1, workers=2), tmp_path / "run/final.json", []
    best = {**search.points()["NEXcepTion"], "kernel": "9"}
    tops = {"9": [71.0, 71.5, 72.0], "5": [70.5, 72.0, 71.0], "3": [60.0, 61.0, 60.5]}
    tops = {kernel: itertools.cycle(values) for kernel, values in tops.items()}

    def schedule(job, workers):
        kernel, future = job.config["kernel"], Future()
        jobs.append((kernel, job.seed))
        future.set_result({"status": "success", "info": {"top1": next(tops[kernel]), "split": split}})
        opened.signal = signal.SIGINT if len(jobs) == interrupt else 0
        return future

    monkeypatch.setattr(search, "schedule", schedule)
    split, interrupt = "test", 4
    opened.compare(best)
    assert len(read_json(path)) == len(jobs) == 4
    opened.signal, interrupt = 0, None
    opened.compare(best)
    assert len(set(jobs)) == len(jobs) == len(read_json(path)) == 9
    assert search.trial_seed(opened.settings, best) not in [seed for _, seed in jobs]
    said = capsys.readouterr().out
    assert "accuracy on the test split" in said and "71.50% ± 0.50 (3)" in said
    assert re.search(r"incumbent - NEXcepTion: \+0.33 points, not more than", said)
    assert "incumbent - Xception: +11.00 points, more than the noise between seeds" in said
    split, jobs[:] = "val", []
    path.unlink()
    opened.compare(search.points()["Xception"])
    assert len(jobs) == 6 and "accuracy on the validation split" in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
def test_the_comparison_names_the_best_without_nan_or_warnings(tmp_path):
    """Equal scores, scores without deviation, failures, and a damaged file."""
    papers, path = search.points(), tmp_path / "final.json"
    best = {**papers["NEXcepTion"], "kernel": "9"}

    def written(*top1s):
        scored = {}
        for config, top1 in zip((best, *papers.values()), top1s, strict=True):
            result = {"top1": top1, "split": "test"} if top1 else {"error": "diverged\nx"}
            scored |= {search.repeat_name(config, repeat): result for repeat in (1, 2, 3)}
        path.write_text(json.dumps(scored))
        return search.comparison(tmp_path, best)

    text, name = written(70.0, 70.0, 60.0)
    assert name == "incumbent" and "incumbent - NEXcepTion: equal\n" in text and "p < 0.001" in text
    text, name = written(70.0, 72.0, None)
    assert name == "NEXcepTion" and text.endswith("but NEXcepTion's choices")
    assert text.count("no result (0)  diverged  diverged  diverged") == 1
    for damage in ("[1, 2]", '{"a', "\udcff"):
        path.write_bytes(damage.encode("utf-8", "surrogateescape"))
        text, name = search.comparison(tmp_path, best)
        assert name == "incumbent" and text.count("no result (0)") == 3


# The sampler


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("sampler", ["smac", "hyperband", "random"])
def test_small_spaces_end_with_all_their_configurations_at_the_highest_budget(sampler, workers, tmp_path):
    """Failures are not repeated, nothing runs twice, and the search ends."""
    for values in (1, 2, 4):
        space = {"x": [str(i) for i in range(values)], "z": ["a", "b"]}

        def target(config, seed, budget, bad="0" if values > 1 else None):
            return 1.0 if config["x"] == bad else 0.1, {}

        _, trials = targets.play(tmp_path / str(values), sampler, space, workers=workers, target=target)
        had = [(trial.config["x"], trial.config["z"]) for trial in trials]
        assert sorted(had) == list(itertools.product(*space.values()))
        assert {trial.budget for trial in trials} == {9}


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
            trial = super().ask()  # as a mutation: two thirds of its choices are the best trial's
            kept = {
                n: v for n, v in (self.best or {"config": {}})["config"].items() if self.rng.random() < 2 / 3
            }
            return search.Trial(trial.config | kept, trial.budget, "child")

        def tell(self, trial, row):
            self.best = min(self.best or row, row, key=lambda row: row["cost"])

    monkeypatch.setitem(search.SAMPLERS, "evolution", Evolution)
    rows = told(start(tmp_path, 60, sampler="evolution"), 60).rows
    assert len({json.dumps(row["config"]) for row in rows}) == 60
    assert [row["origin"] for row in rows] == ["NEXcepTion", "Xception", *["child"] * 58]
    assert search.best_rows(rows, 9)[0]["cost"] == pytest.approx(
        [0.5 - 0.2 - 0.1 - 0.05 - 0.018]
    )  # the optimum
    assert not (tmp_path / "smac").exists()


def test_training_seeds_depend_on_configuration_and_search_seed(tmp_path, monkeypatch):
    seeds = {}
    for seed in (0, 1):
        opened = start(tmp_path / str(seed), 12, seed=seed)
        opened.devices *= 12
        seeds[seed] = {search.short(job.config): job.seed for job in jobs_of(opened, monkeypatch)}
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
    processes = [
        Popen([sys.executable, "-c", program], stdout=PIPE, text=True, env={**env, "PYTHONHASHSEED": seed})
        for seed in "12"
    ]
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


def test_a_search_that_finds_nothing_better_recommends_the_best_it_compared(tmp_path, monkeypatch, capsys):
    opened = told(start(tmp_path / "run", 6, sampler="random"), 6)
    opened.default_target, opened.compare = True, lambda incumbent: "Xception"
    opened.conclude()
    assert f"--model {tmp_path / 'run/xception.json'}" in capsys.readouterr().out
    expected = search.network_config(search.points()["Xception"], "nexception_nano")
    assert create_model(str(tmp_path / "run/xception.json")).config == expected


# Importance and report


def sampled(function, sizes, count=400, noise=0.0):
    """Return random codes (count, P) and their costs."""
    rng = np.random.default_rng(4)
    codes = rng.integers(0, sizes, (count, len(sizes)))
    return codes, np.array([function(*row) for row in codes]) + noise * rng.normal(size=count)


def test_importances_of_known_functions():
    """2a + b has variances 1 and 1/4, so 0.8 and 0.2; a xor b has no main effects."""
    sizes = [2, 2, 4]
    result = search.importances(*sampled(lambda a, b, c: 3 - 2 * a - b, sizes, noise=0.05), sizes)
    shares = [0.8, 0.2, 0]
    for kind, truth in {"local": shares, "fanova": shares, "improvement": [2 / 3, 1 / 3, 0]}.items():
        estimate, low, high, noise = result[kind]
        assert np.allclose(estimate, truth, atol=0.05), kind
        assert (low > noise).tolist() == [True, True, False], kind
        assert (low <= estimate).all() and (estimate <= high).all(), kind
    sizes = [2, 2, 3]
    result = search.importances(*sampled(lambda a, b, c: 1 - (a ^ b), sizes, noise=0.1), sizes)
    assert np.allclose(result["local"][0], [0.5, 0.5, 0], atol=0.03)
    assert np.allclose(result["fanova"][0], 0, atol=0.03)


def test_effects_by_their_definitions():
    """Written out for each configuration, with the trees' own predictions; DeepCAVE's formula."""
    sizes, table = [2, 3, 4], np.random.default_rng(1).normal(size=(2, 3, 4))
    codes, costs = sampled(lambda *at: table[at], sizes, 60, noise=0.3)
    best = codes[costs.argmin()]
    found = search.effects(codes, costs, sizes, best, trees=7)
    forest = RandomForestRegressor(7, max_features=5 / 6, random_state=0)
    forest.fit(search.one_hot(codes, sizes), costs)

    def predict(model, config):
        return model.predict(search.one_hot(np.array([config]), sizes))[0]

    def around(model, i):
        return [predict(model, [*best[:i], k, *best[i + 1 :]]) for k in range(sizes[i])]

    local, main = [], []
    for tree in forest.estimators_:
        every = {config: predict(tree, config) for config in itertools.product(*map(range, sizes))}
        spread = [np.var(around(tree, i)) for i in range(3)]
        local.append(np.array(spread) / sum(spread))
        marginals = [
            [np.mean([y for config, y in every.items() if config[i] == k]) for k in range(n)]
            for i, n in enumerate(sizes)
        ]
        main.append([np.var(means) / np.var(list(every.values())) for means in marginals])
    assert np.allclose(found[:2], [np.mean(local, axis=0), np.mean(main, axis=0)])
    least, default = predict(forest, best), predict(forest, [0, 0, 0])
    others = [np.mean(np.delete(around(forest, i), best[i])) for i in range(3)]
    assert np.allclose(found[2], (np.array(others) - least) / (default - least))


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
    for name in ("progress.png", "importance.png"):
        assert f"]({name})" in page and (out / name).read_bytes().startswith(b"\x89PNG")
    table = list(csv.DictReader((out / "trials.csv").open()))
    assert len(table) == 60
    assert [row["kernel"] for row in table] == [row["config"]["kernel"] for row in rows]
    assert [float(row["budget"]) for row in table] == [row["budget"] for row in rows]


def test_the_report_of_a_random_search_maps_the_space(tmp_path):
    """Made-up trials, whose accuracy depends on the kernel."""
    rng, rows = np.random.default_rng(0), []
    settings = start(tmp_path, 1, sampler="random").settings
    drawn = search.configspace(seed=8).sample_configuration(60)
    origins = [*search.points(), *["random"] * 60]
    for origin, config in zip(origins, (*search.points().values(), *drawn), strict=True):
        config = {name: str(value) for name, value in config.items()}
        top1 = 50 + 10 * settings["space"]["kernel"].index(config["kernel"]) + rng.uniform()
        row = {"config": config, "budget": 9.0, "status": "success", "cost": [1 - top1 / 100], "seed": 1}
        row |= {"origin": origin, "start": 0, "end": 1, "elapsed": len(rows)}
        rows.append(row | {"info": {}})
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = search.report(tmp_path).read_text()
    tops = [100 - 100 * row["cost"][0] for row in rows[2:]]
    marks = ", ".join(f"{np.quantile(tops, q):.2f}%" for q in (0.1, 0.5, 0.9))
    assert f"60 random configurations; 10% quantile, median and 90% quantile: {marks}" in page
    place = 100 * np.mean(np.array(tops) < 100 - 100 * rows[0]["cost"][0])
    assert f"more than {place:.0f}% of" in page
    assert (tmp_path / "marginals.png").read_bytes().startswith(b"\x89PNG") and "](marginals.png)" in page


# Real folders and trainings


def test_all_trials_use_the_precision_recorded_at_the_start(tmp_path, monkeypatch):
    """Also on a machine that would choose another."""
    opened = start(tmp_path / "run", 2, search.train_config, device="cpu")
    told(opened, 1).journal.file.close()
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
    opened.journal.file.close()
    (tmp_path / "photos").rename("elsewhere")
    opened = start(**options, data="./elsewhere/", min_epochs=1, max_epochs=1, workers=1)
    (job,) = jobs_of(opened, monkeypatch)
    usual = search.trial_options(job.settings, 1, 0, torch.device("cpu"))
    assert usual.lr == RECIPES["small-folder"].values["lr"] and usual.data == "./elsewhere/"
    opened.journal.file.close()
    (tmp_path / "elsewhere/val/bee/0.png").unlink()
    with pytest.raises(UsageError, match=r"another search \(images val was 8, is now 7\)"):
        start(**options, data="elsewhere", min_epochs=1, max_epochs=1)


@pytest.mark.parametrize(
    ("facade", "budgets"),
    [
        (HyperparameterOptimizationFacade, {}),
        (RandomFacade, {}),
        (MultiFidelityFacade, {"min_budget": 0.3, "max_budget": 1}),
    ],
)
def test_the_target_works_for_every_facade_and_for_an_activation_added_at_run_time(
    facade, budgets, monkeypatch, tmp_path
):
    """Some pass no budget; at least one epoch is trained."""
    monkeypatch.setattr(data, "CLUTTER_EPOCH", 64)
    monkeypatch.setattr(data, "CLUTTER_HELD_OUT", 100)
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
    assert len(outcome.additional_info["losses"]) == (1 if budgets else 9)


def test_unknown_settings_of_a_trial_are_refused_by_name():
    with pytest.raises(UsageError, match="dat; they are data, root"):
        search.train_config(search.points()["Xception"], settings={"dat": "digits"})


def test_a_real_search_of_digits(tmp_path, monkeypatch, capsys):
    """Two trials of an epoch, the comparison on the test split, and the network for train.py."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", "digits", "--trials", "2", "--max-epochs", "1", "--workers", "2"]
    arguments += ["--model", "nexception_pico"]
    arguments += ["--grow", "tp", "--out", "my run"]
    assert search.main(arguments) == 0
    said = capsys.readouterr().out
    rows = search.rows_of(Path("my run"))
    assert {row["origin"] for row in rows} == {"NEXcepTion", "Xception"}
    row = search.best_rows(rows, 1)[0]
    info = row["info"]
    network = create_model(search.network_config(row["config"], "nexception_pico"), num_classes=10)
    assert info["parameters"] == sum(p.numel() for p in network.parameters())
    assert info["top1"] == pytest.approx(100 - 100 * row["cost"][0])
    assert len(info["losses"]) == 1 and 0 < info["losses"][0] < 5
    assert info["macs"] > 0 and info["training_images_per_second"] > 0 and info["peak_rss_mb"] > 100
    scored = read_json(Path("my run/final.json"))
    assert {search.repeat_name(config, 2) for config in search.points().values()} <= set(scored)
    assert {score["split"] for score in scored.values()} == {"test"} and "on the test split" in said
    command = shlex.split(said[said.index("train it in full: ") :].splitlines()[0])[5:]
    options = parse(TrainOptions, command[1:], command[0])
    assert options.out == "my run/full" and "parameters for images of 32 pixels" in said
    grown = create_model("my run/incumbent.json", num_classes=10)
    assert grown.config.layout == "pyramid" and grown.config.widths == MODELS["nexception_tp"].widths
    assert create_model(options.model).config.widths == grown.config.widths
    assert search.main(arguments) == 0  # nothing left to do: trains nothing again
    assert read_json(Path("my run/final.json")) == scored

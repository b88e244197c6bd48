"""search.py: the space, budgets, what survives, what is recorded, what is explained."""

import json
import math
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import search_targets as targets
import torch
from ConfigSpace import ConfigurationSpace
from distributed import LocalCluster
from smac.runhistory import TrialValue
from smac.runhistory.runhistory import RunHistory

import search
from model import MODELS, create_model
from search import POINTS, SPACE, Options, Search, UsageError
from train import Lamb, RunError, bce_loss


def run(out, trials, target=targets.formula, **options):
    """A search in this process, to its end; its exit status and rows."""
    status = Search(Options(out=str(out), trials=trials, **options), target=target).run()
    return status, search.rows_of(Path(out))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished search of 60 trials by two workers."""
    out = tmp_path_factory.mktemp("search") / "run"
    status, rows = run(out, 60, workers=2)
    assert status == 0
    return out, rows


# The space


def test_the_space_has_the_papers_61440_configurations():
    assert math.prod(len(values) for values in SPACE.values()) == 61_440
    assert search.configspace().estimate_size() == 61_440
    assert len(np.unique(search.every_point([len(v) for v in SPACE.values()]), axis=0)) == 61_440


def test_nexcepiton_and_xception_are_points_of_the_space():
    t, x = MODELS["nexception_t"], MODELS["xception"]
    assert search.model_config(POINTS["NEXcepTion"], "nexception_t") == t
    assert search.model_config(POINTS["Xception"], "xception") == x


def test_every_choice_reaches_the_network():
    """Each value gives another ModelConfig, and all choices are ModelConfig's."""
    first = {name: values[0] for name, values in SPACE.items()}
    for name, values in SPACE.items():
        networks = {search.model_config({**first, name: value}, "nexception_nano") for value in values}
        assert len(networks) == len(values)


@pytest.mark.parametrize("seed", range(8))
def test_random_configurations_train_a_step(seed):
    config = search.configspace(seed=seed).sample_configuration()
    network = create_model(search.model_config(dict(config), "nexception_nano"), num_classes=10)
    optimizer = Lamb(network.parameters(), lr=1e-3)
    before = [p.clone() for p in network.parameters()]
    loss = bce_loss(network(torch.randn(4, 3, 32, 32)), torch.eye(10)[:4], 0.2)
    loss.backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in network.parameters())
    assert any((a != b).any() for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize("size", ["t", "s", "tp"])
def test_any_configuration_grows_to_the_full_networks(size):
    for config in search.configspace(seed=1).sample_configuration(20):
        grown = search.model_config(dict(config), f"nexception_{size}")
        with torch.device("meta"):
            create_model(grown)
        assert grown.widths == MODELS[f"nexception_{size}"].widths


def test_short_names_differ(tmp_path):
    configs = search.configspace(seed=2).sample_configuration(500)
    assert len({search.short(dict(c)) for c in configs}) == len({tuple(c.values()) for c in configs})


# Budgets and options


@pytest.mark.parametrize(
    ("lowest", "highest", "budgets"), [(1, 9, [1, 3, 9]), (5, 45, [5, 15, 45]), (4, 4, [4])]
)
def test_budgets_are_whole_epochs(lowest, highest, budgets):
    assert search.check_budgets(lowest, highest) == budgets


@pytest.mark.parametrize(
    ("lowest", "highest", "nearest"), [(1, 10, "9 and 27"), (2, 53, "18 and 54"), (5, 14, "5 and 15")]
)
def test_other_budgets_are_refused_with_the_nearest(lowest, highest, nearest):
    with pytest.raises(UsageError, match=nearest):
        search.check_budgets(lowest, highest)


@pytest.mark.parametrize("power", range(8))
@pytest.mark.parametrize("lowest", [1, 2, 5, 7])
def test_hyperband_gets_exactly_these_budgets(lowest, power):
    """SMAC's own floor(log(243) / log(3)) is 4."""
    highest = lowest * 3**power
    rounds = search.ExactHyperband._get_max_iterations(3, highest, lowest)
    stages, _ = search.ExactHyperband._compute_configs_and_budgets_for_stages(3, highest, rounds)
    assert [round(b) for b in stages] == search.check_budgets(lowest, highest)
    assert np.allclose(stages, np.round(stages), rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("3d", 259200), ("7", 7)]
)
def test_times(text, value):
    assert search.seconds(text) == value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-epochs", "10"], "9 and 27"),
        (["--walltime", "soon"], "90s, 10m, 12h or 3d"),
        (["--objectives", "macs"], "accuracy first"),
        (["--objectives", "accuracy,beauty"], "throughput, macs, parameters"),
        (["--model", "resnet"], "none of"),
        (["--workers", "-1"], "at least 1"),
        (["--trials", "-3"], "at least 1"),
        (["--tirals", "3"], "unrecognized"),
        (["--data", "nowhere"], "no folder"),
        (["--device", "cuda"], "no GPU") if not torch.cuda.is_available() else (["--model", "x"], "none of"),
        (["--scheduler", "tcp://127.0.0.1:9"], "no Dask scheduler"),
        (["importance"], "importance RUN"),
        (["report", "nowhere"], "no search's run folder"),
    ],
)
def test_mistakes_are_one_sentence_and_status_2(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "SCHEDULER_PATIENCE", 1)
    assert search.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1


# What a search keeps


def test_a_search_ends_with_what_was_asked_for(finished):
    _, rows = finished
    assert len(rows) == 60
    assert {row["budget"] for row in rows} == {1.0, 3.0, 9.0}
    assert len({(json.dumps(row["config"]), row["budget"]) for row in rows}) == 60
    first = [row["config"] for row in rows if row["origin"] == "prior" and row["budget"] == 1]
    assert len(first) == 2 and all(point in first for point in POINTS.values())


def test_it_finds_the_best_block_and_kernel(finished):
    out, rows = finished
    best = json.loads((out / "incumbent.json").read_text())
    assert best["block"] == "bottleneck" and best["kernel"] in (5, 7)
    late = [row["config"]["block"] for row in rows if row["origin"] == "expected improvement"]
    assert late.count("bottleneck") > 0.7 * len(late)


def test_the_incumbent_ran_the_highest_budget_and_is_smacs_too(finished):
    out, rows = finished
    best = search.best_rows(rows, 9)[0]
    assert best["cost"] == min(row["cost"] for row in rows if row["budget"] == 9)
    intensifier = json.loads((out / "smac/0/intensifier.json").read_text())
    history = json.loads((out / "smac/0/runhistory.json").read_text())
    smacs = history["configs"][str(intensifier["incumbent_ids"][0])]
    costs = {json.dumps(row["config"], sort_keys=True): row["cost"] for row in rows if row["budget"] == 9}
    assert costs[json.dumps(smacs, sort_keys=True)] == best["cost"]


def test_the_folder_is_a_smac3_run_folder(finished):
    out, rows = finished
    folder = out / "smac/0"
    history = RunHistory()
    history.load(folder / "runhistory.json", ConfigurationSpace.from_json(folder / "configspace.json"))
    assert history.finished == len(history) == 60 and history.running == 0
    assert sorted(value.cost for value in history.values()) == sorted(row["cost"][0] for row in rows)
    for name in ("scenario.json", "intensifier.json", "optimization.json"):
        json.loads((folder / name).read_text())


def test_values_told_to_the_target_are_plain(finished):
    """Strings, not numpy's; one seed that is not the scenario's."""
    _, rows = finished
    assert len({row["info"]["seed"] for row in rows}) == 1
    assert {type(v) for row in rows for v in row["config"].values()} == {str}


def test_trials_grow_and_finished_ones_stay(finished, tmp_path, capsys):
    out, rows = finished
    status, grown = run(out, 63)
    assert status == 0 and grown[:60] == rows and len(grown) == 63
    assert "going on" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changed",
    [
        {"max_epochs": 27},
        {"data": "cifar10"},
        {"seed": 5},
        {"objectives": "accuracy,macs"},
        {"priors": False},
    ],
)
def test_a_changed_search_on_the_same_folder_is_an_error(finished, changed):
    options = {"out": str(finished[0]), "trials": 60, "min_epochs": 1, "max_epochs": 9, **changed}
    with pytest.raises(UsageError, match="holds another search"):
        Search(Options(**options), target=targets.formula)


def test_a_changed_space_is_an_error(finished):
    space = {**SPACE, "kernel": ("3", "5")}
    with pytest.raises(UsageError, match="space was"):
        Search(Options(out=str(finished[0]), trials=60), choices=space, target=targets.formula)


def test_a_folder_of_something_else_is_an_error(tmp_path):
    (tmp_path / "last.pt").touch()
    with pytest.raises(UsageError, match="no search's"):
        Search(Options(out=str(tmp_path), trials=3), target=targets.formula)


def test_two_searches_do_not_share_a_folder(finished):
    first = Search(Options(out=str(finished[0]), trials=60), target=targets.formula)
    with pytest.raises(UsageError, match="another search is running"):
        Search(Options(out=str(finished[0]), trials=60), target=targets.formula)
    first.journal.file.close()


# What survives


def damage_journal(out):
    path = out / "trials.jsonl"
    path.write_bytes(path.read_bytes() + b'{"config": {"stem": "conv", "ker')


def damage_state(out):
    path = out / "state.json"
    path.write_bytes(path.read_bytes()[:50])


def damage_smac(out):
    path = out / "smac/0/runhistory.json"
    path.write_bytes(path.read_bytes()[:500])
    (out / "smac/0/intensifier.json").unlink()


def forget_state(out):
    (out / "state.json").unlink()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A search that stopped after 20 trials, amid its second round of brackets."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    run(out, 20)
    return out


@pytest.mark.parametrize("damage", [damage_journal, damage_state, damage_smac, forget_state])
def test_damage_is_repaired(damage, interrupted, tmp_path):
    out = tmp_path / "run"
    subprocess.run(["cp", "-r", str(interrupted), str(out)], check=True)
    before = search.rows_of(interrupted)
    damage(out)
    opened = Search(Options(out=str(out), trials=30), target=targets.formula)
    assert opened.rows == before
    assert len(opened.smac.runhistory) == 20 and opened.smac.runhistory.running == 0
    told(opened, 30)
    rows = search.rows_of(out)
    assert rows[:20] == before and len(rows) == 30
    assert len({(json.dumps(row["config"]), row["budget"]) for row in rows}) == 30


def told(opened, trials):
    """Run a search's next trials in this process."""
    while len(opened.rows) < trials:
        trial = opened.smac.ask()
        opened.save()
        cost, info = targets.formula(trial.config, trial.seed, trial.budget)
        now = time.time()
        outcome = {"status": "success", "cost": [cost], "info": info, "start": now, "end": now}
        opened.finished = lambda trial=trial, outcome=outcome: [(trial, outcome)]
        opened.collect()


def test_brackets_go_on_where_they_stood(interrupted, tmp_path):
    """A search taken up again asks for the same trials as one that never stopped."""
    whole = Search(Options(out=str(tmp_path / "whole"), trials=40), target=targets.formula)
    told(whole, 25)
    parts = tmp_path / "parts"
    for trials in (3, 4, 10, 15, 20):
        part = Search(Options(out=str(parts), trials=40), target=targets.formula)
        told(part, trials)
        part.smac.ask()  # asked for, and never heard of again
        part.save()
        part.journal.file.close()
    same = [row["config"] for row in whole.rows[:20]]
    assert [row["config"] for row in search.rows_of(parts)] == same


def test_sigkill_loses_nothing(tmp_path):
    """The short version of `search_targets.py kill`, which does it thirty times."""
    result = targets.survive(tmp_path / "run", trials=40, workers=2, kills=2, seed=1)
    assert result["exit_status"] == 0
    assert result["finished"] == result["in_smac_run_folder"] == 40
    assert result["announced_and_lost"] == result["run_twice"] == result["still_running_there"] == 0
    assert result["incumbent"]


def test_ctrl_c_ends_with_the_incumbent(tmp_path):
    process = targets.start(tmp_path / "run", 1000, 2)
    lines = [process.stdout.readline() for _ in range(25)]
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    announced = sum(bool(targets.finished_line(line)) for line in [*lines, *rest.splitlines()])
    assert process.returncode == 130
    assert "incumbent: " in rest and "goes on from" in rest
    assert announced == len(search.rows_of(tmp_path / "run"))


def test_every_failure_is_recorded_and_the_search_goes_on(tmp_path):
    space = {"kernel": SPACE["kernel"], "block": SPACE["block"], "norm_positions": ("1", "2")}
    options = Options(out=str(tmp_path / "run"), trials=20, time_limit="4s", memory_limit=1.2, workers=2)
    options = replace(options, max_epochs=1)
    opened = Search(options, choices=space, target=targets.moody)
    assert opened.run() == 0
    rows = search.rows_of(tmp_path / "run")
    assert len(rows) == 20  # every configuration of this space
    expected = {"3": "crashed", "5": "crashed", "7": "crashed", "9": "memoryout", "mixed": "timeout"}
    for row in rows:
        config = row["config"]
        failed = config["block"] == "xception"
        assert row["status"] == (expected[config["kernel"]] if failed else "success"), row
        assert row["cost"] == [1.0] if failed else row["cost"][0] < 0.5
    errors = {row["config"]["kernel"]: row["info"].get("error") for row in rows if row["status"] != "success"}
    assert "diverged" in errors["3"] and "wants out" in errors["5"] and "status 7" in errors["7"]
    assert "memory limit" in errors["9"] and "time limit" in errors["mixed"]


def test_a_search_whose_first_trials_all_fail_stops_with_the_first_error(tmp_path):
    opened = Search(Options(out=str(tmp_path / "run"), trials=50), target=targets.broken)
    with pytest.raises(RunError, match=r"first 5 trials all failed.*\n(.*\n)*.*data set is not where"):
        opened.run()
    assert len(search.rows_of(tmp_path / "run")) == 5
    opened.journal.file.close()
    again = Search(Options(out=str(tmp_path / "run"), trials=50), target=targets.broken)
    assert again.rows == [] and (tmp_path / "run/failed.jsonl").exists()


def test_a_dask_cluster_that_exists_runs_trials_that_fork_loader_workers(tmp_path):
    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, protocol="tcp", dashboard_address="127.0.0.1:0"
    ) as cluster:
        status, rows = run(
            tmp_path / "run", 6, targets.loading, workers=2, scheduler=cluster.scheduler_address
        )
    assert status == 0 and [row["status"] for row in rows] == ["success"] * 6


# How it proposes


def proposals(seed: int, hashes: str) -> str:
    program = (
        "import json, sys, tempfile, pathlib, search, search_targets\n"
        "from smac.runhistory import TrialValue\n"
        "settings = dict(space=search.SPACE, seed=int(sys.argv[1]), objectives=['accuracy'], priors=[])\n"
        "settings['budgets'] = [1, 3, 9]\n"
        "smac = search.build_smac(pathlib.Path(tempfile.mkdtemp()), settings, [1.0])\n"
        "search.replay(smac, [], {})\n"
        "for _ in range(60):\n"
        "    trial = smac.ask()\n"
        "    cost, _ = search_targets.formula(trial.config, trial.seed, trial.budget)\n"
        "    smac.tell(trial, TrialValue(cost=cost), save=False)\n"
        "    print(search.short(dict(trial.config)), trial.budget)\n"
    )
    environment = {
        "PYTHONHASHSEED": hashes,
        "PYTHONPATH": f"{targets.REPOSITORY}:{targets.REPOSITORY / 'tests'}",
    }
    command = [sys.executable, "-c", program, str(seed)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_searches_repeat_whatever_the_hash_seed():
    first = proposals(3, "1")
    assert len(set(first.splitlines())) == 60
    assert first == proposals(3, "2")


def test_the_forest_sees_no_order_in_choices():
    """A cost that jumps up and down along the integer codes: exact in one split of indicator columns."""
    space = search.configspace({"a": tuple("stuvwxyz"), "b": ("n", "y")})
    codes = search.every_point([8, 2]).astype(float)
    forest = search.OneHotForest(space, seed=0)
    cost = (codes[:, 0] == 3).astype(float) + 0.1 * codes[:, 1]
    mean, _ = forest.train(np.repeat(codes, 4, 0), np.repeat(cost, 4)[:, None]).predict(codes)
    assert np.abs(mean[:, 0] - cost).max() < 0.05
    assert forest._rf.n_features_in_ == 10


def test_a_batch_is_not_one_idea_in_variations(tmp_path):
    settings = {"space": SPACE, "seed": 0, "objectives": ["accuracy"], "budgets": [9], "priors": []}
    smac = search.build_smac(tmp_path, settings, [1.0])
    search.replay(smac, [], {})
    for _ in range(30):
        trial = smac.ask()
        smac.tell(trial, TrialValue(cost=targets.formula(trial.config, 0, 9)[0]), save=False)
    maximizer = smac._acquisition_maximizer
    batch = []
    for _ in range(5):
        config = maximizer._maximize([], 1)[0][1]
        batch.append(config.get_array())
        smac._config_selector._processed_configs.append(config)
    distances = [(a != b).sum() for i, a in enumerate(batch) for b in batch[:i]]
    assert min(distances) >= maximizer.DISTANCE


def test_two_objectives_end_with_the_pareto_front(tmp_path):
    status, rows = run(tmp_path / "run", 40, targets.two_costs, objectives="accuracy,throughput", workers=2)
    assert status == 0 and len(rows) == 40
    front = search.best_rows(rows, 9)
    done = [row["cost"] for row in rows if row["budget"] == 9]
    for row in front:
        assert not any(a[0] < row["cost"][0] and a[1] < row["cost"][1] for a in done)
    assert {row["config"]["block"] for row in front} == {"bottleneck"}
    assert len(front) > 1
    assert "Pareto front" in (tmp_path / "run/report.html").read_text()


# Importance


def sampled(function, sizes, count=400, seed=0):
    codes = np.random.default_rng(seed).integers(0, sizes, (count, len(sizes)))
    return codes, np.array([function(*row) for row in codes], dtype=float)


def test_importances_of_a_sum():
    """cost = 2a + b: variances over the domains are 1 and 1/4, so 0.8 and 0.2 both ways; c weighs nothing."""
    sizes = [2, 2, 4]
    result = search.importances(*sampled(lambda a, b, c: 2 * a + b, sizes), sizes)
    for kind in ("lpi", "fanova"):
        assert result[kind].shape == (search.TREES, 3)
        assert np.allclose(result[kind].mean(0), [0.8, 0.2, 0.0], atol=0.02), kind
    assert np.allclose(result["lpi"].sum(1), 1)


def test_importances_of_an_interaction():
    """cost = a xor b has no main effects; around any incumbent both choices matter alike."""
    sizes = [2, 2, 3]
    result = search.importances(*sampled(lambda a, b, c: a ^ b, sizes), sizes)
    assert np.allclose(result["lpi"].mean(0), [0.5, 0.5, 0.0], atol=0.03)
    assert np.allclose(result["fanova"].mean(0), 0.0, atol=0.03)


def test_lpi_is_local():
    """cost = a (1 + 2b), incumbent at a = 0: b moves nothing there, though it does elsewhere."""
    sizes = [2, 2]
    codes, costs = sampled(lambda a, b: a * (1 + 2 * b), sizes)
    result = search.importances(codes, costs, sizes)
    b = codes[np.argmin(costs), 1]
    assert np.allclose(result["lpi"].mean(0), [1, 0], atol=0.02)
    # Marginal means: of a 0 and 2, of b 1/2 and 3/2; all costs 0, 0, 1, 3.
    assert np.allclose(result["fanova"].mean(0), [1 / 1.5, 0.25 / 1.5], atol=0.05), b


def test_importance_of_a_run(finished, tmp_path):
    """Two hundred random trials show both effects; those of a search with two workers differ every time."""
    out, rows = finished
    found = search.importance(out)
    assert set(found) <= {1, 3, 9} and 1 in found
    template = next(row for row in rows if row["status"] == "success" and row["budget"] == 1)
    drawn = [dict(config) for config in search.configspace(seed=0).sample_configuration(200)]
    known = [{**template, "config": config, "cost": [targets.formula(config, 0, 1)[0]]} for config in drawn]
    (tmp_path / "search.json").write_bytes((out / "search.json").read_bytes())
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(row, default=str) + "\n" for row in known))
    lpi = {name: mean for name, (mean, _) in search.importance(tmp_path)[1]["lpi"].items()}
    assert sorted(lpi, key=lpi.get)[-2:] == ["kernel", "block"]
    assert (out / "importance.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "importance.json").read_text())["1"]["trials"] >= 18


def test_importance_leaves_failures_out(finished, tmp_path):
    """A thousand crashes of one block change nothing."""
    out, rows = finished
    expected = search.importance(out)
    crash = {"status": "crashed", "cost": [1.0], "info": {"error": "x"}}
    crashes = [{**row, **crash} for row in rows] * 20
    (tmp_path / "search.json").write_bytes((out / "search.json").read_bytes())
    lines = [json.dumps(row) for row in random.Random(0).sample(crashes, len(crashes)) + search.rows_of(out)]
    (tmp_path / "trials.jsonl").write_text("\n".join(lines) + "\n")
    assert search.importance(tmp_path) == expected


def test_importance_of_too_few_trials_is_refused(interrupted):
    with pytest.raises(UsageError, match=r"too few successful trials.*needs 18"):
        search.importance(interrupted)


def test_the_report_says_what_was_found(finished, capsys):
    out, _ = finished
    assert search.main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert page.count("<tr>") == 11  # a head and the ten best
    assert page.count("data:image/png;base64,") == 2
    assert "bottleneck blocks" in page and "60 success" in page.replace("63", "60")


# The real thing


def test_a_real_search_of_digits(tmp_path, monkeypatch, capsys):
    """One trial of an epoch; incumbent and both known points on the test split; the network for train.py."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--trials", "1", "--max-epochs", "1", "--workers", "2", "--out", "run", "--grow", "tp"]
    assert search.main(arguments) == 0
    said = capsys.readouterr().out
    rows = search.rows_of(Path("run"))
    assert [row["status"] for row in rows] == ["success"]
    for row in rows:
        info = row["info"]
        network = create_model(search.model_config(row["config"], "nexception_nano"), num_classes=10)
        assert info["parameters"] == sum(p.numel() for p in network.parameters())
        assert info["top1"] == pytest.approx(100 - 100 * row["cost"][0])
        assert info["curve"][-1][1] == pytest.approx(info["top1"], abs=0.01)
        assert info["macs"] > 0 and info["training_images_per_second"] > 0 and info["peak_rss_mb"] > 100
    scored = json.loads(Path("run/final.json").read_text())
    assert {search.short(config) for config in POINTS.values()} <= set(scored)
    assert "python train.py --data digits --model run/incumbent.json" in said
    grown = create_model("run/incumbent.json", num_classes=10)
    assert grown.config.layout == "pyramid" and grown.config.widths == MODELS["nexception_tp"].widths
    assert search.main(arguments) == 0  # nothing is left to do, and nothing is done twice
    assert json.loads(Path("run/final.json").read_text()) == scored

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import pytest
import yaml
from kfp import components
from mlflow import MlflowClient
from mlflow.entities import Run

from pipelines.sweep import differing_values, sweep_pipeline
from shike_core.config import EvaluateConfig, SubsetConfig, TrainConfig
from shike_core.recipes import cifar100_lt, digits_lt, variant

ROOT = Path(__file__).parents[2]
BASE = digits_lt()
TRAIN_FIELDS = {field.name for field in fields(TrainConfig)}
NAMES = ["digits-lt", "digits-lt/no-dkt", "digits-lt/crt"]

# --- compiled for a cluster ------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """What the command line writes."""
    path = tmp_path_factory.mktemp("sweep") / "new" / "sweep.yaml"
    command = [sys.executable, "-m", "pipelines.sweep", "--output", str(path)]
    command += ["--variants", "no-dkt", "crt", "--seeds", "3", "4", "--imbalance-factors", "20"]
    command += ["100", "--parallelism", "2", "--registry", "registry.example", "--tag", "0123abc"]
    command += ["--data-pvc", "images", "--checkpoint-pvc", "kept", "--gpu-type", "amd.com/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    return path


@pytest.fixture(scope="module")
def documents(path) -> tuple[dict, dict]:
    specification, platform = yaml.safe_load_all(path.read_text())
    return specification, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


@pytest.fixture(scope="module")
def specification(documents) -> dict:
    return documents[0]


@pytest.fixture(scope="module")
def tasks(specification) -> dict[str, dict]:
    """Every task by its name, whichever loop it is in."""

    def inside(dag: dict) -> Iterator[tuple[str, dict]]:
        for name, task in dag["tasks"].items():
            yield name, task
            component = specification["components"][task["componentRef"]["name"]]
            yield from inside(component.get("dag", {"tasks": {}}))

    return dict(inside(specification["root"]["dag"]))


def tasks_in(specification: dict, component: str) -> set[str]:
    return set(specification["components"][component]["dag"]["tasks"])


def test_seeds_and_imbalance_factors_are_parameters_with_descriptions(specification):
    parameters = specification["root"]["inputDefinitions"]["parameters"]
    defaults = {
        name: parameter["defaultValue"]
        for name, parameter in parameters.items()
        if not name.startswith("cluster_")
    }
    assert defaults == {
        "step1_data_dir": "/data",
        "step1_shards_dir": "",
        "step2_checkpoint_dir": "/checkpoints",
        "step4_max_accuracy_drop": 0.0,
        "step4_max_few_shot_drop": 0.0,
        "step4_max_many_shot_drop": 1.0,
        "step4_max_medium_shot_drop": 1.0,
        "step4_metric": "accuracy",
        "step4_min_accuracy": 0.0,
        "step4_min_few_shot_accuracy": 0.0,
        "step4_model_name": "shike-digits-lt",
        "sweep_imbalance_factors": [20.0, 100.0],
        "sweep_seeds": [3, 4],
        "sweep_validation_per_class": 10,
    }
    assert all(len(parameter["description"]) >= 15 for parameter in parameters.values())
    assert parameters["cluster_gpu_type"]["defaultValue"] == "amd.com/gpu"


def test_the_loops_stand_in_each_other_and_limit_the_trainings_at_the_same_time(
    specification, tasks
):
    outer, inner = "for-loop-2", "for-loop-3"
    assert tasks_in(specification, "comp-exit-handler-1") == {
        "preflight", outer, "summarise-sweep", "register-best",
    }  # fmt: skip
    assert tasks_in(specification, f"comp-{outer}") == {"build-subset", inner}
    trainings = {f"{step}{n}" for step in ("train", "evaluate") for n in ("", "-2", "-3")}
    assert tasks_in(specification, f"comp-{inner}") == trainings
    limits = [tasks[loop]["iteratorPolicy"]["parallelismLimit"] for loop in (outer, inner)]
    assert limits == [1, 2]
    looped = [
        tasks[loop]["parameterIterator"]["items"]["inputParameter"] for loop in (outer, inner)
    ]
    assert looped == ["pipelinechannel--sweep_imbalance_factors", "pipelinechannel--sweep_seeds"]


def test_one_training_follows_the_other_and_the_summary_all_of_them(tasks):
    depends_on = {name: task.get("dependentTasks", []) for name, task in tasks.items()}
    assert depends_on["for-loop-2"] == ["preflight"]
    assert depends_on["for-loop-3"] == ["build-subset"]
    chain = ["train", "evaluate", "train-2", "evaluate-2", "train-3", "evaluate-3"]
    for before, after in pairwise(chain):
        assert before in depends_on[after]
    assert depends_on["summarise-sweep"] == ["for-loop-2"]
    assert depends_on["register-best"] == ["summarise-sweep"]


def test_the_last_step_closes_the_runs_whatever_happened(tasks):
    assert tasks["close-runs"]["dependentTasks"] == ["exit-handler-1"]
    assert tasks["close-runs"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"


def test_what_is_computed_is_cached_and_what_is_logged_is_not(tasks):
    cached = {
        name for name, task in tasks.items() if task.get("cachingOptions", {}).get("enableCache")
    }
    assert cached == {"build-subset", "train", "train-2", "train-3"}


def test_each_training_has_the_values_of_its_recipe(tasks):
    for i, recipe in enumerate((BASE, variant(BASE, "no-dkt"), variant(BASE, "crt"))):
        task = tasks["train" if i == 0 else f"train-{i + 1}"]
        assert task["taskInfo"]["name"] == f"train {recipe.name}"
        given = {
            name: source["runtimeValue"]["constant"]
            for name, source in task["inputs"]["parameters"].items()
            if "runtimeValue" in source and name in TRAIN_FIELDS
        }
        expected = {name: getattr(recipe.train, name) for name in TRAIN_FIELDS - {"seed"}}
        assert given == expected | {"device": "cuda"}
        seed = task["inputs"]["parameters"]["seed"]["componentInputParameter"]
        assert seed == "pipelinechannel--sweep_seeds-loop-item"


def test_subset_and_evaluation_have_all_their_values(tasks):
    for task, config in (("build-subset", SubsetConfig), ("evaluate-2", EvaluateConfig)):
        assert {x.name for x in fields(config)} <= set(tasks[task]["inputs"]["parameters"])


def test_the_summary_is_told_the_recipes_in_their_order(tasks):
    given = tasks["summarise-sweep"]["inputs"]["parameters"]["recipes"]
    recipes = given["runtimeValue"]["constant"]
    assert [recipe["name"] for recipe in recipes] == NAMES
    assert [recipe["values"]["dkt_weight"] for recipe in recipes] == [1.0, 0.0, 0.0]


def test_every_image_has_the_given_registry_and_tag(specification):
    kinds = {
        name.removeprefix("exec-"): executor["container"]["image"]
        for name, executor in specification["deploymentSpec"]["executors"].items()
    }
    assert kinds == {
        task: f"registry.example/shike-python-{image}:0123abc"
        for image, names in {
            "data": ["preflight", "build-subset", "close-runs"],
            "train": ["train", "train-2", "train-3"],
            "evaluate": ["evaluate", "evaluate-2", "evaluate-3"],
            "register": ["summarise-sweep", "register-best"],
        }.items()
        for task in names
    }


def test_the_steps_in_the_loops_have_their_place_on_the_cluster(documents):
    specification, kubernetes = documents
    for number in ("", "-2", "-3"):
        for step in ("train", "evaluate"):
            name = f"exec-{step}{number}"
            container = specification["deploymentSpec"]["executors"][name]["container"]
            assert "cluster_gpu_type" in container["resources"]["accelerator"]["resourceType"]
            assert "cluster_memory" in container["resources"]["resourceMemoryLimit"]
            assert kubernetes[name]["emptyDirMounts"][0]["mountPath"] == "/dev/shm"
            for key in ("nodeSelector", "tolerations", "secretAsEnv", "fieldPathAsEnv"):
                assert kubernetes[name][key], (name, key)
            mounts = [mount["mountPath"] for mount in kubernetes[name]["pvcMount"]]
            assert mounts == ["/data", "/checkpoints"]
    assert kubernetes["exec-build-subset"]["pvcMount"][0]["mountPath"] == "/data"
    for name in kubernetes:
        assert int(kubernetes[name]["activeDeadlineSeconds"]) >= 600
        assert kubernetes[name]["secretAsEnv"][0]["optional"]


def test_steps_are_tried_again_but_the_preflight_is_not(tasks):
    tried = {
        name: task["retryPolicy"]["maxRetryCount"]
        for name, task in tasks.items()
        if "retryPolicy" in task
    }
    assert set(tried.values()) == {2}
    assert "preflight" not in tried
    assert {"build-subset", "train-3", "evaluate-3", "summarise-sweep"} <= set(tried)


def test_the_compiled_file_loads_again_and_is_far_from_the_limits_of_the_platform(path):
    loaded = components.load_component_from_file(str(path))
    assert loaded.name == "shike-sweep-digits-lt"
    assert path.stat().st_size < 200_000


# --- what makes no sweep ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variants", "options", "message"),
    [
        ([cifar100_lt()], {}, "cifar100-lt has another subset than digits-lt; give variants"),
        (
            [replace(BASE, name="mirrored", evaluate=EvaluateConfig(flip=True))],
            {},
            "mirrored has another evaluate than digits-lt",
        ),
        (
            [replace(BASE, name="there", train=replace(BASE.train, device="cpu"))],
            {},
            "there asks for device cpu, digits-lt for auto",
        ),
        ([BASE], {}, "digits-lt is given twice"),
        ([variant(BASE, "no-dkt")] * 2, {}, "digits-lt/no-dkt is given twice"),
        ([replace(BASE, name="same")], {}, "same and digits-lt are the same training"),
        ([], {"seeds": ()}, "at least one seed, got none"),
        ([], {"seeds": (1, 2, 1)}, "seeds are given twice: 1, 2, 1"),
        ([], {"imbalance_factors": (20, 20.0)}, "imbalance factors are given twice: 20, 20"),
        ([], {"imbalance_factors": (0.01,)}, "imbalance_factor must be"),
        ([], {"parallelism": 0}, "parallelism must be at least 1, got 0"),
    ],
)
def test_what_makes_no_sweep_is_refused(variants, options, message):
    with pytest.raises(ValueError, match=message):
        sweep_pipeline(BASE, variants, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "--output", "x.yaml"], "give either --run, or --output FILE"),
        ([], "give either --run, or --output FILE"),
        (["--variants", "dkt", "--run"], "unknown variant 'dkt' of digits-lt; choose one of"),
        (["--base", "places", "--run"], "unknown recipe 'places'"),
        (["--variants", "no-dkt", "no-dkt", "--run"], "digits-lt/no-dkt is given twice"),
        (["--tag", "latest", "--output", "x.yaml"], "image tag 'latest' may come to mean other"),
    ],
)
def test_the_command_line_says_in_one_line_what_is_wrong(arguments, message, tmp_path, monkeypatch):
    from pipelines import sweep

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
    with pytest.raises(SystemExit) as stop:
        sweep.main()
    assert str(stop.value).startswith("error: ")
    assert message in str(stop.value)
    assert "\n" not in str(stop.value)
    assert list(tmp_path.iterdir()) == []


def test_what_differs_leaves_out_the_seed_and_what_is_alike():
    other = replace(BASE, name="other", train=replace(BASE.train, seed=7, width=8))
    assert differing_values([BASE, other]) == {
        "digits-lt": {"width": BASE.train.width}, "other": {"width": 8},
    }  # fmt: skip


@pytest.mark.parametrize("validation", [0, 3])
def test_the_recipe_says_how_many_images_choose_if_it_holds_out_any(validation):
    base = replace(BASE, subset=replace(BASE.subset, validation_per_class=validation))
    inputs = sweep_pipeline(base).component_spec.inputs
    assert inputs["sweep_validation_per_class"].default == (validation or 10)


def test_make_compiles_a_sweep_into_one_file():
    command = ["make", "--dry-run", "sweep-compile", "DATASET=digits-lt/smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[words.index("--base") + 1] == "digits-lt/smoke"
    assert words[words.index("--output") + 1] == "build/sweep-digits-lt-smoke.yaml"


# --- run on this machine ---------------------------------------------------------------------

PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path

from components import tracking
from pipelines.run_local import run
from pipelines.sweep import sweep_pipeline
from shike_core.recipes import digits_lt, variant

small = {"num_experts": 2, "width": 4, "warmup_epochs": 1, "stage1_epochs": 1, "stage2_epochs": 1}
digits, home = digits_lt(), Path(sys.argv[1])
base = replace(digits, train=replace(digits.train, **small))
factors = tuple(float(x) for x in sys.argv[2].split(","))
pipeline = sweep_pipeline(base, [variant(base, "no-dkt")], seeds=(0, 1), imbalance_factors=factors)
run_id = run(pipeline, {"step2_checkpoint_dir": str(home / "checkpoints")}, home, kind="sweep")
print(tracking.sweep_summary(run_id, home))
"""


@dataclass
class Swept:
    """What a sweep on this machine left."""

    home: Path
    out: str
    client: MlflowClient
    parent: Run
    children: list[Run]


@pytest.fixture(scope="module")
def swept(empty_mlflow_database, tmp_path_factory, process_environment) -> Swept:
    """Two imbalance factors, two seeds, two recipes: eight real trainings."""
    home = tmp_path_factory.mktemp("swept")
    shutil.copyfile(empty_mlflow_database, home / "mlflow.db")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(home), "20,10"],
        cwd=ROOT,
        env=process_environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("digits-lt").experiment_id])
    (parent,) = (run for run in runs if run.data.tags["kind"] == "sweep")
    return Swept(home, done.stdout, client, parent, [run for run in runs if run is not parent])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_stopped_trains_nothing_more(
    number, empty_mlflow_database, tmp_path, process_environment
):
    """By a service manager, which tells this process alone; by Ctrl-C, which all are told."""
    shutil.copyfile(empty_mlflow_database, tmp_path / "mlflow.db")
    program = PROGRAM.replace('"stage1_epochs": 1', '"stage1_epochs": 5000')
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), "20,10"],
        cwd=ROOT,
        env=process_environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            if re.match(r"epoch +3/", line):
                break
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        rest, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert f"stopped by signal {number:d}" in rest.splitlines()[-1]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("digits-lt").experiment_id])
    assert {run.data.tags["kind"]: run.info.status for run in runs} == {
        "sweep": "KILLED", "run": "KILLED",
    }  # fmt: skip
    assert len(runs) == 2
    assert len(list(tmp_path.glob("checkpoints/*/checkpoint.pt"))) == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_training_is_a_finished_child_of_the_sweep(swept):
    cells = {
        (
            float(run.data.params["subset.imbalance_factor"]),
            float(run.data.params["train.dkt_weight"]),
            int(run.data.params["train.seed"]),
        )
        for run in swept.children
    }
    assert cells == {(f, dkt, s) for f in (20.0, 10.0) for dkt in (1.0, 0.0) for s in (0, 1)}
    assert len(swept.children) == 8
    parent_id = swept.parent.info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in swept.children} == {parent_id}
    assert {run.info.status for run in [swept.parent, *swept.children]} == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_sweep_has_the_means_of_its_trainings(swept):
    for factor in (20.0, 10.0):
        for name, dkt in (("digits-lt", "1.0"), ("digits-lt/no-dkt", "0.0")):
            values = [
                run.data.metrics["test/accuracy"]
                for run in swept.children
                if run.data.params["train.dkt_weight"] == dkt
                and float(run.data.params["subset.imbalance_factor"]) == factor
            ]
            key = f"{name}/IF{factor:g}/test/accuracy"
            assert swept.parent.data.metrics[f"{key}_mean"] == pytest.approx(fmean(values))
            assert swept.parent.data.metrics[f"{key}_std"] == pytest.approx(stdev(values))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_best_by_validation_at_the_first_factor_is_the_registered_one(swept):
    first = [
        run for run in swept.children if float(run.data.params["subset.imbalance_factor"]) == 20.0
    ]
    by_recipe: dict[str, list[Run]] = {}
    for run in first:
        by_recipe.setdefault(run.data.params["train.dkt_weight"], []).append(run)
    validation = "validation/accuracy"
    best = max(
        (by_recipe["1.0"], by_recipe["0.0"]),
        key=lambda runs: fmean(run.data.metrics[validation] for run in runs),
    )
    expected = max(
        best, key=lambda run: (run.data.metrics[validation], -int(run.data.params["train.seed"]))
    )
    version = swept.client.get_model_version_by_alias("shike-digits-lt", "champion")
    assert version.run_id == expected.info.run_id == swept.parent.data.tags["chosen_run"]
    assert len(swept.client.search_model_versions("name = 'shike-digits-lt'")) == 1
    assert swept.parent.data.tags["registered_version"] == str(version.version)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_page_lies_in_the_sweeps_run_and_where_the_terminal_says(swept):
    path = Path(swept.out.split("page ")[1].split("\n")[0].strip())
    page = path.read_text()
    assert all(run.info.run_id in page for run in swept.children)
    stored = {file.path for file in swept.client.list_artifacts(swept.parent.info.run_id, "sweep")}
    assert stored == {"sweep/sweep.csv", "sweep/sweep.html", "sweep/sweep.json"}
    report = json.loads(path.with_name("sweep.json").read_text())
    assert list(report["recipes"]) == ["digits-lt", "digits-lt/no-dkt"]
    assert {trial["state"] for trial in report["trials"]} == {"done"}
    in_kfp = swept.home.glob("runs/*/**/page")
    assert [file.read_text() for file in in_kfp] == [page]

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Literal, get_origin, get_type_hints

import numpy as np
import pandas as pd
import pytest
from kfp import dsl
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput

from components import images, tracking
from components.build_subset import build_subset
from components.close_runs import close_runs
from components.compare_with_champion import compare_with_champion
from components.evaluate import evaluate
from components.preflight import preflight
from components.register_best import register_best
from components.register_model import register_model
from components.summarise_sweep import summarise_sweep
from components.tracking import runs
from components.train import train
from shike_core.config import EvaluateConfig, RegisterConfig, SubsetConfig, TrainConfig
from shike_core.data.manifest import read_subset
from shike_core.recipes import digits_lt

FOLDER = Path(images.__file__).parent
EXTRAS = {
    "build_subset": (
        SubsetConfig,
        {"data_dir": str, "shards_dir": str, "subset": dsl.Dataset},
    ),
    "train": (
        TrainConfig,
        {
            "subset": dsl.Dataset,
            "checkpoint_dir": str,
            "stage1_from": str,
            "num_nodes": int,
            "nodes": dict,
            "checkpoint": dsl.Model,
        },
    ),
    "evaluate": (
        EvaluateConfig,
        {
            "subset": dsl.Dataset,
            "checkpoint": dsl.Model,
            "checkpoint_dir": str,
            "evaluation": dsl.Artifact,
            "report": dsl.HTML,
            "metrics": dsl.Metrics,
            "confusion": dsl.ClassificationMetrics,
        },
    ),
    "compare_with_champion": (
        RegisterConfig,
        {"evaluation": dsl.Artifact, "run_id": str, "return": str},
    ),
    "register_best": (RegisterConfig, {"sweep_id": str, "chosen": str, "return": str}),
}
COMPONENTS = {
    component.python_func.__name__: component
    for component in (
        preflight,
        build_subset,
        train,
        evaluate,
        compare_with_champion,
        register_model,
        close_runs,
        summarise_sweep,
        register_best,
    )
}
IMAGES = {
    "preflight": images.DATA,
    "close_runs": images.DATA,
    "summarise_sweep": images.REGISTER,
    "register_best": images.REGISTER,
    "build_subset": images.DATA,
    "train": images.TRAIN,
    "evaluate": images.EVALUATE,
    "compare_with_champion": images.REGISTER,
    "register_model": images.REGISTER,
}

# --- what the components are made of ---------------------------------------------------------


@pytest.mark.parametrize("name", EXTRAS)
def test_a_component_takes_the_fields_of_its_configuration(name):
    config, extras = EXTRAS[name]
    of_fields = {
        field: str if get_origin(kind) is Literal else kind
        for field, kind in get_type_hints(config).items()
    }
    hints = get_type_hints(COMPONENTS[name].python_func)
    hints = {key: kind for key, kind in hints.items() if kind is not type(None)}
    if name == "evaluate":
        assert hints.pop("return").__annotations__ == {"run_id": str, "model_uri": str}
    assert hints == of_fields | extras


@pytest.mark.parametrize("component", COMPONENTS.values(), ids=COMPONENTS)
def test_a_component_has_no_defaults(component):
    parameters = signature(component.python_func).parameters.values()
    assert [p.name for p in parameters if p.default is not Parameter.empty] == []


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_runs_in_its_image_and_installs_nothing(name):
    container = COMPONENTS[name].component_spec.implementation.container
    assert container.image == IMAGES[name]
    assert "pip install" not in " ".join(container.command)


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_is_thin(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    body = function.body
    assert body[-1].end_lineno - body[0].lineno < 75
    logic = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.Match, ast.comprehension)
    found = [type(n).__name__ for n in ast.walk(function) if isinstance(n, logic)]
    assert found == []


def test_every_step_has_its_file():
    modules = {path.stem for path in FOLDER.glob("*.py")}
    packages = {path.parent.name for path in FOLDER.glob("*/__init__.py")}
    assert modules | packages == {
        *COMPONENTS,
        "__init__",
        "__main__",
        "boundary",
        "registration",
        "checks",
        "cli",
        "images",
        "tracking",
        "train_job",
    }


# --- the steps, one after the other ----------------------------------------------------------

EPOCHS = 6
STOPPED_AFTER = 2


@dataclass
class Chain:
    """The steps of one pipeline run on the digits, and what they left."""

    home: Path
    run_id: str
    model_uri: str
    alias: str
    version: str
    metrics: dsl.Metrics
    confusion: dsl.ClassificationMetrics
    config: TrainConfig
    interrupted_with: int
    finished_epochs_before: int

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.home}/mlflow.db")

    @property
    def run(self):
        return self.client.get_run(self.run_id)

    def artifacts(self, folder: str | None = None) -> set[str]:
        found = set()
        for entry in self.client.list_artifacts(self.run_id, folder):
            found |= self.artifacts(entry.path) if entry.is_dir else {entry.path}
        return found

    def json(self, path: str):
        return json.loads((self.home / path).read_text())


def terminate_when(lines: Path, count: int) -> None:
    """Send this process SIGTERM once a file has so many lines."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if lines.exists() and lines.read_text().count("\n") >= count:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(0.002)


def train_until_stopped(out: Path, **inputs) -> int:
    """The step's exit code when SIGTERM comes in the middle."""
    handler = signal.signal(signal.SIGTERM, lambda number, frame: None)  # should it come late
    stopper = threading.Thread(target=terminate_when, args=(out / "metrics.jsonl", STOPPED_AFTER))
    stopper.start()
    try:
        with pytest.raises(SystemExit) as stop:
            train.python_func(checkpoint=dsl.Model(uri=str(out)), **inputs)
    finally:
        stopper.join()
        signal.signal(signal.SIGTERM, handler)
    return stop.value.code


@pytest.fixture(scope="module")
def chain(empty_mlflow_database, tmp_path_factory) -> Iterator[Chain]:
    home = tmp_path_factory.mktemp("chain")
    shutil.copyfile(empty_mlflow_database, home / "mlflow.db")
    recipe = digits_lt()
    config = replace(
        recipe.train, num_experts=2, width=4, stage1_epochs=4, stage2_epochs=2, warmup_epochs=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
        patch.setenv(tracking.KFP_RUN_ID, "kfp-chain")
        patch.setenv(tracking.GIT_COMMIT, "0123abc")
        subset = dsl.Dataset(uri=str(home / "subset"))
        build_subset.python_func(**asdict(recipe.subset), data_dir="", shards_dir="", subset=subset)
        inputs = asdict(config) | {"subset": subset, "checkpoint_dir": str(home / "kept")}
        inputs |= {"num_nodes": 1, "nodes": {}, "stage1_from": ""}
        code = train_until_stopped(home / "lost", **inputs)
        (before,) = MlflowClient().search_runs(["1"])
        checkpoint = dsl.Model(uri=str(home / "checkpoint"))
        # The platform stores the results after the step; if it cannot, the step is retried.
        train.python_func(checkpoint=dsl.Model(uri=str(home / "not stored")), **inputs)
        train.python_func(checkpoint=checkpoint, **inputs)
        evaluation = dsl.Artifact(uri=str(home / "evaluation"))
        metrics, confusion = dsl.Metrics(), dsl.ClassificationMetrics()
        run_id, model_uri = evaluate.python_func(
            subset=subset,
            checkpoint=checkpoint,
            checkpoint_dir=str(home / "kept"),
            **asdict(recipe.evaluate),
            evaluation=evaluation,
            report=dsl.HTML(uri=str(home / "report.html")),
            metrics=metrics,
            confusion=confusion,
        )
        alias = compare_with_champion.python_func(
            evaluation=evaluation, run_id=run_id, **asdict(recipe.register)
        )
        version = register_model.python_func(
            run_id=run_id,
            model_uri=model_uri,
            model_name=recipe.register.model_name,
            alias=alias,
        )
        yield Chain(
            home=home,
            run_id=run_id,
            model_uri=model_uri,
            alias=alias,
            version=version,
            metrics=metrics,
            confusion=confusion,
            config=config,
            interrupted_with=code,
            finished_epochs_before=int(before.data.metrics["epoch"]) + 1,
        )


def test_all_steps_write_to_one_run(chain):
    experiment = chain.client.get_experiment_by_name("digits-lt")
    (run,) = chain.client.search_runs([experiment.experiment_id])
    assert run.info.run_id == chain.run_id
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "experts-2 IF20 first 2e 6ep seed0"


def test_parameters_are_prefixed_with_their_step(chain):
    recipe = digits_lt()
    parts = {
        "subset": recipe.subset,
        "train": chain.config,
        "evaluate": recipe.evaluate,
        "register": recipe.register,
    }
    assert chain.run.data.params == {
        f"{prefix}.{field.name}": str(getattr(part, field.name))
        for prefix, part in parts.items()
        for field in fields(part)
    }


def test_both_data_sets_are_inputs_of_the_run(chain):
    info = chain.json("subset/subset.json")
    found = {entry.tags[0].value: entry.dataset.digest for entry in chain.run.inputs.dataset_inputs}
    assert found == {"train": info["digest"][:36], "test": info["test_digest"][:36]}
    assert chain.run.inputs.dataset_inputs[0].tags[0].key == "mlflow.data.context"


def test_a_stopped_training_goes_on_in_the_same_run(chain):
    assert chain.interrupted_with == 128 + signal.SIGTERM
    assert STOPPED_AFTER <= chain.finished_epochs_before < EPOCHS
    done = chain.json("not stored/train.json")
    assert done["epochs_in_this_call"] == EPOCHS - chain.finished_epochs_before


def test_a_finished_training_is_kept_until_it_is_evaluated(chain):
    assert chain.json("checkpoint/train.json")["epochs_in_this_call"] == 0
    ours, lost = (chain.json(f"{name}/history.json") for name in ("checkpoint", "not stored"))
    assert ours == lost
    assert list((chain.home / "kept").iterdir()) == []


def test_every_epoch_is_logged_once(chain):
    history = chain.json("checkpoint/history.json")
    assert len(history) == EPOCHS
    for key in ("train/loss", "train/accuracy", "lr", "train/images_per_second", "stage"):
        found = chain.client.get_metric_history(chain.run_id, key)
        assert [m.step for m in found] == list(range(EPOCHS)), key
        assert [m.value for m in found] == [epoch[key] for epoch in history], key
    for key in ("train/loss_dkt", "train/loss_mutual", "train/loss_cross_entropy"):
        found = chain.client.get_metric_history(chain.run_id, key)
        assert [m.step for m in found] == list(range(chain.config.stage1_epochs)), key


def test_test_metrics_are_those_of_the_report(chain):
    reported = chain.json("evaluation/report.json")["metrics"]
    logged = chain.run.data.metrics
    assert {k: v for k, v in logged.items() if k.startswith("test/")} == pytest.approx(reported)
    assert {"test/accuracy", "test/few_shot/accuracy", "test/expert_1/accuracy"} <= set(reported)
    assert chain.metrics.metadata == reported
    assert len(chain.confusion.metadata["confusionMatrix"]["rows"]) == 10


def test_the_machine_is_measured(chain):
    measured = {k for k in chain.run.data.metrics if k.startswith("system/")}
    wanted = {"cpu_utilization_percentage", "system_memory_usage_megabytes"}
    assert {f"system/{name}" for name in wanted} <= measured


def test_artifacts_of_every_step_are_stored(chain):
    assert {
        "subset/subset.json",
        "subset/class_counts.png",
        "train/checkpoint.pt",
        "train/history.json",
        "train/train.json",
        "train/metrics.jsonl",
        "evaluation/report.html",
        "evaluation/report.json",
        "evaluation/predictions.parquet",
        "evaluation/plots/reliability.png",
        "evaluation/plots/confusion_matrix.png",
        "register/decision.json",
    } <= chain.artifacts()
    assert (chain.home / "report.html").read_bytes() == (
        chain.home / "evaluation/report.html"
    ).read_bytes()


def test_tags_say_where_the_run_comes_from(chain):
    tags = chain.run.data.tags
    info, report = chain.json("subset/subset.json"), chain.json("evaluation/report.json")
    expected = {
        "kfp_run_id": "kfp-chain",
        "mlflow.source.git.commit": "0123abc",
        "dataset": "digits-lt",
        "subset_digest": info["digest"],
        "test_digest": info["test_digest"],
        "training_digest": chain.json("checkpoint/train.json")["training_digest"],
        "weights_digest": report["export"]["weights_digest"],
        "decision": "champion",
        "registered_model": "shike-digits-lt",
        "registered_version": "1",
    }
    assert expected.items() <= tags.items()
    assert "kfp-chain" in tags["mlflow.note.content"]


def test_metrics_belong_to_the_model_and_the_test_set(chain):
    model = chain.client.get_logged_model(chain.model_uri.rpartition("/")[2])
    assert model.source_run_id == chain.run_id
    assert not any(metric.key.startswith("train/") for metric in model.metrics)
    of_model = {metric.key: metric for metric in model.metrics if metric.key.startswith("test/")}
    reported = chain.json("evaluation/report.json")["metrics"]
    assert {key: metric.value for key, metric in of_model.items()} == pytest.approx(reported)
    digest = chain.json("subset/subset.json")["test_digest"][:36]
    assert {(m.dataset_name, m.dataset_digest) for m in of_model.values()} == {
        ("digits-lt-test", digest)
    }


ELSEWHERE = """
import sys
for name in ("shike_core", "components", "pipelines"):
    sys.modules[name] = None  # importing it fails
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
np.save(sys.argv[4], model.predict(np.load(sys.argv[3])))
"""


def test_the_model_answers_without_this_package(chain, tmp_path, process_environment):
    test = read_subset(chain.home / "subset", splits=("test",)).splits["test"]
    np.save(tmp_path / "images.npy", test.images.transpose(0, 3, 1, 2))
    command = [sys.executable, "-c", ELSEWHERE, f"sqlite:///{chain.home}/mlflow.db"]
    command += ["models:/shike-digits-lt@champion"]
    command += [str(tmp_path / "images.npy"), str(tmp_path / "answers.npy")]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=process_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = np.load(tmp_path / "answers.npy")
    table = pd.read_parquet(chain.home / "evaluation/predictions.parquet")
    logits = np.mean([np.stack(table[f"logits_expert_{i}"]) for i in range(2)], axis=0)
    report = json.loads((chain.home / "evaluation/report.json").read_text())
    logits /= report["calibration"]["temperature"]
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)
    assert answers.shape == (len(test.labels), 10)
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(answers, expected, atol=1e-4)
    assert (table["label"] == test.labels).all()


def test_the_model_is_registered_as_champion(chain):
    assert (chain.alias, chain.version) == ("champion", "1")
    version = chain.client.get_model_version_by_alias("shike-digits-lt", "champion")
    assert str(version.version) == "1"
    assert version.run_id == chain.run_id
    tags = version.tags
    same = ("subset_digest", "test_digest", "training_digest", "weights_digest", "kfp_run_id")
    assert {k: tags[k] for k in same} == {k: chain.run.data.tags[k] for k in same}
    metrics = json.loads(tags["metrics"])
    assert metrics["test/accuracy"] == chain.run.data.metrics["test/accuracy"]
    assert (tags["variant"], tags["seed"]) == ("experts-2", "0")


def test_registering_again_makes_no_second_version(chain, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{chain.home}/mlflow.db")
    version = register_model.python_func(
        run_id=chain.run_id,
        model_uri=chain.model_uri,
        model_name="shike-digits-lt",
        alias="champion",
    )
    assert version == "1"
    assert len(chain.client.search_model_versions("name = 'shike-digits-lt'")) == 1


def test_an_export_that_was_cut_short_is_not_the_runs_model(chain, tmp_path, monkeypatch):
    shutil.copyfile(chain.home / "mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = tracking.attach(chain.run_id)
    for _ in range(4):  # in whatever order the server lists them
        cut = run.client.create_logged_model(run.experiment_id, "model", chain.run_id)
        run.client.log_outputs(chain.run_id, [LoggedModelOutput(cut.model_id, step=0)])
    assert len(run.client.get_run(chain.run_id).outputs.model_outputs) == 5
    assert tracking.model_of(run) == chain.model_uri
    run.client.delete_tag(chain.run_id, runs.MODEL_URI)
    with pytest.raises(tracking.TrackingError, match="has no model; evaluate first"):
        tracking.model_of(run)


def test_a_model_is_registered_by_hand(chain, process_environment):
    command = [sys.executable, "-m", "components", "register", "--run-id", chain.run_id]
    done = subprocess.run(
        [*command, "--model-name", "by-hand"],
        cwd=FOLDER.parent,
        env=process_environment(MLFLOW_TRACKING_URI=f"sqlite:///{chain.home}/mlflow.db"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "by-hand version 1, alias champion\nthere is no champion yet" in done.stdout
    version = chain.client.get_model_version_by_alias("by-hand", "champion")
    assert version.run_id == chain.run_id


@pytest.mark.parametrize("named", ["id", "shike-digits-lt@champion"])
def test_stage1_of_a_run_is_taken_by_another(named, chain, tmp_path, monkeypatch):
    shutil.copyfile(chain.home / "mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    changes = {"stage2_epochs": 17, "stage2_logit_adjustment": 1.25}  # 17 times 13 batches
    values = asdict(replace(chain.config, **changes))
    out, run_id = tmp_path / "checkpoint", chain.run_id if named == "id" else named
    inputs = {"subset": dsl.Dataset(uri=str(chain.home / "subset")), "num_nodes": 1, "nodes": {}}
    inputs |= {"checkpoint": dsl.Model(uri=str(out)), "checkpoint_dir": str(tmp_path / "kept")}
    train.python_func(**values, **inputs, stage1_from=run_id)
    report = json.loads((out / "train.json").read_text())
    assert (report["epochs"], report["epochs_in_this_call"]) == (21, 17)
    history, before = (
        json.loads(path.read_text())
        for path in (out / "history.json", chain.home / "checkpoint/history.json")
    )
    assert history[:4] == before[:4]
    (run,) = MlflowClient().search_runs(["1"], f"tags.stage1_run = '{chain.run_id}'")
    assert run.data.params["train.stage2_logit_adjustment"] == "1.25"
    assert run.data.metrics["epoch"] == 20


def test_a_run_whose_stage1_does_not_fit_is_refused(chain, tmp_path, monkeypatch, capsys):
    shutil.copyfile(chain.home / "mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    values = asdict(replace(chain.config, seed=5))
    inputs = {"subset": dsl.Dataset(uri=str(chain.home / "subset")), "num_nodes": 1, "nodes": {}}
    inputs |= {"checkpoint": dsl.Model(uri=str(tmp_path / "out")), "checkpoint_dir": ""}
    for wanted, message in (
        (chain.run_id, f"stage 1 of run {chain.run_id} is another one (seed 0 there, 5 here)"),
        ("nobody", "is called 'nobody'; give a run's id or name"),
    ):
        with pytest.raises(SystemExit):
            train.python_func(**values, **inputs, stage1_from=wanted)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out/checkpoint.pt").exists()


def later_run(chain: Chain, tmp_path: Path, number: int, accuracy: float) -> tuple[str, str]:
    """Gate and registration of a further run, which measured this accuracy; alias and version."""
    report = chain.json("evaluation/report.json")
    report["export"]["weights_digest"] = f"weights of run {number}"
    report["metrics"] = {"test/accuracy": accuracy, "test/few_shot/accuracy": accuracy / 2}
    evaluation = tmp_path / f"evaluation_{number}"
    evaluation.mkdir()
    (evaluation / "report.json").write_text(json.dumps(report))
    run = tracking.open_run("digits-lt")
    run.tag(weights_digest=f"weights of run {number}", test_digest=report["test_digest"])
    for key, value in report["metrics"].items():
        run.client.log_metric(run.run_id, key, value)
    alias = compare_with_champion.python_func(
        evaluation=dsl.Artifact(uri=str(evaluation)),
        run_id=run.run_id,
        **asdict(
            RegisterConfig(model_name="several", max_accuracy_drop=0.01, max_few_shot_drop=0.01)
        ),
    )
    version = register_model.python_func(
        run_id=run.run_id, model_uri=chain.model_uri, model_name="several", alias=alias
    )
    return alias, version


def test_only_a_model_that_is_not_worse_becomes_champion(chain, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{chain.home}/mlflow.db")
    found, champions = [], []
    for number, accuracy in enumerate((0.80, 0.70, 0.795, 0.90), start=1):
        found.append(later_run(chain, tmp_path, number, accuracy))
        version = chain.client.get_model_version_by_alias("several", "champion").version
        champions.append(str(version))
    assert found == [("champion", "1"), ("challenger", "2"), ("champion", "3"), ("champion", "4")]
    assert champions == ["1", "1", "3", "4"]
    assert str(chain.client.get_model_version_by_alias("several", "challenger").version) == "2"


def test_a_run_is_told_why_it_is_no_champion(chain, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{chain.home}/mlflow.db")
    later_run(chain, tmp_path, 11, 0.99)
    assert later_run(chain, tmp_path, 12, 0.40)[0] == "challenger"
    (run,) = chain.client.search_runs(["1"], "tags.weights_digest = 'weights of run 12'")
    path = chain.client.download_artifacts(run.info.run_id, "register/decision.json")
    decision = json.loads(Path(path).read_text())
    assert any("0.4000" in reason and "0.9900" in reason for reason in decision["reasons"])
    assert decision["champion"]["metrics"]["test/accuracy"] == 0.99

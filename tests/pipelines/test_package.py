import json
import re

import pytest
import yaml

from pipelines.compile import compile_pipeline
from pipelines.package import Package, PackageError, read_package
from shike_core.recipes import recipe_named

PARAMETERS = {
    "step1_profile": {"parameterType": "STRING", "literals": ["exp", "step"]},
    "step1_data_dir": {"parameterType": "STRING"},
    "step1_subset_seed": {"parameterType": "NUMBER_INTEGER"},
    "step2_seed": {"parameterType": "NUMBER_INTEGER"},
    "step2_momentum": {"parameterType": "NUMBER_DOUBLE"},
    "step2_fusion": {"parameterType": "BOOLEAN"},
    "cluster_tolerations": {"parameterType": "LIST"},
    "cluster_node_selector": {"parameterType": "STRUCT"},
    "status": {"parameterType": "TASK_FINAL_STATUS"},
}


def write(path, *images: str, **more: object) -> Package:
    executors = {str(n): {"container": {"image": image}} for n, image in enumerate(images)}
    optional = {name: parameter | {"isOptional": True} for name, parameter in PARAMETERS.items()}
    specification = {
        "pipelineInfo": {"name": "shike"},
        "root": {"inputDefinitions": {"parameters": optional | more}},
        "deploymentSpec": {"executors": executors},
    }
    path.write_text(yaml.safe_dump(specification))
    return read_package(path)


@pytest.fixture
def package(tmp_path) -> Package:
    return write(tmp_path / "package.yaml", "registry.example:5000/group/train:0123abc")


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("step2_seed=3", 3),
        ("step2_seed=-3", -3),
        ("step2_seed=3.0", 3),
        ("step2_momentum=1", 1.0),
        ("step2_momentum=.5", 0.5),
        ("step2_momentum=1e-3", 0.001),
        ("step2_fusion=True", True),
        ("step2_fusion=false", False),
        ("step1_profile=step", "step"),
        ("step1_data_dir=/a=b c", "/a=b c"),
        ("step1_data_dir=", ""),
        ("step1_data_dir=3", "3"),
        ('cluster_tolerations=[{"key": "gpu"}]', [{"key": "gpu"}]),
        ('cluster_node_selector={"zone": "a"}', {"zone": "a"}),
    ],
)
def test_a_text_becomes_the_parameters_type(package, assignment, value):
    (converted,) = package.values([assignment]).values()
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("step2_seed=three", "parameter step2_seed wants a whole number, got 'three'"),
        ("step2_seed=3.5", "parameter step2_seed wants a whole number, got '3.5'"),
        ("step2_seed=1e999", "parameter step2_seed wants a whole number, got '1e999'"),
        ("step2_seed=9007199254740993", "parameter step2_seed wants a whole number"),
        ("step2_seed=true", "parameter step2_seed wants a whole number, got 'true'"),
        ("step2_momentum=NaN", "parameter step2_momentum wants a number, got 'NaN'"),
        ("step2_momentum=", "parameter step2_momentum wants a number, got ''"),
        ("step2_fusion=1", "parameter step2_fusion wants true or false, got '1'"),
        ("cluster_tolerations={}", "parameter cluster_tolerations wants a JSON list, got '{}'"),
        ("cluster_tolerations=[NaN]", "parameter cluster_tolerations wants a JSON list"),
        ("cluster_node_selector=[", "parameter cluster_node_selector wants a JSON object, got '['"),
        ("step1_profile=linear", "parameter step1_profile is 'linear'; choose one of exp, step"),
        ("status=done", "parameter status is of the kind TASK_FINAL_STATUS, which cannot be given"),
        ("step2_sed=3", "there is no parameter 'step2_sed'; did you mean step2_seed"),
        ("sed=3", "there is no parameter 'sed'; did you mean step2_seed?"),
        ("seed=3", "there is no parameter 'seed'; did you mean step1_subset_seed or step2_seed?"),
        ("zzz=3", "there is no parameter 'zzz', nor one of a similar name"),
        ("step2_seed", "--set step2_seed has no value; write --set step2_seed=VALUE"),
    ],
)
def test_what_does_not_fit_is_refused(package, assignment, message):
    with pytest.raises(PackageError, match=re.escape(message)):
        package.values([assignment])


def test_all_that_does_not_fit_is_told_at_once(package):
    with pytest.raises(PackageError) as caught:
        package.values(["step2_seed=x", "step2_fusion=y", "step2_momentum=0.5"])
    assert [line.split()[1] for line in str(caught.value).splitlines()] == [
        "step2_seed",
        "step2_fusion",
    ]


def test_a_parameter_given_twice_is_refused_unless_it_is_the_same(package):
    with pytest.raises(PackageError, match="--set gives step2_seed twice: '1' and '2'"):
        package.values(["step2_seed=1", "step2_seed=2"])
    assert package.values(["step2_seed=1", "step2_seed=1"]) == {"step2_seed": 1}


def test_assignments_win_over_the_file(package, tmp_path):
    file = tmp_path / "values.json"
    file.write_text(json.dumps({"step2_seed": 1, "step2_fusion": True}))
    assert package.values(["step2_seed=2"], file) == {"step2_seed": 2, "step2_fusion": True}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"step2_seed": "3"}', "parameter step2_seed wants a whole number, got '\"3\"'"),
        ('{"step1_data_dir": 3}', "parameter step1_data_dir wants a text, got '3'"),
        ('{"step2_fusion": 1}', "parameter step2_fusion wants true or false, got '1'"),
        ('{"step2_momentum": true}', "parameter step2_momentum wants a number, got 'true'"),
        ('{"step2_momentum": 1e999}', "parameter step2_momentum wants a number"),
        ('{"step2_momentum": NaN}', "is not JSON: NaN is not a number"),
        ("step2_seed: 3", "is not JSON"),
        ("[3]", "is not a JSON object"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_of_values_has_the_types_already(package, tmp_path, content, message):
    file = tmp_path / "values.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(PackageError, match=re.escape(message)):
        package.values([], file)


def test_a_parameter_without_default_has_to_be_given(tmp_path):
    package = write(tmp_path / "package.yaml", epochs={"parameterType": "NUMBER_INTEGER"})
    with pytest.raises(PackageError, match="parameter epochs has no default; give it by --set"):
        package.values([])
    assert package.values(["epochs=3"]) == {"epochs": 3}


@pytest.mark.parametrize(
    ("images", "start"),
    [
        (["host:5000/a/train:0123abc", "host:5000/a/data:0123abc"], "0123abc-"),
        (["train:v1.2_RC"], "v1.2-rc-"),
        (["train:one", "data:two"], ""),
        (["host:5000/train"], ""),
        ([], ""),
    ],
)
def test_the_version_is_the_tag_and_a_digest(tmp_path, images, start):
    version = write(tmp_path / "package.yaml", *images).version
    assert re.fullmatch(re.escape(start) + "[0-9a-f]{8}", version)


def test_the_version_changes_with_the_content_alone(tmp_path):
    first, again = (write(tmp_path / name, "train:0123abc") for name in ("a.yaml", "b.yaml"))
    other = write(tmp_path / "c.yaml", "train:0123abc", more={"parameterType": "STRING"})
    assert first.version == again.version != other.version


def without_caching_options(thing):
    if isinstance(thing, dict):
        kept = {key: value for key, value in thing.items() if key != "cachingOptions"}
        return {key: without_caching_options(value) for key, value in kept.items()}
    return thing


def test_without_cache_no_task_at_any_depth_takes_a_result_of_before(tmp_path):
    compile_pipeline(recipe_named("digits-lt"), tmp_path / "pipeline.yaml")
    package = read_package(tmp_path / "pipeline.yaml")
    assert "enableCache: true" in package.text
    fresh = package.without_cache()
    assert "enableCache" not in fresh.text
    assert fresh.version != package.version
    first, second = package.documents[0], fresh.documents[0]
    assert without_caching_options(first) == without_caching_options(second)
    assert fresh.documents[1:] == package.documents[1:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory; `make pipeline-compile` writes one"),
        ("a: [", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        ("", "is not a compiled pipeline: it lacks pipelineInfo and root"),
        ("- 1", "is not a compiled pipeline"),
        ("pipelineInfo: {name: x}", "is not a compiled pipeline"),
        ("kind: Workflow\nspec: {}", "is a workflow compiled by KFP 1, not a KFP 2 pipeline"),
    ],
)
def test_what_is_no_package_is_refused(tmp_path, content, message):
    path = tmp_path / "package.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PackageError, match=re.escape(message)):
        read_package(path)

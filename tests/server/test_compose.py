"""docker/compose.yaml: what it demands, what it exposes, and that it holds no secret."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCKER = Path(__file__).parents[2] / "docker"
NEEDED = (
    "POSTGRES_PASSWORD",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "TAG",
)
GIVEN = {name: f"given-{name.lower()}" for name in NEEDED}


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    """The file as it stands."""
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def compose(tmp_path_factory):
    """Has Docker Compose read the file with some settings; needs no engine."""
    command = next(
        (
            found
            for found in (["docker-compose"], ["docker", "compose"])
            if shutil.which(found[0])
            and not subprocess.run([*found, "version"], capture_output=True, check=False).returncode
        ),
        None,
    )
    if command is None:
        pytest.skip("needs Docker Compose (Debian: apt-get install docker-compose)")

    def read(settings: dict[str, str]) -> subprocess.CompletedProcess:
        environment = tmp_path_factory.mktemp("compose") / "mlflow.env"
        environment.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        arguments = ["--env-file", str(environment), "-f", str(DOCKER / "compose.yaml"), "config"]
        return subprocess.run(
            [*command, *arguments],
            env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )

    return read


def test_nothing_starts_without_passwords_and_a_tag(written):
    text = (DOCKER / "compose.yaml").read_text()
    for name in NEEDED:
        uses = re.findall(rf"\$\{{{name}([^}}]*)\}}", text)
        assert uses, name
        assert all(use.startswith(":?") for use in uses), name
    example = (DOCKER / "mlflow.env.example").read_text()
    assert re.findall(r"^(\w+)=$", example, re.MULTILINE) == list(NEEDED)


def test_every_setting_of_the_file_is_explained_in_the_example():
    text = (DOCKER / "compose.yaml").read_text()
    example = (DOCKER / "mlflow.env.example").read_text()
    named = set(re.findall(r"\$\{(\w+)", text)) | set(re.findall(r"^ +([A-Z0-9_]+):$", text, re.M))
    assert named <= set(re.findall(r"^#? ?([A-Z0-9_]+)=", example, re.MULTILINE))


def test_no_address_holds_a_password(written):
    text = (DOCKER / "compose.yaml").read_text() + (DOCKER / "mlflow-auth.ini").read_text()
    assert re.findall(r"\w+://[^\s/]*:[^\s/]*@", text) == []
    assert "admin_password" not in text


def test_the_server_can_do_nothing_but_serve(written):
    server = written["services"]["mlflow"]
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert server["security_opt"] == ["no-new-privileges:true"]
    assert [mount.partition(":")[0] for mount in server["tmpfs"]] == ["/tmp"]
    assert "privileged" not in server
    assert "user" not in server  # the image's own, which is not root


def test_only_the_server_is_published_and_to_this_machine_only(written):
    services = written["services"]
    assert services["mlflow"]["ports"] == ["${BIND:-127.0.0.1}:${PORT:-5000}:5000"]
    assert "ports" not in services["db"]
    assert services["db"]["networks"] == ["inside"]
    assert written["networks"]["inside"]["internal"] is True


def test_what_is_stored_outlives_the_containers(written):
    assert set(written["volumes"]) == {"database", "artifacts"}
    assert "database:/var/lib/postgresql/data" in written["services"]["db"]["volumes"]
    assert "artifacts:/artifacts" in written["services"]["mlflow"]["volumes"]


def test_docker_compose_takes_the_file(compose):
    done = compose(GIVEN)
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert services["db"]["image"].startswith("postgres:")
    assert services["mlflow"]["image"] == "shike-python-mlflow:given-tag"
    assert services["mlflow"]["depends_on"]["db"]["condition"] == "service_healthy"
    settings = services["mlflow"]["environment"]
    assert settings["PGPASSWORD"] == services["db"]["environment"]["POSTGRES_PASSWORD"]
    assert settings["MLFLOW_ARTIFACTS_DESTINATION"] == "/artifacts"
    port = str(services["mlflow"]["ports"][0])
    assert "127.0.0.1" in port


def test_docker_compose_takes_an_s3_compatible_store(compose):
    store = {
        "ARTIFACTS": "s3://bucket/mlflow",
        "MLFLOW_S3_ENDPOINT_URL": "https://s3.example.org",
        "AWS_ACCESS_KEY_ID": "key",
    }
    done = compose(GIVEN | store)
    assert done.returncode == 0, done.stderr
    settings = yaml.safe_load(done.stdout)["services"]["mlflow"]["environment"]
    assert settings["MLFLOW_ARTIFACTS_DESTINATION"] == store["ARTIFACTS"]
    assert settings["MLFLOW_S3_ENDPOINT_URL"] == store["MLFLOW_S3_ENDPOINT_URL"]
    assert settings["AWS_ACCESS_KEY_ID"] == "key"


@pytest.mark.parametrize("name", NEEDED)
def test_docker_compose_names_what_is_missing(compose, name):
    done = compose(GIVEN | {name: ""})
    assert done.returncode != 0
    assert "mlflow.env" in done.stderr

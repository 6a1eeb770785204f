import datetime
import ipaddress
import json
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipelines import connection, submit
from tests.pipelines.kfp_api import KfpApi

ROOT = Path(__file__).parents[2]
SECRET = "eyJhbGciOi.c2VjcmV0.X-_9"
PIPELINE = "shike-digits-lt"


@dataclass
class Done:
    """How the command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what is wrong."""
        assert self.code == 1, self.out + self.err
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A package as `make pipeline-compile` writes it."""
    path = tmp_path_factory.mktemp("package") / "pipeline.yaml"
    command = [sys.executable, "-m", "pipelines.compile", "--output", str(path), "--tag", "0123abc"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return path


@pytest.fixture
def serve() -> Iterator[Callable[..., KfpApi]]:
    """Starts servers; a call that they do not know fails the test."""
    servers: list[KfpApi] = []

    def start(**settings: object) -> KfpApi:
        servers.append(KfpApi(**settings).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()
    assert [call for server in servers for call in server.unforeseen] == []


@pytest.fixture
def api(serve) -> KfpApi:
    return serve()


@pytest.fixture
def call(package, monkeypatch, capsys) -> Callable[..., Done]:
    """The command in this process."""
    monkeypatch.delenv(connection.TOKEN_VARIABLE, raising=False)
    monkeypatch.delenv(connection.COOKIES_VARIABLE, raising=False)

    def run(host: str | KfpApi, *arguments: str, package: Path = package) -> Done:
        address = host if isinstance(host, str) else host.address
        command = ["submit", "--host", address, "--package", str(package), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        code: object = 0
        try:
            submit.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return Done(code, out, err) if isinstance(code, int) else Done(1, out, f"{err}{code}\n")

    return run


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A key and a certificate for 127.0.0.1, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kfp.example")])
    now = datetime.datetime.now(datetime.UTC)
    addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(
        issuer_name=name,
        subject_name=name,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - datetime.timedelta(hours=1),
        not_valid_after=now + datetime.timedelta(hours=1),
    ).add_extension(addresses, critical=False)
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_bytes(
        builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


@pytest.fixture
def tls(certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def only(things: dict[str, dict]) -> dict:
    (thing,) = things.values()
    return thing


# Uploading and running.


def test_a_new_pipeline_is_uploaded_and_run(api, call, package):
    done = call(api, "--set", "step2_seed=3", "--set", "step1_imbalance_factor=50")
    assert (done.code, done.err) == (0, "")
    pipeline, version = only(api.pipelines), only(api.versions)
    experiment, run = only(api.experiments), only(api.runs)
    assert pipeline["display_name"] == pipeline["name"] == experiment["display_name"] == PIPELINE
    assert re.fullmatch("0123abc-[0-9a-f]{8}", version["display_name"])
    uploaded = version["pipeline_spec"]
    assert [uploaded["pipeline_spec"], uploaded["platform_spec"]] == list(
        yaml.safe_load_all(package.read_text())
    )
    assert run["runtime_config"] == {
        "parameters": {"step2_seed": 3, "step1_imbalance_factor": 50.0}
    }
    assert run["display_name"].startswith(f"{PIPELINE} 20")
    assert "service_account" not in run
    assert len(api.called("healthz")) == 1  # kfp.Client by itself asks five times, for 25 seconds
    pipeline_id, version_id = pipeline["pipeline_id"], version["pipeline_version_id"]
    assert run["pipeline_version_reference"] == {
        "pipeline_id": pipeline_id,
        "pipeline_version_id": version_id,
    }
    links = re.findall(rf"{api.address}(\S+)", done.out)
    assert links == [
        f"/#/pipelines/details/{pipeline_id}/version/{version_id}",
        f"/#/experiments/details/{experiment['experiment_id']}",
        f"/#/runs/details/{run['run_id']}",
    ]


def test_the_same_package_is_used_again(api, call):
    assert call(api).code == 0
    done = call(api, "--set", "step2_seed=4")
    assert done.code == 0
    assert re.search(r"version +0123abc-\w+ \(was there already\)", done.out)
    assert len(api.called("upload_version")) == len(api.versions) == len(api.pipelines) == 1
    assert len(api.experiments) == 1
    assert len(api.runs) == 2


def test_another_package_of_the_same_commit_is_another_version(api, call, package, tmp_path):
    changed = tmp_path / "pipeline.yaml"
    text = package.read_text()
    assert "resourceTtlOnCompletion: " in text
    changed.write_text(
        re.sub("resourceTtlOnCompletion: [0-9]+", "resourceTtlOnCompletion: 7", text)
    )
    assert [call(api).code, call(api, package=changed).code] == [0, 0]
    assert len(api.pipelines) == 1
    assert len({version["name"] for version in api.versions.values()}) == 2


def test_a_version_that_somebody_uploads_meanwhile_is_used(api, call):
    assert call(api, "--upload-only").code == 0
    api.fault("GET .*/versions", status=200, body=b"{}")
    done = call(api)
    assert done.code == 0, done.err
    assert len(api.called("upload_version")) == 2
    (version_id,) = api.versions
    assert only(api.runs)["pipeline_version_reference"]["pipeline_version_id"] == version_id


def test_an_upload_starts_nothing_if_told_so(api, call):
    done = call(api, "--upload-only")
    assert done.code == 0
    assert len(api.versions) == 1
    assert api.experiments == api.runs == {}


def test_the_run_is_named_and_placed_as_told(api, call, tmp_path):
    values = tmp_path / "values.json"
    values.write_text('{"step2_seed": 1, "step2_flip": true, "cluster_node_selector": {"a": "b"}}')
    arguments = ["--parameters", str(values), "--set", "step2_seed=2"]
    arguments += ["--experiment", "tries", "--run-name", "one", "--service-account", "trainer"]
    done = call(api, *arguments, "--ui", "https://ui.example/pipeline/")
    run = only(api.runs)
    assert run["runtime_config"]["parameters"] == {
        "step2_seed": 2,
        "step2_flip": True,
        "cluster_node_selector": {"a": "b"},
    }
    assert only(api.experiments)["display_name"] == "tries"
    assert (run["display_name"], run["service_account"]) == ("one", "trainer")
    assert f"https://ui.example/pipeline/#/runs/details/{run['run_id']}" in done.out
    assert api.address not in done.out


def test_without_cache_the_uploaded_version_holds_none(api, call):
    assert call(api, "--no-cache").code == 0
    assert "enableCache" not in json.dumps(only(api.versions)["pipeline_spec"])


def test_nothing_is_sent_before_all_parameters_fit(api, call):
    done = call(api, "--set", "seed=3", "--set", "step2_precision=fp8", "--wait")
    assert done.code == 1
    assert done.err.splitlines() == [
        "error: there is no parameter 'seed'; did you mean step1_subset_seed or step2_seed?",
        "error: parameter step2_precision is 'fp8'; choose one of auto, float32, bfloat16, float16",
    ]
    assert api.requests == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--package", "/none.yaml"], "cannot read /none.yaml: No such file or directory; `make"),
        (["--parameters", "/none.json"], "cannot read /none.json: No such file or directory"),
        (["--cron", "0 2 * * *"], "the cron expression '0 2 * * *' has 5 fields, not 6"),
        (["--cron", ""], "the cron expression '' has 0 fields, not 6"),
        (["--interval-seconds", "0"], "the interval is 0 s; it has to be positive"),
        (["--cron", "0 0 2 * * *", "--end", "2020-01-01T00:00:00Z"], "is not after now"),
        (["--cron", "0 0 2 * * *", "--start", "noon"], "'noon' is not a time with its zone"),
        (["--ca-cert", "/none.pem"], "certificates in /none.pem: there is no such file"),
        (["--ca-cert", str(ROOT / "README.md")], "cannot use the certificates in"),
        (["--token-file", "/none"], "cannot read the token in /none: No such file or directory"),
    ],
)
def test_nothing_is_sent_before_everything_else_fits(api, call, arguments, message):
    assert message in call(api, *arguments).error
    assert api.requests == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wait", "--upload-only"], "not allowed with"),
        (["--wait", "--cron", "0 0 2 * * *"], "not allowed with"),
        (["--cron", "0 0 2 * * *", "--interval-seconds", "60"], "not allowed with"),
        (["--start", "2027-01-31T02:00:00Z"], "--start and --end belong to --cron"),
        (["--timeout-seconds", "9"], "--timeout-seconds belongs to --wait"),
        (["--upload-only", "--set", "step2_sed=3"], "--set means nothing with --upload-only"),
        (["--upload-only", "--run-name", "mine"], "--run-name means nothing with --upload-only"),
        (["--token", SECRET], "a token does not belong where `ps` shows it"),
    ],
)
def test_options_that_exclude_each_other_are_refused(api, call, arguments, message):
    done = call(api, *arguments)
    assert done.code == 2
    assert message in done.err
    assert SECRET not in done.err
    assert api.requests == []


def test_an_archived_experiment_is_not_run_in(api, call):
    assert call(api).code == 0
    only(api.experiments)["storage_state"] = "ARCHIVED"
    assert call(api).error.startswith(f"the experiment '{PIPELINE}' is archived; restore it")
    assert len(api.runs) == 1


def test_a_name_that_stands_for_several_is_refused(api, call):
    assert call(api).code == 0
    (experiment,) = api.experiments.values()
    api.experiments["copy"] = experiment | {"experiment_id": "copy"}
    assert f"has 2 experiments of the name '{PIPELINE}'" in call(api).error


# Schedules.


def test_a_cron_schedule_runs_one_at_a_time_and_catches_nothing_up(api, call):
    arguments = ["--cron", "0 0 2 * * *", "--set", "step2_seed=3"]
    done = call(api, *arguments, "--start", "2027-01-31T03:00:00+01:00")
    assert done.code == 0, done.err
    recurring = only(api.recurring_runs)
    assert recurring["display_name"] == f"{PIPELINE} at 0 0 2 * * *"
    assert recurring["trigger"] == {
        "cron_schedule": {"cron": "0 0 2 * * *", "start_time": "2027-01-31T02:00:00Z"}
    }
    assert (recurring["mode"], recurring["max_concurrency"]) == ("ENABLE", "1")
    assert recurring["no_catchup"] is True
    assert recurring["runtime_config"]["parameters"] == {"step2_seed": 3}
    assert f"/#/recurringrun/details/{recurring['recurring_run_id']}" in done.out
    assert api.runs == {}


def test_an_interval_is_sent_with_its_end(api, call):
    arguments = ["--interval-seconds", "3600", "--end", "2099-01-01T00:00:00Z"]
    assert call(api, *arguments, "--run-name", "hourly").code == 0
    recurring = only(api.recurring_runs)
    assert recurring["display_name"] == "hourly"
    assert recurring["trigger"] == {
        "periodic_schedule": {"interval_second": "3600", "end_time": "2099-01-01T00:00:00Z"}
    }


def test_a_schedule_is_not_made_twice(api, call):
    assert call(api, "--interval-seconds", "3600").code == 0
    error = call(api, "--interval-seconds", "3600").error
    assert "there is a recurring run 'shike-digits-lt every 3600 s' already" in error
    assert only(api.recurring_runs)["recurring_run_id"] in error
    assert call(api, "--interval-seconds", "3600", "--experiment", "other").code == 0


# Waiting.


def wait(call, api, *arguments: str) -> Done:
    limits = ["--poll-seconds", "0.02", "--timeout-seconds", "60"]
    return call(api, "--wait", *limits, *arguments)


def states(done: Done) -> list[str]:
    return re.findall(r"^state +(\w+) after 0:00:\d\d$", done.out, re.MULTILINE)


def test_a_run_is_followed_to_its_success(serve, call):
    api = serve(states=("PENDING", "PENDING", "RUNNING", "RUNNING", "SUCCEEDED"))
    done = wait(call, api)
    assert (done.code, done.err) == (0, "")
    assert states(done) == ["PENDING", "RUNNING", "SUCCEEDED"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("FAILED", "the run ended as FAILED in train: exit code 1: the loss is not finite"),
        ("CANCELED", "the run ended as CANCELED"),
        ("SKIPPED", "the run ended as SKIPPED"),
    ],
)
def test_any_other_end_is_a_failure(serve, call, state, message):
    done = wait(call, serve(states=("RUNNING", state)))
    assert done.error == message
    assert states(done) == ["RUNNING", state]


def test_waiting_ends_with_its_limit(serve, call):
    done = wait(call, serve(states=("RUNNING",)), "--timeout-seconds", "0.1")
    assert done.error == "the run is RUNNING after 0.1 s; it goes on"


def test_a_server_that_is_away_for_a_while_is_asked_again(api, call):
    api.fault("GET .*/runs/", times=5, status=503, body=b"upstream connect error")
    done = wait(call, api)
    assert done.code == 0, done.err
    assert states(done) == ["PENDING", "RUNNING", "SUCCEEDED"]
    assert done.out.count("asking again") == 1
    assert "(HTTP 503: upstream connect error); asking again" in done.out


def test_a_server_that_stays_away_ends_the_waiting(api, call, monkeypatch):
    monkeypatch.setattr(submit, "PATIENCE_SECONDS", 0.1)
    api.fault("GET .*/runs/", times=1000)
    assert "closed the connection instead of answering" in wait(call, api).error


def test_a_run_that_is_gone_ends_the_waiting(api, call):
    body = json.dumps({"code": 5, "message": "Run 1 not found.", "details": []}).encode()
    api.fault("GET .*/runs/", status=404, body=body)
    assert wait(call, api).error.endswith("refused the request (HTTP 404: Run 1 not found.)")


def test_a_token_that_is_replaced_while_waiting_counts(serve, call, tmp_path):
    api = serve(token="first", states=("RUNNING", "RUNNING", "SUCCEEDED"))
    file = tmp_path / "token"
    file.write_text("first\n")
    original = api.get_run

    def replace_token(request, run_id):
        api.token = "second"
        file.write_text("second\n")
        return original(request, run_id)

    api.get_run = replace_token
    assert wait(call, api, "--token-file", str(file)).code == 0
    sent = [request.headers["authorization"] for request in api.requests]
    assert sent[0] == "Bearer first"
    assert sent[-1] == "Bearer second"


def test_interrupted_waiting_says_that_the_run_goes_on(serve, call, package, process_environment):
    api = serve(states=("RUNNING",))
    command = [sys.executable, "-m", "pipelines.submit", "--host", api.address]
    process = subprocess.Popen(
        [*command, "--package", str(package), "--wait", "--poll-seconds", "5"],
        cwd=ROOT,
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("state"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    run_id = only(api.runs)["run_id"]
    assert process.returncode == 130
    assert f"the run goes on: {api.address}/#/runs/details/{run_id}" in err
    stop = re.search(r"python -m (pipelines\.submit .*)", err).group(1).split()
    assert "Traceback" not in err
    assert only(api.runs)["state"] == "RUNNING"

    subprocess.run([sys.executable, "-m", *stop], cwd=ROOT, env=process_environment(), check=True)
    assert only(api.runs)["state"] == "CANCELED"


# Who asks.


def test_a_token_of_the_environment_is_sent_with_each_call(serve, call, monkeypatch):
    api = serve(token=SECRET)
    monkeypatch.setenv(connection.TOKEN_VARIABLE, f"{SECRET}\n")
    done = wait(call, api)
    assert done.code == 0, done.err
    assert {r.headers["authorization"] for r in api.requests} == {f"Bearer {SECRET}"}
    assert SECRET not in done.out + done.err


def test_a_token_file_wins_over_the_environment(serve, call, monkeypatch, tmp_path):
    api = serve(token=SECRET)
    file = tmp_path / "token"
    file.write_text(f"{SECRET}\n")
    monkeypatch.setenv(connection.TOKEN_VARIABLE, "another")
    assert call(api, "--token-file", str(file)).code == 0


def test_cookies_are_sent_with_each_call(serve, call, monkeypatch):
    cookies = f"authservice_session={SECRET}; other=1"
    api = serve(cookie=cookies)
    monkeypatch.setenv(connection.COOKIES_VARIABLE, cookies)
    assert call(api).code == 0


def test_missing_credentials_are_told(serve, call):
    error = call(serve(token=SECRET)).error
    assert "wants other credentials (none were given; HTTP 401: Unauthenticated" in error
    assert "Set SHIKE_KFP_TOKEN or SHIKE_KFP_COOKIES, or give --token-file" in error


@pytest.mark.parametrize("status", [401, 403, 400, 500])
def test_no_secret_is_printed_that_the_server_repeats(api, call, monkeypatch, status):
    monkeypatch.setenv(connection.TOKEN_VARIABLE, SECRET)
    monkeypatch.setenv(connection.COOKIES_VARIABLE, "session=c00kie; also=other")
    body = json.dumps({"message": f"got Bearer {SECRET} and session=c00kie, c00kie"}).encode()
    api.fault("POST .*/runs", status=status, body=body)
    error = call(api).error
    assert "got Bearer *** and ***, ***" in error
    assert SECRET not in error
    assert "c00kie" not in error


@pytest.mark.parametrize("status", [401, 403])
def test_refused_credentials_are_named_but_not_shown(api, call, tmp_path, status):
    file = tmp_path / "token"
    file.write_text(SECRET)
    api.fault("healthz", status=status, body=b"<html>Sign in</html>", content_type="text/html")
    error = call(api, "--token-file", str(file)).error
    assert f"(the token of {file} was sent; HTTP {status}: " in error
    assert "html" not in error
    assert SECRET not in error


@pytest.mark.parametrize("token", [f"{SECRET} {SECRET}", f"{SECRET}\n{SECRET}", f"{SECRET}ü"])
def test_a_token_that_is_none_is_not_shown(api, call, tmp_path, token):
    file = tmp_path / "token"
    file.write_text(token)
    error = call(api, "--token-file", str(file)).error
    assert f"what {file} holds cannot be sent" in error
    assert SECRET not in error
    file.write_text(" \n")
    assert call(api, "--token-file", str(file)).error == f"the token file {file} is empty"
    assert api.requests == []


def test_a_password_in_the_address_is_not_shown(call):
    error = call(f"https://me:{SECRET}@kfp.example").error
    assert "the address of KFP must not hold a password" in error
    assert SECRET not in error


def test_a_namespace_goes_with_each_call_where_there_are_several_users(serve, call):
    api = serve(multi_user=True)
    assert call(api).error.endswith("serves several users; give your --namespace")
    done = call(api, "--namespace", "team-a")
    assert done.code == 0, done.err
    assert only(api.pipelines)["namespace"] == only(api.experiments)["namespace"] == "team-a"
    lists = api.called("GET .*/(pipelines|experiments)$")
    assert [request.query["namespace"] for request in lists] == ["team-a", "team-a"]


def test_a_namespace_is_refused_where_there_are_none(api, call):
    error = call(api, "--namespace", "team-a").error
    assert error.endswith("has no users' namespaces; leave out --namespace team-a")


def test_what_kfp_keeps_in_the_home_and_the_environment_does_not_count(
    serve, package, tmp_path, process_environment
):
    api = serve(multi_user=True)
    context = tmp_path / ".config" / "kfp" / "context.json"
    context.parent.mkdir(parents=True)
    content = {"namespace": "other", "client_authentication_cookie": "session=other"}
    content |= {
        "client_authentication_header_name": "x-goog",
        "client_authentication_header_value": "1",
    }
    context.write_text(json.dumps(content))
    other = "http://127.0.0.1:9"
    environment = process_environment(
        HOME=str(tmp_path), KF_PIPELINES_ENDPOINT=other, KF_PIPELINES_UI_ENDPOINT=other
    )
    command = [sys.executable, "-m", "pipelines.submit", "--host", api.address]
    done = subprocess.run(
        [*command, "--package", str(package), "--namespace", "team-a"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert other not in done.stdout
    assert not any({"cookie", "x-goog"} & set(request.headers) for request in api.requests)
    assert only(api.experiments)["namespace"] == "team-a"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [context]
    assert json.loads(context.read_text()) == content


# What may be at the address instead.


@pytest.mark.parametrize(
    "host",
    [
        "kfp.example",
        "kfp.example:8080",
        "ftp://kfp.example",
        "https://",
        "http://a b",
        "http://a?b",
    ],
)
def test_an_address_has_a_scheme(call, host):
    assert "is not the address of KFP; it begins with http:// or https://" in call(host).error


@pytest.mark.parametrize("host", ["http://a:port", "http://[::1"])
def test_an_address_of_no_meaning_is_refused(call, host):
    assert call(host).error.startswith("the address of KFP has a port or a bracket of no meaning")


def test_an_address_copied_from_the_browser_will_do(api, call):
    assert call(f"{api.address}/#/experiments").code == 0


def test_a_port_where_nobody_listens(call, free_port, caplog):
    host = f"http://127.0.0.1:{free_port()}"
    assert call(host).error == (
        f"{host} is not reachable (Connection refused); does its port-forward run?"
    )
    assert caplog.messages == []  # a line for each attempt


def test_a_name_without_address(call):
    host = "https://kfp.invalid"  # reserved for having none
    assert call(host).error == f"{host} is not known: no address belongs to this name"


def test_https_where_http_is_spoken(api, call):
    host = api.address.replace("http:", "https:")
    assert call(host).error == f"{host} does not speak https; write http:// in the address"


def test_http_where_https_is_spoken(serve, call, tls):
    host = serve(tls=tls).address.replace("https:", "http:")
    assert "instead of answering; if it speaks https, write https://" in call(host).error


def test_http_where_a_go_server_speaks_https(api, call):
    body = b"Client sent an HTTP request to an HTTPS server.\n"
    api.fault("healthz", status=400, body=body, content_type="text/plain")
    assert call(api).error == f"{api.address} speaks https; write https:// in the address"


def test_a_certificate_that_nobody_signed_is_trusted_by_name_only(serve, call, tls, certificate):
    api = serve(tls=tls)
    error = call(api).error
    assert "has a certificate that is not trusted (self-signed certificate" in error
    assert "--ca-cert FILE names the authority" in error
    assert api.requests == []
    assert call(api, "--ca-cert", str(certificate)).code == 0
    assert len(api.runs) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"status": 404, "body": b"404 page not found"}, "has no API of KFP (HTTP 404)"),
        ({"status": 200, "body": b"<html>Sign in</html>"}, "is it the page where one logs in"),
        ({"status": 200, "body": b"{}"}, "answers, but not as KFP does"),
        ({"status": 200, "body": b"[1]"}, "answers, but not as KFP does"),
        ({"status": 500, "body": b"\xff\xfe"}, "gave an answer that is not one of KFP 2"),
        ({"status": 502, "body": b"<html>"}, "refused the request (HTTP 502: Bad Gateway)"),
        ({}, "closed the connection instead of answering"),
    ],
)
def test_something_else_than_kfp(api, call, answer, message):
    api.fault("healthz", times=10, **answer)
    assert message in call(api).error
    assert {request.method for request in api.requests} == {"GET"}


@pytest.mark.parametrize(
    ("release", "message"),
    [
        ("1.8.5", "is KFP 1.8.5, which has the API v1beta1 only; the pipeline needs 2.16 or newer"),
        ("2.4.0", "is KFP 2.4.0; the pipeline needs 2.16 or newer"),
    ],
)
def test_a_kfp_that_is_too_old(serve, call, release, message):
    api = serve(release=release)
    assert call(api).error == f"{api.address} {message}"
    assert {request.method for request in api.requests} == {"GET"}


def test_a_kfp_of_unknown_age_is_known_by_what_it_refuses(serve, call):
    api = serve(release="0.15.0-of-a-vendor")
    error = call(api).error
    assert error.startswith(f"{api.address} is older than KFP 2.16: invalid v2 pipeline spec")


@pytest.mark.parametrize(
    ("pattern", "content_type", "body"),
    [
        (
            "upload_version",
            "application/json",
            b'{"error_message": "no\\nway", "error_details": "x"}',
        ),
        ("upload_version", "text/plain", b"no way\n"),
        ("POST .*/pipelines$", "application/json", b'{"code": 3, "message": "no way"}'),
        ("POST .*/runs", "application/json", b'{"error": "no way", "code": 3}'),
    ],
)
def test_the_message_of_the_server_is_passed_on(api, call, pattern, content_type, body):
    api.fault(pattern, status=400, body=body, content_type=content_type)
    assert call(api).error == f"{api.address} refused the request (HTTP 400: no way)"
    assert api.runs == {}


def test_a_session_that_ends_in_between_is_not_taken_for_success(api, call):
    api.fault("POST .*/runs", status=200, body=b"<html>Sign in</html>", content_type="text/html")
    assert call(api).error.endswith("gave an answer that is not one of KFP 2")


def test_an_answer_that_does_not_come_leaves_it_open(api, call, monkeypatch):
    # Long enough for what comes before, also on a busy machine.
    monkeypatch.setattr(submit, "CHANGE_SECONDS", 5)
    api.fault("POST .*/runs", delay=7, status=200, body=b"{}")
    error = call(api).error
    assert error.endswith("did not answer; the UI shows whether it was carried out")
    assert len(api.called("POST .*/runs")) == 1


# Make.


def test_make_compiles_and_submits_a_variant():
    command = ["make", "--dry-run", "pipeline-submit", "DATASET=cifar100-lt/no-dkt"]
    command += ["HOST=https://kfp.example", "COMPILE_ARGS=--gpu-count 2", "ARGS=--wait"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiling, submitting = re.findall(
        r"python -m pipelines\.(.*(?:\\\n.*)?)", done.stdout.replace("\\\n", "")
    )
    package = "build/cifar100-lt-no-dkt.yaml"
    wanted = ["compile", "--recipe", "cifar100-lt/no-dkt", "--output", package, "--gpu-count", "2"]
    assert compiling.split() == wanted
    wanted = ["submit", "--host", "'https://kfp.example'", "--package", package, "--wait"]
    assert submitting.split() == wanted


def test_make_asks_for_the_host():
    environment = {name: value for name, value in os.environ.items() if name != "HOST"}
    command = ["make", "--old-file=.venv/.synced", "pipeline-submit"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "HOST is missing, the address of KFP: make pipeline-submit HOST=" in done.stderr

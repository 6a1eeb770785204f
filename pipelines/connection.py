"""A connection to the API of Kubeflow Pipelines whose every failure is one line for people."""

import json
import logging
import re
import ssl
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3

from shike_core.errors import ShikeError

TOKEN_VARIABLE = "SHIKE_KFP_TOKEN"
COOKIES_VARIABLE = "SHIKE_KFP_COOKIES"
OLDEST = (2, 16)
"""The first release whose backend knows parameters with a few choices; older ones refuse them."""
CONNECT_SECONDS = 5
ANSWER_SECONDS = 30
_EXPLAINED = 500


class ClusterError(ShikeError):
    """The API could not be reached, refused the request or is another one.

    Attributes:
        status: of HTTP; 0 without an answer.
        temporary: whether the same request may succeed a little later.
    """

    def __init__(self, message: str, *, status: int = 0, temporary: bool = False) -> None:
        super().__init__(message)
        self.status, self.temporary = status, temporary


@dataclass(frozen=True)
class Credentials:
    """Who asks: a bearer token or the cookies of a session, never from the command line.

    Attributes:
        token_file: read anew for each request, since a projected token is replaced from time to
            time.
        token: used without a file.
        cookies: as in the header, ``name=value; name=value``.
    """

    token_file: Path | None = None
    token: str = field(default="", repr=False)
    cookies: str = field(default="", repr=False)

    @classmethod
    def of(cls, token_file: Path | None, environment: Mapping[str, str]) -> "Credentials":
        """From a file, if there is one, and from the environment."""
        return cls(
            token_file,
            "" if token_file else _checked(environment.get(TOKEN_VARIABLE, ""), TOKEN_VARIABLE),
            _checked(environment.get(COOKIES_VARIABLE, ""), COOKIES_VARIABLE, also=" "),
        )

    def bearer(self) -> str:
        """The token, or an empty string."""
        if self.token_file is None:
            return self.token
        try:
            token = self.token_file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ClusterError(f"cannot read the token in {self.token_file}: {reason}") from error
        if not token.strip():
            raise ClusterError(f"the token file {self.token_file} is empty")
        return _checked(token, str(self.token_file))

    def refresh_api_key_hook(self, configuration: Any) -> None:
        """What the API's client calls before each request."""
        configuration.api_key["authorization"] = self.bearer()

    def hide(self, text: str) -> str:
        """The text without the secrets that it may quote."""
        pairs = [pair.strip() for pair in self.cookies.split(";")]
        secrets = {self.bearer(), *pairs, *(pair.partition("=")[2] for pair in pairs)}
        for secret in sorted(filter(None, secrets), key=len, reverse=True):
            text = text.replace(secret, "***")
        return text

    def __str__(self) -> str:
        if self.token_file or self.token:
            return f"the token of {self.token_file or TOKEN_VARIABLE} was sent"
        return f"the cookies of {COOKIES_VARIABLE} were sent" if self.cookies else "none were given"


def _checked(text: str, origin: str, also: str = "") -> str:
    # Python quotes a header that it refuses, secret and all, so what it would refuse stops here.
    text = text.strip()
    if not all("!" <= letter <= "~" or letter in also for letter in text):
        raise ClusterError(
            f"what {origin} holds cannot be sent: a space, a line break or a letter that is not "
            "ASCII is in it"
        )
    return text


@dataclass(frozen=True)
class Cluster:
    """A checked connection.

    Attributes:
        host: address of the API, without a slash at its end.
        client: ``kfp.Client``. Only the generated calls that it holds are used: those around them
            have no time limits, print, and do not pass on a namespace.
        credentials: who asks.
        namespace: of the user, or empty where there is but one.
    """

    host: str
    client: Any
    credentials: Credentials
    namespace: str = ""

    def call(
        self, function: Callable[..., Any], *, seconds: int = ANSWER_SECONDS, **kwargs: Any
    ) -> Any:
        """Call one of the client's generated functions.

        Args:
            function: such as ``client.runs.run_service_get_run``.
            seconds: limit for the answer; where an answer is lost, nobody knows whether the
                request took effect.
            **kwargs: its arguments.

        Raises:
            ClusterError: anything but success.
        """
        from kfp_server_api import ApiException

        limits = (CONNECT_SECONDS, seconds)
        try:
            return function(**kwargs, _request_timeout=limits)
        except ApiException as error:
            raise self._refused(error.status, error.reason, error.body) from error
        except urllib3.exceptions.HTTPError as error:
            raise self._unanswered(error) from error
        except (AttributeError, TypeError, ValueError) as error:
            # The generated client stumbles over an answer that has another shape.
            raise ClusterError(f"{self.host} gave an answer that is not one of KFP 2") from error

    def _refused(self, status: int, reason: Any, body: Any) -> ClusterError:
        message = self.credentials.hide(_message(body) or str(reason or ""))
        said = f": {message}" if message else ""
        if status == 401:
            return ClusterError(
                f"{self.host} wants other credentials ({self.credentials}; HTTP 401{said}). Set "
                f"{TOKEN_VARIABLE} or {COOKIES_VARIABLE}, or give --token-file; has it expired?",
                status=status,
            )
        if status == 403:
            return ClusterError(
                f"{self.host} does not allow this ({self.credentials}; HTTP 403{said}). Ask for "
                "the right to it, or check --namespace and --service-account",
                status=status,
            )
        if status == 400 and re.search("HTTP request.* HTTPS", message):
            return ClusterError(f"{self.host} speaks https; write https:// in the address")
        if 'unknown field "literals"' in message:
            return ClusterError(f"{self.host} is older than KFP {_release(OLDEST)}{said}")
        return ClusterError(
            f"{self.host} refused the request (HTTP {status}{said})",
            status=status,
            temporary=status in (408, 429) or status >= 500,
        )

    def _unanswered(self, error: urllib3.exceptions.HTTPError) -> ClusterError:
        cause = getattr(error, "reason", None) or error
        return ClusterError(
            self.credentials.hide(f"{self.host} {_why(cause, self.host)}"),
            temporary=not isinstance(cause, urllib3.exceptions.SSLError),
        )


def connect(
    host: str,
    credentials: Credentials,
    ca_cert: Path | None = None,
    namespace: str = "",
) -> Cluster:
    """Connect and find out whether KFP 2 answers.

    Raises:
        ClusterError: it does not.
    """
    host = _address(host)
    if ca_cert:
        try:
            ssl.create_default_context(cafile=ca_cert)
        except OSError as error:
            reason = error.strerror if ca_cert.is_file() else "there is no such file"
            raise ClusterError(f"cannot use the certificates in {ca_cert}: {reason}") from error
    cluster = Cluster(host, _client(host, credentials, ca_cert), credentials, namespace)
    health = _health(cluster)
    release = re.match(r"v?(2)\.(\d+)", str(health.get("tag_name", "")))
    if release and tuple(map(int, release.groups())) < OLDEST:
        raise ClusterError(
            f"{host} is KFP {health['tag_name']}; the pipeline needs {_release(OLDEST)} or newer"
        )
    if health["multi_user"] and not namespace:
        raise ClusterError(f"{host} serves several users; give your --namespace")
    if namespace and not health["multi_user"]:
        raise ClusterError(f"{host} has no users' namespaces; leave out --namespace {namespace}")
    return cluster


def _address(host: str) -> str:
    address = host.partition("#")[0].rstrip("/")
    try:
        parts = urlsplit(address)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise ClusterError("the address of KFP has a port or a bracket of no meaning") from None
    if parts.username or parts.password:
        raise ClusterError(
            f"the address of KFP must not hold a password; use {TOKEN_VARIABLE} or --token-file"
        )
    if not valid or parts.query or re.search(r"\s", address):
        raise ClusterError(
            f"{host!r} is not the address of KFP; it begins with http:// or https://, as in "
            "https://kfp.example.org"
        )
    return address


def _client(host: str, credentials: Credentials, ca_cert: Path | None) -> Any:
    from kfp import client as kfp_client

    # The file may hold a namespace, a cookie and a header meant for another cluster; and where a
    # user's namespace is found out, it is written.
    kfp_client.Client._LOCAL_KFP_CONTEXT = ""
    token = credentials.bearer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one to say that KFP 1 will not do
        client = kfp_client.Client(
            host,
            # Given any, it neither asks the server for up to 25 seconds nor writes that file; ours
            # is passed with each call.
            namespace="unused",
            existing_token=token or None,
            cookies=credentials.cookies,
            ssl_ca_cert=str(ca_cert) if ca_cert else None,
        )
    # It tells of each attempt, and making a client has set its level.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    if token:
        client._existing_config.refresh_api_key_hook = credentials.refresh_api_key_hook
    return client


def _health(cluster: Cluster) -> dict[str, Any]:
    check = cluster.client.healthzs.healthz_service_get_healthz
    try:
        health = _json(cluster.call(check, _preload_content=False).data)
    except ClusterError as error:
        if error.status != 404:
            raise
        release = _first_generation(check.__self__.api_client, cluster)
        if release:
            raise ClusterError(
                f"{cluster.host} is KFP {release}, which has the API v1beta1 only; the pipeline "
                f"needs {_release(OLDEST)} or newer"
            ) from error
        raise ClusterError(
            f"{cluster.host} has no API of KFP (HTTP 404). The API is where KFP's UI is; in "
            "Kubeflow that is the dashboard's address followed by /pipeline"
        ) from error
    if not isinstance(health, dict) or "multi_user" not in health:
        raise ClusterError(
            f"{cluster.host} answers, but not as KFP does; is it the page where one logs in "
            f"({cluster.credentials})?"
        )
    return health


def _first_generation(api_client: Any, cluster: Cluster) -> str:
    """The release of a KFP that has the old API; empty if there is none of these either."""
    try:
        answer = cluster.call(
            api_client.call_api,
            resource_path="/apis/v1beta1/healthz",
            method="GET",
            auth_settings=["Bearer"],
            _preload_content=False,
            _return_http_data_only=True,
        )
    except ClusterError:
        return ""
    health = _json(answer.data)
    if not isinstance(health, dict) or not {"tag_name", "commit_sha"} & set(health):
        return ""
    return str(health.get("tag_name") or "1")


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _message(body: Any) -> str:
    """What an answer says is wrong: the API's JSON, the upload's JSON, or a short plain text."""
    text = body if isinstance(body, str) else ""
    found = _json(text.encode())
    if isinstance(found, dict):
        said = [found.get(key) for key in ("message", "error_message", "error")]
        text = next((str(word) for word in said if word), "")
    elif "<" in text:  # a page
        text = ""
    text = " ".join(text.split())
    return text if len(text) <= _EXPLAINED else f"{text[:_EXPLAINED]}..."


def _why(cause: BaseException, host: str) -> str:
    errors, text = urllib3.exceptions, " ".join(str(cause).split())
    if isinstance(cause, errors.SSLError):
        if re.search("WRONG_VERSION_NUMBER|UNKNOWN_PROTOCOL|record layer", text, re.IGNORECASE):
            return "does not speak https; write http:// in the address"
        if "CERTIFICATE_VERIFY_FAILED" in text:
            reason = text.partition("certificate verify failed:")[2].partition("(_ssl")[0].strip()
            return (
                f"has a certificate that is not trusted ({reason}); --ca-cert FILE names the "
                "authority that signed it"
            )
        return f"cannot be talked to over TLS: {text}"
    if isinstance(cause, errors.NameResolutionError):
        return "is not known: no address belongs to this name"
    if isinstance(cause, errors.NewConnectionError):
        reason = re.sub(r".*: (\[Errno -?\d+\] )?", "", text)
        return f"is not reachable ({reason}); does its port-forward run?"
    if isinstance(cause, errors.ConnectTimeoutError):
        return f"does not answer within {CONNECT_SECONDS} s; is a VPN or a port-forward missing?"
    if isinstance(cause, errors.ReadTimeoutError):
        return "took the request, but did not answer; the UI shows whether it was carried out"
    if isinstance(cause, errors.ProtocolError):
        other = "; if it speaks https, write https://" if host.startswith("http:") else ""
        return f"closed the connection instead of answering{other}"
    return f"cannot be talked to: {text}"


def _release(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))

"""Serve a registered model over HTTP with MLflow's own server."""

import os
import sys
from pathlib import Path

import tyro

from components import tracking
from pipelines.rollback import DEFAULT_MODEL
from pipelines.run_local import HOME, exit_on_error, local_or_named_server


def main(
    model: tyro.conf.Positional[str] = DEFAULT_MODEL,
    host: str = "127.0.0.1",
    port: int = 5000,
    workers: int = 1,
    home: Path = HOME,
) -> None:
    """Serve a registered model over HTTP until Ctrl-C; docs/serving.md says what to send.

    Args:
        model: a registered model, whose champion is served, or NAME@ALIAS, or NAME/VERSION.
        host: address to listen at; anyone who reaches it may ask the model.
        port: to listen at.
        workers: processes that answer.
        home: where local runs are kept; used if MLFLOW_TRACKING_URI names no server.
    """
    with exit_on_error("server"):
        address = tracking.address_to_serve(local_or_named_server(home), model)
    print(f"serving {address} at http://{host}:{port}/invocations", flush=True)
    here = Path(sys.executable).parent
    # MLflow starts a server that it expects on the path, as in an environment that is activated.
    environment = os.environ | {"PATH": f"{here}{os.pathsep}{os.environ['PATH']}"}
    arguments = ["models", "serve", "--model-uri", address, "--env-manager", "local"]
    arguments += ["--host", host, "--port", str(port), "--workers", str(workers)]
    os.execve(here / "mlflow", ["mlflow", *arguments], environment)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m pipelines.serve")

"""Start MLflow's tracking server with users on a PostgreSQL database; `make mlflow-server`.

The database is the one that ``MLFLOW_STORE`` names, as in ``postgresql://mlflow@host/mlflow``, or
without it the one that ``psql`` would take: PGHOST, PGUSER, PGDATABASE, PGPASSWORD, ~/.pgpass.
Everything else is set by MLflow's own variables (MLFLOW_HOST, MLFLOW_PORT, MLFLOW_WORKERS,
MLFLOW_ARTIFACTS_DESTINATION, MLFLOW_AUTH_ADMIN_PASSWORD, ...) and arguments.
"""

import os
import secrets
import sys
from pathlib import Path

import psycopg2
from psycopg2.extensions import parse_dsn

ROOT = Path(__file__).parents[1]
STORE = "MLFLOW_STORE"
ADMIN_PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"
VARIABLES = {
    "host": "PGHOST",
    "port": "PGPORT",
    "user": "PGUSER",
    "password": "PGPASSWORD",
    "dbname": "PGDATABASE",
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
}
"""Where PostgreSQL's client looks for what an address leaves out."""


def variables_of(store: str) -> dict[str, str]:
    """The parts of a database's address as variables, so that no URI holds a password.

    Raises:
        ValueError: it is no address of a PostgreSQL database.
    """
    if not store:
        return {}
    scheme, separator, rest = store.partition("://")
    if not separator or scheme.partition("+")[0] not in ("postgresql", "postgres"):
        raise ValueError(f"{STORE} has to look like postgresql://user@host/database")
    try:
        parts = parse_dsn(f"postgresql://{rest}")
    except psycopg2.ProgrammingError:
        parts = {}
    # Messages of PostgreSQL repeat what it could not read, which may be part of a password.
    if not parts or rest.count("@") > 1 or not parts.get("port", "0").isdigit():
        raise ValueError(
            f"{STORE} cannot be read; write it as postgresql://user@host:port/database, and "
            "in a password @ as %40, / as %2F, : as %3A, % as %25"
        )
    if unknown := parts.keys() - VARIABLES:
        raise ValueError(
            f"{STORE} has parameters that are not passed on: {', '.join(sorted(unknown))}; "
            "leave them out, or set PostgreSQL's own variables for them"
        )
    return {VARIABLES[key]: value for key, value in parts.items()}


def check_database() -> None:
    """Say in one line what MLflow would try ten times, or take long to find out.

    Raises:
        ValueError: nobody can connect to the database, or nobody could to the server.
    """
    try:
        with psycopg2.connect("", connect_timeout=10) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT to_regclass('users') IS NULL")
            ((no_users,),) = cursor.fetchall()
    except psycopg2.OperationalError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the database cannot be used ({reason}); check {STORE}, or PGHOST, PGUSER, "
            "PGDATABASE and PGPASSWORD, and that PostgreSQL runs"
        ) from None
    if no_users and not os.environ.get(ADMIN_PASSWORD):
        raise ValueError(
            f"{ADMIN_PASSWORD} is not set; a new server needs it once, for its first user: admin"
        )


def main() -> None:
    """Become the server, with the arguments of the command line."""
    try:
        os.environ.update(variables_of(os.environ.pop(STORE, "")))
        check_database()
    except ValueError as error:
        sys.exit(f"error: {error}")
    for name, value in {
        "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg2://",
        "MLFLOW_AUTH_CONFIG_PATH": str(ROOT / "docker/mlflow-auth.ini"),
        "MLFLOW_ARTIFACTS_DESTINATION": str(ROOT / ".shike/server-artifacts"),
        # Guards one form in the browser; it has to outlive a restart only while that is filled in.
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # jobs are for language models
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():
        os.environ.setdefault(name, value)
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
    os.execv(sys.executable, [*command, *sys.argv[1:]])


if __name__ == "__main__":
    main()

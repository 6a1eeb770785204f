"""A compiled pipeline as a file: its name, its version and the values that its parameters take."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from shike_core.errors import ShikeError

KINDS = {
    "STRING": "a text",
    "NUMBER_INTEGER": "a whole number",
    "NUMBER_DOUBLE": "a number",
    "BOOLEAN": "true or false",
    "LIST": "a JSON list",
    "STRUCT": "a JSON object",
}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast
_EXACT = 2**53  # the API carries every number as a double


class PackageError(ShikeError):
    """The file is no compiled pipeline, or the values given do not fit its parameters."""


@dataclass(frozen=True)
class Package:
    """A compiled YAML file.

    Attributes:
        text: its content.
        documents: the same parsed: the pipeline, then what it asks of the platform.
    """

    text: str
    documents: tuple[dict[str, Any], ...]

    @property
    def name(self) -> str:
        """Name of the pipeline."""
        return str(self.documents[0]["pipelineInfo"]["name"])

    @property
    def description(self) -> str:
        """Description of the pipeline."""
        return str(self.documents[0]["pipelineInfo"].get("description", ""))

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """Definition of every parameter."""
        inputs: dict[str, Any] = self.documents[0]["root"].get("inputDefinitions", {})
        return dict(inputs.get("parameters", {}))

    @property
    def tag(self) -> str:
        """Tag of the images, by default the git commit; empty if they have none in common."""
        executors = self.documents[0].get("deploymentSpec", {}).get("executors", {}).values()
        images = [executor.get("container", {}).get("image", "") for executor in executors]
        names = [image.rpartition("/")[2] for image in images if image]
        tags = {name.partition(":")[2] for name in names}
        return tags.pop() if len(tags) == 1 else ""

    @property
    def version(self) -> str:
        """Name of the version: the images' tag and a digest of the content.

        The same commit compiled with other options is another version, so that one which is there
        already can be used again without a look into it.
        """
        content = json.dumps(self.documents, sort_keys=True, default=str)
        words = [self.tag[:40], hashlib.sha256(content.encode()).hexdigest()[:8]]
        # Where KFP keeps pipelines as Kubernetes objects, a version's name must be one of theirs.
        return re.sub("[^a-z0-9.-]", "-", "-".join(filter(None, words)).lower()).lstrip("-.")

    def without_cache(self) -> "Package":
        """The same pipeline with every step run anew.

        ``kfp.Client`` has a switch for this, which reaches neither the steps inside an exit handler
        or a condition nor a run of an uploaded version.
        """
        first, *others = json.loads(json.dumps(self.documents, default=str))
        for component in (first["root"], *first.get("components", {}).values()):
            for task in component.get("dag", {}).get("tasks", {}).values():
                task["cachingOptions"] = {}
        documents = (first, *others)
        return Package(yaml.safe_dump_all(documents, sort_keys=False), documents)

    def values(self, assignments: Sequence[str], file: Path | None = None) -> dict[str, Any]:
        """The parameters' values in their types.

        Args:
            assignments: ``name=value`` each; they win over the file.
            file: JSON object of names and values.

        Raises:
            PackageError: one line for each thing that is wrong.
        """
        problems, values = [], {}
        given = _read_values(file) if file else {}
        for name, value, is_text in _all_values(assignments, given):
            try:
                values[name] = _value(name, value, self.parameters, is_text)
            except ValueError as error:
                problems.append(str(error))
        for name, parameter in self.parameters.items():
            optional = parameter.get("isOptional") or "defaultValue" in parameter
            if not optional and name not in values:
                problems.append(f"parameter {name} has no default; give it by --set {name}=...")
        if problems:
            raise PackageError("\n".join(problems))
        return values


def read_package(path: Path) -> Package:
    """Read a compiled YAML file.

    Raises:
        PackageError: there is no such file, or it is something else.
    """
    compile_first = "; `make pipeline-compile` writes one"
    try:
        text = path.read_text()
        documents = tuple(filter(None, yaml.load_all(text, _LOADER)))
    except OSError as error:
        raise PackageError(f"cannot read {path}: {error.strerror}{compile_first}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise PackageError(f"{path} is not YAML ({reason}){compile_first}") from error
    first = documents[0] if documents and isinstance(documents[0], dict) else {}
    if first.get("kind") == "Workflow":
        raise PackageError(f"{path} is a workflow compiled by KFP 1, not a KFP 2 pipeline")
    info, root = first.get("pipelineInfo"), first.get("root")
    if not isinstance(info, dict) or not info.get("name") or not isinstance(root, dict):
        raise PackageError(
            f"{path} is not a compiled pipeline: it lacks pipelineInfo and root{compile_first}"
        )
    return Package(text, documents)


def _read_values(file: Path) -> Mapping[str, Any]:
    try:
        given = json.loads(file.read_text(), parse_constant=_no_constant)
    except OSError as error:
        raise PackageError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise PackageError(f"{file} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise PackageError(f'{file} is not a JSON object such as {{"step2_seed": 3}}')
    return given


def _all_values(
    assignments: Sequence[str], given: Mapping[str, Any]
) -> Iterator[tuple[str, Any, bool]]:
    texts: dict[str, str] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise PackageError(f"--set {assignment} has no value; write --set {assignment}=VALUE")
        if texts.setdefault(name, text) != text:
            raise PackageError(f"--set gives {name} twice: {texts[name]!r} and {text!r}")
    yield from ((name, value, False) for name, value in given.items() if name not in texts)
    yield from ((name, text, True) for name, text in texts.items())


def _value(name: str, value: Any, parameters: Mapping[str, dict[str, Any]], is_text: bool) -> Any:
    if name not in parameters:
        raise ValueError(f"there is no parameter {name!r}{_suggestion(name, list(parameters))}")
    kind, literals = parameters[name].get("parameterType", ""), parameters[name].get("literals")
    if kind not in KINDS:
        raise ValueError(f"parameter {name} is of the kind {kind}, which cannot be given")
    try:
        converted = _convert(kind, _parse(kind, value) if is_text else value)
    except (ValueError, OverflowError) as error:
        shown = value if is_text else json.dumps(value)
        raise ValueError(f"parameter {name} wants {KINDS[kind]}, got {shown!r}") from error
    if literals and converted not in literals:
        choices = ", ".join(str(literal) for literal in literals)
        raise ValueError(f"parameter {name} is {converted!r}; choose one of {choices}")
    return converted


def _suggestion(name: str, names: list[str]) -> str:
    ends = {known.partition("_")[2]: known for known in names}  # people leave out the step
    meant = [known for known in names if known.endswith(f"_{name}")]
    meant += [ends.get(close, close) for close in get_close_matches(name, [*names, *ends])]
    if meant:
        return f"; did you mean {' or '.join(dict.fromkeys(meant))}?"
    return ", nor one of a similar name; the form of the KFP UI shows all of them"


def _parse(kind: str, text: str) -> Any:
    if kind == "STRING":
        return text
    if kind == "BOOLEAN":
        text = text.lower()
    if kind.startswith("NUMBER") and re.fullmatch(r"[+-]?[0-9]*\.?[0-9]*(e[+-]?[0-9]+)?", text):
        return int(text) if re.fullmatch("[+-]?[0-9]+", text) else float(text)
    return json.loads(text, parse_constant=_no_constant)


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number")


def _convert(kind: str, value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "NUMBER_INTEGER" and is_number and value == int(value) and abs(value) <= _EXACT:
        return int(value)
    if kind == "NUMBER_DOUBLE" and is_number and math.isfinite(value):
        return float(value)
    types = {"STRING": str, "BOOLEAN": bool, "LIST": list, "STRUCT": dict}
    if kind in types and isinstance(value, types[kind]):
        return value
    raise ValueError("another type")

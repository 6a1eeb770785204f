"""The only names of container images; registry and tag come from the environment at compile time.

The tag must be immutable, because KFP's cache knows an image by its name only.
"""

import os

REGISTRY = os.environ.get("SHIKE_REGISTRY", "")
TAG = os.environ.get("SHIKE_TAG", "local")


def _image(name: str) -> str:
    return f"{REGISTRY.rstrip('/')}/{name}:{TAG}" if REGISTRY else f"{name}:{TAG}"


DATA = _image("shike-python-data")
TRAIN = _image("shike-python-train")
EVALUATE = _image("shike-python-evaluate")
REGISTER = _image("shike-python-register")

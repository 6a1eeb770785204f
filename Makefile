# Everything a person or a machine does with this project; `make` alone lists it.

PYTHON ?= python3.11
DATASET ?= digits-lt
DATA_DIR ?=
RUNNER ?=
PORT ?= 5000
STORE ?= sqlite:///$(CURDIR)/.shike/mlflow.db
ARGS ?=
COMPILE_ARGS ?=
JOBS ?= $(shell expr $$(nproc) + 1)

PACKAGE = build/$(subst /,-,$(DATASET)).yaml
NAMES = $(if $(REGISTRY),--registry '$(REGISTRY)') $(if $(TAG),--tag '$(TAG)')
IMAGE_ARGS = $(NAMES) \
  $(if $(filter-out 0,$(ALLOW_DIRTY)),--allow-dirty) $(IMAGES)
# A file's tests share what took long to make, so they stay together; tests/conftest.py says which
# file comes when.
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
BIN := .venv/bin
SYNCED := .venv/.synced
COMPILE := pip compile --quiet --generate-hashes --python-version 3.11 --no-header --no-annotate
# uv from PATH, or the locked one that `setup` puts here.
UV := $(or $(shell command -v uv 2>/dev/null),.tools/venv/bin/uv)
UV_READY := $(if $(filter .tools/%,$(UV)),.tools/venv/.installed)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup lock format lint typecheck test test-all test-fast check run pipeline-compile \
  pipeline-submit sweep sweep-compile compare rollback predict serve mlflow-ui mlflow-server \
  images images-push sbom audit bench release \
  screenshots clean

##@ Start here
help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  %-18s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@printf '\nVariables, as in `make run DATASET=cifar100-lt`:\n'
	@printf '  %-14s%s\n' \
	  DATASET 'recipe: digits-lt, cifar10-lt, cifar100-lt, imagenet-lt, inaturalist2018,' \
	  '' '  places-lt (now $(DATASET)), or a variant of one, as in' \
	  '' '  cifar100-lt/no-dkt: docs/method.md has them' \
	  DATA_DIR "folder with the source's files, or its URL; CIFAR is downloaded without" \
	  RUNNER 'docker runs each step in its own container (make images first)' \
	  HOST 'address of the KFP that pipeline-submit uses, http(s)://...' \
	  REGISTRY 'HOST/PROJECT in front of the names of the images' \
	  TAG 'of the images (default: the git commit)' \
	  IMAGES 'only some of data, register, mlflow, train, evaluate' \
	  ALLOW_DIRTY '1 makes images of files that are not committed' \
	  BASE_IMAGE 'with Python, what images are made from (python:3.11-slim-bookworm)' \
	  RUNS "that compare takes: ids, 'names', NAME@champion, NAME/VERSION of models" \
	  MODEL 'registered model of rollback, predict and serve (default: that of the digits)' \
	  FILES 'that predict looks at: images, folders, or - for one image on standard input' \
	  VERSION 'that rollback goes back to' \
	  ARGS 'further arguments of the command behind run, test, lock, ...' \
	  COMPILE_ARGS 'those of compiling, when pipeline-submit does it' \
	  JOBS 'processes that test at the same time, 0 for this one (default: one more than cores)' \
	  STORE 'database that mlflow-ui shows (default: that of the runs made here)' \
	  MLFLOW_STORE 'database of mlflow-server, postgresql://USER@HOST/NAME (or PGHOST, ...)' \
	  PORT 'port of mlflow-ui, mlflow-server and serve (now $(PORT))' \
	  PYTHON 'interpreter the environment is made from (now $(PYTHON))'

setup: $(SYNCED) ## make .venv from the lock (the other targets do it when needed)

##@ Run
run: $(SYNCED) ## build a subset, train, evaluate and register, all on this machine
	@exec $(BIN)/python -m pipelines.run_local --recipe $(DATASET) \
	  $(if $(DATA_DIR),--data-dir '$(DATA_DIR)') $(if $(RUNNER),--runner $(RUNNER)) \
	  $(if $(TAG),--tag '$(TAG)') $(ARGS)

pipeline-compile: $(SYNCED) ## write the pipeline for a cluster as build/DATASET.yaml
	@mkdir -p build
	@exec $(BIN)/python -m pipelines.compile --recipe $(DATASET) \
	  --output $(PACKAGE) $(NAMES) $(ARGS)

pipeline-submit: $(SYNCED) ## compile it, upload it to the KFP at HOST and run it there
	@test -n '$(HOST)' || { echo 'HOST is missing, the address of KFP:' \
	  'make pipeline-submit HOST=https://kfp.example.org' >&2; exit 1; }
	@$(BIN)/python -m pipelines.compile --recipe $(DATASET) \
	  --output $(PACKAGE) $(NAMES) $(COMPILE_ARGS)
	@exec $(BIN)/python -m pipelines.submit --host '$(HOST)' --package $(PACKAGE) $(ARGS)

sweep: $(SYNCED) ## train a recipe and its variants with several seeds here; register the best
	@exec $(BIN)/python -m pipelines.sweep --run --base $(DATASET) \
	  $(if $(DATA_DIR),--data-dir '$(DATA_DIR)') $(ARGS)

sweep-compile: $(SYNCED) ## write the sweep for a cluster as build/sweep-DATASET.yaml
	@mkdir -p build
	@exec $(BIN)/python -m pipelines.sweep --base $(DATASET) \
	  --output build/sweep-$(subst /,-,$(DATASET)).yaml $(NAMES) $(ARGS)

compare: $(SYNCED) ## compare evaluated runs image by image: RUNS=, or the latest two
	@exec $(BIN)/python -m pipelines.compare $(RUNS) $(ARGS)

rollback: $(SYNCED) ## make the champion before the present one, or VERSION, champion of MODEL again
	@exec $(BIN)/python -m pipelines.rollback $(if $(MODEL),'$(MODEL)') \
	  $(if $(VERSION),--to '$(VERSION)') $(ARGS)

predict: $(SYNCED) ## what the champion of MODEL says of images: FILES="a.png folder/"
	@exec $(BIN)/python -m pipelines.predict $(FILES) $(if $(MODEL),--model '$(MODEL)') $(ARGS)

serve: $(SYNCED) ## answer over HTTP with the champion of MODEL, on PORT
	@exec $(BIN)/python -m pipelines.serve $(if $(MODEL),'$(MODEL)') --port $(PORT) $(ARGS)

mlflow-ui: $(SYNCED) ## show the local runs and models in a browser
	@exec $(BIN)/mlflow ui --backend-store-uri '$(STORE)' \
	  --host 127.0.0.1 --port $(PORT) $(ARGS)

mlflow-server: $(SYNCED) ## a tracking server for a team: PostgreSQL, users (docs/mlflow-server.md)
	@exec $(BIN)/python docker/mlflow_server.py --port $(PORT) $(ARGS)

##@ Containers
images: ## build the images of the steps and of the tracking server
	@exec $(PYTHON) docker/build.py $(if $(BASE_IMAGE),--base-image '$(BASE_IMAGE)') $(IMAGE_ARGS)

images-push: ## push them to REGISTRY
	@exec $(PYTHON) docker/build.py --push $(IMAGE_ARGS)

sbom: $(SYNCED) ## write down what is in them, in CycloneDX, as build/sbom/IMAGE.cdx.json
	@exec $(BIN)/python docker/sbom.py $(IMAGE_ARGS)

audit: $(SYNCED) ## ask for known vulnerabilities in what they are made from
	@exec $(BIN)/python docker/audit.py $(ARGS)

##@ Check
test: $(SYNCED) ## all tests but the slow ones
	@exec $(PYTEST) -m 'not slow' $(ARGS)

test-all: $(SYNCED) ## all tests
	@exec $(PYTEST) $(ARGS)

test-fast: $(SYNCED) ## tests that need neither a container engine nor a browser
	@exec $(PYTEST) -m 'not slow and not docker and not browser' $(ARGS)

lint: $(SYNCED) ## style, format and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

typecheck: $(SYNCED) ## mypy
	$(BIN)/mypy

check: lint typecheck test-fast ## what a commit has to pass

bench: $(SYNCED) ## measure the training engine against its plain form on this machine
	@exec $(BIN)/python -m benchmarks.bench $(ARGS)

##@ Keep
format: $(SYNCED) ## put the code into shape
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

lock: | $(UV_READY) ## renew requirements/*.lock; ARGS=--upgrade takes newer versions
	$(UV) $(COMPILE) $(ARGS) requirements/uv.in -o requirements/uv.lock
	$(UV) $(COMPILE) $(ARGS) requirements/dev.in -o requirements/dev.lock
	$(UV) $(COMPILE) $(ARGS) -c requirements/dev.lock requirements/data.in -o requirements/data.lock
	$(UV) $(COMPILE) $(ARGS) -c requirements/dev.lock requirements/train.in -o requirements/train.lock
	$(UV) $(COMPILE) $(ARGS) -c requirements/dev.lock requirements/server.in -o requirements/server.lock

release: check ## check all, write VERSION where it stands, commit, tag, build the wheel
	@test -n '$(VERSION)' || { echo 'VERSION is missing: make release VERSION=0.2.0' >&2; exit 1; }
	@$(BIN)/python docker/release.py '$(VERSION)'
	@$(UV) build --quiet --offline --no-build-isolation --python $(BIN)/python --out-dir dist

screenshots: $(SYNCED) ## take those of the documents again, of the runs made here (a sweep at least)
	@exec $(BIN)/python docs/screenshots.py $(ARGS)

clean: ## remove what can be made again; .venv and the runs in .shike stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(wildcard shike_core components pipelines tests benchmarks) \
	  -name __pycache__ -type d -exec rm -rf {} +

# An environment without the stamp was never finished and is made anew; one with an older stamp is
# brought up to the lock. The stamp goes first, so that a run cut off in between counts as unfinished.
$(SYNCED): requirements/dev.lock pyproject.toml | $(UV_READY)
	@command -v $(PYTHON) >/dev/null || { echo '$(PYTHON) is not installed: install Python 3.11,' \
	  'or name another one: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@{ test -e $@ && $(BIN)/python -c ''; } 2>/dev/null || { rm -rf .venv \
	  && $(UV) venv --quiet --no-python-downloads --python $(PYTHON) .venv; }
	@rm -f $@
	$(UV) pip sync --require-hashes --compile-bytecode --python $(BIN)/python requirements/dev.lock
	$(UV) pip install --quiet --offline --no-deps --no-build-isolation --python $(BIN)/python -e .
	@touch $@

.tools/venv/.installed: requirements/uv.lock
	@command -v $(PYTHON) >/dev/null || { echo '$(PYTHON) is not installed: install Python 3.11,' \
	  'or name another one: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -m venv --clear .tools/venv || { echo 'no venv: install the venv part of Python' \
	  '(Debian: apt-get install python3-venv) or uv' >&2; exit 1; }
	.tools/venv/bin/python -m pip install --quiet --disable-pip-version-check \
	  --require-hashes -r requirements/uv.lock
	@touch $@

# Two commands set everything up: `make quickstart` runs the main job, `make test` the tests.
PIP_FLAGS ?=
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: install quickstart test test-more test-cuda-fake test-oldest test-newest lint format typecheck check-package docs browser clean

install: $(STAMP)

# torch first and pinned (constraints-cpu.txt). Where the package index does not serve CPU builds by itself, name one that
# does: make install PIP_FLAGS='--extra-index-url URL'
$(STAMP): pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(PIP_FLAGS) -r constraints-cpu.txt
	$(BIN)/pip install --quiet $(PIP_FLAGS) -e '.[train,lora,trainers,log,dev]' -c constraints-cpu.txt
	touch $@

quickstart: install
	$(BIN)/hbp train examples/quickstart.yaml

test: install browser
	$(BIN)/pytest -n 2 --dist loadfile

# Property tests with fresh seeds and ten times the cases; MORE names what to run.
MORE ?= tests/planning
test-more: install
	$(BIN)/pytest --hypothesis-profile=more $(MORE)

# The report's test looks at the page in a browser; where there is none and we may, install one.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null 2>&1 || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } || \
	  echo "no chromium here and no right to install it: the report's browser test will be skipped"

# The CUDA paths without a GPU, with the CUDA build of the oldest torch and transformers that we support (some 3 GB).
OLDEST := torch==2.11.0 transformers==5.17.*
NEWEST := torch transformers
EXTRAS := .[train,lora,log] hypothesis pytest pytest-xdist pillow

.venv-%/installed: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet $(PIP_FLAGS) $(if $(filter oldest,$*),$(OLDEST),--upgrade $(NEWEST)) -e $(EXTRAS)
	touch $@

CUDA_FAKE := tests/cuda_fake tests/train/test_compiled.py tests/train/measure/test_fake_world.py
test-cuda-fake: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest $(CUDA_FAKE) -v

# The training half at both ends of the supported range of torch and transformers.
test-oldest test-newest: test-%: .venv-%/installed
	.venv-$*/bin/python -m pytest tests/train tests/parallel tests/cost tests/cuda_fake

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: install
	$(BIN)/mypy

# Wheel and sdist, used from clean environments. More: make check-package CHECK='--train --everything'
CHECK ?=
check-package: install
	$(BIN)/python .ci/check_package.py $(CHECK) $(PIP_FLAGS)

# The site, every warning an error, in an environment of its own: into site/.
docs:
	test -d .venv-docs || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet $(PIP_FLAGS) -e '.[docs]'
	.venv-docs/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-docs runs build dist site src/*.egg-info

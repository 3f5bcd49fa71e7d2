# Two commands do everything on a fresh machine with Python 3.11 or newer, pip and make:
#   make demo   the whole recipe, tiny, nothing downloaded but packages
#   make test   the test suite
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= demo-run
SEED ?= 0
JOBS ?= 3
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# Bytecode is compiled after an installation, on all cores: where Python is told not to write it, every later start would
# be slow.
COMPILE := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true
STAMPED := pyproject.toml constraints.txt

.PHONY: install demo test quick test-all lint docs format compiler plans harness deep notebook xpk clean newest

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/medllm demo --workdir $(WORKDIR) --seed $(SEED)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow"

# The inner loop: what neither trains nor starts processes.
quick: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow and not long"

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

# The site in site/; whatever a page lacks is a warning, and a warning is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The compiler for TPUs, which `medllm plan` and its tests need. Where it is installed and no TPU is, set JAX_PLATFORMS=cpu.
compiler: $(VENV)/.installed
	$(INSTALL) -e ".[plan]"
	$(COMPILE)

# What can be known of TPUs without one: that the shipped configs fit, that kernels compile, and that they compute what
# they should. `.ci/run` has it among the slow tests.
plans: $(VENV)/.installed-test compiler
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal \
		tests/planning tests/model/test_splash.py

# lm-evaluation-harness, which one slow test asks.
harness: $(VENV)/.installed-test
	$(INSTALL) -e ".[test,harness]"
	$(COMPILE)

# Both at once, for the slow tests.
deep: $(VENV)/.installed-test
	$(INSTALL) -e ".[test,plan,harness]"
	$(COMPILE)

# The notebook, executed; what is in its work folder already, such as a demo's stages, is kept. The result stays out of git.
notebook: $(VENV)/.installed
	$(INSTALL) -e ".[notebook]"
	MEDLLM_WORK=$(abspath $(WORKDIR)) $(BIN)/jupyter-execute notebooks/recipe.ipynb --output $(abspath $(WORKDIR))/recipe.ipynb

# xpk, whose manifests ours are compared with; its pinned versions contradict ours, so it lives by itself.
xpk: $(VENV)/.installed
	test -x $(VENV)-xpk/bin/python || $(BIN)/python -m venv $(VENV)-xpk
	$(VENV)-xpk/bin/python -m pip install --quiet --disable-pip-version-check xpk==1.16.0

# An installation is made anew only when what it is made of changes.
$(VENV)/.installed: $(STAMPED)
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; set PYTHON=/path/to/python"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	$(COMPILE)
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) -e ".[test]"
	$(COMPILE)
	touch $@

# Types are checked against the packages that are imported, the optional ones too.
$(VENV)/.installed-lint: $(VENV)/.installed-test
	$(INSTALL) -e ".[lint]"
	$(COMPILE)
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(INSTALL) -e ".[docs]"
	touch $@

# The newest packages, without constraints, in an environment of its own, made anew each time; the suite says what they break.
# torch stays at its version; where accelerator libraries aren't wanted, set PIP_EXTRA_INDEX_URL to an index of CPU builds.
NEWEST ?= $(VENV)-newest
newest:
	$(or $(shell command -v python3.12),$(PYTHON)) -m venv --clear $(NEWEST)
	PIP_CONSTRAINT= $(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e ".[test]"
	$(NEWEST)/bin/python -m pip list --disable-pip-version-check
	$(NEWEST)/bin/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow"

clean:
	rm -rf $(VENV) $(VENV)-xpk $(VENV)-newest site build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# make quickstart   install, fetch the two embedded models, run the ISARA loop into runs/quickstart (again: continue it)
# make test         install what tests need, run the tests; those of the page need chromium and its driver (Debian: chromium chromium-driver)
# make test-slow    the tests that take longest
# make lock         renew the lock files (needs uv)
# make clean        remove the environment and caches; runs/ stays
#
# PYTHON=python3.13 chooses the Python (3.11 to 3.13), VENV=DIR the environment. A package index of your own goes into pip's configuration
# or its environment variables, as for any pip. TORCH_PIP="--index-url=URL" is where torch comes from, which is used by tests alone.

PYTHON ?= python3
VENV ?= .venv
TORCH_PIP ?=
TORCH := 2.13.0
ACCELERATE := 1.15.0
DATASETS := 5.2.0
LM_EVAL := 0.4.13
PEFT := 0.21.2
TRANSFORMERS4 := 4.57.6

PY := $(VENV)/bin/python
PIP := $(PY) -m pip -qq --disable-pip-version-check
MODELS := smollm2-135m-instruct minilm-l6
UV := uv pip compile --no-config --quiet --universal --python-version 3.11 --generate-hashes --upgrade \
	--no-annotate --custom-compile-command "make lock"

.PHONY: quickstart install test test-slow lock clean

quickstart: install
	$(PY) -m isara_jax.fetch $(MODELS)
	$(PY) -m isara_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

install: $(VENV)/installed

test: $(VENV)/installed-test
	$(PY) -m isara_jax.fetch $(MODELS)
	$(PY) -m pytest

# The slow tests also read exported folders with transformers 4, in an environment of its own, and tokenizer.model with tensorflow-text.
test-slow: $(VENV)/installed-test $(VENV)-transformers4/installed
	$(PIP) install "tensorflow-text>=2.21,<2.22"
	$(PY) -m isara_jax.fetch $(MODELS)
	ISARA_TRANSFORMERS4=$(VENV)-transformers4/bin/python $(PY) -m pytest -m slow

$(VENV)-transformers4/installed: | $(PY)
	$(PYTHON) -m venv $(VENV)-transformers4
	$(VENV)-transformers4/bin/python -m pip -qq install $(TORCH_PIP) "torch==$(TORCH)+cpu" 2>/dev/null \
		|| $(VENV)-transformers4/bin/python -m pip -qq install $(TORCH_PIP) "torch==$(TORCH)"
	$(VENV)-transformers4/bin/python -m pip -qq install "transformers==$(TRANSFORMERS4)"
	@touch $@

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] < (3, 14) else \
		"isara_jax needs Python 3.11 to 3.13, and $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make $(MAKECMDGOALS) PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# Every file that comes from an index has its hash in the lock; the package itself is linked, so that a change needs no new install.
$(VENV)/installed: requirements.lock setup.cfg pyproject.toml | $(PY)
	$(PIP) install --require-hashes -r requirements.lock
	$(PIP) install --no-deps --editable .
	@touch $@

# On Linux the CPU build of torch is taken wherever the index (or TORCH_PIP) offers it; the plain name brings GPU libraries of several GB.
# transformers reads GGUF files, the reference for ours, only where accelerate is installed. datasets reads hub snapshots; lm_eval is the
# reference of multiple choice, peft of adapters. pip's hash mode trips over the extras among their requirements, so they are pinned by
# version alone.
$(VENV)/installed-test: requirements-test.lock $(VENV)/installed
	$(PIP) install --require-hashes -r requirements-test.lock
	@if [ "$$(uname -s)" = Linux ] && $(PIP) install $(TORCH_PIP) "torch==$(TORCH)+cpu" 2>/dev/null; then :; else \
		echo "torch $(TORCH): taking the index's own build (TORCH_PIP=\"--index-url=URL\" names an index of CPU builds)"; \
		$(PIP) install $(TORCH_PIP) "torch==$(TORCH)"; fi
	$(PIP) install "accelerate==$(ACCELERATE)" "datasets==$(DATASETS)" "lm_eval==$(LM_EVAL)" "peft==$(PEFT)"
	@touch $@

lock:
	$(UV) setup.cfg --output-file requirements.lock
	printf 'hypothesis\npytest\nselenium\nsentencepiece\n' | $(UV) - --constraint requirements.lock --output-file requirements-test.lock

clean:
	rm -rf $(VENV) $(VENV)-transformers4 build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -exec rm -rf {} +

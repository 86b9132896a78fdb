# Everything runs in virtual environments that this file makes beside itself. A stamp in each says
# which extras it holds, so that a second run installs nothing unless what it was made from changed.

PYTHON ?= python3
# Tried in turn by test-newest; a name that pyenv merely shims does not count until it runs.
NEWEST_PYTHONS ?= python3.13 $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python) \
                  python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python)
COMPARE_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help compare test test-oldest test-newest lint cost notebooks clean
.NOTPARALLEL: # two installs into one environment would meet
.SECONDARY:   # no environment is a by-product for make to delete

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "PYTHON=python3.12 picks the Python of a new environment ('make clean' removes the old)."
	@echo 'COMPARE_ARGS and PYTEST_ARGS are passed on: make test PYTEST_ARGS="-k focal".'

compare: .venv/compare.stamp ## compare the losses on real imbalanced data, with plots
	.venv/bin/python colab/compare_losses.py $(COMPARE_ARGS)

test: .venv/test.stamp .venv/notebooks.stamp ## run the tests
	.venv/bin/python -m pytest $(PYTEST_ARGS)

test-oldest: .venv-oldest/test.stamp ## run the tests on the oldest jax and chex supported
	.venv-oldest/bin/python -m pytest $(PYTEST_ARGS)

test-newest: ## run the tests on the newest Python found, which gets the newest jax
	@for python in $(NEWEST_PYTHONS); do \
		if $$python -c 'import ensurepip' 2>/dev/null; then \
			$(MAKE) --no-print-directory .venv-newest/test.stamp PYTHON=$$python \
				&& .venv-newest/bin/python -m pytest $(PYTEST_ARGS); \
			exit; \
		fi; \
	done; \
	echo 'make test-newest: skipped, as neither python3.13 nor python3.12 was found.'

lint: .venv/lint.stamp ## check style, format and types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

cost: .venv-cost/benchmarks.stamp ## count what losses and training steps cost on TPUs and GPUs (Linux)
	.venv-cost/bin/python benchmarks/cost.py
	.venv-cost/bin/python benchmarks/training.py

notebooks: .venv/notebooks.stamp ## run every notebook, shortened, in a fresh kernel
	@for notebook in colab/*.ipynb; do \
		FOCALJAX_SHORT=1 .venv/bin/jupyter execute "$$notebook" || exit; \
	done

clean: ## remove the environments and all that was built
	rm -rf .venv .venv-cost .venv-newest .venv-oldest build dist
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# --- environments ---------------------------------------------------------------------------------

%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo '$(PYTHON) is not Python 3.11 or later: name one, as in PYTHON=python3.12.'; exit 1; }
	@echo "Making $* with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $* || { rm -rf $*; \
		echo '$(PYTHON) cannot make a virtual environment.' \
			'On Debian and Ubuntu, install the package python3-venv.'; exit 1; }

# environment(folder, constraints): folder/EXTRA.stamp installs focaljax[EXTRA] there, editable.
define environment
$(1)/%.stamp: $(1)/bin/python $(2) pyproject.toml focaljax/__init__.py
	@echo 'Installing focaljax[$$*] into $(1): a minute or two.'
	@$$< -m pip install --quiet --disable-pip-version-check -c $(2) -e '.[$$*]'
	@touch $$@
endef
$(eval $(call environment,.venv,constraints.txt))
$(eval $(call environment,.venv-cost,constraints.txt))
$(eval $(call environment,.venv-newest,constraints.txt))
$(eval $(call environment,.venv-oldest,constraints-oldest.txt))

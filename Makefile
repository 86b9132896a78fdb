# Everything runs in virtual environments that this file makes beside itself. A stamp in each says
# which extras it holds, so that a second run installs nothing unless what it was made from changed.

PYTHON ?= python3
# Tried in turn by test-newest; a name that pyenv merely shims does not count until it runs.
NEWEST_PYTHONS ?= python3.13 $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python) \
                  python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python)
COMPARE_ARGS ?=
# What a notebook needs to run through in a minute; each takes those that it has.
SHORT ?= -p steps 20 -p seeds 2 -p points 101 -p train 64 -p test 16 -p sentences 2000
PYTEST_ARGS ?= -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help compare test test-oldest test-newest lint cost docs dist clean
.PHONY: notebooks notebooks-colab notebooks-full evidence
.NOTPARALLEL: # two installs into one environment would meet
.SECONDARY:   # no environment is a by-product for make to delete

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "PYTHON=python3.12 picks the Python of a new environment ('make clean' removes the old)."
	@echo 'COMPARE_ARGS and PYTEST_ARGS are passed on: make test PYTEST_ARGS="-k focal".'

compare: .venv/lab.stamp ## compare the losses on real imbalanced data, with plots
	.venv/bin/python -m focaljax.lab compare $(COMPARE_ARGS)

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
	.venv-cost/bin/python benchmarks/linear.py

# run_notebooks(environment): shortened, into results/notebooks.
define run_notebooks
	@mkdir -p results/notebooks
	@for notebook in colab/*.ipynb; do \
		$(1)/bin/papermill --no-progress-bar --cwd results/notebooks \
			"$$notebook" "results/notebooks/$$(basename "$$notebook")" $(SHORT) || exit; \
	done
endef

notebooks: .venv/notebooks.stamp ## run every notebook, shortened, in a fresh kernel
	$(call run_notebooks,.venv)

notebooks-colab: .venv-colab/notebooks.stamp ## the same, with the versions that Colab has
	$(call run_notebooks,.venv-colab)

notebooks-full: .venv/notebooks.stamp ## run every notebook in full and keep what it gives (half an hour)
	.venv/bin/python colab/run.py colab/*.ipynb

docs: .venv/docs.stamp ## build the documentation, and test its examples
	.venv/bin/python -m pytest docs/test_docs.py
	.venv/bin/sphinx-build -W --keep-going --quiet docs docs/_build
	@echo 'Open docs/_build/index.html.'

evidence: .venv/lab.stamp ## make the tables of the documentation anew (an hour and a half on 2 cores)
	.venv/bin/python benchmarks/next_word.py docs/evidence/next_word
	.venv/bin/python -m focaljax.lab compare --out docs/evidence/compare
	.venv/bin/python -m focaljax.lab tag --seeds 10 --out docs/evidence/tag
	.venv/bin/python -m focaljax.lab detect --seeds 3 --out docs/evidence/detect --losses \
		"CE, no prior" "CE alpha=.75" "OHEM 1:3" "focal gamma=1 alpha=.25" \
		"focal gamma=2 alpha=.25" "soft K=2" "hard m=.9" "quality focal" "quality focal + DFL" \
		varifocal matchability IoU-aware "Gaussian focal"

dist: .venv/test.stamp ## build the wheel and the sdist, and install each to see that it works
	rm -rf dist && .venv/bin/python -m hatchling build
	@for package in dist/*; do \
		rm -rf build/dist && $(PYTHON) -m venv build/dist \
			&& build/dist/bin/pip install --quiet -c constraints.txt "$$package" \
			&& (cd build && dist/bin/python -c 'import focaljax; print(focaljax.__version__)') || exit; \
	done

clean: ## remove the environments and all that was built
	rm -rf .venv .venv-colab .venv-cost .venv-newest .venv-oldest build dist docs/_build
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
$(eval $(call environment,.venv-colab,constraints-colab.txt))
$(eval $(call environment,.venv-cost,constraints.txt))
$(eval $(call environment,.venv-newest,constraints.txt))
$(eval $(call environment,.venv-oldest,constraints-oldest.txt))

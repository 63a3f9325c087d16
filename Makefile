# make run     set up, run the main job on toy models, write results/report.html
# make plan    set up, print what the main job would take: jobs, tokens, disk, GPU memory
# make test    set up, run the tests
# make check   format, lint and type checks
# make clean   remove all results
.PHONY: run plan test check clean

PYTHON ?= python3
CORES ?= all
VENV := .venv
BIN := $(VENV)/bin
REPORTED := results/tables results/figures workflow/report

run: $(VENV)/run
	$(BIN)/snakemake --cores $(CORES)
	@if [ ! -e results/report.html ] || [ -n "$$(find $(REPORTED) -newer results/report.html)" ]; then \
		$(BIN)/snakemake --report results/report.html; \
	fi
	@echo "The report is results/report.html, the tables are in results/tables."

plan: $(VENV)/run
	@$(BIN)/snakemake plan --cores 1 --quiet all

test: $(VENV)/dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: $(VENV)/dev
	$(BIN)/ruff format --check scripts tests
	$(BIN)/ruff check scripts tests
	$(BIN)/snakefmt --check workflow
	$(BIN)/snakemake --lint
	$(BIN)/mypy

clean:
	rm -rf results/* .snakemake

$(VENV)/run: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev: $(VENV)/run requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

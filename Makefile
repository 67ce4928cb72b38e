# Every target makes .venv first if it is missing. PYTHON picks the interpreter, ARGS go to the command.
PYTHON ?= python3
BIN := .venv/bin
# Files side by side, those that take long first. Most tests wait for processes of their own.
PARALLEL := -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help venv lock tools demo test check bench test-gpu test-vllm test-rdma soak clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: ## .venv with kvferry and its tools
	@command -v $(PYTHON) >/dev/null || { echo "kvferry set-up: no $(PYTHON) on PATH; install Python 3.10 or newer, or set PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) tools/bootstrap.py

lock: ## renews constraints.txt, which pins all that .venv gets
	@$(PYTHON) tools/bootstrap.py lock

tools: venv ## installs the Debian packages that tests miss on this machine
	@packages=$$($(BIN)/python tests/needs.py) && { [ -z "$$packages" ] || { \
	sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); $$sudo apt-get update -q && \
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $$packages; }; }

demo: venv ## two processes, a real model's KV cache between them, the tokens compared
	@$(BIN)/kvferry demo $(ARGS)

test: venv ## the whole test suite
	@$(BIN)/pytest $(PARALLEL) -m "not soak" $(ARGS)

check: venv ## format, lint, types, and the fast tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/pytest $(PARALLEL) -q -m "not slow and not soak"

bench: venv ## the transfer benchmark beside its baselines
	@$(BIN)/kvferry bench transfer $(ARGS)

test-gpu: venv ## the tests that need CUDA devices; each skip says why
	@$(BIN)/pytest -m "gpu and not soak" -rs $(ARGS)

test-vllm: venv ## the vLLM connector on pairs of real engines, all of them (minutes)
	@$(BIN)/pytest -rs -m "soak or not soak" tests/adapters/test_vllm_*.py $(ARGS)

test-rdma: venv ## the whole verbs suite, in a virtual machine with RDMA devices (many minutes)
	@KVFERRY_REQUIRE_TOOLS=1 $(BIN)/pytest -q -m "rdma and (soak or not soak)" tests/tools/test_rdma_suite.py $(ARGS)

soak: venv ## the tests that take minutes
	@$(BIN)/pytest -m soak $(ARGS)

clean: ## removes .venv and everything generated
	rm -rf .venv build dist artifacts .pytest_cache .mypy_cache .ruff_cache .hypothesis

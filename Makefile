# `make help` lists the targets. Everything lives in .venv and target/; nothing else is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUST := Cargo.toml Cargo.lock $(shell find src -name '*.rs')

.DEFAULT_GOAL := help
.PHONY: help setup test bench lint all

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## make .venv with gpt2rs in it, editable, and the tools to test and lint it

# The compiled module is rebuilt when the Rust code changed; Python code is read from the checkout.
$(INSTALLED): pyproject.toml $(RUST)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test,lint]'
	@touch $@

test: setup ## run the Rust tests, the documentation's examples and the Python tests
	cargo test --quiet
	$(BIN)/pytest

bench: setup ## measure the operations, then whole models, beside the limits of this machine
	cargo bench
	$(BIN)/gpt2rs bench

lint: setup ## rustfmt, clippy, ruff, mypy, and the stub of the compiled module against the module
	cargo fmt --check
	cargo clippy --all-targets --all-features -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict
	$(BIN)/python -m mypy.stubtest gpt2rs._core

all: lint test ## lint and test

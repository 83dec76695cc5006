# `make demo` and `make test` each make the environment first if it is missing.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# uv does not read pip's settings: hand on a folder of wheels, or let uv find torch's CPU build itself.
TORCH := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend=cpu)
# Byte code is kept, or every process compiles the engines' sources again when it imports them.
export PYTHONDONTWRITEBYTECODE :=
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help env demo test chaos lint docs lock clean bench bench-ppo bench-async bench-learning bench-architectures bench-sync bench-rm bench-hutto bench-overoptimisation bench-pandalm bench-gate bench-serve bench-serve-stress bench-serve-cluster bench-serve-fuzz bench-nodes bench-scale bench-gpu

help:  ## What there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 26

env: $(READY)  ## The environment in .venv, from the lock

$(READY): requirements/cpu.lock pyproject.toml
	@echo "making the environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv 2>&1 | { grep -v WARNING || true; }
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps $(TORCH) -r requirements/cpu.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: $(READY)  ## SmolLM2 learns from human preferences, about a quarter of an hour on two cores
	@$(BIN)/rlhf-ray prepare smollm2-135m
	@$(BIN)/rlhf-ray prepare minilm
	@$(BIN)/rlhf-ray prepare hutto-movie
	@$(BIN)/rlhf-ray sft configs/demo/sft.yaml --resume
	@$(BIN)/rlhf-ray train-rm configs/demo/reward_model.yaml --resume
	@$(BIN)/rlhf-ray ppo configs/demo/ppo.yaml --resume

test: $(READY)  ## Unit tests in seconds, system tests with the real engines in minutes
	@$(BIN)/python -m pytest tests/unit --numprocesses 2
	@$(BIN)/python -m pytest tests/system --numprocesses 2 --dist loadfile

bench-nodes: $(READY)  ## Two steps of the 70 B configuration on eight nodes of Ray on this machine, with stub roles; OPTIONS=--full
	@$(BIN)/python -m bench.many_nodes $(OPTIONS)

chaos: $(READY)  ## Runs that lose processes in every way must end as if they had not; OPTIONS="--parts matrix"
	@$(BIN)/rlhf-ray prepare tiny
	@$(BIN)/python -m bench.chaos $(OPTIONS)

bench-gpu:  ## On a GPU, with PYTHON=python of its environment: kernels, scores, runs of every kind
	@$(PYTHON) -m rlhf_ray prepare tiny
	@$(PYTHON) -m bench.one_gpu $(OPTIONS)

bench-scale: $(READY)  ## The driver's own time a step with 64 and 256 stub roles
	@$(BIN)/python -m bench.scale $(OPTIONS)

bench-sync: $(READY)  ## Weight syncs: planted faults are caught, and every ZeRO stage holds for twenty steps
	@$(BIN)/rlhf-ray prepare tiny && $(BIN)/rlhf-ray prepare smollm2-135m
	@$(BIN)/python -m bench.sync_faults
	@$(BIN)/python -m bench.zero_syncs

bench: bench-sync bench-ppo bench-async bench-learning bench-architectures bench-hutto bench-rm bench-overoptimisation bench-gate bench-serve bench-serve-stress bench-serve-cluster bench-serve-fuzz bench-nodes bench-scale  ## All benchmarks, into bench/results; hours

BENCH_DATA := $(BIN)/rlhf-ray prepare minilm && $(BIN)/rlhf-ray prepare hutto-movie

.bench/trl:
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target $@ 'trl==1.16.*'

bench-ppo: $(READY) | .bench/trl  ## A PPO step against TRL, bare vLLM and torch, its floor, its memory; OPTIONS=--quick
	@$(BIN)/rlhf-ray prepare tiny && $(BIN)/rlhf-ray prepare smollm2-135m
	@$(BIN)/python -m bench.ppo --trl .bench/trl $(OPTIONS)

bench-async: $(READY)  ## Sampling ahead of training against taking turns, with a picture of the timeline
	@$(BIN)/rlhf-ray prepare tiny
	@$(BIN)/python -m bench.asynchrony

bench-learning: $(READY)  ## Every preset of algorithms learns a task whose answer is known
	@$(BIN)/rlhf-ray prepare tiny
	@$(BIN)/python -m bench.learning

bench-rm: $(READY) | .bench/trl  ## Pairs per second in reward-model training, against TRL
	@$(BENCH_DATA)
	@$(BIN)/python -m bench.reward_training --trl .bench/trl

bench-hutto: $(READY)  ## A reward model of human ratings from end to end
	@$(BENCH_DATA)
	@$(BIN)/python -m bench.hutto_movie

bench-overoptimisation: $(READY)  ## Best-of-n against ensembles and single judges
	@$(BENCH_DATA)
	@$(BIN)/python -m bench.overoptimisation

bench-pandalm: $(READY)  ## A few hundred votes; VOTES=file
	@$(BIN)/rlhf-ray prepare minilm
	@$(BIN)/python -m bench.pandalm --votes $(VOTES)

bench-architectures: $(READY)  ## Learners and engine on thirteen architectures, before training and after each sync
	@$(BIN)/rlhf-ray prepare tiny
	@$(BIN)/python -m bench.architectures

bench-gate: $(READY)  ## The release gate on sound and on broken models
	@$(BIN)/python -m bench.judgement
	@$(BENCH_DATA)
	@$(BIN)/python -m bench.gate

bench-serve: $(READY)  ## The reward service against the offline scorer and a plain server
	@$(BENCH_DATA) && $(BIN)/rlhf-ray prepare smollm2-135m
	@$(BIN)/python -m bench.serve

bench-serve-stress: $(READY)  ## The reward service under overload, death and exchange of models
	@$(BENCH_DATA)
	@$(BIN)/python -m bench.serve_stress

bench-serve-cluster: $(READY)  ## The reward service on a running Ray cluster, by command and by serve deploy
	@$(BENCH_DATA)
	@$(BIN)/python -m bench.serve_cluster

bench-serve-fuzz: $(READY)  ## 200,000 requests that no client should send
	@$(BIN)/rlhf-ray prepare tiny
	@test -d .bench/schemathesis || $(BIN)/uv pip install --quiet --python $(BIN)/python --target .bench/schemathesis 'schemathesis==4.32.*'
	@$(BIN)/python -m bench.serve_fuzz --schemathesis .bench/schemathesis

lint: $(READY)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(READY)  ## Write docs/settings.md and docs/metrics.md again from the code
	@$(BIN)/python -m rlhf_ray.documentation

PINS := $(BIN)/uv pip compile --quiet --generate-hashes --no-emit-package rlhf-ray --custom-compile-command "make lock" \
	--no-emit-index-url --no-emit-find-links pyproject.toml

lock: $(READY)  ## Pin both environments again, with hashes
	@$(PINS) --universal --python-version 3.11 $(TORCH) --extra cpu --extra dev --override requirements/override.txt \
		-o requirements/cpu.lock
	@# torch's CPU build is not of the registry: where its wheels come from, and which there are, differs by machine.
	@sed -i '/^torch==[0-9.]*+cpu/,/# via/{/--hash/d;s/ \\$$//}' requirements/cpu.lock
	@$(PINS) --python-version 3.12 --python-platform x86_64-manylinux_2_28 --extra gpu -o requirements/gpu.lock

clean:  ## Remove caches (not the environment, data or runs)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

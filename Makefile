# The verbs of cli.py for people. Variables: RECIPE, NAME, DATA, GPUS, TP, RESPOND, SHARDS, HOSTS, TRACK, SET, OUT, TARGET.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON := .venv/bin/python
CLI := $(PYTHON) cli.py

RECIPE_FLAGS = $(if $(RECIPE),--recipe $(RECIPE)) $(if $(NAME),--name $(NAME)) $(if $(DATA),--data $(DATA)) $(foreach pair,$(SET),--set $(pair))
REPLICA_FLAGS = $(if $(GPUS),--gpus $(GPUS)) $(if $(TP),--tp $(TP)) $(if $(RESPOND),--respond $(RESPOND)) $(if $(SHARDS),--shards '$(SHARDS)')
RANK_FLAGS = $(if $(GPUS),--gpus $(GPUS)) $(if $(SHARDS),--shards '$(SHARDS)') $(if $(HOSTS),--hosts $(HOSTS)) $(if $(TRACK),--track $(TRACK))
SCREEN = $(or $(NAME),minicodformer_train)
CACHE_SCREEN = $(or $(NAME),minicodformer_cache)

.PHONY: help
help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: RECIPE=smollm2-demo|qwen3-8b|file.toml  NAME=run  DATA=rows.jsonl  GPUS=n  TP=n  RESPOND=teacher|student=path  SHARDS=folder|s3://…|gs://…  HOSTS=hostfile  TRACK=tensorboard|none, or wandb|trackio once installed  SET='a.b=c d.e=f'  OUT=folder"

.PHONY: setup
setup: ## everything this machine needs, into .venv (once; CPU or CUDA by what the machine has)
	@python3 requirements/install.py

.PHONY: demo
demo: setup ## the whole path on a real teacher: fetch, prepare, cache, distil, evaluate, generate (minutes, no GPU)
	@$(CLI) demo $(if $(NAME),--name $(NAME)) $(if $(GPUS),--gpus $(GPUS))

.PHONY: test
test: setup ## set-up and all tests but the long sweeps
	@$(PYTHON) -m pytest -q -m "not long"

.PHONY: test-long
test-long: setup ## the long sweeps too
	@$(PYTHON) -m pytest -q

.PHONY: check
check: setup ## formatting, lint, types and import floors
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m mypy
	@.venv/bin/lint-imports --no-cache

.PHONY: prepare
prepare: setup ## JSONL (DATA=path) to tokenised samples in data/processed
	@$(CLI) prepare $(RECIPE_FLAGS)

.PHONY: teacher-cache
teacher-cache: prepare ## stage one: the teacher over the samples, into shards (GPUS=8 TP=2; RAY_ADDRESS=… for a cluster)
	@$(CLI) teacher-cache $(RECIPE_FLAGS) $(REPLICA_FLAGS)

.PHONY: teacher-cache-screen
teacher-cache-screen: prepare ## the same in a `screen` session that survives the terminal: minicodformer_cache, or NAME
	@command -v screen >/dev/null || { echo "error: screen is not installed"; echo "hint: apt-get install screen, or use make teacher-cache"; exit 1; }
	@! screen -ls | grep -q "\.$(CACHE_SCREEN)[[:space:]]" || { echo "error: there is a screen session $(CACHE_SCREEN) already"; echo "hint: screen -r $(CACHE_SCREEN) to look, or give this one a NAME"; exit 1; }
	@mkdir -p runs && screen -dmS $(CACHE_SCREEN) -L -Logfile runs/$(CACHE_SCREEN).screen.log $(CLI) teacher-cache $(RECIPE_FLAGS) $(REPLICA_FLAGS)
	@echo "caching in the background: screen -r $(CACHE_SCREEN) to look, ctrl-a d to leave it running, make watch to follow;"
	@echo "what it says is in runs/$(CACHE_SCREEN).screen.log too"

.PHONY: distill
distill: setup ## stage two: the student from the shards (GPUS=n; without a GPU, n CPU processes)
	@$(CLI) distill $(RECIPE_FLAGS) $(RANK_FLAGS)

.PHONY: distill-screen
distill-screen: setup ## the same in a `screen` session that survives the terminal: minicodformer_train, or NAME
	@command -v screen >/dev/null || { echo "error: screen is not installed"; echo "hint: apt-get install screen, or use make distill"; exit 1; }
	@! screen -ls | grep -q "\.$(SCREEN)[[:space:]]" || { echo "error: there is a screen session $(SCREEN) already"; echo "hint: screen -r $(SCREEN) to look, or give this one a NAME"; exit 1; }
	@mkdir -p runs && screen -dmS $(SCREEN) -L -Logfile runs/$(SCREEN).screen.log $(CLI) distill $(RECIPE_FLAGS) $(RANK_FLAGS)
	@echo "training in the background: screen -r $(SCREEN) to look, ctrl-a d to leave it running, make watch to follow;"
	@echo "what it says is in runs/$(SCREEN).screen.log too"

.PHONY: watch
watch: setup ## watch the running or newest run (or NAME=run): progress, curves, load, warnings; Ctrl-C leaves it alone
	@$(CLI) monitor $(NAME)

.PHONY: runs
runs: setup ## list the runs: state, verb, progress, KL
	@$(CLI) runs

.PHONY: doctor
doctor: setup ## what this machine has, and what to do about what it lacks
	@$(CLI) doctor

.PHONY: evaluate
evaluate: setup ## the finished student against the teacher on the validation split
	@$(CLI) evaluate $(if $(NAME),--name $(NAME)) $(if $(SHARDS),--shards $(SHARDS))

.PHONY: card
card: setup ## write the model card of a finished run, from its facts
	@$(CLI) card $(if $(NAME),--name $(NAME))

.PHONY: export-model
export-model: setup ## copy a finished model, card and all, to a new folder (OUT=folder)
	@$(CLI) export-model $(OUT) $(if $(NAME),--name $(NAME))

.PHONY: share
share: setup ## write the dataset card of a shard set (SHARDS=folder)
	@$(CLI) share $(SHARDS)

.PHONY: serve
serve: setup ## the newest student (or NAME=run) over HTTP on this machine: a page to chat on, and OpenAI's protocol
	@$(CLI) serve $(NAME)

# These run for long and go on where they stopped: make bench-quality, python -m benchmarks.student_quality, … .corpus
BENCHMARKS = $(filter-out quality quality_live student_quality corpus,$(patsubst benchmarks/results/%.json,%,$(wildcard benchmarks/results/*.json)))

.PHONY: bench
bench: setup ## every benchmark on this machine, then benchmarks/RESULTS.md (about half an hour on 2 cores)
	@for name in $(BENCHMARKS); do echo "== $$name"; $(PYTHON) -m benchmarks.$$name || exit 1; done
	@$(PYTHON) -m benchmarks.report

.PHONY: bench-quality
bench-quality: setup ## what students learn from a cache, beside labels alone and the whole teacher (about 40 minutes; resumes)
	@OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks.quality
	@OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks.quality_live
	@$(PYTHON) -m benchmarks.report

QUICK = benchmarks/results/quick
# Those that take --quick; the quality tables train, and are read from the committed results.
QUICK_BENCHMARKS = codec data_wait loss reader serving student teacher_cache

.PHONY: bench-quick
bench-quick: setup ## fewer cases and turns of each (about five minutes on 2 cores), beside the committed results as ratios
	@for name in $(QUICK_BENCHMARKS); do echo "== $$name"; $(PYTHON) -m benchmarks.$$name --quick || exit 1; done
	@echo "== committed ratio -> this machine's; a report, not a test: quick figures are noisy"
	@$(PYTHON) -m benchmarks.compare benchmarks/results $(QUICK) --noise 1.5 --all || true

.PHONY: bench-report
bench-report: setup ## benchmarks/RESULTS.md anew from benchmarks/results
	@$(PYTHON) -m benchmarks.report

.PHONY: reference
reference: setup ## write docs/cli.md anew from the command line itself
	@PYTHONPATH=. .venv/bin/typer cli.py utils docs --name "python cli.py" --title "The command line" --output docs/cli.md

.PHONY: lock
lock: ## compile requirements/{cpu,cuda}.txt anew from pyproject.toml
	@python3 requirements/lock.py

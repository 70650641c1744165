# make train: train on the packaged sample volumes.   make test: run the tests.   make bench: the benchmark tables.
# make gpu: everything that this bundle claims of GPUs, run and measured on the one that is there; ARGS="--device cpu" runs it small.
# make quality: train every row of the quality tables.
# make release: the bundle as one file to share, in dist/.   make lint: the checks of style and types.
# Further config keys are given in ARGS: make train ARGS="--epochs 200 --dataset_dir /data/mine"

PYTHON ?= python3
BIN := .venv/bin
CONFIGS := --meta_file configs/metadata.json --logging_file configs/logging.conf
ARGS ?=
DEVICE ?= cpu

.PHONY: train test bench gpu quality lint clinical-data release

train: .venv/installed
	$(BIN)/python -m monai.bundle run training --config_file configs/train.json $(CONFIGS) \
		--epochs 80 --val_interval 40 --patch_size "[64,64,64]" --channels_last true --resume true $(ARGS)

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

bench: .venv/installed
	$(BIN)/python -m benchmarks.cost --device $(DEVICE)
	$(BIN)/python -m benchmarks.planning
	$(BIN)/python -m benchmarks.planning_requests
	$(BIN)/python -m benchmarks.loop --device $(DEVICE)

gpu: .venv/installed
	$(BIN)/python -m benchmarks.gpu $(ARGS)

quality: .venv/installed
	$(BIN)/python -m benchmarks.quality rows $(ARGS)
	$(BIN)/python -m benchmarks.quality tables
	$(BIN)/python -m benchmarks.quality plot

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clinical-data: .venv/installed
	$(BIN)/python -m scripts.data.clinical_volumes $(ARGS)

release: .venv/installed
	$(BIN)/python -m scripts.bundle.release $(ARGS)

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# make train: train on the packaged sample volumes.   make test: run the tests.   make bench: the benchmark tables.
# make generate: train a small generator on latents of synthetic heads; make new heads with the shipped one, guided by it, and
# heads from label maps of heads that nobody trained on.
# make gpu: everything that this bundle claims of GPUs, run and measured on the one that is there; ARGS="--device cpu" runs it small.
# make quality: train every row of the quality tables.   make weights: train the shipped weights again, from nothing, in hours.
# make release: the bundle as one file to share, in dist/.   make lint: the checks of style and types.
# The first of them installs into .venv: train and generate what a run needs, the others also what tests and benchmarks need.
# Further config keys are given in ARGS: make train ARGS="--epochs 200 --dataset_dir /data/mine"

PYTHON ?= python3
BIN := .venv/bin
CONFIGS := --meta_file configs/metadata.json --logging_file configs/logging.conf
ARGS ?=
DEVICE ?= cpu
# MONAI warns of running any config, these too
export PYTHONWARNINGS := ignore:parsing config_file:UserWarning

GENERATOR := eval/generator
HEADS := '$$scripts.data.prepare_demonstration_heads(@bundle_root + "/data/heads")'
DIFFUSION := configs/train_diffusion.json
SAMPLING := --num_inference_steps 15 --guide $(GENERATOR)/checkpoints/model.pt --guidance_scale 1.5 \
	--guidance_interval "[0,0.6]" --channels_last true
FROM_MASKS := --num_inference_steps 8 --guidance_scale 1.5 --channels_last true

CODEC := OMP_NUM_THREADS=1 $(BIN)/python -m monai.bundle run training $(CONFIGS) --num_workers 0 --resume true --config_file
RECIPE := 'configs/synthetic_patches.json','configs/shipped_weights.json'
CODEC_8X := $(CODEC) "['configs/train.json',$(RECIPE)]"
CODEC_16X := $(CODEC) "['configs/train.json','configs/presets/16x.json',$(RECIPE)]" --file_patch_size "[128,128,32]"
WEIGHTS := eval/weights

.PHONY: train generate test bench gpu quality weights lint clinical-data release

train: .venv/installed
	$(BIN)/python -m monai.bundle run training --config_file configs/train.json $(CONFIGS) \
		--epochs 60 --val_interval 30 --patch_size "[64,64,64]" --channels_last true --resume true $(ARGS)

generate: .venv/installed
	$(BIN)/python -m monai.bundle run encoding --config_file configs/inference.json $(CONFIGS) \
		--dataset_dir $(HEADS) --output_dir $(GENERATOR)/latents --spatial_keys "['label']"
	$(BIN)/python -m monai.bundle run training --config_file $(DIFFUSION) $(CONFIGS) \
		--dataset_dir $(GENERATOR)/latents --output_dir $(GENERATOR) --condition_keys "['skull']" \
		--spatial_keys "['label']" --condition_dropout 0.2 \
		--channels "[64,64,64]" --batch_size 4 --optimizer#_target_ scripts.training.Muon --lr 0.002 \
		--ema_decay 0.99 --epochs 16 --val_interval 16 --channels_last true --resume true $(ARGS)
	$(BIN)/python -m monai.bundle run evaluating --config_file "['$(DIFFUSION)','configs/evaluate_diffusion.json']" $(CONFIGS) \
		--dataset_dir $(GENERATOR)/latents --output_dir $(GENERATOR) --weights models/generator/model.pt --num_samples 64 \
		--spatial_keys "[]" $(SAMPLING)
	$(BIN)/python -m monai.bundle run evaluating --config_file "['$(DIFFUSION)','configs/evaluate_diffusion.json']" $(CONFIGS) \
		--dataset_dir $(GENERATOR)/latents --output_dir $(GENERATOR) --num_samples 32 $(FROM_MASKS) \
		--evaluation_dir $(GENERATOR)/evaluation_of_masks --segmenter_steps 450
	$(BIN)/python -m monai.bundle run generating --config_file configs/generate.json $(CONFIGS) \
		--ckpt_dir $(GENERATOR)/checkpoints --output_dir $(GENERATOR)/pairs --num_samples 1 $(FROM_MASKS) \
		--dataset_dir data/heads/validation --spatial_keys "['label']"
	for skull in whole stripped; do \
		$(BIN)/python -m monai.bundle run generating --config_file configs/generate.json $(CONFIGS) \
			--ckpt_dir models/generator --output_dir $(GENERATOR)/samples/$$skull \
			--num_samples 2 --conditions "{'skull': '$$skull'}" $(SAMPLING) || exit 1; \
	done

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: .venv/installed-dev
	$(BIN)/python -m benchmarks.cost --device $(DEVICE)
	$(BIN)/python -m benchmarks.planning
	$(BIN)/python -m benchmarks.loop --device $(DEVICE)

gpu: .venv/installed-dev
	$(BIN)/python -m benchmarks.gpu $(ARGS)

quality: .venv/installed-dev
	$(BIN)/python -m benchmarks.quality rows $(ARGS)
	$(BIN)/python -m benchmarks.quality tables
	$(BIN)/python -m benchmarks.quality plot

weights: data/clinical/dataset.json
	$(CODEC_8X) --output_dir $(WEIGHTS)/8x
	$(CODEC_8X) --output_dir $(WEIGHTS)/8x_second --pretrained $(WEIGHTS)/8x/checkpoints/model.pt \
		--further_repeats 32 --epochs 12 --val_interval 6 --seed 1
	$(CODEC_16X) --output_dir $(WEIGHTS)/16x
	$(CODEC_16X) --output_dir $(WEIGHTS)/16x_second --pretrained $(WEIGHTS)/16x/checkpoints/model.pt \
		--further_repeats 40 --procedural_volumes 16 --epochs 11 --val_interval 11 --seed 1
	$(CODEC_16X) --output_dir $(WEIGHTS)/16x_third --pretrained $(WEIGHTS)/16x_second/checkpoints/model.pt --mse_weight 30 \
		--further_repeats 48 --head_patches 20 --procedural_volumes 12 --epochs 26 --val_interval 13 --seed 2
	$(CODEC_16X) --output_dir $(WEIGHTS)/16x_fourth --pretrained $(WEIGHTS)/16x_third/checkpoints/model.pt --mse_weight 100 \
		--further_repeats 60 --head_patches 12 --procedural_volumes 8 --repeats 1 --epochs 40 --val_interval 5 --seed 3

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clinical-data: .venv/installed-dev
	$(BIN)/python -m scripts.data.clinical_volumes $(ARGS)

data/clinical/dataset.json: | .venv/installed-dev
	$(BIN)/python -m scripts.data.clinical_volumes

release: .venv/installed-dev
	$(BIN)/python -m scripts.sharing.release $(ARGS)

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable ".[features]"
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

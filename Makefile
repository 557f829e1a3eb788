# make demo: a small GPT-2 with a giant vector loses every LayerNorm, in minutes on two CPU cores
# make test: the tests
# make evidence: the table of experiments/README.md, from nothing; it goes on where it was stopped
# Each makes the virtual environment first if it is missing.

PYTHON ?= python3
BIN := .venv/bin
DEMO := config/demo_remove_ln.py

demo: .venv/ready
	rm -rf out/demo
	$(BIN)/python prepare.py stdlib --tokenizer=bytes
	$(BIN)/python experiments/standin.py out/demo/standin
	$(BIN)/python train.py config/demo_pretrain.py
	$(BIN)/python train.py $(DEMO) config/control.py
	$(BIN)/python train.py $(DEMO)

test: .venv/ready
	$(BIN)/python -m pytest -q --durations=8 test_model.py

# as many runs at once as there are cores, on one thread each; SEEDS="1 2 3 4 5" for more: two
# seeds of all variants take 80 core-minutes
SEEDS ?= 1 2
VARIANTS := $(basename $(notdir $(wildcard experiments/variants/*.py)))
RUNS := $(foreach s,$(SEEDS),$(VARIANTS:%=out/evidence/%.$s/done))

evidence: out/evidence/pretrained/done
	-OMP_NUM_THREADS=1 $(MAKE) -k -j$$($(BIN)/python -c 'import os; print(os.cpu_count())') $(RUNS)
	$(BIN)/python experiments/report.py out/evidence out/evidence/evidence.png

out/evidence/pretrained/done: | .venv/ready
	rm -rf $(@D) out/evidence/standin
	$(BIN)/python prepare.py stdlib --tokenizer=bytes
	$(BIN)/python experiments/standin.py out/evidence/standin
	$(BIN)/python train.py config/demo_pretrain.py --init_from=out/evidence/standin --max_iters=1000 \
	    --out_dir=$(@D)
	touch $@

out/evidence/%/done: | out/evidence/pretrained/done
	rm -rf $(@D)
	$(BIN)/python train.py $(DEMO) experiments/base.py experiments/variants/$(basename $*).py \
	    --seed=$(subst .,,$(suffix $*)) --out_dir=$(@D)
	touch $@

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv out data

.PHONY: demo test evidence clean

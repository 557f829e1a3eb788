# make demo: watch a small GPT-2 lose every LayerNorm, in minutes on two CPU cores
# make test: the tests
# make torture: kills a run forty times, times prepare.py against the usual ways on 200 MB (minutes)
# make evidence: the README's experiment, from nothing: about an hour and a half on two cores; goes on where it was stopped
# Each makes the virtual environment first if it is missing.

PYTHON ?= python3
BIN := .venv/bin

demo: .venv/ready
	rm -rf out/demo
	$(BIN)/python prepare.py stdlib --tokenizer=bytes
	$(BIN)/python train.py config/demo_pretrain.py
	$(BIN)/python train.py config/demo_control.py
	$(BIN)/python train.py config/demo_remove_ln.py

test: .venv/ready
	$(BIN)/python -m pytest -q --durations=8 test_model.py

torture: .venv/ready
	$(BIN)/python -m pytest -q -s -m torture test_model.py

# NAME.SEED in a folder that says how long: out/evidence/300/taper.2. As many runs at once as there are cores, on one thread each
VARIANTS := $(filter-out pretrain,$(basename $(notdir $(wildcard config/evidence/*.py))))
RUNS := $(foreach s,1 2 3,$(VARIANTS:%=300/%.$s)) $(foreach n,150 600,$n/control.1 $n/no_special.1) 600/slow.1

evidence: out/evidence/pretrained/done
	-OMP_NUM_THREADS=1 $(MAKE) -k -j$$($(BIN)/python -c 'import os; print(os.cpu_count())') $(RUNS:%=out/evidence/%/done)
	$(BIN)/python report.py out/evidence/150 && $(BIN)/python report.py out/evidence/300 remove && $(BIN)/python report.py out/evidence/600 slow

out/evidence/pretrained/done: | .venv/ready data/packages/meta.json
	$(BIN)/python train.py config/evidence/pretrain.py $(if $(wildcard $(@D)/ckpt.pt),--init_from=resume)
	touch $@

data/packages/meta.json: | .venv/ready
	$(BIN)/python prepare.py packages --tokenizer=bytes

out/evidence/%/done: out/evidence/pretrained/done config/evidence/remove.py
	rm -rf $(@D)
	$(BIN)/python train.py config/evidence/remove.py config/evidence/$(basename $(notdir $*)).py \
	    --max_iters=$(patsubst %/,%,$(dir $*)) --seed=$(subst .,,$(suffix $*)) --out_dir=$(@D)
	touch $@

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv out data

.PHONY: demo test torture evidence clean

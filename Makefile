# make demo: a small GPT-2 with a giant vector loses every LayerNorm, in minutes on two CPU cores
# make test: the tests
# make evidence: the table of experiments/README.md, from nothing; it goes on where it was stopped
# Each makes the virtual environment first if it is missing.

PYTHON ?= python3
BIN := .venv/bin
DEMO := config/demo_remove_ln.py

demo: data/stdlib
	rm -rf out/demo
	$(BIN)/python experiments/standin.py out/demo/standin
	$(BIN)/python train.py config/demo_pretrain.py
	$(BIN)/python train.py $(DEMO) config/control.py
	$(BIN)/python train.py $(DEMO)
	$(BIN)/python experiments/plot.py out/demo/demo.png out/demo out/demo/control

test: .venv/ready
	$(BIN)/python -m pytest -q --durations=8 test_model.py

# as many runs at once as there are cores, on one thread each; SEEDS="1 2 3 4 5" for more.
# MORE: a config file behind the variant's; control_X is X behind config/control.py
EVIDENCE ?= out/evidence
SEEDS ?= 1 2
VARIANTS ?= $(CONTROLS) $(basename $(notdir $(wildcard experiments/variants/*.py)))
CONTROLS := control $(addprefix control_,fast length_100 length_200 length_800)
RUNS = $(foreach s,$(SEEDS),$(VARIANTS:%=$(EVIDENCE)/%.$s/done))

evidence: $(EVIDENCE)/pretrained/done
	-OMP_NUM_THREADS=1 $(MAKE) -k -j$$($(BIN)/python -c 'import os; print(os.cpu_count())') $(RUNS)
	$(BIN)/python experiments/report.py $(EVIDENCE) $(EVIDENCE)/evidence.png

$(EVIDENCE)/pretrained/done: | data/stdlib
	rm -rf $(@D) $(EVIDENCE)/standin
	$(BIN)/python experiments/standin.py $(EVIDENCE)/standin
	$(BIN)/python train.py config/demo_pretrain.py --init_from=$(EVIDENCE)/standin \
	    --max_iters=1000 --out_dir=$(@D)
	touch $@

# out/evidence/control_fast.1/done: the run control_fast of seed 1
$(EVIDENCE)/%/done: NAME = $(basename $*)
$(EVIDENCE)/%/done: | $(EVIDENCE)/pretrained/done
	rm -rf $(@D)
	$(BIN)/python train.py $(DEMO) experiments/base.py \
	    $(patsubst %,experiments/variants/%.py,$(filter-out control,$(NAME:control_%=%))) $(MORE) \
	    $(if $(filter control%,$(NAME)),config/control.py) \
	    --seed=$(subst .,,$(suffix $*)) --out_dir=$(@D)
	touch $@

data/stdlib: | .venv/ready
	$(BIN)/python prepare.py stdlib --tokenizer=bytes

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv out data

.PHONY: demo test evidence clean

# make demo: watch a small GPT-2 lose every LayerNorm, in minutes on two CPU cores
# make test: the tests
# make torture: kills a run forty times, times prepare.py against the usual ways on 200 MB (minutes)
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

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv out data

.PHONY: demo test torture clean

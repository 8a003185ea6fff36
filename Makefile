# `make train` and `make test` set up what they need: a virtual environment with the pinned requirements.
PYTHON ?= python3
STAMP := .venv/.installed

.PHONY: train test slow-test clean

train: $(STAMP)
	.venv/bin/torchrun --standalone --nproc-per-node=1 train.py $(ARGS)

test: $(STAMP)
	.venv/bin/python -m pytest $(ARGS)

slow-test: $(STAMP)
	.venv/bin/python -m pytest -m slow $(ARGS)

$(STAMP): requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

clean:
	rm -rf .venv runs

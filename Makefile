# make demo    everything from a fresh clone to a side-by-side run of the bundled model
# make test    lint, types and tests
# make sanitize  the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
#
# PYTHON       the interpreter that builds .venv (3.11 or newer)
# PIP_FLAGS    further options of every pip call, such as the index that holds your build of torch

PYTHON ?= python3
PIP_FLAGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: venv demo check test sanitize clean

venv: .venv/.installed

# The report of a dry run shows a CUDA build of torch before gigabytes of it arrive; torch that is already in
# .venv is left alone.
.venv/.installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard kangaroo/kernels/csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PIP) install $(PIP_FLAGS) --quiet --upgrade "pip>=24"
	@plan=$$($(PIP) install $(PIP_FLAGS) --quiet --dry-run --no-deps --only-binary torch --report - \
		-c constraints.txt torch) || exit 1; \
	case "$$(uname -s) $$plan" in Linux*'"nvidia-'*) \
		echo 'pip would fetch a CUDA build of torch, gigabytes of it. For the CPU build, take the index that'; \
		echo 'the install page of pytorch.org gives: make $(MAKECMDGOALS) PIP_FLAGS="--extra-index-url ..."'; \
		echo 'For a GPU, install torch into .venv yourself, then make again.'; \
		exit 1;; \
	esac >&2
	$(PIP) install $(PIP_FLAGS) --quiet -c constraints.txt -e ".[test]"
	$(BIN)/python -c "import kangaroo.kernels.cpu"
	@touch $@

demo: venv
	$(BIN)/kangaroo demo

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest

# An environment of its own, which finds every other package in .venv. The kernels throw, so libstdc++ must be loaded
# beside the sanitiser.
ASAN := build/asan-env
sanitize: venv
	test -d $(ASAN) || $(BIN)/python -m venv --without-pip $(ASAN)
	$(PIP) --python $(ASAN)/bin/python install $(PIP_FLAGS) --quiet --no-deps -c constraints.txt \
		-C build-dir=build/asan -C cmake.define.KANGAROO_SANITIZE=ON -e .
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(ASAN)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages.pth
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 OMP_NUM_THREADS=1 \
		$(ASAN)/bin/python -m pytest -q -p no:cacheprovider tests/kernels tests/model/test_packed.py \
		tests/drafters/test_kangaroo.py

clean:
	rm -rf .venv dist build/asan build/asan-env build/cp* *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kangaroo tests recipes -name __pycache__ -type d -prune -exec rm -rf {} +

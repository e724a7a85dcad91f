.PHONY: demo demo-smollm quick quick-with-torch quick-without-torch quick-that-wait test long lint docs mini audit sbom setup browser clean

PY := .venv/bin/python
# Empty counts as unset: without bytecode files every import of torch and vLLM takes two to three times as long.
export PYTHONDONTWRITEBYTECODE :=

# The tiny world and three self-play rounds on it. Called again, it prints what came of it.
demo: setup
	$(PY) scripts/make_tiny.py
	$(PY) scripts/round.py --config configs/tiny.yaml --rounds 3 --report

# A real language model: SmolLM2-135M-Instruct on two cores, then its answers before and after. About an hour.
# A processor that does not compute in bfloat16 is faster in float32.
FLOAT32 := $(if $(shell grep -m 1 bf16 /proc/cpuinfo),,--set policy.dtype=float32 --set train.bf16=false)
demo-smollm: setup
	$(PY) scripts/get_smollm2.py
	$(PY) scripts/round.py --config configs/smollm2.yaml $(FLOAT32) --rounds 3 --report
	$(PY) scripts/compare_answers.py runs/smollm2

# The tests that need no engine and no service. Three processes share them by packages, so that one of them alone imports torch,
# and that one of them, which waits for servers and children more than it computes, leaves both cores to the others.
quick: setup
	@$(MAKE) --no-print-directory --jobs=3 --output-sync=target quick-with-torch quick-without-torch quick-that-wait

WITH_TORCH := $(addprefix tests/,checks evaluation generation methods models prompts publishing training worlds \
	reward/test_reward_chat.py reward/test_reward_models.py storage/test_policies.py test_docs_rewards.py)
THAT_WAIT := $(addprefix tests/,cluster processes reward scripts)
QUICK := -m pytest -m "not slow and not service and not gpu"

quick-with-torch:
	$(PY) $(QUICK) $(WITH_TORCH)

quick-without-torch:
	$(PY) $(QUICK) $(addprefix --ignore=,$(WITH_TORCH) $(THAT_WAIT))

quick-that-wait:
	$(PY) $(QUICK) $(THAT_WAIT) $(addprefix --ignore=,$(WITH_TORCH))

# Lint, types and all tests. Four test files at a time keep two cores busy: tests wait for processes and for each other half the time.
test: setup
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint mini browser
	$(PY) -m pytest -n 4 --dist loadfile --no-loadscope-reorder -m "not long"

# What takes minutes: storms of kills, of processes and of nodes, an engine core that is killed, and the whole kit for a GPU in miniature.
long: setup mini
	$(PY) -m pytest -m long

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The reference of the settings is made from the schema; a test fails while it is out of date.
docs: setup
	$(PY) -m selfplay.config.document > docs/configuration.md

mini: setup
	$(PY) scripts/make_tiny.py --size mini --out .cache/tiny-mini

# Known weaknesses of the pinned versions. pip-audit asks its service for them, so it needs a network that reaches it.
audit:
	@command -v pip-audit > /dev/null || { echo "pip-audit is not on the PATH: install it in an environment of its own" >&2; exit 2; }
	pip-audit --requirement constraints.txt --no-deps --disable-pip

# What a release consists of: every package with version and license, as CycloneDX.
sbom: setup
	$(PY) scripts/sbom.py --out dist/selfplay.cdx.json

setup: .venv/.ready

browser:
	@scripts/setup.sh browser

.venv/.ready: pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh

clean:
	rm -rf .venv .cache runs

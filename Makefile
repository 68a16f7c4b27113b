# Every routine of the project by one name. `make` lists them.

PREFIX ?= /usr/local
DESTDIR ?=
# Arguments for the demo and the benchmarks, for example ARGS="--output json".
ARGS ?=
# Part of the names of the tests to run, for example `make test-faults TEST=a_full_disk`.
TEST ?=

CARGO := cargo
TESTBED := $(CARGO) run --quiet --release --bin testbed --
PROGRAMS := containerd-shim-godwit-v1 godwit-snapshotter godwit
# Always the whole workspace: with fewer crates the dependencies would have other features, and be
# built again.
CARGO_TEST := $(CARGO) test --release --workspace --locked
# Suites of a crate of its own, which need no test nodes.
LIGHT_SUITES := $(sort $(basename $(notdir $(wildcard criu-wrapper/tests/*.rs shim/tests/*.rs snapshotter/tests/*.rs))))
SUITES := $(sort $(basename $(notdir $(wildcard tests/tests/*.rs))))
# Suites that choose their containerd by the environment.
BOTH_CONTAINERDS := cri docker pull shim snapshots snapshotter
# Suites that compare times, and so want the machine for themselves.
ALONE := cooperation nodes
# The others, the longest first.
SIDE_BY_SIDE := $(filter-out $(ALONE),$(SUITES)) $(BOTH_CONTAINERDS:%=%-containerd-2)
# How many of them run at a time.
TEST_JOBS ?= 2
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)

.DEFAULT_GOAL := help
.PHONY: help prerequisites build demo test unit lint bench bench-peers bench-shim bench-snapshotter faults sim test-vm doc install clean clean-nodes require-root

# Seconds that each suite usually takes on 2 processors, the longest beside another one; shown by
# `make help`.
SECONDS_OF := caching=100 check=10 cooperation=165 crash=62 cri=48 directory=40 docker=60 faults=450 \
	holds=80 ledger=110 migration=40 moves=90 nodes=60 ownership=190 pull=103 quickstart=40 shim=94 \
	siblings=28 sim=5 \
	snapshots=13 snapshotter=10 soak=38 text=2 volumes=45

help: ## list the targets and the suites
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18
	@echo
	@echo 'Suites: `make test-SUITE`, with TEST=name for the tests whose names have that part.'
	@echo 'Those marked 2 run under containerd 2 by `make test-SUITE-containerd-2`.'
	@for suite in $(SUITES); do \
		seconds=; for one in $(SECONDS_OF); do [ "$${one%=*}" != $$suite ] || seconds=$${one#*=}; done; \
		second=; case " $(BOTH_CONTAINERDS) " in *" $$suite "*) second=2 ;; esac; \
		printf '  %-12s %1s %4s s  %s\n' $$suite "$$second" "$${seconds:-?}" \
			"$$(sed -n '1{s|^//! ||;s|[:.;].*||;p}' tests/tests/$$suite.rs)"; \
	done

prerequisites: ## install the Debian packages that are missing on this host
	@tests/prerequisites.sh

build: prerequisites ## build all programs (release)
	$(CARGO) build --release --workspace --locked

demo: require-root build ## migrate a running redis between two test nodes, and show it
	$(TARGET_DIR)/release/demo $(ARGS)

# Suites wait for the nodes most of the time, so two of them share the processors. The output of
# each is printed when it has ended. Those that compare times come last, one at a time.
test: require-root unit ## run every test; needs root
	@begin=$$(date +%s); \
	$(CARGO_TEST) --no-run || exit 1; \
	echo "suites are built: $$(($$(date +%s) - begin)) s"
	@$(MAKE) --no-print-directory --jobs=$(TEST_JOBS) --output-sync=target $(SIDE_BY_SIDE:%=test-%)
	@$(MAKE) --no-print-directory $(ALONE:%=test-%)

unit: build
	@begin=$$(date +%s); \
	$(CARGO_TEST) --lib --bins $(LIGHT_SUITES:%=--test %) || exit 1; \
	echo "suite unit: $$(($$(date +%s) - begin)) s"

# One suite, for example `make test-nodes`. One test at a time: each has the machine to itself.
test-%: require-root build
	@begin=$$(date +%s); \
	$(CARGO_TEST) --test $* -- --test-threads=1 $(TEST) || exit 1; \
	echo "suite $*: $$(($$(date +%s) - begin)) s"

# A suite under the other generation of containerd, for example `make test-shim-containerd-2`.
test-%-containerd-2: require-root build
	@begin=$$(date +%s); \
	GODWIT_CONTAINERD=2 $(CARGO_TEST) --test $* -- --test-threads=1 $(TEST) || exit 1; \
	echo "suite $*-containerd-2: $$(($$(date +%s) - begin)) s"

# Under Debian's kernel, with cgroups of version 2 alone; ten times slower, so by default what
# depends on them.
VM_SUITE ?= shim
VM_TESTS ?= metrics memory update pause events checkpoint
test-vm: require-root build ## run tests of a suite (VM_SUITE, VM_TESTS) in a virtual machine; not part of test
	@tests/prerequisites.sh qemu-system-x86 e2fsprogs
	env CARGO_TARGET_$$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')_RUNNER=$(abspath $(TARGET_DIR))/release/vm \
		$(CARGO_TEST) --test $(VM_SUITE) -- --test-threads=1 $(VM_TESTS)

# The spelling checker comes as a wheel from PyPI: building it would take minutes.
TYPOS_VERSION := 1.52.0
TYPOS := $(TARGET_DIR)/tools/typos-$(TYPOS_VERSION)/bin/typos

$(TYPOS):
	@command -v pip3 > /dev/null || tests/prerequisites.sh python3-pip
	pip3 install --quiet --root-user-action=ignore --target $(TARGET_DIR)/tools/typos-$(TYPOS_VERSION) typos==$(TYPOS_VERSION)

lint: prerequisites $(TYPOS) ## check formatting, lints, spelling, words, links and licences
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(TYPOS)
	$(CARGO_TEST) --test text

bench: require-root build ## measure migrations between test nodes
	@tests/prerequisites.sh rsync
	$(TARGET_DIR)/release/bench $(ARGS)

bench-peers: require-root build ## measure what neighbours cost that are of no use
	$(TARGET_DIR)/release/bench-peers $(ARGS)

bench-shim: require-root build ## measure the shim beside containerd's own
	$(TARGET_DIR)/release/bench-shim $(ARGS)

bench-snapshotter: require-root build ## measure the snapshotter beside containerd's overlayfs
	$(TARGET_DIR)/release/bench-snapshotter $(ARGS)

# Outcomes are counted in target/faults/report.json.
SEED ?= 0
RUNS ?= 20
faults: require-root build ## migrate a ledger under faults (SEED, RUNS) and judge what came of it
	$(TARGET_DIR)/release/faults --seed $(SEED) --runs $(RUNS) $(ARGS)

sim: build ## simulate large sites under several policies
	$(TARGET_DIR)/release/sim $(ARGS)

doc: prerequisites ## build the API documentation
	RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" $(CARGO) doc --workspace --no-deps --document-private-items --locked

install: ## install programs, systemd unit and examples (DESTDIR, PREFIX); build first
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/systemd/system
	install -m 755 $(PROGRAMS:%=$(TARGET_DIR)/release/%) $(DESTDIR)$(PREFIX)/bin
	sed 's|/usr/local/bin|$(PREFIX)/bin|' docs/deploy/godwit-snapshotter.service \
		> $(DESTDIR)$(PREFIX)/lib/systemd/system/godwit-snapshotter.service
	install -d $(DESTDIR)$(PREFIX)/share/godwit/containerd
	install -m 644 docs/deploy/godwit.toml docs/deploy/runtimeclass.yaml \
		$(DESTDIR)$(PREFIX)/share/godwit
	install -m 644 docs/deploy/containerd/godwit.toml $(DESTDIR)$(PREFIX)/share/godwit/containerd

clean: ## remove everything that was built, test nodes included
	@if [ -x $(TARGET_DIR)/release/testbed ]; then $(TARGET_DIR)/release/testbed clean; fi
	$(CARGO) clean

clean-nodes: ## remove test nodes that a killed run left
	$(TESTBED) clean

require-root:
	@[ "$$(id -u)" = 0 ] || { echo "test nodes need root: run this as root (sudo make ...)" >&2; exit 1; }

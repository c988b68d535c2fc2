# Entry points; each installs by itself what it needs.
#
#   make demo    a node, a primary, load, and a byte-for-byte proof (EXIT=1: stop afterwards)
#   make test    everything that must hold: format, lints, unit, simulation, real PostgreSQL
#   make bench   figures, as ratios to a baseline of the same run
#   make soak    the long runs
#   make fuzz    searches with cargo-fuzz (TARGET=..., SECONDS=...); needs a nightly compiler

SEEDS ?= 100000
MUTATIONS ?= 100000
TARGET ?= layer_index
SECONDS ?= 60
WALREDO_DIR := target/walredo
WALREDO := $(WALREDO_DIR)/neon_walredo.so

.PHONY: deps walredo build release demo test bench soak fuzz fmt lint

deps:
	@scripts/install-deps.sh

# Objects stay out of the source tree.
walredo: deps
	@mkdir -p $(WALREDO_DIR)
	@$(MAKE) --no-print-directory -s -C $(WALREDO_DIR) \
		-f $(CURDIR)/pgxn/neon_walredo/Makefile \
		PG_CONFIG=/usr/lib/postgresql/15/bin/pg_config VPATH=$(CURDIR)/pgxn/neon_walredo

build: walredo
	cargo build --locked

release: walredo
	cargo build --locked --release

demo: release
	target/release/pgstrata demo $(if $(EXIT),--exit)

fmt:
	cargo fmt --check

lint: deps
	cargo clippy --locked --all-targets -- -D warnings

test: fmt lint build
	cargo test --locked
	@echo 'the benches, at sizes that only show that they run'
	PGSTRATA_BENCH_QUICK=1 cargo bench --locked --profile dev

bench: release
	cargo bench --locked

soak: build
	target/debug/pgstrata simulate --seeds $(SEEDS)
	target/debug/pgstrata simulate --crash-points --seeds 2
	LAYER_MUTATIONS=$(MUTATIONS) cargo test --locked --release --lib \
		damage_is_always_detected_and_never_served -- --nocapture
	FUZZ_RUNS=$(MUTATIONS) cargo test --locked --release --test fuzz_corpus -- --nocapture
	target/debug/pgstrata redo compare --scale 20 --transactions 250000 --size 3
	target/debug/pgstrata redo compare --scale 20 --transactions 50000 --size 2 \
		--data-checksums --set full_page_writes=off

# What it finds is added to test_data/fuzz, where every run of the tests tries it again.
fuzz:
	mkdir -p fuzz/corpus/$(TARGET)
	cargo +nightly fuzz run $(TARGET) fuzz/corpus/$(TARGET) test_data/fuzz/$(TARGET) \
		-- -max_total_time=$(SECONDS)

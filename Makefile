# Entry points; each installs by itself what it needs.
#
#   make demo    a node, a primary, load, and a byte-for-byte proof (EXIT=1: stop afterwards)
#   make test    everything that must hold: format, lints, unit, simulation, real PostgreSQL
#   make bench   figures, as ratios to a baseline of the same run
#   make soak    the long runs
#   make fuzz    searches with cargo-fuzz (TARGET=..., SECONDS=...)

SEEDS ?= 100000
STORIES ?= 2000
MUTATIONS ?= 100000
KILLS ?= 60
KILL_SECONDS ?= 600
TRANSACTIONS ?= 150000
ORDERS ?= 50000
MESSAGES ?= 1000000
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

# docs/hacking.md says what each step is. The comparisons must come to more than 10 million records
# together: each transaction of pgbench makes 7 or 8 that change pages, each of the warehouses' 39,
# of which 7 and 30 are asked for, four clients each.
soak: release
	target/release/pgstrata simulate --seeds $(SEEDS)
	target/release/pgstrata simulate --crash-points --seeds 2
	PGSTRATA_STORIES=$(STORIES) cargo test --locked --release --lib -- sim::branch_tests \
		sim::branch_compaction_tests sim::copy_tests sim::gc_tests sim::idle_tests \
		sim::incident_tests sim::journal_tests sim::check_tests
	LAYER_MUTATIONS=$(MUTATIONS) cargo test --locked --release --lib \
		damage_is_always_detected_and_never_served -- --nocapture
	FUZZ_RUNS=$(MUTATIONS) cargo test --locked --release --test fuzz_corpus -- --nocapture
	HOSTILE_MESSAGES=$(MESSAGES) cargo test --locked --release --test hostile -- --nocapture
	target/release/pgstrata demo --exit --scale 10 --seconds $(KILL_SECONDS) --kill $(KILLS) \
		-c checkpoint_distance_bytes=2000000 -c image_layer_bytes=4000000 \
		-c compaction_target_bytes=4000000 \
		-c gc_horizon_bytes=1000000 -c pitr_interval_s=0 -c gc_period_s=1
	target/release/pgstrata redo compare --scale 20 --transactions $(TRANSACTIONS) \
		--warehouses 4 --orders $(ORDERS) --rounds 4 --size 3 \
		--at-least $$((28 * $(TRANSACTIONS) + 120 * $(ORDERS)))
	target/release/pgstrata redo compare --scale 20 --transactions 50000 \
		--warehouses 4 --orders 10000 --rounds 2 --size 2 \
		--data-checksums --set full_page_writes=off --at-least 2600000

# What it finds is added to test_data/fuzz, where every run of the tests tries it again. Without a
# sanitizer it works with the stable compiler; the code is safe Rust, so panics are what is looked
# for.
fuzz: deps
	@command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
	@mkdir -p fuzz/corpus/$(TARGET)
	cargo fuzz run --sanitizer none --target-dir target/fuzz $(TARGET) \
		fuzz/corpus/$(TARGET) test_data/fuzz/$(TARGET) -- \
		-max_total_time=$(SECONDS) -timeout=10 -rss_limit_mb=4096

# Entry points; each installs by itself what it needs.
#
#   make demo    a node, a primary, load, and a byte-for-byte proof (EXIT=1: stop afterwards)
#   make test    everything that must hold: format, lints, unit, simulation, real PostgreSQL
#   make bench   figures, as ratios to a baseline of the same run
#   make soak    the long runs

SEEDS ?= 20000
WALREDO_DIR := target/walredo
WALREDO := $(WALREDO_DIR)/neon_walredo.so

.PHONY: deps walredo build release demo test bench soak fmt lint

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

bench: release
	cargo bench --locked

soak: build
	target/debug/pgstrata simulate --seeds $(SEEDS)
	target/debug/pgstrata redo compare --scale 20 --transactions 250000 --size 3
	target/debug/pgstrata redo compare --scale 20 --transactions 50000 --size 2 \
		--data-checksums --set full_page_writes=off

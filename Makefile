# make demo    shows the main job on a real libvirt, QEMU, OVMF and swtpm (root; installs what it needs)
# make test    everything: unit tests and stories on the real stack (root; installs what it needs)
# make test-providers   what every key provider must do, against the real ones; a line per provider and case (root)
# make fuzz             random inputs for everything that reads what others wrote; FUZZ_CASES=20000 FUZZ_RUNS=1000000
# make soak             kills, full disks and collisions, again and again; SOAK_ROUNDS=10 (root)
# make test-matrix      all tests on Debian 12 and 13, each in a fresh root (root)
# make test-systemd     the package on a host that systemd booted: units, sandbox, devices, watchdog, a sealed VM (root)
# make bench   the figures, as ratios against a peer in the same run (root)
# make test-programs    whether a fresh Debian root has every program that scripts and tests run (root)
# make lint    formatting, clippy, documentation
# make install, deb, test-deb, rpm, test-rpm: packaging/package.mk

.PHONY: demo test test-providers test-programs test-matrix test-systemd fuzz soak bench lint deps

CARGO ?= cargo
include packaging/package.mk

demo:
	tests/host/install-deps demo
	$(CARGO) build --locked --release --workspace --bins
	$(CARGO) run --locked --release --quiet --package virtseal-e2e --bin virtseal-demo

test: deps
	CARGO="$(CARGO)" tests/run

test-providers: deps
	CARGO="$(CARGO)" tests/run-providers

test-programs:
	tests/host/check-programs

test-matrix:
	tests/run-matrix

test-systemd:
	CARGO="$(CARGO)" PROFILE="$(PROFILE)" tests/run-systemd

fuzz: deps
	CARGO="$(CARGO)" tests/run-fuzz

soak: deps
	CARGO="$(CARGO)" tests/run-soak

bench: deps
	$(CARGO) build --locked --release --workspace --bins
	$(CARGO) run --locked --release --quiet --package virtseal-e2e --bin virtseal-bench

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps --document-private-items

# What building, testing and the demo need, by apt (root; Debian 12 or 13). VIRTSEAL_STACK=stable|backports picks the
# pair of libvirt and QEMU.
deps:
	tests/host/install-deps

.PHONY: deps

# What building, testing and the demo need, by apt (root; Debian 12 or 13). VIRTSEAL_STACK=stable|backports picks the pair.
deps:
	tests/host/install-deps

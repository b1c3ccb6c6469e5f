# Installing and packaging. The top-level Makefile includes this; it works alone too: make -f packaging/package.mk deb
#
#   make install [DESTDIR=…] [PREFIX=/usr] [SYSCONFDIR=/etc] [PROFILE=release|dev]
#   make deb     [PROFILE=…]      target/deb/virtseal_VERSION_ARCH.deb
#   make test-deb [PROFILE=…]     installs that package into a fresh Debian root and removes it again (root)

CARGO ?= cargo
PROFILE ?= release
PREFIX ?= /usr
SYSCONFDIR ?= /etc
BINDIR ?= $(PREFIX)/bin
SBINDIR ?= $(PREFIX)/sbin
UNITDIR ?= $(PREFIX)/lib/systemd/system
SYSUSERSDIR ?= $(PREFIX)/lib/sysusers.d
DOCDIR ?= $(PREFIX)/share/doc/virtseal
# Where libvirt looks, wherever virtseal itself goes.
HOOKDIR ?= /etc/libvirt/hooks/qemu.d

PACKAGING := $(patsubst %/,%,$(dir $(lastword $(MAKEFILE_LIST))))
PACKAGED_BINARIES := $(or $(CARGO_TARGET_DIR),target)/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
PACKAGED_DOCS = $(wildcard README.md SECURITY.md ARCHITECTURE.md CHANGELOG.md)

.PHONY: install deb test-deb packaged-binaries

packaged-binaries:
	$(CARGO) build --locked --profile $(PROFILE) --workspace --bins

# The hook is a symbolic link to a program in BINDIR: packaging/README.md says why. An existing configuration is kept.
install: packaged-binaries
	install -d -m 0755 $(DESTDIR)$(BINDIR) $(DESTDIR)$(SBINDIR) $(DESTDIR)$(HOOKDIR) $(DESTDIR)$(SYSCONFDIR)/virtseal
	install -d -m 0755 $(DESTDIR)$(UNITDIR) $(DESTDIR)$(SYSUSERSDIR) $(DESTDIR)$(DOCDIR)/examples
	install -m 0755 $(PACKAGED_BINARIES)/virtseal $(PACKAGED_BINARIES)/virtseal-hook $(DESTDIR)$(BINDIR)/
	install -m 0755 $(PACKAGED_BINARIES)/virtseald $(DESTDIR)$(SBINDIR)/
	ln -sfn $(BINDIR)/virtseal-hook $(DESTDIR)$(HOOKDIR)/virtseal
	for file in virtseald.yaml hook.conf; do \
	  test -e $(DESTDIR)$(SYSCONFDIR)/virtseal/$$file || \
	  install -m 0644 $(PACKAGING)/config/$$file $(DESTDIR)$(SYSCONFDIR)/virtseal/ || exit 1; \
	done
	sed -e 's|@SBINDIR@|$(SBINDIR)|' -e 's|@SYSCONFDIR@|$(SYSCONFDIR)|' $(PACKAGING)/systemd/virtseald.service.in \
	  > $(DESTDIR)$(UNITDIR)/virtseald.service
	chmod 0644 $(DESTDIR)$(UNITDIR)/virtseald.service
	install -m 0644 $(PACKAGING)/systemd/virtseald.socket $(PACKAGING)/systemd/virtseald-hook.socket $(DESTDIR)$(UNITDIR)/
	install -m 0644 $(PACKAGING)/systemd/sysusers.conf $(DESTDIR)$(SYSUSERSDIR)/virtseal.conf
	install -m 0644 LICENSE $(PACKAGED_DOCS) $(PACKAGING)/doc/INSTALLED.md $(DESTDIR)$(DOCDIR)/
	install -m 0644 $(PACKAGING)/doc/apparmor-libvirtd.local $(PACKAGING)/doc/unlock-at-boot.conf \
	  $(DESTDIR)$(DOCDIR)/examples/
	@test -n "$(DESTDIR)" || echo "Installed. Next: $(DOCDIR)/INSTALLED.md, 'By hand'."

deb:
	CARGO="$(CARGO)" PROFILE="$(PROFILE)" $(PACKAGING)/deb/build

test-deb:
	CARGO="$(CARGO)" PROFILE="$(PROFILE)" $(PACKAGING)/test-deb

# Installing and packaging. The top-level Makefile includes this; it works alone too: make -f packaging/package.mk deb
#
#   make install [DESTDIR=…] [PREFIX=/usr] [SYSCONFDIR=/etc] [PROFILE=release|dev]
#   make deb     [PROFILE=…]      target/deb/virtseal_VERSION_ARCH.deb
#   make rpm     [PROFILE=…]      target/rpmbuild/virtseal-VERSION.ARCH.rpm
#   make test-deb [PROFILE=…]     installs that package into fresh roots of Debian 12 and 13 and removes it again (root)
#   make test-rpm [PROFILE=…]     the same with rpm --root (root)

CARGO ?= cargo
PROFILE ?= release
PREFIX ?= /usr
SYSCONFDIR ?= /etc
BINDIR ?= $(PREFIX)/bin
SBINDIR ?= $(PREFIX)/sbin
UNITDIR ?= $(PREFIX)/lib/systemd/system
SYSUSERSDIR ?= $(PREFIX)/lib/sysusers.d
DOCDIR ?= $(PREFIX)/share/doc/virtseal
MANDIR ?= $(PREFIX)/share/man
BASHCOMPDIR ?= $(PREFIX)/share/bash-completion/completions
ZSHCOMPDIR ?= $(PREFIX)/share/zsh/site-functions
FISHCOMPDIR ?= $(PREFIX)/share/fish/vendor_completions.d
# Where libvirt looks, wherever virtseal itself goes.
HOOKDIR ?= /etc/libvirt/hooks/qemu.d
DAEMON_HOOKDIR ?= /etc/libvirt/hooks/daemon.d

PACKAGING := $(patsubst %/,%,$(dir $(lastword $(MAKEFILE_LIST))))
PACKAGED_BINARIES := $(or $(CARGO_TARGET_DIR),target)/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
PACKAGED_DOCS = README.md SECURITY.md ARCHITECTURE.md CHANGELOG.md CONTRIBUTING.md $(shell find docs -name '*.md' -o -name '*.json')
# What the program virtseal-manual has written: man pages and completions.
MANUAL = $(PACKAGED_BINARIES)/manual

.PHONY: install install-files deb rpm test-deb test-rpm packaged-binaries

packaged-binaries:
	$(CARGO) build --locked --profile $(PROFILE) --workspace --bins

install: packaged-binaries
	$(MAKE) -f $(PACKAGING)/package.mk install-files

# For packages whose tools have built the programs. The hook is a symbolic link to a program in BINDIR: packaging/README.md says why.
# An existing configuration is kept.
install-files:
	install -d -m 0755 $(DESTDIR)$(BINDIR) $(DESTDIR)$(SBINDIR) $(DESTDIR)$(HOOKDIR) $(DESTDIR)$(DAEMON_HOOKDIR)
	install -d -m 0755 $(DESTDIR)$(SYSCONFDIR)/virtseal
	install -d -m 0755 $(DESTDIR)$(UNITDIR) $(DESTDIR)$(SYSUSERSDIR) $(DESTDIR)$(DOCDIR)/examples
	install -d -m 0755 $(addprefix $(DESTDIR)$(MANDIR)/man,1 5 8)
	install -d -m 0755 $(DESTDIR)$(BASHCOMPDIR) $(DESTDIR)$(ZSHCOMPDIR) $(DESTDIR)$(FISHCOMPDIR)
	install -m 0755 $(PACKAGED_BINARIES)/virtseal $(PACKAGED_BINARIES)/virtseal-hook $(DESTDIR)$(BINDIR)/
	install -m 0755 $(PACKAGED_BINARIES)/virtseald $(DESTDIR)$(SBINDIR)/
	ln -sfn $(BINDIR)/virtseal-hook $(DESTDIR)$(HOOKDIR)/virtseal
	ln -sfn $(BINDIR)/virtseal-hook $(DESTDIR)$(DAEMON_HOOKDIR)/virtseal
	for file in virtseald.yaml hook.conf; do \
	  test -e $(DESTDIR)$(SYSCONFDIR)/virtseal/$$file || \
	  install -m 0644 $(PACKAGING)/config/$$file $(DESTDIR)$(SYSCONFDIR)/virtseal/ || exit 1; \
	done
	sed -e 's|@SBINDIR@|$(SBINDIR)|' -e 's|@SYSCONFDIR@|$(SYSCONFDIR)|' $(PACKAGING)/systemd/virtseald.service.in \
	  > $(DESTDIR)$(UNITDIR)/virtseald.service
	chmod 0644 $(DESTDIR)$(UNITDIR)/virtseald.service
	install -m 0644 $(PACKAGING)/systemd/virtseald.socket $(PACKAGING)/systemd/virtseald-hook.socket $(DESTDIR)$(UNITDIR)/
	install -m 0644 $(PACKAGING)/systemd/sysusers.conf $(DESTDIR)$(SYSUSERSDIR)/virtseal.conf
	rm -rf $(MANUAL)
	$(PACKAGED_BINARIES)/virtseal-manual $(MANUAL)
	install -m 0644 $(MANUAL)/*.1 $(DESTDIR)$(MANDIR)/man1/
	install -m 0644 $(PACKAGING)/manual/*.5 $(DESTDIR)$(MANDIR)/man5/
	install -m 0644 $(PACKAGING)/manual/*.8 $(DESTDIR)$(MANDIR)/man8/
	install -m 0644 $(MANUAL)/virtseal.bash $(DESTDIR)$(BASHCOMPDIR)/virtseal
	install -m 0644 $(MANUAL)/_virtseal $(DESTDIR)$(ZSHCOMPDIR)/
	install -m 0644 $(MANUAL)/virtseal.fish $(DESTDIR)$(FISHCOMPDIR)/
	for page in $(PACKAGED_DOCS); do install -D -m 0644 $$page $(DESTDIR)$(DOCDIR)/$$page || exit 1; done
	install -m 0644 LICENSE $(PACKAGING)/doc/INSTALLED.md $(DESTDIR)$(DOCDIR)/
	install -m 0644 $(PACKAGING)/doc/apparmor-libvirtd.local $(PACKAGING)/doc/unlock-at-boot.conf \
	  $(DESTDIR)$(DOCDIR)/examples/
	@test -n "$(DESTDIR)" || echo "Installed. Next: $(DOCDIR)/INSTALLED.md, 'By hand'."

deb:
	CARGO="$(CARGO)" PROFILE="$(PROFILE)" $(PACKAGING)/deb/build

rpm:
	CARGO="$(CARGO)" PROFILE="$(PROFILE)" $(PACKAGING)/rpm/build

test-deb:
	CARGO="$(CARGO)" PROFILE="$(PROFILE)" $(PACKAGING)/test-deb

test-rpm:
	CARGO="$(CARGO)" PROFILE="$(PROFILE)" $(PACKAGING)/test-rpm

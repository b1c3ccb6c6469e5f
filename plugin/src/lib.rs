//! VM encryption for plain libvirt/QEMU hosts.

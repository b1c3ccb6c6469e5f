//! The only module that talks to libvirt.

//! The stage for stories against a real libvirt.

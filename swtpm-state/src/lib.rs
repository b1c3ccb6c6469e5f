//! Reads the state files of swtpm.

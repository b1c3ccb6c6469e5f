//! Reads `virtseald.yaml`.

//! temporary
#![allow(missing_docs)]
use std::path::{Path, PathBuf};
#[derive(Debug)]
pub struct Audit(PathBuf);
pub struct Verified {
    pub records: u64,
}
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct AuditError;
impl Audit {
    pub fn open(dir: &Path) -> Result<Self, AuditError> {
        Ok(Self(dir.join("audit.log")))
    }
    pub fn path(&self) -> &Path {
        &self.0
    }
    pub fn flush(&self) -> Result<(), AuditError> {
        Ok(())
    }
}
pub fn verify(_: &Path) -> Result<Verified, AuditError> {
    Ok(Verified { records: 0 })
}

//! A failure inside a query, and what it is called outside of SQLite.

use std::path::Path;

use rusqlite::ErrorCode;

use crate::model::problem::chain;
use crate::store::error::StoreError;

/// A failure inside a query, before it is known which file it is about.
#[derive(Debug)]
pub(crate) enum StoreFault {
    Sqlite(rusqlite::Error),
    Refused(StoreError),
}

impl From<rusqlite::Error> for StoreFault {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

impl From<StoreError> for StoreFault {
    fn from(error: StoreError) -> Self {
        Self::Refused(error)
    }
}

impl StoreFault {
    /// What is wrong with the row that was read, if it is the row.
    ///
    /// # Errors
    /// Itself, when it is the file.
    pub(crate) fn of_row(self) -> Result<String, Self> {
        match &self {
            Self::Refused(StoreError::DamagedRecord { source, .. }) => Ok(chain(source)),
            Self::Refused(StoreError::Inconsistent { why, .. }) => Ok(why.clone()),
            Self::Sqlite(
                error @ (rusqlite::Error::FromSqlConversionFailure(..)
                | rusqlite::Error::IntegralValueOutOfRange(..)
                | rusqlite::Error::Utf8Error(..)
                | rusqlite::Error::InvalidColumnType(..)),
            ) => Ok(error.to_string()),
            _ => Err(self),
        }
    }

    pub(crate) fn at(self, path: &Path) -> StoreError {
        match self {
            Self::Refused(error) => error,
            Self::Sqlite(error) => of_file(path, error),
        }
    }
}

fn of_file(path: &Path, error: rusqlite::Error) -> StoreError {
    let (path, code) = (path.to_owned(), error.sqlite_error_code());
    let source = error.into();
    match code {
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => StoreError::Damaged { path, source },
        Some(ErrorCode::DiskFull) => StoreError::DiskFull { path, source },
        Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
            StoreError::ReadOnly { path, source }
        }
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Busy { path, source },
        _ => StoreError::Backend { path, source },
    }
}

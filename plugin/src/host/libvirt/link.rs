//! One connection, reopened as needed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use virt::connect::Connect;

use super::{LibvirtError, Untold};

#[derive(Debug)]
pub(super) struct Link {
    uri: String,
    connection: Mutex<Option<Connect>>,
    opened: AtomicU64,
}

impl Link {
    /// Does not connect yet.
    pub(super) fn new(uri: &str) -> Self {
        virt::error::clear_error_callback();
        Self {
            uri: uri.into(),
            connection: Mutex::new(None),
            opened: AtomicU64::new(0),
        }
    }

    pub(super) fn uri(&self) -> &str {
        &self.uri
    }

    /// How often it was connected.
    pub(super) fn opened(&self) -> u64 {
        self.opened.load(Ordering::SeqCst)
    }

    /// Connects unless the connection stands.
    pub(super) fn connect(&self) -> Result<(), LibvirtError> {
        let mut guard = self.lock();
        if guard
            .as_ref()
            .is_some_and(|connection| connection.is_alive().unwrap_or(false))
        {
            return Ok(());
        }
        *guard = None;
        *guard = Some(Connect::open(Some(&self.uri)).map_err(|source| self.error("connect", source))?);
        self.opened.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Whether the connection stands, without waiting for anything.
    pub(super) fn is_connected(&self) -> bool {
        let guard = match self.connection.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        guard
            .as_ref()
            .is_some_and(|connection| connection.is_alive().unwrap_or(false))
    }

    /// Runs `call`, once more on a new connection when the old one turns out to be dead. All calls made through
    /// here may be repeated.
    pub(super) fn with<T>(
        &self,
        what: &'static str,
        call: impl Fn(&Connect) -> Result<T, virt::error::Error>,
    ) -> Result<T, LibvirtError> {
        self.connect()?;
        let connection = self.lock().clone();
        let first = match connection.as_ref().map(&call) {
            Some(Ok(value)) => return Ok(value),
            Some(Err(error)) => error,
            None => virt::error::Error::last_error(),
        };
        if connection.is_some_and(|connection| connection.is_alive().unwrap_or(false)) {
            return Err(self.error(what, first));
        }
        self.connect()?;
        let connection = self.lock().clone();
        connection
            .as_ref()
            .map_or(Err(first), &call)
            .map_err(|source| self.error(what, source))
    }

    /// The same for a call that may find one VM of which libvirt does not tell all.
    pub(super) fn with_each<T>(
        &self,
        what: &'static str,
        call: impl Fn(&Connect) -> Result<Result<T, Untold>, virt::error::Error>,
    ) -> Result<T, LibvirtError> {
        self.with(what, call)?.map_err(|untold| LibvirtError::Untold {
            vm: untold.vm,
            part: untold.part,
            uri: self.uri.clone(),
            message: untold.message,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Connect>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, what: &'static str, source: virt::error::Error) -> LibvirtError {
        LibvirtError::Call {
            what,
            uri: self.uri.clone(),
            message: source.message().to_owned(),
        }
    }
}
